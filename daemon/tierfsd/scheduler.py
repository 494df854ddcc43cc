"""The mover's rounds: marks into the index, heat, watermarks, replication, garbage, and what a crash left.

One thread makes the rounds, one looks through the tree when that has not been done. Both only decide; the work
is done by Tier. What is decided, and how, stands with `eviction`, `replication` and `trials`. While nothing
happens there is a round now and then only: whoever brings work for one says so (`look`).
"""

from __future__ import annotations

import logging
import threading
import time

from tierfs import recovery, wire
from tierfs.collecting import Collector
from tierfs.errors import TierError
from tierfs.heat_index import HeatIndex
from tierfs.survey import Survey
from tierfs.tier import Tier
from tierfsd.ballast import Ballast
from tierfsd.eviction import Eviction
from tierfsd.heatkeeping import HeatKeeper
from tierfsd.pace import Pace
from tierfsd.pinned import Pinned
from tierfsd.replication import Replication
from tierfsd.scanning import Scanners
from tierfsd.space import Space
from tierfsd.trials import Trials

log = logging.getLogger("scheduler")

_ROUND_SECONDS = 1.0  # from one to the next where there is work
_IDLE_SECONDS = 5.0  # and where there is none
_LOOK_SECONDS = 0.05  # between two looks at a filesystem that is about to run low
_FILLING = 4 << 30  # bytes a second: no program fills a filesystem faster
_HEAT_SECONDS = 5.0
_AGAIN_SECONDS = 60.0  # after a look through the tree that has failed
_GARBAGE_SECONDS = 60.0
_GARBAGE_END_SECONDS = 5.0  # whatever it is doing: it may be cut short anywhere


class Scheduler:
    """Start with `start`, end with `stop`. The link's reports about heat and marks go to it."""

    def __init__(self, tier: Tier, heat: HeatIndex, beside: bool | None, ballast: str) -> None:
        """`beside`: the store is on the filesystem of the tree (None: not known as yet, `space` is told later).
        `ballast`: path of its file."""
        self._tier = tier
        self._kit = tier.kit
        self._heat = heat
        self._wake = threading.Event()
        self._work = threading.Event()  # for the next round; it need not come at once
        self._stopping = threading.Event()
        self.collector = Collector(tier.kit)
        self._ballast = Ballast(ballast, tier.kit.tree)
        self.scanners = Scanners(heat, tier.neighbours.pid_of)
        self.keeper = HeatKeeper(tier.kit, heat, tier.neighbours.precision, self.scanners)
        self.space = Space(tier.kit, beside)
        self.trials = Trials(tier.kit)
        self._pace = Pace(tier, self.space)
        self.eviction = Eviction(
            tier, heat, self.keeper, self.space, self.trials, self._ballast, self._stopping
        )
        self.replication = Replication(tier, self.space, self.trials, self._stopping)
        self._pinned = Pinned(tier, self._stopping)
        self._pending = True
        self._survey: Survey | None = None
        self.looked = threading.Event()  # the look through the tree is over, or none was needed
        self._threads = [
            threading.Thread(target=self._rounds, name="scheduler", daemon=True),
            threading.Thread(target=self._look_through, name="survey", daemon=True),
        ]
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
        self.keeper.flush()

    # --- what others say ----------------------------------------------------------------------------------

    def look(self) -> None:
        """There is something for a round, which comes within a second."""
        self._work.set()
        self._wake.set()

    def reconfigured(self) -> None:
        """There are new settings: what had to stay by the former ones is tried again."""
        self.trials.staying.begin_anew()
        self.look()

    def poke(self, message: wire.Poke) -> None:
        """There are new marks; urgent: space is short."""
        self._pace.told(message.position)
        if message.urgent:
            self.eviction.urgent.set()
        self.look()

    def bring_pinned(self) -> None:
        """Something was pinned: it comes back, also if whoever asked for that goes away."""
        self._tier.drainer.pinned.set()
        self.look()

    def make_index_room(self) -> bool:
        """A commit found no room on the disk: whether it is worth trying again. Room is made besides."""
        self.eviction.urgent.set()
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
        if self.trials.paused:
            notes.append(self.trials.pause_reason)
        if not self._kit.store.capabilities.conditional_put:
            notes.append("the store cannot refuse a second machine: mount this volume on one only")
        if self.space.beside:
            notes.append("the store is on the same filesystem as the files: it is no backup and frees nothing")
        return notes

    # --- rounds -------------------------------------------------------------------------------------------

    def _rounds(self) -> None:
        next_heat = 0.0
        self._kit.movements.told = self.look
        while not self._stopping.is_set():
            self._work.clear()
            restless = True
            try:
                now = time.monotonic()
                if self.eviction.urgent.is_set() or self._pace.is_due():
                    self._pace.drain()
                if self._pending:
                    self._pending = recovery.finish_pending(self._tier) > 0
                if now >= next_heat:
                    next_heat = now + _HEAT_SECONDS
                    self.keeper.flush()
                self.trials.ask_store()
                self.eviction.turn()
                self._ballast.restore(self._kit.config.min_free)
                self.replication.turn()
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
        unsure = self._pending or self.trials.doubtful or self.trials.on_trial
        return self.replication.is_waiting or unsure or self.space.excess() > 0

    def _wait(self, restless: bool) -> None:
        """Until the next round. Meanwhile space is watched closely: a fast writer fills a disk in no time."""
        began = time.monotonic()
        latest = began + (_ROUND_SECONDS if restless else _IDLE_SECONDS)
        while not self._stopping.is_set():
            until = min(latest, began + _ROUND_SECONDS) if self._work.is_set() else latest
            until = min(until, self._pace.due_at)
            if self._wake.wait(min(max(0.0, until - time.monotonic()), self._pause_between_looks())):
                self._wake.clear()
                if self.eviction.urgent.is_set():
                    return
            if time.monotonic() >= until or (self.space.elsewhere and self.eviction.is_low()):
                return

    def _pause_between_looks(self) -> float:
        """Seconds in which nobody can have filled the filesystem."""
        if not self.space.elsewhere:
            return _IDLE_SECONDS
        return max(_LOOK_SECONDS, self.space.left() / _FILLING)

    # --- the look through the tree ------------------------------------------------------------------------

    def _look_through(self) -> None:
        """The tree, if that has not been done in this custody epoch or heat was lost. Where it fails, as for
        want of descriptors or of an answer, nobody waits for it, and it is tried again."""
        seconds = 0.0
        while not self._stopping.wait(seconds):
            try:
                if self._look_if_needed():
                    return
            finally:
                self.looked.set()
            seconds = _AGAIN_SECONDS

    def _look_if_needed(self) -> bool:
        """False where it is to be tried again."""
        try:
            if not self._kit.index.surveyed or self._heat_is_lost():
                self._survey = Survey(self._tier, self._heat.seed_many, self._stopping)
                self._survey.run()
        except (TierError, OSError) as error:
            if not self._stopping.is_set():
                self._kit.troubles.note(f"the tree could not be looked through: {error}")
            return False
        except Exception:
            log.exception("looking through the tree failed")
            return False
        finally:
            self._survey = None
        return True

    def _heat_is_lost(self) -> bool:
        here = self._kit.index.totals().local_bytes > 0
        return here and not any(True for _ in self._heat.victims(1 << 62))
