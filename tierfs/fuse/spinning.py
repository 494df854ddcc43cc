"""Whether to try again for a moment before sleeping: waking an idle CPU costs more than answering a request."""

from __future__ import annotations

import os

SPIN_SECONDS = 200e-6  # catches 19 of 20 requests of a burst
NEAR_SECONDS = 500e-6  # a sleep this short would have been caught: waking takes up to 300 µs of it
_MOST_CREDIT = 8
_MOST_VAIN = 7


class Spinner:
    """Spins while that catches a request more often than not; idle it costs nothing.

    A catch earns a credit, a vain spin costs one, so that a burst's end costs at most 8 spins (1.6 ms) and
    requests that come one by one, further apart than a spin, are soon waited for asleep. Where they come just
    after a spin has ended, each attempt in vain doubles what has to pass until the next.
    """

    def __init__(self, enabled: bool | None = None) -> None:
        """`enabled` None: where the process may use more than one CPU; on one, it keeps the caller off."""
        self.enabled = len(os.sched_getaffinity(0)) > 1 if enabled is None else enabled
        self._credit = 0
        self._spun = False  # in vain, just now
        self._vain = 0  # spins that ended shortly before the request came, since the last catch
        self._near = 0  # sleeps that a spin might have spared, since the last attempt

    @property
    def patience(self) -> float:
        """How long to spin now, in seconds."""
        return SPIN_SECONDS if self._credit > 0 else 0.0

    def hit(self) -> None:
        """A spin has caught a request."""
        self._credit = min(self._credit + 1, _MOST_CREDIT)
        self._vain = 0

    def miss(self) -> None:
        """A spin was in vain."""
        self._credit -= 1
        self._spun = True

    def slept(self, seconds: float) -> None:
        """A request has ended a sleep of this length."""
        near = self.enabled and seconds < NEAR_SECONDS
        if self._spun:
            # A longer sleep after it was a burst's end, and says nothing of the next burst.
            self._spun = False
            self._vain = min(self._vain + 1, _MOST_VAIN) if near else 0
        elif near:
            self._near += 1
            if self._near >> self._vain:
                self._near = 0
                self._credit = min(self._credit + 2, _MOST_CREDIT)
