"""How many ranges of a file to have on their way at once: as few as are as quick as many.

Many are quicker where each connection has a limit of its own, as with most stores far away. Where few fill the
link, or keep a processor busy, more of them only share it: the first of them, which the reader waits for, comes
late, and what is on its way fills memory.

    few, measured -> quick by themselves: few
                  -> many, measured -> much quicker: many, else few          (and anew after a while)
"""

from __future__ import annotations

import threading

FEW, MANY = 4, 16
AMPLE = 1e9  # bytes a second: what a processor takes in, about
_BETTER = 1.2  # times as quick as few, for many to be worth it
_BEFORE = 32 << 20  # bytes that were on their way before it was so many
_MEASURED = 64 << 20  # bytes
_SECONDS = 300.0  # until it is measured anew
_PAUSE = 1.0  # a gap of so long is no matter of the link


class Breadth:
    """Of all files together: they share the link. Safe to use from several threads."""

    def __init__(self) -> None:
        self.count = FEW
        self._lock = threading.Lock()
        self._few = 0.0  # bytes a second by few; 0: not known
        self._left = _BEFORE  # bytes until the measuring begins, or (once it has) ends
        self._began = 0.0  # 0: it has not
        self._last = 0.0
        self._again = 0.0  # 0: it is being measured

    def came(self, size: int, under_way: int, now: float) -> None:
        """So many bytes have come, of a file of which so many ranges were under way. `now`: CLOCK_MONOTONIC."""
        if under_way != self.count:
            return  # it is the reader that sets the pace, or what there is left of it; or so many are not yet
        with self._lock:
            if self._again:
                if now < self._again:
                    return
                self._measure(FEW)
                self._again = 0.0
            if now - self._last > _PAUSE:
                self._measure(self.count)
            self._last = now
            self._left -= size
            if self._left > 0:
                return
            if not self._began:
                self._began, self._left = now, _MEASURED
                return
            self._decide((_MEASURED - self._left) / max(now - self._began, 1e-6), now)

    def _measure(self, count: int) -> None:
        self.count, self._left, self._began = count, _BEFORE, 0.0

    def _decide(self, rate: float, now: float) -> None:
        if self.count == FEW and rate < AMPLE:
            self._few = rate
            self._measure(MANY)
            return
        if self.count == MANY and rate < self._few * _BETTER:
            self.count = FEW
        self._again = now + _SECONDS
