"""Replication: what has been quiet for a while is copied out: eviction is instant then, and little lost."""

from __future__ import annotations

import threading
import time

from tierfs.model import Record, Residency
from tierfs.restless import patience
from tierfs.tier import Item, Tier
from tierfsd.rescues import Rescues
from tierfsd.space import Space
from tierfsd.trials import Trials

_BATCH = 256
_AHEAD = 1_000_000_000  # a date (ns) so far ahead is one from before the clock was set back
_BEGINNING = 0, 0  # of the queue of dirty files
_EVER = (1 << 63) - 1


class Replication:
    """Used by the scheduler's thread."""

    def __init__(self, tier: Tier, space: Space, trials: Trials, stopping: threading.Event) -> None:
        self._tier = tier
        self._kit = tier.kit
        self._space = space
        self._trials = trials
        self._stopping = stopping
        self._rescues = Rescues(tier, stopping)
        self._passed = _BEGINNING  # in the queue: who stands before it is left alone, or told by `staying`

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
            self._begin_anew()
            return
        self._rescues.turn()
        trials.staying.forget()
        before = time.time_ns() - int(self._kit.config.quiet_seconds * 1e9)
        while not self._stopping.is_set():
            items = [Item.of(record) for record in self._quiet(before, _BATCH + len(trials.tried))]
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

    def _quiet(self, before: int, count: int) -> list[Record]:
        """Dirty files that nobody has touched since then (ns), and those that would wait for that too long.
        What was queued before the clock was set back would wait until that date comes again."""
        found: dict[int, Record] = {}
        if self._trials.on_trial or self._passed[0] > before:  # one of them is tried; the clock was set back
            self._begin_anew()
        for ino in self._trials.staying.take_over(count):
            if self._kit.index.dirty_since(ino) < before:
                self._take(ino, found)
        self._passed = self._walk(self._passed, before, count, found)
        self._walk((time.time_ns() + _AHEAD, 0), _EVER, count, found)
        quiet = self._kit.config.quiet_seconds
        for ino, seconds in self._kit.restless.waiting(time.monotonic(), quiet):
            record = self._kit.index.get(ino)
            if record is not None and seconds >= patience(record.size, quiet):
                self._take(ino, found)
        return list(found.values())

    def _begin_anew(self) -> None:
        """With the first of the queue, and so with all that are left alone no more."""
        self._passed = _BEGINNING
        self._trials.staying.drop_over()

    def _walk(
        self, start: tuple[int, int], before: int, count: int, found: dict[int, Record]
    ) -> tuple[int, int]:
        """Take files from the queue until there are `count`. Returns where to begin the next time: all before
        that are left alone. Those that never leave may be most of a volume, and stay in the queue for ever."""
        at = passed = start
        while len(found) < count:
            rows = self._kit.index.queued(at, before, _BATCH)
            for since, ino in rows:
                taken = self._take(ino, found)
                passed = (since, ino + 1) if passed == at and not taken else passed
                at = since, ino + 1
            if len(rows) < _BATCH:
                break
        return passed

    def _take(self, ino: int, found: dict[int, Record]) -> bool:
        """Whether it may be tried, and is among what was found."""
        if ino not in self._trials.staying and ino not in found:
            record = self._kit.index.get(ino)
            if record is not None and record.dirty and record.residency is Residency.RESIDENT:
                found[ino] = record
        return ino in found
