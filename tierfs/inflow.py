"""Content on its way in, as the mount server sees it: which leaves are here, which are asked for, who waits.

The mover fetches and writes; this side only asks, keeps the bits and wakes the waiters. A flight is one
request to the mover. Flights outlive a mover: a new one is asked for all that are still open.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from tierfs import wire
from tierfs.model import LEAF, Stub, leaf_count
from tierfs.passages import Passages
from tierfs.waits import Blocked, Wait

log = logging.getLogger("gate")

FIRST_AHEAD = 8 << 20  # read-ahead of a reader that has just proven sequential, bytes
SMALL_AHEAD = 2 << 20  # the same by small reads: it may be about a head only
GROWTH = 4  # at each step: a link of 1 GB/s and 20 ms is filled by the second
MOST_AHEAD = 128 << 20  # sixteen ranges of 8 MiB, or twice the four of 16 MiB that are in the air
AHEAD_SECONDS = 10.0  # at most, as fast as it went last: on a slow link the next bytes must not wait for all
LARGE_READ = 128 << 10  # programs that read whole files ask for at least so much at once
SLACK = 1 << 20  # the kernel's own read-ahead arrives a little out of order
FAILED_SECONDS = 0.5  # so long the next read of what was waited for in vain fails at once: see Content.failed
LONG_SECONDS = 1.0  # is a wait
NEXT = 4 << 20  # bytes: of what is read ahead so much is on its way at once, whatever the size of the ranges


@dataclass(slots=True)
class Flight:
    """One request to the mover: bytes [start, end) of the file."""

    id: int
    start: int
    end: int
    whole: bool
    ahead: bool
    passable: bool  # only readers wait for it: content may be handed past a full disk
    ordered: bool = False  # for an order: who waits here asks for himself
    pid: int = 0  # as in wire.Fetch: nobody else waits behind a scan


class Waiting(NamedTuple):
    """Who waits until bytes [start, end) are local, or (`passable`) can be read anyhow."""

    start: int
    end: int
    wait: Wait
    passable: bool
    since: float  # seconds of CLOCK_MONOTONIC


class Failure(NamedTuple):
    """Somebody has waited in vain for bytes [start, end)."""

    start: int
    end: int
    errno: int
    reason: str
    until: float  # seconds of CLOCK_MONOTONIC


class Content:
    """The state of one stub or partial file while somebody has it open or something is being fetched.

    `present` has one byte a leaf. `settled` is awaited by writers: stub attribute durably gone. `failed`: the
    kernel reads ahead, and asks once more, page by page, for what has failed: its caller would wait twice.
    """

    __slots__ = (
        "closing", "failed", "flights", "idle", "missing", "opener", "passages", "present", "settled", "shown",
        "size", "stub", "timed", "waits", "whole_asked",
    )  # fmt: skip

    def __init__(self, stub: Stub, size: int, bits: bytes | None) -> None:
        """`bits`: the leaves known to be local, one bit each, least significant first; None: none."""
        self.stub = stub
        self.size = size
        self.shown = (0, 0)  # mtime and ctime (ns) that the file showed when it was opened
        self.opener: int | None = None  # the thread that has opened it; 0: several, or not known which
        self.believe(bits)
        self.flights: list[Flight] = []
        self.waits: list[Waiting] = []
        self.passages = Passages()
        self.timed: set[Wait] = set()  # those with a deadline, which moves while content arrives
        self.settled = Wait()
        self.failed: list[Failure] = []
        self.idle: Wait | None = None
        self.closing = False  # a truncation waits for the flights to end: nothing new is asked for
        self.whole_asked = False

    def believe(self, bits: bytes | None) -> None:
        """These leaves are local, and no others; `bits` as above."""
        count = leaf_count(self.size)
        self.present = bytearray(count)
        if bits is not None:
            for leaf in range(min(count, len(bits) * 8)):
                if bits[leaf >> 3] >> (leaf & 7) & 1:
                    self.present[leaf] = 1
        self.missing = self.present.count(0)

    def opened_by(self, pid: int) -> None:
        """A thread opens the file, perhaps for the second time for having had to wait."""
        self.opener = pid if self.opener in (None, pid) else 0

    def fail(self, hit: list[Waiting], error: int, reason: str) -> None:
        """These have waited in vain; whoever asks for the same just now need not."""
        now = time.monotonic()
        self.waits = [each for each in self.waits if each not in hit]
        self.failed = [failure for failure in self.failed if failure.until > now]
        if error != errno.ECANCELED and not self.small:  # a small file comes in OPEN, which is asked for once
            until = now + FAILED_SECONDS
            long = [each for each in hit if each.since <= now - LONG_SECONDS]
            self.failed += [Failure(each.start, each.end, error, reason, until) for each in long]
        for each in hit:
            each.wait.fire(error, reason)

    def failure(self, start: int, end: int) -> Failure | None:
        """That of what bytes [start, end) are a part of, if it was just now."""
        if not self.failed:
            return None
        now = time.monotonic()
        fitting = (failure for failure in self.failed if failure.start <= start and failure.end >= end)
        return next((failure for failure in fitting if failure.until > now), None)

    @property
    def settling(self) -> bool:
        """All is local; the mover is making that final."""
        return self.missing == 0 and not self.settled.done

    @property
    def small(self) -> bool:
        """The file is one chunk: fetched whole, in OPEN."""
        return self.size <= 1 << self.stub.chunk_shift

    def lacks(self, start: int, end: int) -> tuple[int, int] | None:
        """The smallest leaf-aligned range that covers what is missing of [start, end); None: nothing is."""
        low, high = start // LEAF, leaf_count(min(end, self.size))
        first = self.present.find(0, low, high)
        if first < 0:
            return None
        last = self.present.rfind(0, low, high)
        return first * LEAF, min((last + 1) * LEAF, self.size)

    def readable(self, start: int, end: int) -> bool:
        """A read of [start, end) has all it needs, here or handed over in memory."""
        gap = self.lacks(start, end)
        return gap is None or self.passages.cover(*gap)

    def comes_next(self, start: int, end: int) -> bool:
        """Read-ahead is bringing bytes [start, end): some of it has come, and little else comes before them.

        To ask for them as well would be as much work as a piece of content. For those of `passable` who still
        wait at the next turn of the clock that is done even so (`Inflow.expire`): read-ahead is not passable.
        """
        for flight in self.flights:
            if flight.ahead and flight.start <= start and flight.end >= end:
                low = flight.start // LEAF
                first = self.present.find(0, low)
                return first > low and start - first * LEAF < NEXT
        return False

    def filled_in(self, data: bytes, offset: int) -> bytes:
        """`data`, read from the file at `offset` after `readable`, with what is not in the file."""
        gap = self.lacks(offset, offset + len(data))
        return data if gap is None else self.passages.fill_in(data, offset, *gap)

    def arrived(self, start: int, end: int) -> None:
        """[start, end) is local now."""
        low, high = start // LEAF, leaf_count(min(end, self.size))
        self.missing -= self.present.count(0, low, high)
        self.present[low:high] = b"\1" * (high - low)


class ReadAhead:
    """How far ahead of one handle to fetch: nothing at first, then ever more while reading is sequential.

    A large first read at the file's beginning is taken for the start of a sequential one: what only sniffs at a
    file's head asks for less.
    """

    __slots__ = ("_ahead_end", "_asked", "_expect", "_last", "_window")

    def __init__(self) -> None:
        self._expect = 0
        self._window = 0
        self._ahead_end = 0
        self._asked = (0, 0.0)  # the last time: how far had been read, and when
        self._last = (-1, -1)

    def advance(self, offset: int, end: int, size: int) -> tuple[int, int] | None:
        """Note a read of [offset, end); the range to ask for now, if any. A repeated read counts once."""
        if (offset, end) == self._last:
            return None
        self._last = offset, end
        began = offset == 0 and end >= LARGE_READ
        sequential = self._expect and self._expect - SLACK <= offset <= self._expect + SLACK
        if not sequential and not began:
            self._expect, self._window, self._ahead_end = end, 0, end
            return None
        self._expect = max(self._expect, end)
        self._ahead_end = max(self._ahead_end, end)
        if self._ahead_end >= size or self._ahead_end - end > self._window:
            return None
        now = time.monotonic()
        if self._window:
            read, took = self._expect - self._asked[0], max(now - self._asked[1], 1e-6)
            most = max(int(read / took * AHEAD_SECONDS), SMALL_AHEAD)
            self._window = min(self._window * GROWTH, MOST_AHEAD, most)
        else:
            self._window = FIRST_AHEAD if end - offset >= LARGE_READ else SMALL_AHEAD
        self._asked = self._expect, now
        start, self._ahead_end = self._ahead_end, min(self._ahead_end + self._window, size)
        return start, self._ahead_end


class Inflow:
    """Asks the mover for content and wakes those who wait for it."""

    def __init__(self, post: Callable[[wire.Message, tuple[int, ...]], None]) -> None:
        """`post` hands a message with descriptors to the mover, now or when there is one again."""
        self._post = post
        self._next = 0
        self._contents: dict[int, tuple[Content, int]] = {}  # ino -> its content and an O_PATH descriptor
        self._timed: set[Wait] = set()
        self.fetch_timeout = 60.0

    def track(self, ino: int, content: Content, opath: int) -> None:
        """From now on messages about `ino` concern this content; `opath` stays the caller's."""
        self._contents[ino] = content, opath

    def untrack(self, ino: int) -> None:
        """The file is settled or nobody cares any more."""
        entry = self._contents.pop(ino, None)
        if entry is not None:
            entry[0].passages.close()

    def need(self, ino: int, start: int, end: int, *, passable: bool = False) -> None:
        """Raises Blocked until [start, end) is local, or (`passable`) `Content.readable`; OSError where that
        has failed just now."""
        content, _ = self._contents[ino]
        gap = content.lacks(start, end)
        if gap is None or (passable and content.passages.cover(*gap)):
            return
        failure = content.failure(*gap)
        if failure is not None:
            raise OSError(failure.errno, failure.reason)
        wait = self._timed_wait(content)
        content.waits.append(Waiting(*gap, wait, passable, time.monotonic()))
        coming = [f for f in content.flights if _brings(f, *gap, passable) and not (f.ahead or f.ordered)]
        asked = any(flight.pid in (0, content.opener or 0) for flight in coming)
        if not asked and not (passable and content.comes_next(*gap)):
            self._ask(ino, *gap, whole=content.small, ahead=False, passable=passable)
        raise Blocked(wait)

    def need_settled(self, ino: int) -> None:
        """Raises Blocked until the whole file is local and its stub attribute durably gone."""
        content, _ = self._contents[ino]
        if content.settled.done:
            return
        if not content.whole_asked:
            self._ask(ino, 0, content.size, whole=True, ahead=False)
            content.whole_asked = True
        wait, settled = self._timed_wait(content), content.settled
        settled.add(lambda: wait.fire(settled.errno, settled.reason))
        raise Blocked(wait)

    def bring(self, ino: int) -> None:
        """Ask for all of it, for an order; nobody waits here."""
        content, _ = self._contents[ino]
        asked = content.whole_asked or any(flight.whole for flight in content.flights)
        if not content.settled.done and not asked:
            self._ask(ino, 0, content.size, whole=True, ahead=False, ordered=True)

    def need_idle(self, ino: int) -> None:
        """Raises Blocked until the mover has given up everything it does with this file's blocks."""
        content, _ = self._contents[ino]
        if content.settling:
            self.need_settled(ino)
        if not content.flights:
            content.closing = False
            return
        content.closing = True
        for flight in content.flights:
            self._post(wire.CancelFetch(flight.id), ())
        if content.idle is None or content.idle.done:
            content.idle = self._timed_wait(content)
        raise Blocked(content.idle)

    def ahead(self, ino: int, start: int, end: int) -> None:
        """Ask for [start, end) without waiting for it."""
        content, _ = self._contents[ino]
        gap = content.lacks(start, end)
        if gap is None or content.closing:
            return
        if not any(f.start <= gap[0] and f.end >= gap[1] for f in content.flights):
            self._ask(ino, *gap, whole=False, ahead=True)

    def busy(self, ino: int) -> bool:
        """The mover may still touch this file's blocks, or somebody waits for them."""
        entry = self._contents.get(ino)
        if entry is None:
            return False
        content = entry[0]
        return bool(content.flights or content.settling) or any(wait.wanted for wait in content.timed)

    def _timed_wait(self, content: Content) -> Wait:
        wait = Wait(time.monotonic() + self.fetch_timeout)
        self._timed.add(wait)
        content.timed.add(wait)

        def fired() -> None:
            self._timed.discard(wait)
            content.timed.discard(wait)

        wait.keeper = fired
        return wait

    def _ask(
        self,
        ino: int,
        start: int,
        end: int,
        *,
        whole: bool,
        ahead: bool,
        passable: bool = False,
        ordered: bool = False,
    ) -> None:
        self._next += 1
        content, _ = self._contents[ino]
        pid = 0 if ordered else content.opener or 0
        flight = Flight(self._next, start, end, whole, ahead, passable, ordered, pid)
        content.flights.append(flight)
        try:
            self._send(ino, flight)
        except OSError:
            content.flights.remove(flight)  # nobody will end it
            raise

    def _send(self, ino: int, flight: Flight) -> None:
        content, opath = self._contents[ino]
        message = wire.Fetch(
            id=flight.id,
            ino=ino,
            stub=content.stub.pack(),
            size=content.size,
            start=flight.start,
            length=flight.end - flight.start,
            whole=flight.whole,
            ahead=flight.ahead,
            passable=flight.passable,
            ordered=flight.ordered,
            mtime=content.shown[0],
            ctime=content.shown[1],
            pid=flight.pid,
        )
        self._post(message, (opath,))

    # --- what the mover says ------------------------------------------------------------------------------

    def filled(self, message: wire.Filled) -> None:
        """Leaves are here: wake those who have all they need."""
        entry = self._contents.get(message.ino)
        if entry is None:
            return
        content = entry[0]
        content.arrived(message.start, message.start + message.length)
        self._is_coming(content)

    def passed(self, message: wire.Passing, fd: int) -> None:
        """Content that has no room on the disk: for those who only read. `fd` stays the caller's."""
        entry = self._contents.get(message.ino)
        # It may come late, of what the file held before it was cut.
        if entry is None or entry[0].stub.pack() != message.stub:
            return
        entry[0].passages.take(message.start, message.start + message.length, os.dup(fd))
        self._is_coming(entry[0])

    def _is_coming(self, content: Content) -> None:
        # Whoever waits for more than the link brings in the time of one read still sees it coming.
        deadline = time.monotonic() + self.fetch_timeout
        for wait in content.timed:
            wait.deadline = deadline
        self._wake(content)

    def _wake(self, content: Content) -> None:
        ready = [
            each
            for each in content.waits
            if content.lacks(each.start, each.end) is None
            or (each.passable and content.readable(each.start, each.end))
        ]
        content.waits = [each for each in content.waits if each not in ready and not each.wait.done]
        for each in ready:
            each.wait.fire()

    def ended(self, message: wire.FetchEnd) -> None:
        """A flight has landed or failed. What is still awaited and nobody fetches is asked for again."""
        entry = self._contents.get(message.ino)
        if entry is None:
            return
        content = entry[0]
        flight = next((f for f in content.flights if f.id == message.id), None)
        if flight is None:
            return
        content.flights.remove(flight)
        if message.errno and not (flight.ahead or flight.ordered) and not content.closing:
            self._fail(content, flight, message)
        if message.errno and flight.whole and not flight.ordered:
            content.whole_asked = False  # cancelled, or failed: whoever still waits for all of it asks again
        self._wake(content)
        if not content.closing:
            self._ask_again(message.ino, content)
        elif not content.flights and content.idle is not None:
            # Until the truncation has run again nothing new is asked for, or it would never find it idle.
            content.closing = content.idle.wanted
            content.idle.fire()

    def _ask_again(self, ino: int, content: Content) -> None:
        """Ask for what is awaited and not in the air (its flight was read-ahead, or was cancelled)."""
        with suppress(OSError):  # no descriptor to send: at the next turn
            if content.settled.wanted and not content.whole_asked:
                self._ask(ino, 0, content.size, whole=True, ahead=False)
                content.whole_asked = True
            for start, end, _, passable, _ in content.waits:
                if not any(_brings(f, start, end, passable) for f in content.flights):
                    self._ask(ino, start, end, whole=content.small, ahead=False, passable=passable)

    def _fail(self, content: Content, flight: Flight, message: wire.FetchEnd) -> None:
        hit = [each for each in content.waits if each.start < flight.end and each.end > flight.start]
        if message.errno == errno.ENOSPC and not flight.passable:
            hit = [each for each in hit if not each.passable]  # those are asked for in another way
        content.fail(hit, message.errno, message.reason)
        if flight.whole and not content.settled.done:
            failed, content.settled, content.whole_asked = content.settled, Wait(), False
            failed.fire(message.errno, message.reason)

    def settled(self, message: wire.Settled) -> None:
        """The file is resident for good, or (errno) could not be made so."""
        entry = self._contents.get(message.ino)
        if entry is None:
            return
        content = entry[0]
        if message.errno:
            failed, content.settled, content.whole_asked = content.settled, Wait(), False
            failed.fire(message.errno, message.reason)
            return
        content.arrived(0, content.size)
        content.settled.fire()
        self._wake(content)

    def limit(self, fetch_timeout: float) -> None:
        """How long content may take, in seconds, also for those who have waited since before this was known."""
        self.fetch_timeout = fetch_timeout
        latest = time.monotonic() + fetch_timeout
        for wait in self._timed:
            if wait.deadline is not None:
                wait.deadline = min(wait.deadline, latest)

    def new_mover(self) -> None:
        """Ask a new mover for everything that is still open; settling starts over there too."""
        for ino, (content, _) in list(self._contents.items()):
            for flight in content.flights:
                self._send(ino, flight)
            if content.settling and not content.flights:
                self._ask(ino, 0, content.size, whole=True, ahead=False)

    @property
    def waiting(self) -> bool:
        """Somebody waits with a deadline."""
        return bool(self._timed)

    def expire(self, now: float) -> list[int]:
        """Let the waits fail whose deadline has passed; the inodes that nobody may wait for any more."""
        reason = f"no content within {self.fetch_timeout:g} s"
        expired = {wait for wait in self._timed if _is_late(wait, now)}
        late = [ino for ino, (content, _) in self._contents.items() if not content.timed.isdisjoint(expired)]
        for ino in late:
            content, _ = self._contents[ino]
            content.fail([each for each in content.waits if each.wait in expired], errno.EIO, reason)
        for wait in expired:
            log.warning("a read gave up: %s", reason)
            wait.fire(errno.EIO, reason)
        for ino, (content, _) in list(self._contents.items()):
            if content.idle is not None and content.idle.done and (content.idle.deadline or 0.0) <= now:
                content.closing = False
            content.waits = [each for each in content.waits if not each.wait.done]
            content.passages.expire(now)
            if not content.closing:
                self._ask_again(ino, content)
        return late

    def void(self, ino: int) -> None:
        """The content was truncated away: those who wait for it look again and find an empty file."""
        content, _ = self._contents.pop(ino)
        content.passages.close()
        waits, content.waits = content.waits, []
        content.settled.fire()
        for each in waits:
            each.wait.fire()


def _brings(flight: Flight, start: int, end: int, passable: bool) -> bool:
    """Whether bytes [start, end) come with it, also past a full disk where that is enough (`passable`)."""
    return flight.start <= start and flight.end >= end and (flight.passable or not passable)


def _is_late(wait: Wait, now: float) -> bool:
    return wait.deadline is not None and wait.deadline <= now
