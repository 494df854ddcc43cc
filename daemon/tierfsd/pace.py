"""When the mover brings marks into the index of its own accord: in a pause of the changes.

While a program makes, renames and removes files each batch costs a synced commit, and a file that is gone a
moment later has been written down for nothing. Whoever needs the index as of now (an order, a copy, a punch,
the journal, `tierfs status`, the end) drains by himself, and does not ask here.
"""

from __future__ import annotations

import math
import time

from tierfs.marks import SEGMENT
from tierfs.tier import Tier
from tierfsd.space import Space

_PAUSE = 0.5  # seconds without a new mark, of which the server tells every quarter of one
_MOST_SECONDS = 10.0  # a mark waits no longer, however busy it is
_MOST_BYTES = SEGMENT  # of marks: what a new server has to read at a takeover, and the disk to hold


class Pace:
    """`told` in any thread, all else in the scheduler's."""

    def __init__(self, tier: Tier, space: Space) -> None:
        self._tier = tier
        self._space = space
        self._end = 0  # of the marks that we have been told of
        self._newest = 0.0  # when that was
        self._since = 0.0  # when we were told of the first that waits
        self._available = 0  # bytes of the filesystem when all was in the index

    def told(self, position: int) -> None:
        """There are marks up to this position."""
        now = time.monotonic()
        if not self._waits:
            self._since = now
        self._end, self._newest = position, now

    @property
    def _waits(self) -> bool:
        return self._end > self._tier.drainer.position

    @property
    def due_at(self) -> float:
        """When (CLOCK_MONOTONIC) marks that wait now are due, if no more come; inf: none wait."""
        return self._newest + _PAUSE if self._waits else math.inf

    def is_due(self) -> bool:
        """Not to be put off. Raises OSError, IndexError_."""
        if not self._waits or time.monotonic() >= min(self.due_at, self._since + self._patience):
            return True
        behind = self._end - self._tier.drainer.position
        return behind >= _MOST_BYTES or self._space.excess(self._unseen()) > 0

    @property
    def _patience(self) -> float:
        """Copies and the journal wait for their own times from then on."""
        config = self._tier.kit.config
        return min(_MOST_SECONDS, config.quiet_seconds, config.journal_seconds / 4)

    def drain(self) -> None:
        """Do so."""
        self._tier.drain()
        if self._tier.kit.config.local_limit:
            self._available = self._tier.kit.tree.space().available

    def _unseen(self) -> int:
        """So many bytes the files may have grown by, of which the index does not know."""
        if not self._tier.kit.config.local_limit:
            return 0
        return max(0, self._available - self._tier.kit.tree.space().available)
