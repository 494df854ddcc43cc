"""Work on the store: bounded pools with priorities, and what is known of their pace.

A pool runs a fixed number of threads; the most urgent job goes first, jobs of equal urgency in order. Nothing
here knows what a job does. One flight a chunk is kept by filling.py, which owns the map of what is in the air.
"""

from __future__ import annotations

import collections
import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

from tierfs.errors import BusyError
from tierfs.spelling import shown
from tierfs.unawaited import log_failure

log = logging.getLogger("transfer")

T = TypeVar("T")
_RATE_SECONDS = 10.0


class Urgency(IntEnum):
    """Who goes first."""

    READER = 0  # somebody waits for these very bytes
    AHEAD = 1  # somebody will soon
    UPLOAD = 2
    GARBAGE = 3


def flow(
    items: Iterable[T],
    submit: Callable[[T], Future[None]],
    most: int,
    idle: Callable[[], None] = lambda: None,
    look_seconds: float | None = None,
) -> Iterator[tuple[T, Future[None]]]:
    """Submit them, `most` at a time, and give back each when it has ended, in the order in which they do.

    Of a million items no more than those are there at once. `idle` is called where none ends for a look's time.
    Where the items themselves fail, or nobody asks for more, those under way are waited for all the same.
    """
    ended: queue.SimpleQueue[tuple[T, Future[None]]] = queue.SimpleQueue()

    under_way: list[Future[None]] = []

    def begin(item: T) -> None:
        future = submit(item)
        under_way.append(future)
        future.add_done_callback(lambda future: ended.put((item, future)))

    def next_end() -> tuple[T, Future[None]]:
        while True:
            try:
                return ended.get(timeout=look_seconds)
            except queue.Empty:
                idle()

    try:
        for item in items:
            if len(under_way) == most:
                done = next_end()
                under_way.remove(done[1])
                yield done
            begin(item)
        while under_way:
            done = next_end()
            under_way.remove(done[1])
            yield done
    finally:
        # Each by itself: an interrupt may have come when its end had been taken, and was not counted yet.
        for future in under_way:
            over = _end_of(future)
            while not over.wait(look_seconds):
                idle()


def _end_of(future: Future[None]) -> threading.Event:
    """Set when it has ended, or was cancelled."""
    over = threading.Event()
    future.add_done_callback(lambda _: over.set())
    return over


class Pool:
    """Threads that run jobs by urgency. A job's exception ends in its future, never in the thread."""

    def __init__(self, threads: int, name: str) -> None:
        self._ready = threading.Condition()
        self._heap: list[tuple[int, int, Callable[[], Any], Future[Any]]] = []
        self._order = itertools.count()
        self._closed = False
        self._name = name
        self._idle = 0
        self._most = threads
        self._threads: list[threading.Thread] = []

    def submit(self, urgency: Urgency, run: Callable[[], T]) -> Future[T]:
        """Run this when its turn comes. Raises BusyError once the pool is closed, or if nobody can."""
        future: Future[T] = Future()
        with self._ready:
            if self._closed:
                raise BusyError("the daemon is stopping")
            self._begin_thread(len(self._heap) + 1)
            heapq.heappush(self._heap, (urgency, next(self._order), run, future))
            self._ready.notify()
        return future

    def post(self, urgency: Urgency, run: Callable[[], object]) -> Future[object]:
        """The same for what nobody waits for: the log says how it failed."""
        future = self.submit(urgency, run)
        future.add_done_callback(log_failure(log, f"work of the pool {self._name!r}"))
        return future

    def resize(self, threads: int) -> None:
        """Use so many from now on; those that are too many end after the job that they are at."""
        with self._ready:
            self._most = threads
            for _ in range(min(threads, len(self._heap))):
                self._begin_thread(len(self._heap))
            self._ready.notify_all()

    def _begin_thread(self, waiting: int) -> None:
        """Where more jobs wait than threads do, and there may be another. Under the lock."""
        if self._idle >= waiting or len(self._threads) >= self._most or self._closed:
            return
        thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError as exc:  # too many, for now: those that there are do it
            if not self._threads:
                raise BusyError("there are too many threads on this machine") from exc
            log.warning("the pool %r gets no other thread: %s", self._name, exc)
        else:
            self._threads.append(thread)

    @property
    def queued(self) -> int:
        """Jobs that no thread has taken yet."""
        return len(self._heap)

    def close(self) -> None:
        """Take no more jobs, cancel those not begun and wait for the others."""
        with self._ready:
            self._closed = True
            for _, _, _, future in self._heap:
                future.cancel()
            self._heap.clear()
            self._ready.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._ready:
                self._idle += 1
                while not self._heap and not self._closed and len(self._threads) <= self._most:
                    self._ready.wait()
                self._idle -= 1
                if len(self._threads) > self._most and not self._closed:
                    self._threads.remove(threading.current_thread())
                    self._ready.notify()  # this one may have been woken for a job
                    return
                if not self._heap:
                    return
                _, _, run, future = heapq.heappop(self._heap)
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(run())
            except BaseException as error:
                future.set_exception(error)
            # The frame must not keep a chunk alive until the next job.
            del run, future


class Rate:
    """Bytes a second over the last seconds. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._marks: collections.deque[tuple[float, int]] = collections.deque()
        self._sum = 0

    def add(self, count: int) -> None:
        """So many bytes have passed now."""
        with self._lock:
            self._marks.append((time.monotonic(), count))
            self._sum += count
            self._forget()

    def per_second(self) -> float:
        """The present rate."""
        with self._lock:
            self._forget()
            return self._sum / _RATE_SECONDS

    def _forget(self) -> None:
        limit = time.monotonic() - _RATE_SECONDS
        while self._marks and self._marks[0][0] < limit:
            self._sum -= self._marks.popleft()[1]


@dataclass(frozen=True, slots=True)
class Trouble:
    """One error, for status. `at` in seconds since the epoch."""

    at: float
    what: str
    ino: int = 0


class Troubles:
    """The newest errors, bounded. An equal one replaces the older."""

    def __init__(self, most: int = 100) -> None:
        self._lock = threading.Lock()
        self._most = most
        self._list: dict[tuple[int, str], Trouble] = {}

    def note(self, what: str, ino: int = 0) -> None:
        """Keep this error for status and write it to the log, unless it has just been written."""
        now, what = time.time(), shown(what)
        with self._lock:
            before = self._list.pop((ino, what), None)
            self._list[ino, what] = Trouble(now, what, ino)
            while len(self._list) > self._most:
                del self._list[next(iter(self._list))]
        if before is None or now - before.at > 60:
            log.error("%s", what)

    def solved(self, ino: int) -> None:
        """What was wrong with this inode is over."""
        with self._lock:
            for key in [key for key in self._list if key[0] == ino and ino]:
                del self._list[key]

    def list(self) -> list[Trouble]:
        """Oldest first."""
        with self._lock:
            return list(self._list.values())

    def of(self, ino: int) -> str:
        """The newest error about this inode, "" without one."""
        with self._lock:
            return next((t.what for t in reversed(self._list.values()) if t.ino == ino), "")
