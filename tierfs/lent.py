"""Rights that an owner without privileges gives himself for a moment, to work on a file that refuses him those.

Every object of git has mode 0444: its content cannot be written, nor an attribute set, not even by its owner.
So the mode is changed for as long as that takes, and must be put back whatever happens. A note says so, made
before and removed behind: a name in a directory beside the tree, since names and modes are in one journal of
the filesystem. What a crash leaves is taken back by recovery.

    <inode>-<mode>-<rights lent>-<process>-<of which file handle>
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from tierfs import failpoints

log = logging.getLogger("tree")

_COMPARED = 0o1777  # set-id bits go when content is written, and come back by themselves
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Note(NamedTuple):
    """A mode that is to be put back. `of` tells the file from another one with its inode number."""

    ino: int
    mode: int
    bits: int
    pid: int
    of: str

    def __str__(self) -> str:
        return f"{self.ino}-{self.mode:o}-{self.bits:o}-{self.pid}-{self.of}"

    @classmethod
    def parse(cls, name: str) -> Note | None:
        """None for what is none."""
        parts = name.split("-")
        try:
            ino, mode, bits, pid, of = parts
            return cls(int(ino), int(mode, 8), int(bits, 8), int(pid), of)
        except ValueError:
            return None

    @property
    def in_use(self) -> bool:
        """The process that has made it may still be at work."""
        return self.pid == os.getpid() or os.path.exists(f"/proc/{self.pid}")


class Lent:
    """Of one tree; `handle_of` gives the file handle of a descriptor."""

    def __init__(self, directory: str, handle_of: Callable[[int], bytes]) -> None:
        self._directory = directory
        self._handle_of = handle_of

    @contextmanager
    def lending(self, fd: int, path: str, bits: int) -> Iterator[None]:
        """`path` leads to the open file. Moves ctime. Raises OSError."""
        st = os.fstat(fd)
        mode = stat.S_IMODE(st.st_mode)
        note = Note(st.st_ino, mode, bits, os.getpid(), self._digest(fd))
        with self._noted(note):
            os.chmod(path, mode | bits)
            failpoints.hit(failpoints.LENT)
            try:
                yield
            finally:
                self._put_back(fd, path, note)

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
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return []
        notes = [note for note in map(Note.parse, names) if note is not None]
        return [note for note in notes if not note.in_use]

    def take_back(self, note: Note, fd: int, path: str) -> bool:
        """Put the mode of this open file back; False where it is another one. Raises OSError."""
        if os.fstat(fd).st_ino != note.ino or self._digest(fd) != note.of:
            return False
        self._put_back(fd, path, note)
        return True

    def drop(self, note: Note) -> None:
        """There is nothing to put back. Raises OSError."""
        os.unlink(os.path.join(self._directory, str(note)))
