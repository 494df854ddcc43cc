"""Heat: how often a file has been used lately, on a clock that counts turnover instead of time.

The turnover clock stands at V = bytes admitted to the local tier (fetched or newly written) / its capacity: it
runs as fast as the tier's content is replaced and stands still when nothing is. A use at V weighs 2^(V/H), so
that older uses count half as much every H turnovers; L is log2 of the sum of weights. In the log domain
files that nobody touches never change their order, so nothing ever needs ageing.

Pure: time and the clock are arguments. The same class serves the daemon and the replay of traces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

HALF_LIFE = 0.5  # turnovers
BURST = 0.1  # uses within this many turnovers count once: a script's thousand opens are one use ...
BURST_SECONDS = 3600.0  # ... unless so long apart: where little is admitted, days of work are more than one
PROBATION_SHARE = 0.10  # of the local bytes; beyond it files used once go first, oldest first
DISPLAY_HALF_LIFE = 7 * 86400.0  # seconds, of the heat that people see and age rules use
REQUEST_SECONDS = 0.060  # cost of a miss: one request ...
BYTES_PER_SECOND = 50e6  # ... and the transfer
NEVER = -(2.0**100)  # exact in single precision, as which clocks are kept


@dataclass(frozen=True, slots=True)
class Heat:
    """What is kept of one file. `level` is L, `clock` V at the last counted use, `last` wall seconds of any.

    `shown` is the decayed number of uses at `last`. On `probation`: used once since it was admitted. `lent`:
    here only because a scan (scans.py) read it, at `last`; that is no use, and the first by anybody else admits
    it.
    """

    level: float = NEVER
    clock: float = NEVER
    last: float = 0.0
    shown: float = 0.0
    size: int = 0
    probation: bool = True
    lent: bool = False


def add_use(level: float, clock: float) -> float:
    """L after one more use at V = `clock`."""
    weight = clock / HALF_LIFE
    if level <= NEVER:
        return weight
    return max(level, weight) + math.log2(1.0 + 2.0 ** -min(abs(level - weight), 1000.0))


def touched(heat: Heat, clock: float, now: float, count: int, size: int, local: bool = True) -> Heat:
    """After `count` uses around wall time `now` (seconds). A clock jump backwards decays nothing.

    A `local` file leaves probation with its second use; one that is not, or is only lent, will be on probation
    when it comes, unless it was used less than a turnover ago.
    """
    if heat.lent:
        heat, local = replace(heat, lent=False), False
    shown = heat.shown * decay(now - heat.last) + count
    again = heat.clock > NEVER and clock - heat.clock < BURST and now - heat.last < BURST_SECONDS
    if again:
        return replace(heat, last=max(now, heat.last), shown=shown, size=size)
    level = add_use(heat.level, clock)
    probation = heat.probation and heat.clock <= NEVER if local else clock - heat.clock >= 1.0
    return Heat(level, clock, max(now, heat.last), shown, size, probation)


def admitted(heat: Heat | None, clock: float, now: float, size: int) -> Heat:
    """After the file came to the local disk, which is a use; told before or after that use itself."""
    return touched(heat or Heat(), clock, now, 0, size, local=False)


def brought(heat: Heat | None, size: int) -> Heat:
    """After the file came before anybody had asked for it, which is no use."""
    return replace(heat or Heat(), size=size, probation=True)


def lent(heat: Heat | None, now: float, size: int) -> Heat:
    """After a scan has brought the file to the local disk: what is known of its uses stays as it is."""
    before = heat or Heat()
    shown = before.shown * decay(now - before.last)
    return replace(before, last=max(now, before.last), shown=shown, size=size, probation=True, lent=True)


def seeded(age: float, clock: float, now: float, size: int) -> Heat:
    """A file that was here before TierFS, last used `age` seconds ago: one use, a turnover a month ago."""
    past = clock - max(age, 0.0) / (30 * 86400.0)
    return Heat(add_use(NEVER, past), past, now - max(age, 0.0), decay(age), size, probation=False)


def decay(seconds: float) -> float:
    """The share of displayed heat that is left after so many seconds."""
    return float(0.5 ** (max(seconds, 0.0) / DISPLAY_HALF_LIFE))


def shown_at(heat: Heat, now: float) -> float:
    """The heat that people see: uses, half of them forgotten every seven days."""
    return heat.shown * decay(now - heat.last)


def score(heat: Heat, by_bytes: bool = False) -> float:
    """The order of victims: lowest first. `by_bytes`: a miss costs its bytes, not its time (egress is paid)."""
    if by_bytes or heat.size <= 0:
        return heat.level
    cost = REQUEST_SECONDS + heat.size / BYTES_PER_SECOND
    return heat.level + math.log2(cost / heat.size)
