"""Scans: who reads much of what is away, once, as a `grep -r`, a backup or a virus scanner does.

Known by what is brought in and by nothing else, not by name, so that who reads little is never taken for one: a
scan has lately brought in a share of the local tier, or thousands of files. What comes for a scan is lent, and
so is what it had brought before it was known, unless somebody has used that since. Its other uses of files
count for nothing. Who goes back to a file after more than five minutes uses that file, whatever else they do;
and who often does that works with files, as a server for others may, and is no scan.

Pure: time is an argument, and `who` is whatever tells one program that runs from another.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

SCAN_SHARE = 0.05  # of the local tier ...
LEAST_FILES = 8  # ... in at least so many files: a few large ones are somebody's work
SCAN_FILES = 4096
FORGOTTEN_SECONDS = 3600.0  # half of what was brought in is forgotten
RETURN_SECONDS = 300.0  # who uses a file so long after it came has come back to it
MOST_RETURNS = 0.05  # a scan goes back to fewer of its files
_LATEST_RETURN = 7200.0  # what was read longer ago is another scan's
LENT_SHARE = 0.05  # of the local bytes: so much of what is lent leaves as late as what is on probation ...
LENT_SECONDS = 86400.0  # ... but no later than this, once somebody else needs the room
_MOST = 256  # programs that are remembered


@dataclass(slots=True)
class Meter:
    """What one program has brought in and gone back to, decayed to `at`, and the newest of it with the time."""

    files: float = 0.0
    bytes: float = 0.0
    returns: float = 0.0
    at: float = 0.0
    brought: OrderedDict[int, float] = field(default_factory=OrderedDict)

    def add(self, file: int, size: int, now: float) -> None:
        """It brings in `size` more bytes of this file."""
        self._decay(now)
        self.returns += self._returns_to(file, now)
        self.files += now - self.brought.get(file, -math.inf) >= _LATEST_RETURN
        self.bytes += size
        self.brought[file] = now
        self.brought.move_to_end(file)
        if len(self.brought) > SCAN_FILES:
            self.brought.popitem(last=False)

    def scans(self, capacity: int, now: float) -> bool:
        """It has brought in more than who only works with files."""
        self._decay(now)
        much = self.files >= LEAST_FILES and self.bytes >= SCAN_SHARE * capacity
        return (much or self.files >= SCAN_FILES) and self.returns < MOST_RETURNS * self.files

    def uses(self, file: int, now: float) -> bool:
        """It opens the file; whether that is to go back to it."""
        self._decay(now)
        returned = self._returns_to(file, now)
        self.returns += returned
        return returned

    def _returns_to(self, file: int, now: float) -> bool:
        brought = self.brought.get(file)
        return brought is not None and RETURN_SECONDS <= now - brought < _LATEST_RETURN

    def _decay(self, now: float) -> None:
        kept = 0.5 ** (max(now - self.at, 0.0) / FORGOTTEN_SECONDS)
        self.files, self.bytes, self.returns = self.files * kept, self.bytes * kept, self.returns * kept
        self.at = max(now, self.at)


class Scans:
    """Who scans now. `capacity` is that of the local tier, in bytes."""

    def __init__(self) -> None:
        self._meters: OrderedDict[Hashable, Meter] = OrderedDict()

    def brings(
        self, who: Hashable, file: int, size: int, capacity: int, now: float
    ) -> tuple[bool, list[tuple[int, float]]]:
        """`who` has `size` bytes of a file brought in. Whether that is for a scan, and which others have turned
        out just now to have been, and when."""
        meter = self._meters.setdefault(who, Meter(at=now))
        self._meters.move_to_end(who)
        if len(self._meters) > _MOST:
            self._meters.popitem(last=False)
        before = meter.scans(capacity, now)
        meter.add(file, size, now)
        scans = meter.scans(capacity, now)
        known = [each for each in meter.brought.items() if each[0] != file] if scans and not before else []
        return scans, known

    def counts(self, who: Hashable, file: int, capacity: int, now: float) -> bool:
        """Whether this use of a file by `who` is one, and no part of a scan."""
        meter = self._meters.get(who)
        return meter is None or meter.uses(file, now) or not meter.scans(capacity, now)
