"""A directory being read: the filesystem's own listing, kept from the first reading of an open directory on.

Offsets stay valid for the life of the open directory whatever is made or removed meanwhile: an offset is the
number of a block of the listing and a position in it. Offset 0 reads the directory anew.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator

from tierfs import syscalls
from tierfs.nodes import NodeTable
from tierfs.waits import Slow

_DIRENT = struct.Struct("=QqHB")  # inode, the filesystem's own offset, record length, type
_SHIFT = 16  # a block is at most 64 KiB
_NAME = 19


# The offset at which to go on behind it, name, inode, d_type. A plain tuple: there are very many.
Entry = tuple[int, bytes, int, int]


class Listing:
    """The entries of one open directory. Blocks are read as they are asked for and about 40 bytes an entry."""

    __slots__ = ("_blocks", "_fd", "_whole")

    def __init__(self, fd: int) -> None:
        """Takes the descriptor of a directory, open for reading."""
        self._fd = fd
        self._blocks: list[bytes] = []
        self._whole = False

    def close(self) -> None:
        """Close the directory."""
        os.close(self._fd)

    def dup(self) -> int:
        """Another descriptor of it."""
        return os.dup(self._fd)

    def read(self, offset: int) -> Iterator[Entry]:
        """The entries from `offset` on, with `.` and `..`. Raises OSError."""
        if offset == 0:
            os.lseek(self._fd, 0, os.SEEK_SET)
            self._blocks.clear()
            self._whole = False
        number, at = offset >> _SHIFT, offset & (1 << _SHIFT) - 1
        unpack = _DIRENT.unpack_from
        while (block := self._block(number)) is not None:
            base, end = number << _SHIFT, len(block)
            while at < end:
                ino, _, length, kind = unpack(block, at)
                start = at + _NAME
                at += length
                following = base + at if at < end else base + (1 << _SHIFT)
                yield following, block[start : block.index(0, start)], ino, kind
            number, at = number + 1, 0

    def _block(self, number: int) -> bytes | None:
        while number >= len(self._blocks) and not self._whole:
            block = syscalls.read_directory(self._fd)
            if block:
                self._blocks.append(block)
            else:
                self._whole = True
        return self._blocks[number] if number < len(self._blocks) else None


class Directories:
    """The open directories of a mount, by number."""

    def __init__(self, nodes: NodeTable) -> None:
        self._nodes = nodes
        self._listings: dict[int, Listing] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._listings)

    def close(self) -> None:
        """Close all."""
        for listing in self._listings.values():
            listing.close()
        self._listings.clear()

    def open(self, nodeid: int) -> int:
        """Open a directory for reading; its number. Raises OSError."""
        dirfd = self._nodes.dirfd(self._nodes.get(nodeid))
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dirfd)
        self._next += 1
        self._listings[self._next] = Listing(fd)
        return self._next

    def _get(self, fh: int) -> Listing:
        try:
            return self._listings[fh]
        except KeyError:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None

    def read(self, fh: int, offset: int) -> Iterator[Entry]:
        """Entries (next offset, name, inode, d_type) from `offset` on; 0 reads anew. Raises OSError."""
        return self._get(fh).read(offset)

    def release(self, fh: int) -> None:
        """Close a directory."""
        self._get(fh).close()
        del self._listings[fh]

    def fsync(self, fh: int, datasync: bool) -> Slow:
        """Make a directory durable. Raises OSError."""
        fd = self._get(fh).dup()

        def run() -> None:
            try:
                (os.fdatasync if datasync else os.fsync)(fd)
            finally:
                os.close(fd)

        return Slow(run)
