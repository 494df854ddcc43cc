"""The namespace journal's writer: what has changed goes to `meta/` in the store, a few seconds behind.

The index notes what may have changed (a name in a directory, an inode) in the commit that learns of it;
`flush` looks at all of that in the tree, writes one segment, and takes the notes back once it is in the store.
The notes outlive the process and an outage, and are as many as there are changed names at most; when they
become too many they are dropped, and a snapshot is taken when the store is back.

A segment shall not miss a file that is being renamed: after each look the server is asked for a sign that its
marks so far are in the log, and what they name is looked at as well, some rounds long; names that are seen gone
only in the last round are left to the next segment. `Snapshots` (snapshots.py) writes the whole tree.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from tierfs import failpoints, manifest
from tierfs.errors import BusyError, TierError
from tierfs.index import Chain, Note, Writer
from tierfs.kit import Kit, is_passing
from tierfs.looking import is_settled, line
from tierfs.places import Places, join
from tierfs.spelling import quoted

log = logging.getLogger("journal")

PARTLY_READ = -2  # the `unclean` of a chain in which something that could not be read was told as remembered
MOST_NOTES = 100_000  # then a snapshot is cheaper, and bounded
_ROUNDS = 4
_PATIENCE = 5  # flushes in which a directory may be nowhere to be found
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(slots=True)
class _Segment:
    """One segment being made. `done`: notes that it answers."""

    packer: manifest.Packer
    done: dict[tuple[int, bytes], Note] = field(default_factory=dict)
    left: set[tuple[int, bytes]] = field(default_factory=set)  # for the next segment
    nowhere: set[int] = field(default_factory=set)  # directories whose place was not known at the last look
    unread: bool = False  # something that could not be read is not told


class Journal:
    """Safe to use from several threads; one flush at a time."""

    def __init__(self, kit: Kit, places: Places, drain: Callable[[], int], volume: str, epoch: int) -> None:
        """`volume`: its id; `epoch`: this mount's, under which is written."""
        self._kit = kit
        self._places = places
        self._drain = drain
        self.volume = volume
        self.epoch = epoch
        self._lock = threading.Lock()
        self._nowhere: dict[int, int] = {}  # directory -> flushes in which its place was not known
        self._seen = 0, 0.0  # `noted_since` as last looked at, and seconds of CLOCK_MONOTONIC of the first look
        self.damaged = False  # something could not be read
        self._closed: set[int] = set()  # directories that may not be searched, and what is in them not be told
        self.lost_track = False  # notes were dropped or could not be followed: the tree is to be walked

    # --- how it stands ------------------------------------------------------------------------------------

    @property
    def behind(self) -> float:
        """Seconds since the oldest change that the store does not know of. Of one whose date lies ahead, as
        the clock has been set back since, the seconds since it was first seen here."""
        since = self._kit.index.noted_since()
        if not since:
            return 0.0
        if self._seen[0] != since:
            self._seen = since, time.monotonic()
        return max(time.time() - since / 1e9, time.monotonic() - self._seen[1])

    @property
    def due(self) -> bool:
        """It is time for a segment."""
        return self.behind >= self._kit.config.journal_seconds

    def chain(self) -> Chain:
        """Where the journal goes on: a chain of its own where it is not known."""
        known = self._kit.index.chain()
        return known if known is not None else new_chain(self.epoch)

    # --- segments -----------------------------------------------------------------------------------------

    def trim(self) -> None:
        """Keep the notes within bounds while nothing can be written. Raises IndexError_."""
        with self._lock:
            count = self._kit.index.note_count()
            if count > MOST_NOTES:
                self._give_up(f"{count} changes wait")

    def flush(self) -> bool:
        """Write what has changed, if anything has. Raises StoreError, BusyError, IndexError_, OSError."""
        self.trim()
        with self._lock:
            segment = self._tell_all()
            told = segment is not None
            while segment is not None and segment.packer.full:
                segment = self._tell_all()  # at once: of a rename one half may be in this one, one in the next
            return told

    def _tell_all(self) -> _Segment | None:
        """One segment of what is noted, or of as much as fits; None where nothing is."""
        position = self._drain()
        begun = time.time_ns()
        notes = self._kit.index.notes()
        if not notes:
            return None
        chain = self.chain()
        head = manifest.Head(
            manifest.FORMAT, manifest.SEGMENT, self.volume, self.epoch, chain.sequence + 1, chain.root,
            chain.digest, begun, position,
        )  # fmt: skip
        segment = _Segment(manifest.Packer(head))
        self._look_at_all(segment, notes)
        self._lose_track_of(segment)
        self._look_at_closed()
        self._put(segment, chain, begun)
        return segment

    def _put(self, segment: _Segment, chain: Chain, begun: int) -> None:
        data = segment.packer.finish(time.time_ns())
        key = manifest.Key(self.epoch, chain.sequence + 1, os.urandom(8).hex())
        self.store(str(key), data)
        failpoints.hit(failpoints.SEGMENT_PUT)
        done = [note for key, note in segment.done.items() if key not in segment.left]

        def commit(w: Writer) -> None:
            now = w.get_chain() or chain
            following = Chain(
                chain.root, self.epoch, chain.sequence + 1, manifest.digest_of(data),
                now.written + len(data), now.segments + 1, now.snapshot,
                PARTLY_READ if segment.unread else now.unclean,
            )  # fmt: skip
            w.journalled(done, following, begun)

        self._kit.index.commit(commit).result()
        failpoints.hit(failpoints.SEGMENT_COMMITTED)
        log.debug("segment %d: %d changes, %d bytes", chain.sequence + 1, len(done), len(data))

    def store(self, key: str, data: bytes) -> None:
        """Write an object and make sure that it is right. Raises StoreError, BusyError."""
        if self._kit.withheld:
            raise BusyError(self._kit.withheld)
        if not self._kit.store.put(key, data, len(data)).verified and self._kit.store.get(key) != data:
            raise TierError(f"the store gave back other bytes than it was given for {key}")

    def _look_at_all(self, segment: _Segment, notes: list[Note]) -> None:
        for turn in range(_ROUNDS):
            fresh = [note for note in notes if segment.done.get((note.ino, note.name)) != note]
            if not fresh:
                return
            self._look_at(segment, fresh, final=turn == _ROUNDS - 1)
            if turn < _ROUNDS - 1:
                # Whatever the server had done when it answers has its mark in the log.
                self._kit.server.await_marks()
                self._drain()
                notes = self._kit.index.notes()

    def _look_at(self, segment: _Segment, notes: list[Note], final: bool) -> None:
        """Notes are in the order of their directories: each of those is opened once."""
        directory, fd, ident = -1, -1, ""
        with ExitStack() as stack:
            for note in notes:
                key = (note.ino, note.name)
                segment.done[key] = note
                if segment.packer.full:
                    segment.left.add(key)
                    continue
                segment.left.discard(key)
                if not note.name:
                    self._look_at_inode(segment, note.ino)
                    continue
                if note.ino != directory:
                    stack.close()
                    directory = note.ino
                    fd = self._open_directory(directory)
                    segment.nowhere.discard(directory)
                    if fd >= 0:
                        stack.callback(os.close, fd)
                        ident = self._tell(segment, fd, directory)
                if fd >= 0:
                    present = self._look_at_name(segment, fd, directory, ident, note.name, final)
                    if not present and final:
                        segment.left.add(key)
                elif self._kit.index.get_dir(directory) is not None:
                    # It has not been removed, as far as is known: it is tried again.
                    segment.nowhere.add(directory)
                    segment.left.add(key)

    def _tell(self, segment: _Segment, fd: int, ino: int) -> str:
        """A line of a directory itself; its id."""
        handle = self._kit.tree.handle_of(fd)
        try:
            segment.packer.add(line(self._kit, fd, os.fstat(fd), handle))
        except OSError as error:
            self._pass_over(segment, ino, b"", error)
        return manifest.inode_id(handle)

    def _pass_over(self, segment: _Segment, directory: int, name: bytes, error: OSError) -> None:
        """What cannot be read must not keep all else from the store: it stays there as it was told last, and a
        snapshot tells what the index knows. Raises the error where it is so just now only."""
        if is_passing(error):
            raise error
        segment.unread = self.damaged = True
        place = self._places.directory(directory)
        path = quoted(join(place.path, name)) if place is not None else f"{quoted(name)} in inode {directory}"
        what = f"{path} cannot be read: the store knows it as it was last seen"
        self._kit.troubles.note(f"{what}: {error.strerror}", directory)

    def _look_at_name(
        self, segment: _Segment, dirfd: int, directory: int, ident: str, name: bytes, final: bool
    ) -> bool:
        """False where there is nothing of this name."""
        try:
            fd = os.open(name, _LOOK, dir_fd=dirfd)
        except FileNotFoundError:
            if not final:
                segment.packer.add(manifest.Gone(ident, manifest.text(name)))
            return False
        except PermissionError:
            self.found_closed(directory)
            return True
        except OSError as error:
            self._pass_over(segment, directory, name, error)
            return True
        try:
            st = os.fstat(fd)
            told = line(self._kit, fd, st, self._kit.tree.handle_of(fd), ident, name)
            segment.packer.add(told)
            if not is_settled(self._kit, told, st.st_ino):
                segment.left.add((directory, name))
        except OSError as error:
            self._pass_over(segment, directory, name, error)
        finally:
            os.close(fd)
        return True

    def _look_at_inode(self, segment: _Segment, ino: int) -> None:
        tree = self._kit.tree
        if ino == tree.root_ino:
            self._tell(segment, tree.rootfd, ino)
            return
        record = self._kit.index.get(ino)
        if record is None:
            return  # gone, or not yet in the index: then a note follows
        above = None if tree.privileged else self._places.directory(record.parent)
        path = os.path.join(above.path, record.name) if above is not None else None
        try:
            fd = self._kit.open(ino, record.handle, _LOOK, path)
        except OSError as error:
            log.debug("inode %d is not looked at: %s", ino, error)  # its names have notes of their own
            return
        try:
            told = line(self._kit, fd, os.fstat(fd), record.handle)
            segment.packer.add(told)
            if not is_settled(self._kit, told, ino):
                segment.left.add((ino, b""))
        except OSError as error:
            self._pass_over(segment, record.parent, record.name, error)
        finally:
            os.close(fd)

    # --- directories --------------------------------------------------------------------------------------

    def _open_directory(self, ino: int) -> int:
        """A descriptor, -1 where its place is not known."""
        if ino == self._kit.tree.root_ino:
            return os.dup(self._kit.tree.rootfd)
        return self._places.look_at(ino)

    def found_closed(self, directory: int) -> None:
        """What is in a directory cannot be looked at (by a daemon that is not root's): the store knows it as it
        was last seen, and when the directory may be searched again the tree is walked."""
        self._closed.add(directory)
        place = self._places.directory(directory)
        name = quoted(place.path) if place is not None else f"inode {directory}"
        what = f"directory {name} may not be searched (chmod u+x): the store knows it as it was last seen"
        self._kit.troubles.note(what, directory)

    def _look_at_closed(self) -> None:
        for directory in list(self._closed):
            fd = self._open_directory(directory)
            try:
                if fd >= 0:
                    os.close(os.open(".", _LOOK, dir_fd=fd))
                    self.lost_track = True
                elif self._kit.index.get_dir(directory) is not None:
                    continue  # what is above it is closed by now
                self._closed.discard(directory)
                self._kit.troubles.solved(directory)
            except PermissionError:
                pass
            finally:
                if fd >= 0:
                    os.close(fd)

    def _lose_track_of(self, segment: _Segment) -> None:
        """Directories that stay away, from one flush to the next, were moved behind the mount's back: their
        notes are dropped, and the tree is walked."""
        self._nowhere = {ino: self._nowhere.get(ino, 0) + 1 for ino in segment.nowhere}
        lost = {ino for ino, flushes in self._nowhere.items() if flushes > _PATIENCE}
        if not lost:
            return
        log.warning("%d directories are not where they were last seen: the tree is journalled anew", len(lost))
        segment.left = {key for key in segment.left if key[0] not in lost}
        self._nowhere = {ino: flushes for ino, flushes in self._nowhere.items() if ino not in lost}
        self.lost_track = True

    def _give_up(self, reason: str) -> None:
        """Drop the notes. What is written from now on does not continue what was written so far."""
        log.warning("%s for the namespace journal: a snapshot takes their place", reason)

        def commit(w: Writer) -> None:
            before = w.get_chain()
            w.begin_notes(False)
            w.set_chain(new_chain(self.epoch, before.sequence + 1 if before is not None else 0))

        self._kit.index.commit(commit).result()


def new_chain(epoch: int, sequence: int = 0) -> Chain:
    """The beginning of a chain that nothing precedes; later ones of an epoch have larger numbers."""
    root = os.urandom(16).hex()
    return Chain(root, epoch, sequence, root)
