"""When rescue copies are taken: of what has been open for writing for an hour, and once a day from then on.

They cost as much as former versions do, and are kept as long. One at a time, behind all other work.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial

from tierfs.errors import TierError
from tierfs.model import Record
from tierfs.policy.aging import is_young
from tierfs.spelling import quoted
from tierfs.tier import Tier
from tierfs.transfer import Urgency

log = logging.getLogger("scheduler")

AFTER_SECONDS = 3600.0
EVERY_SECONDS = 86400.0
_LOOK_SECONDS = 600.0
_MOST = 1 << 20
_AHEAD = 1_000_000_000  # a date (ns) so far ahead is one from before the clock was set back


class Rescues:
    """Used by the scheduler's thread. `stopping` ends the one that is being taken."""

    def __init__(self, tier: Tier, stopping: threading.Event) -> None:
        self._tier = tier
        self._stopping = stopping
        self._taking: Future[object] | None = None
        self._next_look = 0.0
        self._due: list[int] = []

    def turn(self) -> None:
        """Begin one, if one is due and none is being taken. Raises IndexError_, BusyError."""
        if self._taking is not None and not self._taking.done():
            return
        now = time.monotonic()
        if not self._due and now >= self._next_look:
            self._next_look = now + _LOOK_SECONDS
            self._due = list(self._look())
        while self._due:
            record = self._tier.kit.index.get(self._due.pop())
            if record is not None and record.dirty:
                self._taking = self._tier.kit.uploads.post(Urgency.GARBAGE, partial(self._take, record))
                return

    def _look(self) -> Iterator[int]:
        """Files of which one is due, if they are open: most that are dirty for so long are those that never
        leave."""
        index, now = self._tier.kit.index, time.time_ns()
        # What was opened before the clock was set back would wait until that date comes again.
        for ino in index.quiet(now - int(AFTER_SECONDS * 1e9), _MOST) + index.misdated(now + _AHEAD, _MOST):
            record = index.get(ino)
            if record is None or not record.dirty or not self._tier.may_leave(record):
                continue
            last = index.rescue(record.fid)
            if last is None or not is_young(last.at / 1e9, time.time(), EVERY_SECONDS):
                yield ino

    def _take(self, record: Record) -> None:
        name = quoted(record.name)
        try:
            if self._tier.rescue(record, self._stopping):
                log.info("a rescue copy was taken of %s, which is open", name)
        except (TierError, OSError) as error:
            log.info("no rescue copy of %s, which is open: %s", name, error)
