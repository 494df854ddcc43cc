"""Content for readers where the local disk has no room for it: checked, handed over in memory, kept nowhere.

Only what the server asked for with `passable` is passed on: those who write, or need the bytes in the file, are
told that the disk is full.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable

from tierfs import wire
from tierfs.arrivals import Arrival, Range, Request
from tierfs.kit import Kit
from tierfs.model import LEAF
from tierfs.store.base import Body

_LEAST = 1 << 20  # one after another these are read: what follows comes with it
_MOST = 16 << 20
_PATIENCE_SECONDS = 2.0


class Passer:
    """Hands content over, and remembers for a moment that the disk is full."""

    def __init__(self, kit: Kit, bring: Callable[[Arrival, Range, Request], Body]) -> None:
        """`bring` fetches and checks a range on behalf of a request. Raises TierError."""
        self._kit = kit
        self._bring = bring
        self._full_until = 0.0

    def is_full(self, count: int) -> bool:
        """There was no room a moment ago, nothing that could leave, and there is no room now."""
        return time.monotonic() < self._full_until and not self._kit.has_room(count)

    def found_full(self) -> OSError:
        """All has been tried; the error that this is. Every two seconds it is tried anew."""
        if time.monotonic() >= self._full_until:
            self._full_until = time.monotonic() + _PATIENCE_SECONDS
        return OSError(errno.ENOSPC, "the local disk is full of what cannot leave")

    def serve(self, arrival: Arrival, request: Request, piece: Range, data: Body | None) -> bool:
        """Pass on what this request is about; `data`, if it has been fetched, is how `piece` begins. Whether
        that could be done. Raises TierError, OSError."""
        if not request.passable or request.cancelled:
            return False
        start, end = request.start, request.end
        if not arrival.small:
            end = min(arrival.size, max(end, start + _LEAST))
        if end - start > _MOST or start % LEAF:
            return False
        if data is not None and piece.start <= start and piece.start + len(data) >= end:
            data = memoryview(data)[start - piece.start : end - piece.start]
        else:
            data = self._bring(arrival, Range(start, end, False), request)
        with arrival.lock:
            if arrival.closed or request.cancelled:
                return False
            # What somebody has put into the file behind the mount wins, also where nothing is written over it.
            arrival.compare(start, data)
        fd = os.memfd_create("tierfs-passing", os.MFD_CLOEXEC)
        try:
            with open(fd, "wb", closefd=False) as memory:
                memory.write(data)
            self._kit.server.send(wire.Passing(arrival.ino, arrival.stub.pack(), start, end - start), [fd])
        finally:
            os.close(fd)
        return True
