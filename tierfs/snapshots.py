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
from tierfs.journal import PARTLY_READ, Journal, new_chain
from tierfs.kit import Kit, is_gone, is_passing
from tierfs.looking import is_settled, line
from tierfs.places import Directory, Places, join
from tierfs.remembering import Gap, Remembered
from tierfs.spelling import quoted

log = logging.getLogger("journal")

PART = 4 << 20  # compressed bytes
PART_LINES = 100_000
_LEAST = 1 << 20  # bytes of segments that are worth a snapshot
_MOST_SEGMENTS = 5000  # that a reader has to follow
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class _Directory(NamedTuple):
    """`cut`: what it is in cannot be read. An inode number of 0 is not known."""

    ino: int
    handle: bytes
    path: bytes
    line: manifest.AnyInode
    cut: bool = False


class Snapshots:
    """Used by one thread. `stopping` ends a walk early; it begins anew with the next mover."""

    def __init__(self, kit: Kit, journal: Journal, places: Places, stopping: threading.Event) -> None:
        self._kit = kit
        self._journal = journal
        self._places = places
        self._stopping = stopping
        self._filling = False  # the one that is being taken gives the store what it lacks
        self._new = False  # the index may not know yet of all files that they have copies
        self._made_do = False  # in the last one something could not be read: it is not taken again for that
        self._unread = 0  # directories of which this walk could not read all
        self._lent: int | None = None  # copies that only the journal knows, in the last one; None: not known
        self._remembered = self._remember()

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
        if chain is None or not noting:
            return True
        if chain.unclean != unclean and not (self._made_do and chain.unclean == PARTLY_READ):
            return True
        return self._filling or self._journal.lost_track or self._kit.snapshot_wanted.is_set()

    @property
    def holds_back(self) -> str:
        """Why nothing may be removed from the store, "" where it may. Raises IndexError_.

        To what a snapshot has from elsewhere the index does not refer, and so it would be garbage.
        """
        chain = self._kit.index.chain()
        if chain is None or not chain.snapshot or self._kit.index.past.snapshots[1] >= 0:
            return ""
        if not self._lent:
            return "nothing is removed from the store: the last snapshot of the names tells some from memory"
        of = "1 file is" if self._lent == 1 else f"{self._lent} files are"
        return f"nothing is removed from the store before {of} copied anew, whose copies only the journal knows"

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
        # Until one has been taken for which nothing had to be lent: an index that was lost is not whole again
        # with the first, nor is that one always finished.
        self._new = self._kit.index.past.snapshots[1] < 0
        self._journal.lost_track = self._journal.damaged = False
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
        partly = self._unread > 0 or self._journal.damaged
        lent = self._remembered.lent
        failpoints.hit(failpoints.SNAPSHOT_PUT)

        def commit(w: Writer) -> bool:
            chain = w.get_chain()
            if chain is None or not w.meta.noting or chain.root != base.root:
                return False  # notes were dropped meanwhile
            ended = PARTLY_READ if partly else unclean  # then the next session looks again
            w.set_chain(
                msgspec.structs.replace(chain, written=0, segments=0, snapshot=parts.size, unclean=ended)
            )
            if not partly and not lent:  # to what is remembered the index may not refer
                w.note_snapshot(beat)
            return True

        kept = bool(self._kit.index.commit(commit).result())
        self._made_do, self._lent = partly, lent
        self._remembered = self._remember()
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
        """A line for every name in the tree; a directory's own comes before those in it. What cannot be read is
        told as it was told last, and as the index knows it."""
        tree = self._kit.tree
        self._remembered, self._unread = self._remember(), 0
        root = tree.handle_of(tree.rootfd)
        top = line(self._kit, tree.rootfd, os.fstat(tree.rootfd), root)
        yield top
        pending = [_Directory(tree.root_ino, root, b"", top)]
        remembered: set[str] = set()
        while pending:
            here = pending.pop()
            if here.cut:
                # By now it may be above what it is remembered to be in, and then would never end.
                if here.line.id in remembered:
                    continue
                remembered.add(here.line.id)
            for told, ino, handle, cut in self._inside(here):
                yield told
                if isinstance(told, manifest.Directory):
                    path = join(here.path, manifest.raw(told.name))
                    pending.append(_Directory(ino, handle, path, told, cut))
        for known, path in self._remembered.others():
            yield self._look_again(known, path)[0]

    def _inside(self, here: _Directory) -> Iterator[tuple[manifest.AnyInode, int, bytes, bool]]:
        """(line, inode number, handle, whether it is only remembered) of each name in a directory."""
        ident, told, missed = here.line.id, set[bytes](), set[bytes]()
        fd, names, error = self._list(here)
        listed = error is None
        try:
            for name in names:
                try:
                    found = self._child(fd, ident, name)
                except OSError as unread:
                    if is_passing(unread):
                        raise
                    missed.add(name)
                    error = error or unread
                    continue
                if found is not None:
                    told.add(name)
                    line_of, ino, handle = found
                    yield self._remembered.with_copy(line_of) if self._new else line_of, ino, handle, False
        finally:
            if fd >= 0:
                os.close(fd)
        if error is not None:
            yield from self._not_read(here, Gap(here.line, told, missed if listed else None), error)

    def _not_read(
        self, here: _Directory, gap: Gap, error: OSError
    ) -> Iterator[tuple[manifest.AnyInode, int, bytes, bool]]:
        """The same, as it is remembered, of what could not be read in a directory."""
        for name, known in self._remembered.children(gap.line.id):
            if gap.lacks(name):
                line_of, ino, handle = self._look_again(known, join(here.path, name))
                yield line_of, ino or self._remembered.number_of(here.ino, name), handle, True
                gap.told.add(name)
        self._remembered.leave(here.ino, gap)
        if here.cut or error.errno == errno.EACCES:
            return  # what is above it has been named; or its owner wants it so
        self._unread += 1
        which = "" if gap.only is None else f"{len(gap.only)} names in "
        what = f"{which}directory {quoted(here.path)} cannot be read: the store knows it as it was last seen"
        self._kit.troubles.note(f"{what}: {error.strerror}", here.ino)

    def _look_again(self, known: manifest.AnyInode, path: bytes) -> tuple[manifest.AnyInode, int, bytes]:
        """A fresh line of what its directory does not lead to, where it can be opened all the same."""
        tree, handle = self._kit.tree, manifest.handle_of(known.id)
        try:
            fd = tree.open_handle(handle, _LOOK) if tree.privileged else tree.open_at(path, handle, _LOOK)
            told, ino, handle = self._tell(fd, known.dir, manifest.raw(known.name))
            return self._remembered.with_copy(told), ino, handle
        except OSError as error:
            if is_passing(error):
                raise
            log.debug("%s is only remembered: %s", quoted(path), error)
            return known, 0, handle

    def _remember(self) -> Remembered:
        return Remembered(self._kit, self._places, self._journal.volume)

    def _list(self, here: _Directory) -> tuple[int, list[bytes], OSError | None]:
        """A descriptor of a directory (-1: there is none), the names in it, and why these are not all."""
        names: list[bytes] = []
        fd = -1
        try:
            fd = self._open(here)
            if fd >= 0:
                with os.scandir(fd) as entries:
                    names.extend(os.fsencode(entry.name) for entry in entries)
        except OSError as error:
            if is_passing(error):
                if fd >= 0:
                    os.close(fd)
                raise
            return fd, names, error
        return fd, names, None

    def _open(self, directory: _Directory) -> int:
        """A descriptor of a directory, wherever it is by now; -1 where it is gone.

        Raises OSError where it cannot be opened: a snapshot without what is in it would be believed.
        """
        try:
            return self._places.opened(Directory(directory.ino, directory.handle, directory.path))
        except OSError as error:
            if not is_gone(error) and error.errno != errno.ELOOP:
                raise
            log.debug("directory %d is not where it was: %s", directory.ino, error)
        if directory.cut:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))  # nobody can say that it is gone
        return -1

    def _child(self, dirfd: int, ident: str, name: bytes) -> tuple[manifest.AnyInode, int, bytes] | None:
        try:
            fd = os.open(name, _LOOK, dir_fd=dirfd)
        except FileNotFoundError:
            return None  # which has a note
        except PermissionError:
            self._journal.found_closed(os.fstat(dirfd).st_ino)
            raise
        st = os.fstat(fd)
        if st.st_dev != self._kit.tree.device and stat.S_ISDIR(st.st_mode):
            os.close(fd)
            return None  # something is mounted there
        return self._tell(fd, ident, name)

    def _tell(self, fd: int, ident: str, name: bytes) -> tuple[manifest.AnyInode, int, bytes]:
        """Line, inode number and handle of what this descriptor, which ends here, leads to."""
        try:
            st = os.fstat(fd)
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
        if self._packer.size < PART and self._packer.lines < PART_LINES and not self._packer.full:
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
