"""The namespace journal's snapshots: the whole tree, walked while it is in use, in parts of a few MiB.

One is taken when there is none, when notes of changes may have been lost (a session that ended without order,
or too many of them), and when the segments since the last one are larger than it is. Notes go on being made and
written meanwhile; what the walk misses or sees twice is in the segments behind the snapshot's beginning. Only
its last part makes it one: whatever a crash leaves of it is passed over by readers, and removed in time.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from tierfs import failpoints, manifest
from tierfs.errors import ObjectArchivedError, ObjectCorruptError, ObjectMissingError
from tierfs.index import Chain, Writer
from tierfs.journal import Journal, new_chain
from tierfs.kit import Kit, is_gone, is_passing
from tierfs.looking import is_settled, line
from tierfs.places import Places, join
from tierfs.spelling import quoted

log = logging.getLogger("journal")

PART = 4 << 20  # compressed bytes
PART_LINES = 100_000
_LEAST = 1 << 20  # bytes of segments that are worth a snapshot
_MOST_SEGMENTS = 5000  # that a reader has to follow
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class _Directory(NamedTuple):
    ino: int
    handle: bytes
    path: bytes


class Snapshots:
    """Used by one thread. `stopping` ends a walk early; it begins anew with the next mover."""

    def __init__(self, kit: Kit, journal: Journal, places: Places, stopping: threading.Event) -> None:
        self._kit = kit
        self._journal = journal
        self._places = places
        self._stopping = stopping
        self._filling = False  # the one that is being taken gives the store what it lacks

    @property
    def due(self) -> bool:
        """One should be taken now."""
        index = self._kit.index
        if not index.surveyed:
            return False
        chain = index.chain()
        if self.lacking or chain is None:
            return True
        return chain.written > max(chain.snapshot, _LEAST) or chain.segments >= _MOST_SEGMENTS

    @property
    def lacking(self) -> bool:
        """Without one the store does not know the tree, whatever segments say. Raises IndexError_."""
        noting, unclean = self._kit.index.noting()
        chain = self._kit.index.chain()
        if chain is None or not noting or chain.unclean != unclean:
            return True
        return self._filling or self._journal.lost_track or self._kit.snapshot_wanted.is_set()

    def is_lost(self) -> bool:
        """The store lacks something of the journal that a reader would need: somebody has removed it.

        By names, and the end of the newest snapshot. Raises StoreError, IndexError_.
        """
        chain = self._kit.index.chain()
        if chain is None:
            return False  # none has been written
        infos = self._kit.store.list(manifest.PREFIX)
        keys = sorted(key for info in infos if (key := manifest.Key.parse(info.key)) is not None)
        groups: dict[tuple[int, int, str], list[manifest.Key]] = {}
        for key in keys:
            if key.part >= 0:
                groups.setdefault(key[:3], []).append(key)
        there = {key.sequence for key in keys if key.part < 0}
        for group in sorted(groups, reverse=True):
            parts = groups[group]
            if [key.part for key in parts] == list(range(len(parts))) and self._is_end(parts[-1]):
                return not there.issuperset(range(group[1] + 1, chain.sequence + 1))
        return True

    def take(self) -> bool:
        """Walk and write; False where it was stopped or overtaken.

        Raises StoreError, BusyError, IndexError_, OSError.
        """
        begun = time.monotonic()
        self._filling = self.lacking
        self._journal.lost_track = False
        self._kit.snapshot_wanted.clear()
        base, unclean, beat = self._kit.index.commit(self._begin).result()
        failpoints.hit(failpoints.SNAPSHOT_BEGUN)
        parts = _Parts(self._journal, base)
        for told in self._walk():
            if parts.add(told) and self._journal.due:
                self._journal.flush()
            if self._stopping.is_set():
                return False
        # Whatever the walk saw of changes made meanwhile is whole with the segments up to here.
        self._journal.flush()
        parts.end(self._journal.chain().sequence)
        failpoints.hit(failpoints.SNAPSHOT_PUT)

        def commit(w: Writer) -> bool:
            chain = w.get_chain()
            if chain is None or not w.meta.noting or chain.root != base.root:
                return False  # notes were dropped meanwhile
            w.set_chain(
                msgspec.structs.replace(chain, written=0, segments=0, snapshot=parts.size, unclean=unclean)
            )
            w.note_snapshot(beat)
            return True

        kept = bool(self._kit.index.commit(commit).result())
        self._filling = self._filling and not kept
        failpoints.hit(failpoints.SNAPSHOT_COMMITTED)
        seconds = time.monotonic() - begun
        log.info("snapshot of %d inodes: %d bytes in %.1f s", parts.lines, parts.size, seconds)
        return kept

    def _begin(self, w: Writer) -> tuple[Chain, int, int]:
        if not w.meta.noting:
            w.begin_notes(True)
        chain = w.get_chain()
        if chain is None:
            chain = new_chain(self._journal.epoch)
            w.set_chain(chain)
        return chain, w.meta.unclean, w.past.beat

    # --- the walk -----------------------------------------------------------------------------------------

    def _walk(self) -> Iterator[manifest.AnyInode]:
        """A line for every name in the tree; a directory's own comes before those in it."""
        tree = self._kit.tree
        root = tree.handle_of(tree.rootfd)
        yield line(self._kit, tree.rootfd, os.fstat(tree.rootfd), root)
        pending = [_Directory(tree.root_ino, root, b"")]
        while pending:
            here = pending.pop()
            fd = self._open(here)
            if fd < 0:
                continue
            try:
                ident = manifest.inode_id(here.handle)
                for text in os.listdir(fd):
                    name = os.fsencode(text)
                    found = self._child(fd, ident, name)
                    if found is not None:
                        told, ino, handle = found
                        yield told
                        if isinstance(told, manifest.Directory):
                            pending.append(_Directory(ino, handle, join(here.path, name)))
            finally:
                os.close(fd)

    def _open(self, directory: _Directory) -> int:
        """A descriptor of a directory, wherever it is by now; -1 where it is gone.

        Raises OSError where it cannot be opened just now: a snapshot without what is in it would be believed.
        """
        tree = self._kit.tree
        if tree.privileged:
            try:
                return tree.open_handle(directory.handle, _LIST)
            except OSError as error:
                if is_passing(error):
                    raise
        # By its handle whatever cannot be read is gone to the kernel; its name tells more.
        fd = self._open_at(directory, directory.path)
        if fd < 0 and not tree.privileged:
            place = self._places.directory(directory.ino)
            fd = self._open_at(directory, place.path) if place is not None else -1
        return fd

    def _open_at(self, directory: _Directory, path: bytes) -> int:
        tree = self._kit.tree
        try:
            fd = os.open(path or b".", _LIST, dir_fd=tree.rootfd)
        except OSError as error:
            if is_passing(error):
                raise
            log.debug("directory %d is not where it was: %s", directory.ino, error)
            if not is_gone(error) and error.errno not in (errno.ELOOP, errno.EACCES):
                what = f"directory {quoted(path)} cannot be read: what is in it is in earlier snapshots only"
                self._kit.troubles.note(f"{what}: {error.strerror}", directory.ino)
            return -1
        if tree.handle_of(fd) == directory.handle:
            return fd
        os.close(fd)
        return -1

    def _child(self, dirfd: int, ident: str, name: bytes) -> tuple[manifest.AnyInode, int, bytes] | None:
        try:
            fd = os.open(name, _LOOK, dir_fd=dirfd)
        except FileNotFoundError:
            return None  # which has a note
        try:
            st = os.fstat(fd)
            if st.st_dev != self._kit.tree.device and stat.S_ISDIR(st.st_mode):
                return None  # something is mounted there
            handle = self._kit.tree.handle_of(fd)
            told = line(self._kit, fd, st, handle, ident, name)
            if not is_settled(self._kit, told, st.st_ino):
                self._kit.index.commit(lambda w: w.note(st.st_ino)).result()
            return told, st.st_ino, handle
        finally:
            os.close(fd)

    # --- what is no longer needed -------------------------------------------------------------------------

    def prune(self) -> int:
        """Remove what precedes the last snapshot older than `keep_versions`, keeping two of them at least. Old
        is what the store's clock and this machine's both say to be: one alone may have jumped.

        Returns how many objects went. Raises StoreError."""
        store, keep = self._kit.store, self._kit.config.kept_seconds
        if self._kit.withheld:
            return 0
        infos = [(key, info) for info in store.list(manifest.PREFIX) if (key := manifest.Key.parse(info.key))]
        now = max((info.modified for _, info in infos), default=0.0)  # by the store's own clock
        lasts = {
            key[:3]: (key, info.modified)
            for key, info in sorted(infos, key=lambda item: item[0])
            if key.part >= 0
        }
        ends = [(key, modified, self._end_of(key)) for key, modified in lasts.values()]
        whole = [(key[:2], modified, end.at / 1e9) for key, modified, end in ends if end is not None]
        old = [place for place, by_store, by_us in whole if min(now - by_store, time.time() - by_us) > keep]
        if len(whole) < 3 or not old:
            return 0
        before = min(max(old), sorted(place for place, _, _ in whole)[-2])
        gone = [str(key) for key, _ in infos if (key.epoch, key.sequence) < before]
        if gone:
            store.delete(gone)
        return len(gone)

    def _is_end(self, key: manifest.Key) -> bool:
        """The last part of a whole snapshot."""
        return self._end_of(key) is not None

    def _end_of(self, key: manifest.Key) -> manifest.End | None:
        """The last line of a whole snapshot, if this is its last part."""
        try:
            end = manifest.unpack(key, self._kit.store.get(str(key))).end
        except (ObjectMissingError, ObjectCorruptError, ObjectArchivedError):
            return None  # also one that a rule of the bucket has put where nothing can read it
        return end if end.last else None


class _Parts:
    """The parts of one snapshot."""

    def __init__(self, journal: Journal, base: Chain) -> None:
        self._journal = journal
        self._base = base
        self._tag = os.urandom(8).hex()
        self._previous = ""
        self._number = 0
        self.size = 0
        self.lines = 0
        self._packer = self._begin()

    def _begin(self) -> manifest.Packer:
        base = self._base
        return manifest.Packer(
            manifest.Head(
                manifest.FORMAT, manifest.SNAPSHOT, self._journal.volume, self._journal.epoch, base.sequence,
                base.root, self._previous, time.time_ns(), part=self._number, base=base.digest,
            )
        )  # fmt: skip

    def add(self, told: manifest.AnyInode) -> bool:
        """One more line; True when a part has gone."""
        self._packer.add(told)
        self.lines += 1
        if self._packer.size < PART and self._packer.lines < PART_LINES:
            return False
        self._put(self._packer.finish(time.time_ns()))
        self._packer = self._begin()
        failpoints.hit(failpoints.SNAPSHOT_PART)
        return True

    def end(self, through: int) -> None:
        """The last part: it is a snapshot now."""
        failpoints.hit(failpoints.SNAPSHOT_PART)
        self._put(self._packer.finish(time.time_ns(), last=True, through=through))

    def _put(self, data: bytes) -> None:
        key = manifest.Key(self._journal.epoch, self._base.sequence, self._tag, self._number)
        self._journal.store(str(key), data)
        self._previous = manifest.digest_of(data)
        self._number += 1
        self.size += len(data)
