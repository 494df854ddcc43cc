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
from tierfs.tier import Tier
from tierfs.transfer import Urgency

log = logging.getLogger("scheduler")

AFTER_SECONDS = 3600.0
EVERY_SECONDS = 86400.0
_LOOK_SECONDS = 60.0
_AGAIN_SECONDS = 1800.0  # after one that was not needed, or failed
_LOOKED_AT = 1000  # of those that have waited longest


class Rescues:
    """Used by the scheduler's thread. `stopping` ends the one that is being taken."""

    def __init__(self, tier: Tier, stopping: threading.Event) -> None:
        self._tier = tier
        self._stopping = stopping
        self._taking: Future[None] | None = None
        self._next_look = 0.0
        self._tried: dict[int, float] = {}  # inode -> when (seconds of CLOCK_MONOTONIC) it is tried again

    def turn(self) -> None:
        """Begin one, if one is due and none is being taken. Raises IndexError_, BusyError."""
        now = time.monotonic()
        if now < self._next_look or (self._taking is not None and not self._taking.done()):
            return
        self._tried = {ino: until for ino, until in self._tried.items() if until > now}
        record = next(self._due(), None)
        if record is None:
            self._next_look = now + _LOOK_SECONDS
            return
        self._tried[record.ino] = now + _AGAIN_SECONDS
        self._taking = self._tier.kit.uploads.submit(Urgency.GARBAGE, partial(self._take, record))

    def _due(self) -> Iterator[Record]:
        index = self._tier.kit.index
        for ino in index.quiet(time.time_ns() - int(AFTER_SECONDS * 1e9), _LOOKED_AT):
            record = index.get(ino)
            if ino in self._tried or record is None or not record.dirty:
                continue
            last = index.rescue(record.fid)
            if last is None or not is_young(last.at / 1e9, time.time(), EVERY_SECONDS):
                yield record

    def _take(self, record: Record) -> None:
        name = record.name.decode(errors="backslashreplace")
        try:
            if self._tier.rescue(record, self._stopping):
                log.info("a rescue copy was taken of %r, which is open", name)
        except (TierError, OSError) as error:
            log.info("no rescue copy of %r, which is open: %s", name, error)
