"""Keeps the namespace journal up to date: a thread that writes segments and snapshots when they are due."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable

from tierfs.errors import TierError
from tierfs.journal import Journal
from tierfs.ownership import ALIVE_SECONDS
from tierfs.snapshots import Snapshots
from tierfs.tier import Tier

log = logging.getLogger("journal")

_LOOK_SECONDS = 0.5
_IDLE_SECONDS = 2.5  # where nothing has changed
_PAUSES = (1.0, 2.0, 5.0, 10.0, 20.0)  # after failures; what waits stays noted
_CLAIM_SECONDS = 30.0  # between two looks whether the store is still ours
_FAREWELL_SECONDS = 3.0
_ANSWER_SECONDS = 10.0  # for the store's first answer after a mount


class JournalKeeper:
    """Start with `start`, end with `stop`. What is not in the store by then is written by the next one."""

    def __init__(self, tier: Tier, volume: str, show_life: Callable[[bool], None]) -> None:
        """`show_life` tells other machines that the store is in use (True), or no more."""
        self._tier = tier
        self._kit = tier.kit
        self._show_life = show_life
        self._next_sign = 0.0
        self._looked = False  # whether the store still has what was written to it
        self._stopping = threading.Event()
        self.journal = Journal(tier.kit, tier.places, tier.drain, volume, tier.kit.index.session.epoch)
        self.snapshots = Snapshots(tier.kit, self.journal, tier.places, self._stopping)
        self._lacking_since = time.time()  # 0: what is in the store describes the tree as of the last segment
        self._verified = -_CLAIM_SECONDS
        self._failures = 0
        self._problem = ""
        self._idle = False  # all that has changed is in the store
        self._turn = threading.Condition()
        self._turns = 0
        self._hurry = False
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    def start(self) -> None:
        """Work in a thread of its own."""
        self._thread.start()

    def stop(self) -> None:
        """End after what is under way."""
        self._stopping.set()
        with self._turn:
            self._turn.notify_all()
        self._thread.join()
        if self._next_sign and not self._kit.withheld and not self._failures:
            # So that no machine lost in the night takes the evening's last changes with it, and another one
            # need not wait before it takes the volume; neither is worth a long wait here.
            farewell = threading.Thread(target=self._say_farewell, daemon=True)
            farewell.start()
            farewell.join(_FAREWELL_SECONDS)

    def _say_farewell(self) -> None:
        with contextlib.suppress(TierError, OSError):
            noting, _ = self._kit.index.noting()
            if noting:
                self.journal.flush()
            self._show_life(False)

    @property
    def behind(self) -> float:
        """Seconds since the oldest change that the store does not know of."""
        lacking = max(0.0, time.time() - self._lacking_since) if self._lacking_since else 0.0
        return max(self.journal.behind, lacking)

    @property
    def holds_back(self) -> str:
        """Why nothing may be removed from the store, "" where it may. Raises IndexError_."""
        return self.snapshots.holds_back

    def catch_up(self, cancelled: threading.Event) -> str:
        """Wait until all that has changed by now is in the store; why it is not, if it cannot be."""
        self._kit.claim_tried.wait(_ANSWER_SECONDS)
        self._tier.drain()
        begun, oldest = time.time_ns(), self._kit.index.noted_since()
        while not cancelled.is_set() and not self._stopping.is_set():
            # What waits by now was noted before, also where the clock has been set back since.
            since = self._kit.index.noted_since()
            if not self.snapshots.due and (not since or (since > begun and since != oldest)):
                return ""
            with self._turn:
                before, self._hurry = self._turns, True
                self._turn.notify_all()
                while self._turns == before and not cancelled.is_set() and not self._stopping.is_set():
                    self._turn.wait(_LOOK_SECONDS)
                if self._problem:
                    return self._problem
        return "it was cancelled"

    def _run(self) -> None:
        while not self._stopping.is_set():
            with self._turn:
                if not self._hurry:
                    self._turn.wait(self._pause())
                hurry, self._hurry = self._hurry, False
            if not self._stopping.is_set():
                self._work(hurry)
                with self._turn:
                    self._turns += 1
                    self._turn.notify_all()

    def _pause(self) -> float:
        if self._failures:
            return _PAUSES[min(self._failures, len(_PAUSES)) - 1]
        if not self._idle:
            return _LOOK_SECONDS
        return min(max(_LOOK_SECONDS, self._kit.config.journal_seconds / 8), _IDLE_SECONDS)

    def _work(self, hurry: bool) -> None:
        try:
            self._note_lacking()
            self.journal.trim()
            if self._kit.withheld:
                self._problem = self._kit.withheld
                return
            if time.monotonic() >= self._next_sign:
                self._check_claim()
                self._show_life(True)
                self._next_sign = time.monotonic() + ALIVE_SECONDS
            if not self._looked:
                if self.snapshots.is_lost():
                    log.warning("the journal in the store is not whole any more: the tree is journalled anew")
                    self._kit.snapshot_wanted.set()
                self._looked = True
            if self.snapshots.due:
                self._check_claim()
                if self.snapshots.take():
                    self.snapshots.prune()
            elif self.journal.due or hurry:
                self._check_claim()
                self.journal.flush()
            self._note_lacking()
            self._idle = not self._lacking_since and not self._kit.index.noted_since()
        except (TierError, OSError) as error:
            self._failed(str(error))
        except Exception as error:
            log.exception("the namespace journal cannot be written")
            self._failed(f"internal error ({type(error).__name__})")
        else:
            self._failures, self._problem = 0, ""

    def _note_lacking(self) -> None:
        if not self.snapshots.lacking:
            self._lacking_since = 0.0
        elif not self._lacking_since:
            self._lacking_since = time.time()

    def _failed(self, problem: str) -> None:
        self._failures += 1
        self._problem = problem
        if self._failures == 1 and not self._stopping.is_set():
            self._kit.troubles.note(f"the namespace journal cannot be written: {problem}")

    def _check_claim(self) -> None:
        now = time.monotonic()
        if self._failures or now - self._verified >= _CLAIM_SECONDS:
            self._kit.still_ours()
            self._verified = now
