"""Which files of a directory come next, and whether what is brought before it is asked for is used.

Programs go through a directory in one of three orders: as a person counts, by bytes, or as the directory lists
its names. Which it is two files show that were asked for one after another: they lie closest in it. Where they
lie close in none somebody reads here and there, and what would be brought were in vain.

Pure: times are arguments, seconds of CLOCK_MONOTONIC.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

FIRST, MOST = 16, 64  # files ahead
SECONDS = 2.0  # between two files that are asked for; more where some were at hand meanwhile
LOOKED_AT = 4  # names for each file that is to be brought: others lie in between that are here already
_NEAR = 8  # names: who goes on asks for one that is no further on; others read here and there
_DIGITS = re.compile(rb"(\d+)")


def natural(name: bytes) -> list[tuple[int, int | bytes]]:
    """A key that sorts names as a person counts: file9 before file10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in _DIGITS.split(name) if part]


class Listing:
    """The names of a directory in the orders in which programs go through them."""

    def __init__(self, names: Sequence[bytes]) -> None:
        self.orders = [sorted(names, key=natural), sorted(names), list(names)]
        self._places = [{name: place for place, name in enumerate(order)} for order in self.orders]

    def order_of(self, before: bytes, name: bytes) -> int | None:
        """The order in which `name` comes most closely after `before`; None where it is near in none."""
        found = [
            (places[name] - places[before], number)
            for number, places in enumerate(self._places)
            if before in places and name in places and 0 < places[name] - places[before] <= _NEAR
        ]
        return min(found)[1] if found else None

    def place(self, order: int, name: bytes) -> int:
        """Where a name is in an order; -1: nowhere."""
        return self._places[order].get(name, -1)


@dataclass(slots=True)
class Run:
    """What is known of one reader's way through a directory."""

    name: bytes  # asked for last
    until: float  # if nothing is asked for by then, it is over
    listing: Listing | None = None
    listed: float = 0.0
    order: int = -1
    ahead: int = -1  # the place in that order up to which files have been brought
    window: int = FIRST

    def _is_foreseen(self, name: bytes) -> bool:
        """It is among what was brought last, or right behind that."""
        assert self.listing is not None
        if self.order < 0:
            return False
        return self.ahead - self.window < self.listing.place(self.order, name) <= self.ahead + _NEAR

    def next(self, name: bytes, now: float) -> range:
        """The places in the order at which to look for files, now that this one is asked for."""
        assert self.listing is not None
        before, self.name = self.name, name
        self.until = now + SECONDS
        order = self.order if self._is_foreseen(name) else self.listing.order_of(before, name)
        if order is None:
            self.order, self.window = -1, FIRST
            return range(0)
        place = self.listing.place(order, name)
        ahead = self.ahead if order == self.order else -1
        if ahead >= 0 and place < ahead - self.window // 2:
            return range(0)  # among what is on its way, and most of that is still to be read
        if ahead >= 0 and place <= ahead + _NEAR:
            self.window = min(2 * self.window, MOST)
        else:
            self.window = FIRST
        self.order = order
        start = max(place, ahead if place <= ahead else -1) + 1
        return range(start, min(start + LOOKED_AT * self.window, len(self.listing.orders[order])))


class Precision:
    """How much of what was brought ahead was used. Safe to use from several threads."""

    SECONDS = 120.0  # what is used later than that would have left again
    PAUSE = 600.0
    DECIDED = 64  # files, before their use counts; of more than four times as many the older count half
    LEAST = 0.25  # of them are to be used

    def __init__(self) -> None:
        self.files = self.bytes = self.used_files = self.used_bytes = 0
        self._lock = threading.Lock()
        self._waiting: OrderedDict[int, tuple[int, float]] = OrderedDict()
        self._good = self._vain = 0
        self._until = 0.0

    def asked(self, ino: int, size: int, now: float) -> None:
        """A file is to come ahead."""
        with self._lock:
            self._waiting[ino] = size, now

    def came(self, size: int) -> None:
        """It has."""
        with self._lock:
            self.files += 1
            self.bytes += size

    def unused(self, inos: Iterable[int]) -> set[int]:
        """Those of these files that came ahead lately, and have not been used yet."""
        with self._lock:
            return {ino for ino in inos if ino in self._waiting}

    def failed(self, ino: int) -> None:
        """It did not come."""
        with self._lock:
            self._waiting.pop(ino, None)

    def used(self, inos: Iterable[int]) -> None:
        """These files were opened."""
        with self._lock:
            for ino in inos:
                entry = self._waiting.pop(ino, None)
                if entry is not None:
                    self.used_files += 1
                    self.used_bytes += entry[0]
                    self._good += 1

    def is_good(self, now: float) -> bool:
        """Go on."""
        with self._lock:
            while self._waiting:
                ino, (_, since) = next(iter(self._waiting.items()))
                if now - since < self.SECONDS:
                    break
                del self._waiting[ino]
                self._vain += 1
            decided = self._good + self._vain
            if decided >= self.DECIDED and self._good < self.LEAST * decided:
                self._good = self._vain = 0
                self._until = now + self.PAUSE
            elif decided > 4 * self.DECIDED:
                self._good, self._vain = self._good // 2, self._vain // 2
            return now >= self._until
