"""A directory being read. Offsets are the backing filesystem's own cookies, good for as long as it is open.

They depend on nothing kept here: another server goes on where this one stopped. Offset 0 reads it anew.
On filesystems where they are good whoever has the directory open (STEADY), nobody need open it.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
from collections.abc import Iterator

from tierfs import syscalls
from tierfs.ledger import KeptDir, Ledger
from tierfs.nodes import GoneStat, NodeTable
from tierfs.waits import Blocked, Slow, Wait

log = logging.getLogger("gate")

_DIRENT = struct.Struct("=QqHB")  # inode, the offset at which to go on behind it, record length, type
_NAME = 19
_END = (1 << 63) - 1  # an offset behind which nothing can be

# On these, what a cookie says of a place is in the directory itself: network servers rely on it. Elsewhere it
# may count what is there, or stand in a list that is made when the directory is opened.
STEADY = frozenset({"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "xfs"})

# The offset at which to go on behind it, name, inode, d_type. A plain tuple: there are very many.
Entry = tuple[int, bytes, int, int]


class _Reader:
    """The block of entries in which somebody is who reads a directory (64 KiB at most)."""

    __slots__ = ("_at", "_block", "_offset")

    def __init__(self) -> None:
        self._block = b""
        self._at = 0  # where in the block the entry at `_offset` begins
        self._offset = -1

    def read(self, fd: int, offset: int) -> Iterator[Entry]:
        """The entries from `offset` on, with `.` and `..`. Raises OSError.

        Ask for the next entry only when the one before has been used: it goes on before the last one given.
        """
        block, at = self._block, self._at
        if offset == 0 or offset != self._offset:
            block, at = b"", 0
        unpack = _DIRENT.unpack_from
        here = offset
        if at >= len(block):
            os.lseek(fd, offset, os.SEEK_SET)
        try:
            while True:
                if here == _END:
                    # Nothing is. ext4 (6.18), if that is the first that it is asked by a descriptor, says so of
                    # offset 0 too from then on.
                    return
                if at >= len(block):
                    block, at = syscalls.read_directory(fd), 0
                    if not block:
                        return
                ino, following, length, kind = unpack(block, at)
                start = at + _NAME
                yield following, block[start : block.index(0, start)], ino, kind
                at += length
                here = following
        finally:
            self._block, self._at, self._offset = block, at, here


class Listing:
    """One open directory."""

    __slots__ = ("_fd", "_reader")

    def __init__(self, fd: int) -> None:
        """Takes the descriptor of a directory, open for reading; -1 of one that has been removed."""
        self._fd = fd
        self._reader = _Reader()

    def close(self) -> None:
        """Close the directory."""
        if self._fd >= 0:
            os.close(self._fd)

    def dup(self) -> int:
        """Another descriptor of it."""
        return os.dup(self._fd)

    def read(self, offset: int) -> Iterator[Entry]:
        """As `_Reader.read`."""
        return self._reader.read(self._fd, offset) if self._fd >= 0 else iter(())


class Directories:
    """The open directories of a mount, by number."""

    def __init__(self, nodes: NodeTable, ledger: Ledger) -> None:
        self._nodes = nodes
        self._ledger = ledger
        self._listings: dict[int, Listing] = {}
        self._opened_by: dict[int, int] = {}  # request -> directory, of those that were taken over
        self._late: dict[int, KeptDir] = {}  # by number, those of them that have not been found as yet
        self._found = Wait()  # for that
        # Who reads without having opened: the directory, and where in it. Others seek.
        self._reading: tuple[int, _Reader] = 0, _Reader()

    def __len__(self) -> int:
        return len(self._listings)

    def close(self) -> None:
        """Close all."""
        for listing in self._listings.values():
            listing.close()
        self._listings.clear()

    def open(self, nodeid: int) -> int:
        """Open a directory for reading; its number. Raises OSError."""
        fd = self._open(nodeid)
        number = self._ledger.directory(nodeid)
        self._listings[number] = Listing(fd)
        return number

    def _open(self, nodeid: int) -> int:
        dirfd = self._nodes.dirfd(self._nodes.get(nodeid))
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dirfd)

    def restore(self) -> None:
        """Take over the open directories that the ledger knows. One that is gone has no entries any more; but
        see OpenFiles.restore."""
        for kept in self._ledger.load_directories():
            self._late[kept.number] = kept
            self._opened_by[kept.request] = kept.number
        self.restore_late(last=not self._ledger.is_pending)

    def restore_late(self, *, last: bool) -> None:
        """Those that were not found where the ledger says; `last`: there will be no other try."""
        late, self._late = self._late, {}
        for kept in late.values():
            try:
                self._listings[kept.number] = Listing(self._open(kept.node))
            except OSError as error:
                if error.errno == errno.ESTALE and not last:
                    self._late[kept.number] = kept
                    continue
                log.info("an open directory, node %d, is gone: %s", kept.node, error)
                self._listings[kept.number] = Listing(-1)
        if not self._late:
            self._found.fire()

    def undo(self, request: int) -> None:
        """A request that is sent again has opened this directory, and nobody has been told its number."""
        number = self._opened_by.pop(request, None)
        if number is not None and self._late.pop(number, None) is not None:
            self._ledger.drop_directory(number)
        elif number is not None and number in self._listings:
            self.release(number)

    def _get(self, fh: int) -> Listing:
        if fh in self._late:
            raise Blocked(self._found)
        try:
            return self._listings[fh]
        except KeyError:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None

    def read(self, fh: int, offset: int) -> Iterator[Entry]:
        """Entries (next offset, name, inode, d_type) from `offset` on; 0 reads anew. Raises OSError."""
        return self._get(fh).read(offset)

    def entries(self, nodeid: int, offset: int) -> Iterator[Entry]:
        """As `read`, of a directory that nobody has opened. Raises OSError."""
        fd = self._nodes.readable(self._nodes.get(nodeid))
        if self._reading[0] != nodeid:
            self._reading = nodeid, _Reader()
        return self._reading[1].read(fd, offset)

    def release(self, fh: int) -> None:
        """Close a directory."""
        self._get(fh).close()
        del self._listings[fh]
        self._ledger.drop_directory(fh)

    def fsync(self, fh: int, datasync: bool) -> Slow:
        """Make a directory durable. Raises OSError."""
        return _synced(self._get(fh).dup(), datasync)

    def sync(self, nodeid: int, datasync: bool) -> Slow:
        """As `fsync`, of one that nobody has opened. Raises OSError."""
        node = self._nodes.get(nodeid)
        if isinstance(node.anchor, GoneStat):
            return Slow(lambda: None)  # removed while somebody has it open: it has no entries any more
        return _synced(os.dup(self._nodes.readable(node)), datasync)


def _synced(fd: int, datasync: bool) -> Slow:
    """Sync by a descriptor, and close it."""

    def run() -> None:
        try:
            (os.fdatasync if datasync else os.fsync)(fd)
        finally:
            os.close(fd)

    return Slow(run)
