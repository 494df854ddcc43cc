"""Files that are changed again and again, so that they are never quiet: which, and since when.

A log that is opened for each line, or a state that a program writes aside and renames over the last one every
few seconds, would never be copied if a copy waited for quiet alone, and a lost disk would take all of it. A
name counts, not an inode: of the latter kind each one lives for seconds. Kept in memory: a new mover begins
to count anew.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

MOST = 20_000  # names that are watched; those that were longest not changed are forgotten
_LEAST_SECONDS = 600.0  # so long nothing is done: most of them end by themselves
_MOST_SECONDS = 86400.0
_BYTES_PER_SECOND = 64 << 10  # no file alone shall take more of the line than this


def patience(size: int, quiet: float) -> float:
    """Seconds for which a restless file of this size waits for `quiet` ones; then it is copied all the same."""
    return max(_LEAST_SECONDS, 2 * quiet, min(size / _BYTES_PER_SECOND, _MOST_SECONDS))


@dataclass(slots=True)
class _Name:
    ino: int
    first: float
    last: float


class Restless:
    """Thread-safe. Times are seconds of CLOCK_MONOTONIC."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: OrderedDict[tuple[int, bytes], _Name] = OrderedDict()
        self._places: dict[int, tuple[int, bytes]] = {}  # inode -> its name in `_names`

    def changed(self, ino: int, parent: int, name: bytes, now: float) -> None:
        """The file of this name (in the directory `parent`) has other content, or is another one: `ino`."""
        place = parent, name
        with self._lock:
            if self._places.get(ino, place) != place:
                self._drop(ino)  # renamed: how often there is something new under the former name is no matter
            known = self._names.get(place)
            first = known.first if known is not None else now
            if known is not None:
                self._drop(known.ino)
            self._names[place], self._places[ino] = _Name(ino, first, now), place
            if len(self._names) > MOST:
                self._drop(next(iter(self._names.values())).ino)

    def waiting(self, now: float, quiet: float) -> list[tuple[int, float]]:
        """(inode, seconds) of those that have been changed again and again for so long, never quiet between."""
        with self._lock:
            while self._names and now - (longest := next(iter(self._names.values()))).last > quiet:
                self._drop(longest.ino)  # it is in the queue of quiet files
            return [
                (name.ino, now - name.first)
                for name in self._names.values()
                if name.last > name.first and now - name.first >= _LEAST_SECONDS
            ]

    def copied(self, ino: int) -> None:
        """Its content of just now is in the store."""
        with self._lock:
            self._drop(ino)

    def _drop(self, ino: int) -> None:
        place = self._places.pop(ino, None)
        if place is not None:
            del self._names[place]
