"""Whether the mover gets on, while somebody waits for it.

One that stands still in the middle of a punch (stopped, or caught in a call that does not return) keeps a file
shut. To end its guard on a timer would not be safe: it may go on between its last look and the punch. So what
is noticed here is told to the supervisor, which ends the process; only the link to the next one voids guards.
"""

from __future__ import annotations

import os

SILENCE_SECONDS = float(
    os.environ.get("TIERFS_SILENCE_SECONDS", "20")
)  # after a question; tests are in a hurry
LOADING_SECONDS = 6 * SILENCE_SECONDS  # until it has said anything at all
GUARD_SECONDS = 3 * SILENCE_SECONDS  # of one guard, from the first who waits: a punch takes milliseconds


class Vigil:
    """Of one mover after another. Times are seconds of CLOCK_MONOTONIC."""

    def __init__(self) -> None:
        self.pid = 0  # of the mover, once it has said it
        self._asked = 0.0  # when the last question went out; 0: there is none
        self._answered = True
        self._told = False
        self._guards: dict[int, float] = {}  # inode -> since when somebody has waited for the end of its guard

    def begin(self) -> None:
        """There is another mover, or none."""
        self.pid = 0
        self._asked, self._answered, self._told = 0.0, True, False
        self._guards.clear()

    def heard(self) -> None:
        """It has said something."""
        self._answered = True

    def wait_for_guard(self, ino: int, now: float) -> None:
        """Somebody waits for the end of this inode's guard."""
        self._guards.setdefault(ino, now)

    def guard_ended(self, ino: int) -> None:
        """Nobody waits for that any more."""
        self._guards.pop(ino, None)

    @property
    def guards_waited_for(self) -> bool:
        """Somebody waits for the end of a guard."""
        return bool(self._guards)

    def question_due(self, now: float) -> bool:
        """It should be asked whether it is there. That is noted as done."""
        if not self._answered or now - self._asked < SILENCE_SECONDS:
            return False
        self._asked, self._answered = now, False
        return True

    def problem(self, now: float) -> str:
        """Why it must be ended, once; empty while there is no reason."""
        if self._told:
            return ""
        patience = SILENCE_SECONDS if self.pid else LOADING_SECONDS
        reason = ""
        if not self._answered and now - self._asked > patience:
            reason = f"has not answered for {patience:.0f} s"
        elif self._guards and now - min(self._guards.values()) > GUARD_SECONDS:
            reason = f"has kept a file shut for {GUARD_SECONDS:.0f} s"
        self._told = bool(reason)
        return reason
