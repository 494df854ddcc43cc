"""How many requests at once, and whose: a limit that follows what the server bears, and a queue by priority.

The limit halves when the server asks for fewer requests and grows by one for every `limit` requests that
succeed (additive increase, multiplicative decrease: clients that share a server end up sharing it evenly).
A foreground request waits for other foreground requests only, never for an upload to end, which may take
minutes. While uploads fill the limit, reads may therefore exceed it, up to twice.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from tierfs.errors import StoreThrottledError
from tierfs.store.base import Body, ObjectInfo, ObjectStore, Part, Put
from tierfs.store.decorators import Decorator
from tierfs.store.priority import Priority, current_priority

_ONE_CUT = 1.0  # seconds: refusals within that time are one event


class ThrottledStore(Decorator):
    """At most `most` requests at once, fewer while the server objects.

    A stream is a request until it ends: a body that is itself a stream of this store takes two places.
    """

    def __init__(self, inner: ObjectStore, most: int = 32, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(inner)
        self.gate = Gate(most, clock)

    def put(self, key: str, body: bytes | Iterable[bytes], size: int) -> Put:
        with self.gate.request(Priority.UPLOAD):
            return self.inner.put(key, body, size)

    def put_parts(self, key: str, parts: Iterable[Part], size: int) -> Put:
        with self.gate.request(Priority.UPLOAD):
            return self.inner.put_parts(key, parts, size)

    def put_if(self, key: str, body: bytes, etag: str | None) -> Put:
        with self.gate.request(Priority.FOREGROUND):
            return self.inner.put_if(key, body, etag)

    def get(self, key: str, start: int = 0, length: int | None = None) -> Body:
        with self.gate.request(Priority.FOREGROUND):
            return self.inner.get(key, start, length)

    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        with self.gate.request(Priority.FOREGROUND):
            yield from self.inner.stream(key, start, length)

    def pieces(self, key: str, start: int, length: int) -> Iterator[Body]:
        with self.gate.request(Priority.FOREGROUND):
            yield from self.inner.pieces(key, start, length)

    def head(self, key: str) -> ObjectInfo:
        with self.gate.request(Priority.FOREGROUND):
            return self.inner.head(key)

    def delete(self, keys: Sequence[str]) -> None:
        with self.gate.request(Priority.GARBAGE):
            self.inner.delete(keys)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        with self.gate.request(Priority.GARBAGE):
            yield from self.inner.list(prefix)


class Gate:
    """Lets requests in by priority, as many as the limit allows."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = float(most)
        self._clock = clock
        self._changed = threading.Condition()
        # Below: guarded by _changed.
        self._limit = float(most)
        self._cut_at = float("-inf")
        self._active = 0
        self._foreground = 0
        self._queue: list[tuple[Priority, int]] = []
        self._order = itertools.count()

    def resize(self, most: int) -> None:
        """Let in so many at most from now on; what the server was seen to bear still counts."""
        with self._changed:
            unhindered = self._limit >= self._most
            self._most = float(most)
            self._limit = self._most if unhindered else min(self._limit, self._most)
            self._changed.notify_all()

    @property
    def limit(self) -> int:
        """Requests at once that the server seems to bear."""
        return int(self._limit)

    @contextlib.contextmanager
    def request(self, default: Priority) -> Iterator[None]:
        """The time of one request; StoreThrottledError that leaves the block lowers the limit."""
        level = current_priority(default)
        self._enter(level)
        try:
            yield
        except StoreThrottledError:
            self._leave(level, throttled=True)
            raise
        except BaseException:
            self._leave(level, throttled=None)
            raise
        self._leave(level, throttled=False)

    def _enter(self, level: Priority) -> None:
        with self._changed:
            ticket = (level, next(self._order))
            heapq.heappush(self._queue, ticket)
            try:
                while self._queue[0] != ticket or not self._has_room(level):
                    self._changed.wait()
            finally:
                self._queue.remove(ticket)
                heapq.heapify(self._queue)
                self._changed.notify_all()
            self._active += 1
            self._foreground += level == Priority.FOREGROUND

    def _has_room(self, level: Priority) -> bool:
        return (self._foreground if level == Priority.FOREGROUND else self._active) < int(self._limit)

    def _leave(self, level: Priority, throttled: bool | None) -> None:
        """A request ended: refused by the server (True), well (False), or in a way that says nothing (None)."""
        with self._changed:
            self._active -= 1
            self._foreground -= level == Priority.FOREGROUND
            if throttled:
                self._cut()
            elif throttled is False:
                self._limit = min(self._most, self._limit + 1 / self._limit)
            self._changed.notify_all()

    def _cut(self) -> None:
        now = self._clock()
        if now - self._cut_at >= _ONE_CUT:
            self._cut_at = now
            self._limit = max(1.0, self._limit / 2)
