"""Rights that an owner without privileges gives himself for a moment, to work on a file that refuses him those.

Every object of git has mode 0444: its content cannot be written, nor an attribute set, not even by its owner.
So the mode is changed for as long as that takes, and must be put back whatever happens. A note says so, made
before and removed behind: a name in a directory beside the tree, since names and modes are in one journal of
the filesystem. What a crash leaves is taken back by recovery.

    <inode>-<mode>-<rights lent>-<process>-<when it began>-<of which file handle>
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import NamedTuple

from tierfs import failpoints

log = logging.getLogger("tree")

_COMPARED = 0o1777  # set-id bits go when content is written, and come back by themselves
_ATTEMPTS = 10
_BEGAN_AT = 19  # of what /proc/<pid>/stat says behind the name
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Note(NamedTuple):
    """A mode that is to be put back. `of` tells the file from another one with its inode number, `began` the
    process from another one with its number: in a container each run may have the same."""

    ino: int
    mode: int
    bits: int
    pid: int
    began: int
    of: str

    def __str__(self) -> str:
        return f"{self.ino}-{self.mode:o}-{self.bits:o}-{self.pid}-{self.began}-{self.of}"

    @classmethod
    def parse(cls, name: str) -> Note | None:
        """None for what is none."""
        parts = name.split("-")
        try:
            ino, mode, bits, pid, began, of = parts
            return cls(int(ino), int(mode, 8), int(bits, 8), int(pid), int(began), of)
        except ValueError:
            return None

    @property
    def in_use(self) -> bool:
        """The process that has made it may still be at work."""
        return _began(self.pid) == self.began


def _began(pid: int) -> int:
    """When a process began, in ticks since the boot; -1: there is none. Raises OSError."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[_BEGAN_AT])
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # the last: it is another user's
        return -1


_own_beginning = lru_cache(1)(_began)  # by the number: not its parent's after a fork


class Lent:
    """Of one tree; `handle_of` gives the file handle of a descriptor."""

    def __init__(self, directory: str, handle_of: Callable[[int], bytes]) -> None:
        self._directory = directory
        self._handle_of = handle_of

    @contextmanager
    def lending(self, fd: int, path: str, bits: int) -> Iterator[None]:
        """`path` leads to the open file. Moves ctime. Raises OSError."""
        ino, mode, lent = self._found(fd)
        pid = os.getpid()
        note = Note(ino, mode & ~lent, bits | lent, pid, _own_beginning(pid), self._digest(fd))
        with self._noted(note):
            os.chmod(path, mode | bits)
            failpoints.hit(failpoints.LENT)
            try:
                yield
            finally:
                self._put_back(fd, path, note)

    def _found(self, fd: int) -> tuple[int, int, int]:
        """Inode number and mode of an open file, and what of that somebody else has lent it: it shall not stay
        for our having seen it. Raises OSError."""
        of = self._digest(fd)
        for _ in range(_ATTEMPTS):
            st = os.fstat(fd)
            others = [note for note in self._notes() if (note.ino, note.of) == (st.st_ino, of) and note.in_use]
            if os.fstat(fd).st_mode == st.st_mode:  # else one has begun, or ended, between the two looks
                break
        mode, lent = stat.S_IMODE(st.st_mode), 0
        for note in others:
            lent |= note.bits & ~note.mode & mode
        return st.st_ino, mode, lent

    @contextmanager
    def _noted(self, note: Note) -> Iterator[None]:
        where = os.path.join(self._directory, str(note))
        try:
            self._make(where)
        except OSError as error:
            if error.errno == errno.EEXIST:  # another thread is at it, and puts the same mode back
                yield
                return
            if error.errno not in _FULL:
                raise
            log.debug("not noted: %s", error)  # what frees the disk must go on
            yield
            return
        try:
            yield
        finally:
            os.unlink(where)

    def _make(self, where: str) -> None:
        try:
            os.symlink("-", where)
        except FileNotFoundError:
            with suppress(FileExistsError):
                os.mkdir(self._directory, 0o700)
            os.symlink("-", where)

    def _put_back(self, fd: int, path: str, note: Note) -> None:
        """Unless its owner has given it another mode meanwhile."""
        if (os.fstat(fd).st_mode & _COMPARED) == ((note.mode | note.bits) & _COMPARED):
            os.chmod(path, note.mode)

    def _digest(self, fd: int) -> str:
        return hashlib.sha256(self._handle_of(fd)).hexdigest()[:32]

    # --- after a crash ------------------------------------------------------------------------------------

    def left(self) -> list[Note]:
        """What processes that have ended have not put back. Raises OSError."""
        return [note for note in self._notes() if not note.in_use]

    def _notes(self) -> list[Note]:
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return []
        return [note for note in map(Note.parse, names) if note is not None]

    def take_back(self, note: Note, fd: int, path: str) -> bool:
        """Put the mode of this open file back; False where it is another one. Raises OSError."""
        if os.fstat(fd).st_ino != note.ino or self._digest(fd) != note.of:
            return False
        self._put_back(fd, path, note)
        return True

    def drop(self, note: Note) -> None:
        """There is nothing to put back. Raises OSError."""
        os.unlink(os.path.join(self._directory, str(note)))
