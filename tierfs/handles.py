"""What the mount server keeps of an open file, and of an inode that is open, guarded or being fetched."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

from tierfs.inflow import Content, ReadAhead
from tierfs.waits import Wait

# Flags that say how a file is to be opened, and are done with once it is.
OPENING = os.O_TRUNC | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_DIRECT | os.O_NOFOLLOW | os.O_SYNC


class Backing(Protocol):
    """The passthrough calls of a kernel session."""

    def open(self, fd: int) -> int:
        """Register a backing file; the id. Raises OSError."""

    def close(self, backing_id: int) -> None:
        """Forget it again."""


class ShownStat:
    """A stat result with the times and blocks that the file had before TierFS moved its content."""

    __slots__ = ("_stat", "st_blocks", "st_ctime_ns", "st_mtime_ns")

    def __init__(self, real: os.stat_result, mtime: int, ctime: int, blocks: int) -> None:
        self._stat = real
        self.st_mtime_ns = mtime
        self.st_ctime_ns = ctime
        self.st_blocks = blocks

    def __getattr__(self, name: str) -> int:
        return int(getattr(self._stat, name))


Shown = os.stat_result | ShownStat


@dataclass(slots=True)
class ShownTimes:
    """What GETATTR answers while our own writes move the real times."""

    mtime: int
    ctime: int
    blocks: int


class Inode:
    """One regular file that is open, guarded or being fetched. Others need no memory here."""

    __slots__ = (
        "backing_id", "content", "faults", "gone", "guard", "handle", "ino", "marked", "name", "opath", "opens",
        "parent", "passthrough", "set_id", "shown", "size", "slot", "writers",
    )  # fmt: skip

    def __init__(self, ino: int, parent: int, name: bytes) -> None:
        self.ino = ino
        self.parent = parent
        self.name = name
        self.opath = -1
        self.handle = b""
        self.opens = 0
        self.writers = 0
        self.slot = 0  # in the ledger, if what is there is to be known to a successor
        self.passthrough = False
        self.backing_id = 0
        self.content: Content | None = None  # None: resident
        self.guard: Wait | None = None
        self.shown: ShownTimes | None = None
        self.gone = False  # its last name is
        self.size = 0  # when it was opened last
        self.set_id = 0  # ctime of a chmod that gave set-id bits while it was open in passthrough
        self.faults = 0  # syncs that have failed
        self.marked = False  # its generation has risen since it was last sealed or closed


class Handle:
    """An open file as the binding sees it. `fd` is -1 and `backing_id` set in passthrough; `uid` opened it, and
    has heard of so many `faults` of the inode. `unused_by`: the thread that has opened it only to look, until
    it reads; -1: no such."""

    __slots__ = ("_ahead", "backing_id", "fd", "flags", "heard", "inode", "uid", "unused_by", "writable")

    def __init__(self, inode: Inode, fd: int, flags: int, backing_id: int) -> None:
        self.inode = inode
        self.fd = fd
        self.flags = flags
        self.writable = flags & os.O_ACCMODE != os.O_RDONLY
        self.backing_id = backing_id
        self.uid = 0
        self.unused_by = -1
        self.heard = inode.faults
        self._ahead: ReadAhead | None = None

    @property
    def ahead(self) -> ReadAhead:
        """How far ahead of it to fetch: of one that reads what is not all here."""
        if self._ahead is None:
            self._ahead = ReadAhead()
        return self._ahead
