"""Replication: what has been quiet for a while is copied out: eviction is instant then, and little lost."""

from __future__ import annotations

import threading
import time

from tierfs.model import Residency
from tierfs.restless import patience
from tierfs.tier import Item, Tier
from tierfsd.rescues import Rescues
from tierfsd.space import Space
from tierfsd.trials import Trials

_BATCH = 256
_AHEAD_SECONDS = 1.0  # a date so far ahead is one from before the clock was set back


class Replication:
    """Used by the scheduler's thread."""

    def __init__(self, tier: Tier, space: Space, trials: Trials, stopping: threading.Event) -> None:
        self._tier = tier
        self._kit = tier.kit
        self._space = space
        self._trials = trials
        self._stopping = stopping
        self._rescues = Rescues(tier, stopping)

    @property
    def wanted(self) -> bool:
        """Every file is to be in the store."""
        wanted = self._kit.config.replicate
        return wanted == "all" or (wanted == "auto" and self._space.elsewhere)

    @property
    def is_waiting(self) -> bool:
        """Something has yet to be copied out."""
        return self.wanted and self._kit.index.totals().dirty_files > 0

    def turn(self) -> None:
        """Copy out what has been quiet for a while."""
        trials = self._trials
        if not self.wanted or self._kit.withheld or trials.doubtful:
            return
        self._rescues.turn()
        trials.forget_stayers()
        before = time.time_ns() - int(self._kit.config.quiet_seconds * 1e9)
        while not self._stopping.is_set():
            inos = self._quiet(before, _BATCH + len(trials.staying) + len(trials.tried))
            records = [self._kit.index.get(ino) for ino in inos if ino not in trials.staying]
            items = [Item.of(r) for r in records if r is not None and r.residency is Residency.RESIDENT]
            if not items:
                return
            if trials.on_trial:
                items = trials.next_of(items)
            done = self._tier.demote(items, self._stopping, punch=False)
            for item in done:
                if item.reason or item.already:
                    trials.leave_alone(item, trials.tried)
                else:
                    self._kit.restless.copied(item.ino)
            failed = sum(item.failed for item in done)
            if failed * 2 > len(done):
                trials.pause(len(done), failed)
                return
            trials.end()
            if self._space.excess() > 0:
                return

    def _quiet(self, before: int, count: int) -> list[int]:
        """Dirty files that nobody has touched since then (ns), and those that would wait for that too long.
        What was queued before the clock was set back would wait until that date comes again."""
        index, ahead = self._kit.index, time.time_ns() + int(_AHEAD_SECONDS * 1e9)
        found = dict.fromkeys(index.quiet(before, count) + index.misdated(ahead, count))
        quiet = self._kit.config.quiet_seconds
        for ino, seconds in self._kit.restless.waiting(time.monotonic(), quiet):
            record = index.get(ino)
            if record is not None and record.dirty and seconds >= patience(record.size, quiet):
                found[ino] = None
        return list(found)
