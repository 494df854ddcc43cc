"""The mover's rounds: marks into the index, heat, watermarks, replication, garbage, and what a crash left.

One thread makes the rounds, one looks through the tree when that has not been done. Both only decide; the work
is done by Tier. Eviction also runs in the thread of a fetch that found no room. While nothing happens there is
a round now and then only: whoever brings work for one says so (`look`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tierfs import recovery, wire
from tierfs.collecting import Collector
from tierfs.errors import IndexError_, TierError
from tierfs.heat_index import HeatIndex
from tierfs.model import Record, Residency
from tierfs.policy.aging import is_young
from tierfs.restless import patience
from tierfs.survey import Survey
from tierfs.tier import Item, Tier
from tierfsd.ballast import Ballast
from tierfsd.pinned import Pinned
from tierfsd.rescues import Rescues

log = logging.getLogger("scheduler")

_ROUND_SECONDS = 1.0  # from one to the next where there is work
_IDLE_SECONDS = 5.0  # and where there is none
_LOOK_SECONDS = 0.05  # between two looks at a filesystem that is about to run low
_FILLING = 4 << 30  # bytes a second: no program fills a filesystem faster
_HEAT_SECONDS = 5.0
_URGENT_ROOM = 512 << 20  # bytes to free when writers wait, on a small filesystem less
_LEAST_ROOM = 4 << 20  # bytes; eviction for one small read after the other would be slow
_GARBAGE_SECONDS = 60.0
_GARBAGE_END_SECONDS = 5.0  # whatever it is doing: it may be cut short anywhere
_REPLICATE_BATCH = 256
_EVICT_BATCH = 64
_STAY_SECONDS = 30.0  # a file that could not go is left alone so long
_NEVER_SECONDS = 3600.0
_ROOM_ATTEMPTS = 5
_ROOM_SECONDS = 0.1
_IN_VAIN_SECONDS = 2.0  # after nothing was found that may leave
_PAUSE_SECONDS = 60.0  # after most of what was tried has failed
_ENOUGH_TRIES = 20
_AHEAD_SECONDS = 1.0  # a date so far ahead is one from before the clock was set back


class Scheduler:
    """Start with `start`, end with `stop`. The link's reports about heat and marks go to it."""

    def __init__(self, tier: Tier, heat: HeatIndex, beside: bool | None, ballast: str) -> None:
        """`beside`: the store is on the filesystem of the tree (None: not known as yet, which may be set
        later). `ballast`: path of its file."""
        self._tier = tier
        self._kit = tier.kit
        self._heat = heat
        self.beside = beside
        self.collector = Collector(tier.kit)
        self._ballast = Ballast(ballast, tier.kit.tree)
        self._wake = threading.Event()
        self._work = threading.Event()  # for the next round; it need not come at once
        self._urgent = threading.Event()
        self._stopping = threading.Event()
        self._evicting = threading.Lock()
        self._count = threading.Lock()
        self._freeing = 0  # calls that free space for somebody who waits
        self._making = threading.Lock()  # room for fetches, one attempt at a time
        self._in_vain = 0.0  # when the last one ended that made none
        self._touches: dict[int, tuple[int, int]] = {}
        self._heat_waits = False  # it could not be written, and has been complained of
        self._touch_lock = threading.Lock()
        self._staying: dict[int, float] = {}  # inode -> until when it is left alone
        self._paused_until = 0.0
        self._doubtful = False  # most of what was last tried has failed: the store is asked before files are
        self._trial = False  # it answers again: one file is tried before the others, as its bucket may be full
        # Those whose trial has failed, of eviction and of replication: others come first. Two sets, as what one
        # of them may not try yet must not make the other begin with the same file over and over.
        self._tried_victims: set[int] = set()
        self._tried: set[int] = set()
        self._pause_reason = ""
        self._next_look = 0.0
        self._pending = True
        self._survey: Survey | None = None
        self.looked = threading.Event()  # the look through the tree is over, or none was needed
        self._threads = [
            threading.Thread(target=self._rounds, name="scheduler", daemon=True),
            threading.Thread(target=self._look_through, name="survey", daemon=True),
        ]
        self._rescues = Rescues(tier, self._stopping)
        self._pinned = Pinned(tier, self._stopping)
        self._garbage = threading.Thread(target=self._collect, name="garbage", daemon=True)

    def start(self) -> None:
        """Work in threads of its own."""
        for thread in self._threads:
            thread.start()
        self._garbage.start()

    def stop(self) -> None:
        """End after what is under way."""
        self._stopping.set()
        self._wake.set()
        self.collector.stop()
        for thread in self._threads:
            thread.join()
        self._garbage.join(_GARBAGE_END_SECONDS)
        try:
            self._tier.drain()
        except (TierError, OSError) as error:
            log.warning("marks are left to the next mover: %s", error)
        self._flush_heat()

    # --- what others say ----------------------------------------------------------------------------------

    def look(self) -> None:
        """There is something for a round, which comes within a second."""
        self._work.set()
        self._wake.set()

    def touches(self, message: wire.Touches) -> None:
        """Uses of files."""
        with self._touch_lock:
            for touch in message.touches:
                count, _ = self._touches.get(touch.ino, (0, 0))
                self._touches[touch.ino] = count + touch.count, touch.size

    def poke(self, message: wire.Poke) -> None:
        """There are new marks; urgent: space is short."""
        if message.urgent:
            self._urgent.set()
        self.look()

    def bring_pinned(self) -> None:
        """Something was pinned: it comes back, also if whoever asked for that goes away."""
        self._tier.drainer.pinned.set()
        self.look()

    def make_room(self, count: int, failed: bool) -> None:
        """Free so many bytes of local disk now, for a fetch; `failed`: a write found none, whatever the
        filesystem says of its free space. Who waited while another tried in vain has had the answer."""
        asked = time.monotonic()
        with self._making:
            if asked < self._in_vain or (not failed and self._kit.has_room(count)):
                return
            for attempt in range(_ROOM_ATTEMPTS):
                self._evict(max(count, _LEAST_ROOM), urgent=True)
                if attempt == 0 and (failed or not self._kit.has_room(count)):
                    self._ballast.release()
                if self._kit.has_room(count) or self._stopping.is_set():
                    return
                # What was read a moment ago is about to be closed, or to settle.
                self._stopping.wait(_ROOM_SECONDS)
            self._in_vain = time.monotonic()

    def make_index_room(self) -> bool:
        """A commit found no room on the disk: whether it is worth trying again. Room is made besides."""
        self._urgent.set()
        self._pending = True  # what nobody waits for may not have been committed
        self.look()
        return self._ballast.release()

    @property
    def verifying(self) -> int:
        """Files that have yet to be compared after an unclean stop."""
        survey = self._survey
        return survey.left if survey is not None else 0

    def notes(self) -> list[str]:
        """What a person should know."""
        notes = []
        if self._kit.withheld:
            notes.append(f"nothing is copied out: {self._kit.withheld}")
        if time.monotonic() < self._paused_until:
            notes.append(self._pause_reason)
        if not self._kit.store.capabilities.conditional_put:
            notes.append("the store cannot refuse a second machine: mount this volume on one only")
        if self.beside:
            notes.append("the store is on the same filesystem as the files: it is no backup and frees nothing")
        return notes

    @property
    def _elsewhere(self) -> bool:
        """What leaves for the store leaves this filesystem."""
        return self.beside is False

    # --- rounds -------------------------------------------------------------------------------------------

    def _rounds(self) -> None:
        next_heat = 0.0
        self._kit.movements.told = self.look
        while not self._stopping.is_set():
            self._work.clear()
            restless = True
            try:
                now = time.monotonic()
                self._tier.drain()
                if self._pending:
                    self._pending = recovery.finish_pending(self._tier) > 0
                if now >= next_heat:
                    next_heat = now + _HEAT_SECONDS
                    self._flush_heat()
                self._ask_store()
                self._look_at_space()
                self._ballast.restore(self._kit.config.min_free)
                self._replicate()
                self._pinned.turn()
                restless = self._is_restless()
            except (TierError, OSError) as error:
                if not self._stopping.is_set():
                    self._kit.troubles.note(str(error))
            except Exception:
                log.exception("a round failed")
            try:
                self._wait(restless)
            except OSError as error:  # that of a disk that is not well: it may be again
                log.debug("the filesystem does not say how full it is: %s", error.strerror)
                self._stopping.wait(_ROUND_SECONDS)

    def _collect(self) -> None:
        """In a thread of its own: a store that hangs keeps no writer waiting for space."""
        while not self._stopping.wait(min(_GARBAGE_SECONDS, max(1.0, self._kit.config.grace / 4))):
            try:
                self.collector.run()
            except (TierError, OSError) as error:
                if not self._stopping.is_set():
                    self._kit.troubles.note(f"what nothing refers to cannot be removed: {error}")
            except Exception:
                log.exception("a collection failed")

    def _is_restless(self) -> bool:
        """The next round has work of which nobody will tell us: its time comes."""
        waiting = self._replicates and self._kit.index.totals().dirty_files > 0
        return waiting or self._pending or self._doubtful or self._trial or self._excess() > 0

    def _wait(self, restless: bool) -> None:
        """Until the next round. Meanwhile space is watched closely: a fast writer fills a disk in no time."""
        began = time.monotonic()
        latest = began + (_ROUND_SECONDS if restless else _IDLE_SECONDS)
        while not self._stopping.is_set():
            until = min(latest, began + _ROUND_SECONDS) if self._work.is_set() else latest
            if self._wake.wait(min(max(0.0, until - time.monotonic()), self._pause_between_looks())):
                self._wake.clear()
                if self._urgent.is_set():
                    return
            if time.monotonic() >= until or (self._elsewhere and self._is_low()):
                return

    def _pause_between_looks(self) -> float:
        """Seconds in which nobody can have filled the filesystem."""
        if not self._elsewhere:
            return _IDLE_SECONDS
        return max(_LOOK_SECONDS, self._room_left() / _FILLING)

    def _room_left(self) -> float:
        """Bytes until the filesystem runs low."""
        space = self._kit.tree.space()
        return space.available - self._kit.config.min_free * space.total

    def _is_low(self) -> bool:
        if time.monotonic() < max(self._paused_until, self._next_look):
            return False
        return self._room_left() < 0

    def _flush_heat(self) -> None:
        with self._touch_lock:
            touches, self._touches = self._touches, {}
        here, left, gone = self._kit.movements.take()
        try:
            if here:
                self._heat.admit_many(here)
                here = []
            if left:
                self._heat.left(left)
                left = set()
            if gone:
                self._heat.forget(gone)
                gone = set()
            if touches:
                self._heat.touch_many((ino, count, size) for ino, (count, size) in touches.items())
        except IndexError_ as error:
            # On a full disk room is made by what is known: nobody's read fails for want of heat.
            if not self._heat_waits:
                log.warning("%s: it is kept until it can be", error)
            self._heat_waits = True
            self._kit.movements.give_back(here, left, gone)
            with self._touch_lock:
                for ino, (count, size) in touches.items():
                    newer = self._touches.get(ino, (0, size))
                    self._touches[ino] = count + newer[0], newer[1]
        else:
            self._heat_waits = False

    # --- space --------------------------------------------------------------------------------------------

    def _look_at_space(self) -> None:
        """Demote when the local bytes are above the high watermark, or the filesystem itself runs low."""
        if self._urgent.is_set():
            # Writers wait for this: no minimums count, as for an order.
            self._urgent.clear()
            share = min(_URGENT_ROOM, self._kit.tree.space().total // 8)
            self._evict(max(self._excess(), share), urgent=True)
            return
        if time.monotonic() < self._next_look:
            return
        excess = self._excess()
        if excess > 0 and not self._evict(excess, urgent=False):
            self._next_look = time.monotonic() + _IN_VAIN_SECONDS

    def _excess(self) -> int:
        config = self._kit.config
        excess = 0
        if config.local_limit:
            local = self._kit.index.totals().local_bytes
            if local > config.high * config.local_limit:
                excess = local - int(config.low * config.local_limit)
        if self._elsewhere:
            space = self._kit.tree.space()
            wanted = int(config.min_free * space.total)
            if space.available < wanted:
                # A little more, so that the next file does not begin it all again.
                excess = max(excess, wanted + wanted // 10 - space.available)
        return excess

    @property
    def is_waited_for(self) -> bool:
        """Somebody cannot go on before space is free."""
        return self._urgent.is_set() or self._freeing > 0

    def _evict(self, wanted: int, *, urgent: bool) -> int:
        """Demote the coldest files until so many bytes are free; how many became so."""
        with self._waited_for(urgent), self._evicting:
            self._flush_heat()
            freed = tried = failed = 0
            for batch in self._batches(wanted, urgent):
                gained, bad = self._demote(batch)
                freed, tried, failed = freed + gained, tried + len(batch), failed + bad
                hopeless = failed * 2 > tried and (tried >= _ENOUGH_TRIES or (self._trial and not urgent))
                if failed * 2 <= tried:
                    self._end_trial()
                if freed >= wanted or hopeless or self._stopping.is_set():
                    break
            if failed * 2 > tried and not self._doubtful:
                self._pause(tried, failed)
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

    def _batches(self, wanted: int, urgent: bool) -> Iterator[list[Item]]:
        """Victims, in batches that free what is wanted or are full."""
        batch: list[Item] = []
        size = 0
        for record in self._victims(urgent):
            batch.append(_item(record, ordered=urgent))
            size += record.local
            if len(batch) >= _EVICT_BATCH or size >= wanted or (self._trial and not urgent):
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _pause(self, tried: int, failed: int) -> None:
        self._doubtful = True
        self._paused_until = time.monotonic() + _PAUSE_SECONDS
        self._pause_reason = f"demotion pauses: {failed} of {tried} files could not be copied out"
        log.warning("%s", self._pause_reason)

    def _ask_store(self) -> None:
        """One small question instead of many files that fail: each would be read, and leave a trace for the
        collection of what may have arrived of it."""
        if not self._doubtful or time.monotonic() < self._paused_until:
            return
        try:
            self._kit.still_ours()
        except (TierError, OSError) as error:
            self._paused_until = time.monotonic() + _PAUSE_SECONDS
            log.debug("the store does not answer yet: %s", error)
        else:
            self._doubtful, self._trial = False, True

    def _victims(self, urgent: bool) -> Iterator[Record]:
        """Records of files that may go, coldest first."""
        config, now = self._kit.config, time.time()
        self._forget_stayers()
        seen: set[int] = set()
        tried = self._tried_victims if self._trial and not urgent else set()
        passed_over = others = False
        for ino in self._heat.victims(self._kit.index.totals().local_bytes):
            if ino in seen or (ino in self._staying and not urgent) or self._tier.filler.is_wanted(ino):
                continue
            seen.add(ino)
            record = self._kit.index.get(ino)
            if record is None or record.residency is Residency.STUB or not record.local:
                continue
            if record.dirty and self._doubtful and not urgent:
                continue
            last = self._heat.last_use(ino) or 0.0
            if not urgent and (record.size < config.min_size or is_young(last, now, config.min_age)):
                continue
            if ino in tried:
                passed_over = True
                continue
            others = True
            yield record
        if passed_over and not others:
            self._tried_victims.clear()  # each has had its trial: next time the first has another

    def _demote(self, batch: list[Item]) -> tuple[int, int]:
        """(bytes freed, failures) of a batch."""
        before = {item.ino: self._local(item.ino) for item in batch}
        done = self._tier.demote(batch, self._stopping)
        for item in done:
            if not item.demoted:
                self._leave_alone(item, self._tried_victims)
        freed = sum(before[item.ino] for item in done if item.demoted)
        return freed, sum(item.failed for item in done)

    def _local(self, ino: int) -> int:
        record = self._kit.index.get(ino)
        return record.local if record is not None else 0

    def _leave_alone(self, item: Item, tried: set[int]) -> None:
        seconds = _NEVER_SECONDS if item.reason.startswith("never") else _STAY_SECONDS
        self._staying[item.ino] = time.monotonic() + seconds
        if item.failed and self._trial:
            tried.add(item.ino)

    def _end_trial(self) -> None:
        self._trial = False
        self._tried.clear()
        self._tried_victims.clear()

    def _next_trial(self, items: list[Item]) -> list[Item]:
        """One that has not been tried, else the first: what is wrong may be wrong with a file alone."""
        left = [item for item in items if item.ino not in self._tried]
        if not left:
            self._tried.clear()
        return (left or items)[:1]

    def _forget_stayers(self) -> None:
        now = time.monotonic()
        for ino in [ino for ino, until in self._staying.items() if until <= now]:
            del self._staying[ino]

    # --- replication --------------------------------------------------------------------------------------

    @property
    def _replicates(self) -> bool:
        wanted = self._kit.config.replicate
        return wanted == "all" or (wanted == "auto" and self._elsewhere)

    def _replicate(self) -> None:
        """Copy out what has been quiet for a while."""
        config = self._kit.config
        if not self._replicates or self._kit.withheld or self._doubtful:
            return
        self._rescues.turn()
        self._forget_stayers()
        before = time.time_ns() - int(config.quiet_seconds * 1e9)
        while not self._stopping.is_set():
            inos = self._quiet(before, _REPLICATE_BATCH + len(self._staying) + len(self._tried))
            records = [self._kit.index.get(ino) for ino in inos if ino not in self._staying]
            items = [_item(r) for r in records if r is not None and r.residency is Residency.RESIDENT]
            if not items:
                return
            if self._trial:
                items = self._next_trial(items)
            done = self._tier.demote(items, self._stopping, punch=False)
            for item in done:
                if item.reason or item.already:
                    self._leave_alone(item, self._tried)
                else:
                    self._kit.restless.copied(item.ino)
            failed = sum(item.failed for item in done)
            if failed * 2 > len(done):
                self._pause(len(done), failed)
                return
            self._end_trial()
            if self._excess() > 0:
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

    # --- the look through the tree ------------------------------------------------------------------------

    def _look_through(self) -> None:
        """The tree, if that has not been done in this custody epoch or heat was lost."""
        try:
            self._look_if_needed()
        finally:
            self.looked.set()

    def _look_if_needed(self) -> None:
        try:
            if self._kit.index.surveyed and not self._heat_is_lost():
                return
            self._survey = Survey(self._tier, self._heat.seed_many, self._stopping)
            self._survey.run()
        except (TierError, OSError) as error:
            if not self._stopping.is_set():
                self._kit.troubles.note(f"the tree could not be looked through: {error}")
        except Exception:
            log.exception("looking through the tree failed")
        finally:
            self._survey = None

    def _heat_is_lost(self) -> bool:
        here = self._kit.index.totals().local_bytes > 0
        return here and not any(True for _ in self._heat.victims(1 << 62))


def _item(record: Record, ordered: bool = False) -> Item:
    return Item(record.ino, record.handle, b"", record.parent, record.name, record.size, ordered)
