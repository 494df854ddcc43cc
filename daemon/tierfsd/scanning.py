"""Which program asks for content, and whether it scans (tierfs/policy/scans.py)."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from tierfs import wire
from tierfs.heat_index import HeatIndex
from tierfs.policy.scans import Scans

_MOST = 4096  # threads that are remembered
_SURE_SECONDS = 5.0  # so long a number is taken for the same thread's without a look
Program = tuple[int, int]  # a process, and when it began: numbers are used again


class Scanners:
    """Used by several threads. Numbers are of threads, as the kernel gives them; 0: it is not known whose."""

    def __init__(self, heat: HeatIndex, ahead_for: Callable[[int], int] = lambda ino: 0) -> None:
        """`ahead_for` knows for which thread a file comes that nobody has asked for yet."""
        self._heat = heat
        self._ahead_for = ahead_for
        self._lock = threading.Lock()
        self._scans = Scans()
        self._programs: OrderedDict[int, tuple[float, Program]] = OrderedDict()
        self._found: list[tuple[int, float]] = []

    def brings(self, message: wire.Fetch) -> bool:
        """Whether this content is asked for by a scan."""
        thread = self._ahead_for(message.ino) if message.ordered else message.pid
        if not thread:
            return False
        now = time.monotonic()
        with self._lock:
            program = self._program(thread, now)
            if program is None:
                return False
            capacity = self._heat.capacity
            scans, known = self._scans.brings(program, message.ino, message.length, capacity, now)
            self._found += known
            return scans

    def found(self) -> list[tuple[int, float]]:
        """Files that were brought in by what has turned out to be a scan since this was last asked, each with
        how many seconds ago."""
        now = time.monotonic()
        with self._lock:
            found, self._found = self._found, []
        return [(ino, now - brought) for ino, brought in found]

    def counts(self, touch: wire.Touch) -> bool:
        """Whether this use of a file is one, and no part of a scan."""
        with self._lock:
            # Of a thread that has had nothing brought in nothing is known, and nothing need be.
            program = self._program(touch.pid, touch.last) if touch.pid in self._programs else None
            return program is None or self._scans.counts(program, touch.ino, self._heat.capacity, touch.last)

    def _program(self, thread: int, now: float) -> Program | None:
        """Whose the thread was at that moment. Uses are told seconds later: of one that has ended, and whose
        number is not used again, whose it was when it was last seen."""
        seen, program = self._programs.get(thread, (0.0, None))
        if program is None or now - seen > _SURE_SECONDS:
            program = program_of(thread) or program
            if program is None:
                return None
            self._programs[thread] = now, program
            if len(self._programs) > _MOST:
                self._programs.popitem(last=False)
        self._programs.move_to_end(thread)
        return program


def program_of(thread: int) -> Program | None:
    """Whose thread this is; None where it has ended."""
    try:
        with open(f"/proc/{thread}/status", "rb") as status:
            process = int(next(line for line in status if line.startswith(b"Tgid:")).split()[1])
        with open(f"/proc/{process}/stat", "rb") as stat:
            return process, int(stat.read().rpartition(b")")[2].split()[19])
    except (OSError, StopIteration):
        return None
