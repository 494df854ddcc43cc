"""What the mount server sends to the mover: messages that must not block, and heat in batches."""

from __future__ import annotations

import collections
import errno
import logging
import os
import time

from tierfs import wire
from tierfs.handles import Inode

log = logging.getLogger("gate")

TOUCH_BATCH = 300  # uses in one message: with names of 255 bytes it has to fit wire.MAX_MESSAGE
_GONE = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF})
# No room now: in the socket, in memory, or among the descriptors that one user may have on their way.
_FULL = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS})


class Outbox:
    """Sends at once where there is room, later where not.

    What is for a mover that is gone is dropped. Nothing is lost by that: a new one reads the log, and is asked
    again for every open flight.
    """

    def __init__(self) -> None:
        self.link: wire.Link | None = None
        self._queue: collections.deque[tuple[wire.Message, tuple[int, ...]]] = collections.deque()

    def __bool__(self) -> bool:
        """Something waits: the mover takes nothing just now."""
        return bool(self._queue)

    def connect(self, link: wire.Link | None) -> None:
        """Send to this mover from now on."""
        if self.link is not None:
            self.link.close()
        for _, fds in self._queue:
            for fd in fds:
                os.close(fd)
        self._queue.clear()
        self.link = link
        if link is not None:
            link.sock.setblocking(False)

    def post(self, message: wire.Message, fds: tuple[int, ...] = ()) -> None:
        """Send this message; the descriptors stay the caller's."""
        if self.link is None:
            return
        if not self._queue:
            try:
                self.link.send(message, fds)
                return
            except OSError as error:
                if error.errno in _GONE:
                    log.warning("the mover does not listen: %s", error)
                    return
                if error.errno not in _FULL:
                    raise
        if isinstance(message, wire.Poke) and self._queue and isinstance(last := self._queue[-1][0], wire.Poke):
            self._queue.pop()  # one says it all, however long the mover stands still
            message = wire.Poke(message.position, message.urgent or last.urgent)
        self._queue.append((message, tuple(os.dup(fd) for fd in fds)))

    def flush(self) -> None:
        """Send what there was no room for."""
        while self._queue and self.link is not None:
            message, fds = self._queue[0]
            try:
                self.link.send(message, fds)
            except OSError as error:
                if error.errno in _FULL:
                    return
                log.warning("the mover does not listen: %s", error)
            self._queue.popleft()
            for fd in fds:
                os.close(fd)


class HeatReport:
    """Uses of files since the last report."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        # ino -> count, last, size, parent, name
        self.touched: dict[int, tuple[int, float, int, int, bytes]] = {}

    def __bool__(self) -> bool:
        return bool(self.touched)

    def touch(self, inode: Inode, size: int) -> None:
        """The file was opened."""
        before = self.touched.get(inode.ino)
        count = before[0] + 1 if before is not None else 1
        self.touched[inode.ino] = count, time.monotonic(), size, inode.parent, inode.name

    def count(self, ino: int) -> int:
        """Uses that have not been reported yet."""
        entry = self.touched.get(ino)
        return entry[0] if entry is not None else 0

    def flush(self) -> None:
        """Hand all to the mover. Not while it takes nothing: what has been counted here takes no more room for
        being used again."""
        if self._outbox:
            return
        batch: list[wire.Touch] = []
        for ino, (count, last, size, parent, name) in self.touched.items():
            batch.append(wire.Touch(ino, count, 0, last, size, parent, name))
        self.touched.clear()
        for start in range(0, len(batch), TOUCH_BATCH):
            self._outbox.post(wire.Touches(batch[start : start + TOUCH_BATCH]))
