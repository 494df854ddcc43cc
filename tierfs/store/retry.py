"""Tries again what failed for a reason that may pass: no answer, a broken connection, an overloaded server.

Waits are drawn from [0, bound], the bound doubling with each try (full jitter: clients that failed together do
not come back together). All calls share a budget of retries, earned by successes: while a store is down, each
call waits as long as waits get, instead of hammering it. A call gives up at its deadline, with the last error.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tierfs.errors import ObjectMissingError, PreconditionError, StoreUnavailableError
from tierfs.store.base import Body, ObjectInfo, ObjectStore, Put
from tierfs.store.decorators import Decorator
from tierfs.store.priority import Priority, current_priority

T = TypeVar("T")
Part = TypeVar("Part", bound=Body)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Seconds: the bound of the first wait, of the longest, and how long after its start a call gives up."""

    first: float = 0.1
    longest: float = 5.0
    deadline: float = 45.0


FOREGROUND = RetryPolicy()
BACKGROUND = RetryPolicy(first=0.5, longest=20.0, deadline=60.0)


class RetryBudget:
    """Retries that may be made soon: `size` at most, one more for every ten calls that succeed."""

    def __init__(self, size: float = 20.0, earned: float = 0.1) -> None:
        self._size = self._left = size
        self._earned = earned
        self._lock = threading.Lock()

    def earn(self) -> None:
        with self._lock:
            self._left = min(self._size, self._left + self._earned)

    def spend(self) -> bool:
        """Whether there was one left."""
        with self._lock:
            if self._left < 1:
                return False
            self._left -= 1
            return True


class RetryingStore(Decorator):
    """Retries StoreUnavailableError and StoreThrottledError; every other error is final.

    A body that can be read only once (an iterator, or parts) is sent once. `clock`, `pause` and `draw` are for
    tests: `pause` waits seconds and says whether the store was closed meanwhile, `draw` gives numbers from
    [0, 1).
    """

    def __init__(
        self,
        inner: ObjectStore,
        foreground: RetryPolicy = FOREGROUND,
        background: RetryPolicy = BACKGROUND,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], bool] | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        super().__init__(inner)
        self._policies = {
            Priority.FOREGROUND: foreground,
            Priority.UPLOAD: background,
            Priority.GARBAGE: background,
        }
        self._budget = RetryBudget()
        self._closing = threading.Event()
        self._clock = clock
        self._pause = pause or self._closing.wait
        self._draw = draw

    def use(self, foreground: RetryPolicy) -> None:
        """Whoever reads is served by this policy from now on."""
        self._policies[Priority.FOREGROUND] = foreground

    def put(self, key: str, body: bytes | Iterable[bytes], size: int) -> Put:
        if not isinstance(body, bytes) and iter(body) is body:
            return self.inner.put(key, body, size)
        return self._try(Priority.UPLOAD, lambda: self.inner.put(key, body, size))

    def put_if(self, key: str, body: bytes, etag: str | None) -> Put:
        """An answer that was lost may have been a success: then the retry finds our own version in the way."""
        tries = self._tries(Priority.FOREGROUND)
        while True:
            try:
                return self.inner.put_if(key, body, etag)
            except StoreUnavailableError as exc:
                tries.wait_or_raise(exc)
            except PreconditionError:
                mine = self._is_now(key, body) if tries.failed else None
                if mine is None:
                    raise
                return Put(mine.etag, verified=False)

    def _is_now(self, key: str, body: bytes) -> ObjectInfo | None:
        """What is known of the object, if its bytes are these."""
        try:
            before = self.head(key)
            return before if self.get(key) == body and self.head(key).etag == before.etag else None
        except ObjectMissingError:
            return None

    def get(self, key: str, start: int = 0, length: int | None = None) -> Body:
        return self._try(Priority.FOREGROUND, lambda: self.inner.get(key, start, length))

    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        return self._going_on(
            lambda given: self.inner.stream(key, start + given, None if length is None else length - given)
        )

    def pieces(self, key: str, start: int, length: int) -> Iterator[Body]:
        return self._going_on(lambda given: self.inner.pieces(key, start + given, length - given))

    def _going_on(self, begin: Callable[[int], Iterator[Part]]) -> Iterator[Part]:
        """What `begin` gives from a byte on. Goes on where it broke; each piece that arrives gives it the whole
        deadline again."""
        tries = self._tries(Priority.FOREGROUND)
        given = 0
        while True:
            try:
                for piece in begin(given):
                    given += len(piece)
                    tries.progress()
                    yield piece
                self._budget.earn()
                return
            except StoreUnavailableError as exc:
                tries.wait_or_raise(exc)

    def head(self, key: str) -> ObjectInfo:
        return self._try(Priority.FOREGROUND, lambda: self.inner.head(key))

    def delete(self, keys: Sequence[str]) -> None:
        self._try(Priority.GARBAGE, lambda: self.inner.delete(keys))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Goes on where it broke if the store lists in ascending order (S3 does): else the error is final."""
        tries = self._tries(Priority.GARBAGE)
        last, ascending = "", True
        while True:
            try:
                for info in self.inner.list(prefix):
                    if tries.failed and info.key <= last:
                        continue
                    ascending = ascending and info.key > last
                    last = info.key
                    tries.progress()
                    yield info
                self._budget.earn()
                return
            except StoreUnavailableError as exc:
                if not ascending:
                    raise
                tries.wait_or_raise(exc)

    def close(self) -> None:
        self._closing.set()
        super().close()

    def _tries(self, default: Priority) -> _Tries:
        policy = self._policies[current_priority(default)]
        return _Tries(policy, self._budget, self._clock, self._pause, self._draw)

    def _try(self, default: Priority, action: Callable[[], T]) -> T:
        tries = self._tries(default)
        while True:
            try:
                result = action()
            except StoreUnavailableError as exc:
                tries.wait_or_raise(exc)
            else:
                self._budget.earn()
                return result


class _Tries:
    """The tries of one call: how many `failed`, when it gives up."""

    def __init__(
        self,
        policy: RetryPolicy,
        budget: RetryBudget,
        clock: Callable[[], float],
        pause: Callable[[float], bool],
        draw: Callable[[], float],
    ) -> None:
        self.failed = 0
        self._recent = 0  # failures since the last success
        self._policy = policy
        self._budget = budget
        self._clock = clock
        self._pause = pause
        self._draw = draw
        self._gives_up = clock() + policy.deadline

    def progress(self) -> None:
        """Something arrived: the deadline is that of the next piece."""
        self._recent = 0
        self._gives_up = self._clock() + self._policy.deadline

    def wait_or_raise(self, exc: StoreUnavailableError) -> None:
        """Wait for the next try. Raises `exc` at the deadline, and when the store is closed."""
        self.failed += 1
        self._recent += 1
        bound = min(self._policy.longest, self._policy.first * 2 ** min(self._recent - 1, 30))
        delay = self._draw() * bound if self._budget.spend() else self._policy.longest
        remaining = self._gives_up - self._clock()
        if remaining <= 0 or self._pause(min(delay, remaining)):
            raise exc
