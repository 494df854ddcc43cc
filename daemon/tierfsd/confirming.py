"""When what the kernel was told in good faith is proven: while nobody asks for anything, and soon.

A proof takes several system calls, which whoever has the mount server busy would wait for. So a pause of his is
waited for; where none comes in time, the kernel is told to ask again, which takes one.
"""

from __future__ import annotations

from collections.abc import Callable, Sized

START_SECONDS = 0.3  # from the first belief: most who look at many files are done by then
PAUSE_SECONDS = 0.005  # without a request, and between two lots of proofs
# With what is left until all are told, less than a second: so long hold attributes that are not proven, too.
END_SECONDS = 0.75
_LOT = 128
_MANY = 512  # that need no proof
_NEVER = float("inf")


class Confirming:
    """Of one server, in its one thread."""

    def __init__(
        self, believed: Sized, confirm: Callable[[int], None], disbelieve: Callable[[int], None]
    ) -> None:
        """`confirm` proves so many of the `believed`, and `disbelieve` has the kernel ask for so many again."""
        self._believed = believed
        self._confirm = confirm
        self._disbelieve = disbelieve
        self._asked = False
        self._end = _NEVER
        self.due = _NEVER  # CLOCK_MONOTONIC: `turn` is to be called by then

    def turn(self, now: float, served: int) -> None:
        """Call it between requests, with how many were served since the last call."""
        self._asked |= served > 0
        if not self._believed:
            self.due = self._end = _NEVER
        elif self.due == _NEVER:
            self.due, self._end = now + START_SECONDS, now + END_SECONDS
        elif now >= self._end:
            self._disbelieve(_MANY)
        elif now >= self.due:
            if not self._asked:
                self._confirm(_LOT)
            self._asked, self.due = False, now + PAUSE_SECONDS
