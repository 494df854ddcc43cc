"""Replies whose data go from a file to the kernel through a pipe: they are copied once, to where they are read.

A pipe has a place for each page, and one of 1 MiB may be had without a privilege: 256 places, of which the
header of the reply takes one. The file's pages are lent to the pipe, never given (SPLICE_F_MOVE): the kernel
would take them out of the file's cache.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os

from tierfs.fuse import protocol as p
from tierfs.waits import Stretch

log = logging.getLogger("fuse")

LEAST = 64 << 10  # bytes; fewer are copied sooner
_PAGE = os.sysconf("SC_PAGE_SIZE")
_CAPACITY = 1 << 20


class Splicer:
    """Sends to one device, in one thread."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._pipe: tuple[int, int] | None = None
        self._places = 0
        self._works = True

    def reply(self, unique: int, stretch: Stretch) -> bool:
        """Answer this request with these bytes. False: nothing has been said, they have to go another way.

        Raises OSError where the kernel refuses the reply.
        """
        if not self._works or not self._fits(stretch):
            return False
        filled = False
        try:
            filled = self._fill(unique, stretch)
            if filled:
                self._send(p.OUT_SIZE + stretch.length)
        finally:
            if not filled:
                self.close()  # with what is in the pipe
        return filled

    def close(self) -> None:
        """Let the pipe go; it is made anew when it is needed."""
        pipe, self._pipe = self._pipe, None
        for fd in pipe or ():
            os.close(fd)

    def _fits(self, stretch: Stretch) -> bool:
        if self._pipe is None and not self._open():
            return False
        first, last = stretch.offset // _PAGE, (stretch.offset + stretch.length - 1) // _PAGE
        return stretch.length >= LEAST and last - first + 2 <= self._places

    def _open(self) -> bool:
        try:
            self._pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            # Where many have one, or somebody has large ones, a smaller one is what there is.
            with contextlib.suppress(PermissionError):
                fcntl.fcntl(self._pipe[1], fcntl.F_SETPIPE_SZ, _CAPACITY)
            self._places = fcntl.fcntl(self._pipe[1], fcntl.F_GETPIPE_SZ) // _PAGE
        except OSError as error:
            log.debug("no pipe: %s", error)
            self.close()
            return False
        return True

    def _fill(self, unique: int, stretch: Stretch) -> bool:
        """Whether all of it is in the pipe."""
        assert self._pipe is not None
        entry = self._pipe[1]
        os.write(entry, p.OUT.pack(p.OUT_SIZE + stretch.length, 0, unique))
        at, left = stretch.offset, stretch.length
        while left:
            try:
                count = os.splice(stretch.fd, entry, left, offset_src=at, flags=os.SPLICE_F_NONBLOCK)
            except OSError as error:
                self._works = error.errno != errno.EINVAL  # not from files of this filesystem
                log.debug("not spliced: %s", error)
                return False
            if not count:
                return False  # it has become shorter
            at, left = at + count, left - count
        return True

    def _send(self, size: int) -> None:
        assert self._pipe is not None
        try:
            os.splice(self._pipe[0], self._device, size)
        except OSError:
            self.close()
            raise
