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
MOST_BESIDES = 4096  # more are left out: they only tell who else has used what somebody has
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


Use = tuple[int, float, int, int, bytes, int]  # count, last, size, parent, name, pid


class HeatReport:
    """Uses of files since the last report."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self.touched: dict[int, Use] = {}  # by ino
        self.besides: dict[tuple[int, int], Use] = {}  # by ino and pid: those of others than the first

    def __bool__(self) -> bool:
        return bool(self.touched)

    def touch(self, inode: Inode, size: int, pid: int = 0) -> None:
        """The file was opened by this thread; 0: it is not known by which."""
        before = self.touched.get(inode.ino)
        if before is None or before[5] == pid:
            count = before[0] if before is not None else 0
            self.touched[inode.ino] = count + 1, time.monotonic(), size, inode.parent, inode.name, pid
        elif (inode.ino, pid) in self.besides or len(self.besides) < MOST_BESIDES:
            count = self.besides.get((inode.ino, pid), (0,))[0]
            use = count + 1, time.monotonic(), size, inode.parent, inode.name, pid
            self.besides[inode.ino, pid] = use

    def count(self, ino: int) -> int:
        """Uses that have not been reported yet."""
        entry = self.touched.get(ino)
        besides = sum(use[0] for (each, _), use in self.besides.items() if each == ino)
        return (entry[0] if entry is not None else 0) + besides

    def flush(self) -> None:
        """Hand all to the mover. Not while it takes nothing: what has been counted here takes no more room for
        being used again."""
        if self._outbox:
            return
        batch: list[wire.Touch] = []
        uses = [*self.touched.items(), *((ino, use) for (ino, _), use in self.besides.items())]
        for ino, (count, last, size, parent, name, pid) in uses:
            batch.append(wire.Touch(ino, count, 0, last, size, parent, name, pid))
        self.touched.clear()
        self.besides.clear()
        for start in range(0, len(batch), TOUCH_BATCH):
            self._outbox.post(wire.Touches(batch[start : start + TOUCH_BATCH]))
