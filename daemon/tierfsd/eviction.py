"""Eviction: the coldest files leave when space is short, in the scheduler's rounds or for a fetch."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tierfs.heat_index import HeatIndex
from tierfs.inodes import InodeSet
from tierfs.model import Record, Residency
from tierfs.policy.aging import is_young
from tierfs.tier import Item, Tier
from tierfsd.ballast import Ballast
from tierfsd.heatkeeping import HeatKeeper
from tierfsd.space import Space
from tierfsd.trials import Trials

log = logging.getLogger("scheduler")

_URGENT_ROOM = 512 << 20  # bytes to free when writers wait, on a small filesystem less
_URGENT_PARTS = 8  # of it: one of so many
_LEAST_ROOM = 4 << 20  # bytes; eviction for one small read after the other would be slow
_BATCH = 64
_ROOM_ATTEMPTS = 5
_ROOM_SECONDS = 0.1
_OVERDUE_SECONDS = 60.0  # between two looks for what scans have left behind
_IN_VAIN_SECONDS = 2.0  # after nothing was found that may leave; and so many times what looking took
_IN_VAIN_PART = 20
_ENOUGH_TRIES = 20


class Eviction:
    """Used by several threads; one evicts at a time."""

    def __init__(
        self,
        tier: Tier,
        heat: HeatIndex,
        keeper: HeatKeeper,
        space: Space,
        trials: Trials,
        ballast: Ballast,
        stopping: threading.Event,
    ) -> None:
        self._tier = tier
        self._kit = tier.kit
        self._heat = heat
        self._keeper = keeper
        self._space = space
        self._trials = trials
        self._ballast = ballast
        self._stopping = stopping
        self.urgent = threading.Event()  # writers wait
        self.tell_futile: Callable[[], None] = lambda: None  # them, that nothing can leave
        self._evicting = threading.Lock()
        self._count = threading.Lock()
        self._freeing = 0  # calls that free space for somebody who waits
        self._making = threading.Lock()  # room for fetches, one attempt at a time
        self._in_vain = 0.0  # when the last one ended that made none
        self._next_look = 0.0
        self._next_overdue = 0.0

    @property
    def is_waited_for(self) -> bool:
        """Somebody cannot go on before space is free."""
        return self.urgent.is_set() or self._freeing > 0

    def is_low(self) -> bool:
        """The filesystem runs low, and something may be done about it now. Raises OSError."""
        if time.monotonic() < max(self._trials.paused_until, self._next_look):
            return False
        return self._space.left() < 0

    def turn(self) -> None:
        """Demote when the local bytes are above the high watermark, or the filesystem itself runs low."""
        if self.urgent.is_set():
            # Writers wait for this: no minimums count, as for an order.
            self.urgent.clear()
            share = min(_URGENT_ROOM, self._space.share(_URGENT_PARTS))
            freed = self.evict(max(self._space.excess(), share), urgent=True)
            # Elsewhere what stays for now may leave in a moment; one that is ending has not tried all.
            if not freed and self._space.beside and not self._stopping.is_set():
                self.tell_futile()
            return
        if time.monotonic() < self._next_look:
            return
        excess, begun = self._space.excess(), time.thread_time()
        if excess > 0:
            if not self.evict(excess, urgent=False):
                spent = time.thread_time() - begun
                self._next_look = time.monotonic() + max(_IN_VAIN_SECONDS, _IN_VAIN_PART * spent)
        elif time.monotonic() >= self._next_overdue:
            self._next_overdue = time.monotonic() + _OVERDUE_SECONDS
            if self._heat.lent_bytes() and (self._space.elsewhere or self._kit.config.local_limit):
                self.evict(self._heat.lent_bytes(), urgent=False, overdue=True)

    def make_room(self, count: int, failed: bool) -> None:
        """Free so many bytes of local disk now, for a fetch; `failed`: a write found none, whatever the
        filesystem says of its free space. Who waited while another tried in vain has had the answer."""
        asked = time.monotonic()
        with self._making:
            if asked < self._in_vain or (not failed and self._kit.has_room(count)):
                return
            for attempt in range(_ROOM_ATTEMPTS):
                self.evict(max(count, _LEAST_ROOM), urgent=True)
                if attempt == 0 and (failed or not self._kit.has_room(count)):
                    self._ballast.release()
                if self._kit.has_room(count) or self._stopping.is_set():
                    return
                # What was read a moment ago is about to be closed, or to settle.
                self._stopping.wait(_ROOM_SECONDS)
            self._in_vain = time.monotonic()

    def evict(self, wanted: int, *, urgent: bool, overdue: bool = False) -> int:
        """Demote the coldest files until so many bytes are free; how many became so. `overdue`: only what
        scans brought long ago."""
        trials = self._trials
        with self._waited_for(urgent), self._evicting:
            self._keeper.flush()
            freed = tried = failed = 0
            records = self._overdue() if overdue else self.victims(urgent)
            while batch := self._batch(records, wanted - freed, urgent):
                gained, bad = self._demote(batch)
                freed, tried, failed = freed + gained, tried + len(batch), failed + bad
                enough = tried >= _ENOUGH_TRIES or (trials.on_trial and not urgent)
                hopeless = failed * 2 > tried and enough
                if failed * 2 <= tried:
                    trials.end()
                if freed >= wanted or hopeless or self._stopping.is_set():
                    break
            if failed * 2 > tried and not trials.doubtful:
                trials.pause(tried, failed)
            if freed:
                log.info("freed %d bytes of %d wanted", freed, wanted)
            return freed

    @contextmanager
    def _waited_for(self, urgent: bool) -> Iterator[None]:
        with self._count:
            self._freeing += urgent
        try:
            yield
        finally:
            with self._count:
                self._freeing -= urgent

    def _batch(self, records: Iterator[Record], lacking: int, urgent: bool) -> list[Item]:
        """The next victims: as many as free what is lacking yet, or a full batch; none: none is left."""
        batch: list[Item] = []
        for record in records:
            # Of what is lent no minimums count either.
            batch.append(Item.of(record, ordered=urgent or self._is_lent(record)))
            lacking -= record.local
            if len(batch) >= _BATCH or lacking <= 0 or (self._trials.on_trial and not urgent):
                break
        return batch

    def victims(self, urgent: bool) -> Iterator[Record]:
        """Records of files that may go, coldest first."""
        return self._that_may(self._heat.victims(self._kit.index.totals().local_bytes), urgent)

    def _overdue(self) -> Iterator[Record]:
        """Records of files that may go, and should although there is room."""
        return self._that_may(self._heat.overdue(), urgent=False)

    def _that_may(self, candidates: Iterator[int], urgent: bool) -> Iterator[Record]:
        now, trials = time.time(), self._trials
        trials.staying.forget()
        seen = InodeSet()
        tried = trials.tried_victims if trials.on_trial and not urgent else set()
        passed_over = others = False
        for ino in candidates:
            if ino in seen or (ino in trials.staying and not urgent) or self._tier.filler.is_wanted(ino):
                continue
            seen.add(ino)
            record = self._kit.index.get(ino)
            if record is None or record.residency is Residency.STUB or not record.local:
                continue
            if record.dirty and trials.doubtful and not urgent:
                continue
            if record.dirty and urgent and self._space.beside:  # its copy takes here what its blocks give
                continue
            if not urgent and self._is_kept(record, now):
                continue
            if ino in tried:
                passed_over = True
                continue
            others = True
            yield record
        if passed_over and not others:
            trials.tried_victims.clear()  # each has had its trial: next time the first has another

    def _is_kept(self, record: Record, now: float) -> bool:
        """It is too small or was used too lately to leave while nobody waits for its room."""
        config, last = self._kit.config, self._heat.last_use(record.ino) or 0.0
        if self._is_lent(record):
            return False
        return record.size < config.min_size or is_young(last, now, config.min_age)

    def _is_lent(self, record: Record) -> bool:
        """It is here for a scan alone, and nobody has just changed it."""
        heat = self._heat.of(record.ino)
        return heat is not None and heat.lent and not record.dirty

    def _demote(self, batch: list[Item]) -> tuple[int, int]:
        """(bytes freed, failures) of a batch."""
        before = {item.ino: self._local(item.ino) for item in batch}
        done = self._tier.demote(batch, self._stopping)
        for item in done:
            if not item.demoted:
                self._trials.leave_alone(item, self._trials.tried_victims)
        freed = sum(before[item.ino] for item in done if item.demoted)
        return freed, sum(item.failed for item in done)

    def _local(self, ino: int) -> int:
        record = self._kit.index.get(ino)
        return record.local if record is not None else 0
