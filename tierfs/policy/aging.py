"""How old things are, whatever clocks do; and how old garbage is: by a clock that no jump of another can hurry.

Believed time grows with the store's own dates, and never faster than this machine's clock of seconds since its
boot. Over a reboot the latter says nothing: then at most a day is believed, however long the machine was off.
What is believed is at most what has passed, so that nothing is destroyed too soon; it may be kept for longer.
"""

from __future__ import annotations

from dataclasses import dataclass

OVER_A_BOOT = 86400.0  # seconds


def is_young(moment: float, now: float, age: float) -> bool:
    """Whether a date is less than `age` seconds ago. One that lies further ahead, as somebody has set it or the
    clock was ahead then, says nothing: its file would stay young for years."""
    return abs(now - moment) < age


@dataclass(frozen=True, slots=True)
class Clock:
    """`believed` seconds have passed at least; `server` and `uptime` (seconds) were read then, in that boot."""

    believed: float = 0.0
    server: float = 0.0
    uptime: float = 0.0
    boot: str = ""

    def advanced(self, server: float, uptime: float, boot: str) -> Clock:
        """As of now: the store's date, and seconds since boot `boot` began."""
        if boot == self.boot:
            passed = min(server - self.server, uptime - self.uptime)
        else:
            # Dates may be cut to whole seconds.
            passed = min(server - self.server - 1.0, OVER_A_BOOT) if self.boot else 0.0
        return Clock(self.believed + max(0.0, passed), server, uptime, boot)
