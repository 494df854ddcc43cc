"""Backing files that the kernel reads and writes by itself: the passthrough calls of a connection."""

from __future__ import annotations

import errno
import fcntl
import logging
import struct

from tierfs.fuse import protocol as p

log = logging.getLogger("fuse")

_BACKING_ID = struct.Struct("<I")


class KernelBacking:
    """The passthrough calls of a connection (tierfs.handles.Backing)."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def open(self, fd: int) -> int:
        """Register a regular file by an O_PATH descriptor; its id (> 0). Raises OSError."""
        # A mutable argument: only then is the call's own result returned.
        return int(fcntl.ioctl(self._fd, p.BACKING_OPEN, bytearray(p.BACKING_MAP.pack(fd, 0, 0))))

    def close(self, backing_id: int) -> None:
        """Forget it, or one that was forgotten already: a server that was killed could not write that down.

        A failure is nobody's error: what it was closed for may have been done already.
        """
        try:
            fcntl.ioctl(self._fd, p.BACKING_CLOSE, bytearray(_BACKING_ID.pack(backing_id)))
        except OSError as error:
            if error.errno != errno.ENOENT:
                log.error("a file stays registered with the kernel until the mount ends: %s", error)
