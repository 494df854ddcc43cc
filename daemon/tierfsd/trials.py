"""Whether it is worth trying to copy out now: of the store in general, and of one file after another.

After most of what was tried has failed there is a pause. Then one small question is put to the store, and when
that is answered one file is tried before the others, as its bucket may be full.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from itertools import islice

from tierfs.errors import TierError
from tierfs.kit import Kit
from tierfs.tier import Item

log = logging.getLogger("scheduler")

_STAY_SECONDS = 30.0  # a file that could not go is left alone so long
_NEVER_SECONDS = 3600.0
_PAUSE_SECONDS = 60.0  # after most of what was tried has failed


class Stayers:
    """Files that are left alone for a time. Thread-safe; there may be as many as a volume has files."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By how long they are: the first of each is the next whose time is over (seconds of CLOCK_MONOTONIC).
        self._until: dict[float, OrderedDict[int, float]] = {}
        self._over: dict[int, None] = {}

    def __contains__(self, ino: int) -> bool:
        return any(ino in until for until in self._until.values())

    def has(self, ino: int, seconds: float) -> bool:
        """One that was to be left alone for just so long."""
        return ino in self._until.get(seconds, ())

    def add(self, ino: int, seconds: float) -> None:
        """For so long from now."""
        with self._lock:
            for until in self._until.values():
                until.pop(ino, None)
            self._over.pop(ino, None)
            # Not changed in its place: others look without the lock.
            if seconds not in self._until:
                self._until = {**self._until, seconds: OrderedDict()}
            self._until[seconds][ino] = time.monotonic() + seconds

    def forget(self) -> None:
        """Those whose time is over are no more left alone."""
        now = time.monotonic()
        with self._lock:
            for until in self._until.values():
                while until and next(iter(until.values())) <= now:
                    self._over[until.popitem(last=False)[0]] = None

    def take_over(self, most: int) -> list[int]:
        """So many of those that were forgotten, each once."""
        with self._lock:
            taken = list(islice(self._over, most))
            for ino in taken:
                del self._over[ino]
        return taken


class Trials:
    """What eviction and replication know in common. Both may be at work at once."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self.doubtful = False  # most of what was last tried has failed: the store is asked before files are
        self.on_trial = False  # it answers again: one file is tried before the others
        self.paused_until = 0.0
        self.pause_reason = ""
        self.staying = Stayers()
        # Those whose trial has failed, of eviction and of replication: others come first. Two sets, as what one
        # of them may not try yet must not make the other begin with the same file over and over.
        self.tried_victims: set[int] = set()
        self.tried: set[int] = set()

    @property
    def paused(self) -> bool:
        """Nothing is tried now."""
        return time.monotonic() < self.paused_until

    def pause(self, tried: int, failed: int) -> None:
        """So many of those that were tried have failed."""
        self.doubtful = True
        self.paused_until = time.monotonic() + _PAUSE_SECONDS
        self.pause_reason = f"demotion pauses: {failed} of {tried} files could not be copied out"
        log.warning("%s", self.pause_reason)

    def ask_store(self) -> None:
        """One small question instead of many files that fail: each would be read, and leave a trace for the
        collection of what may have arrived of it."""
        if not self.doubtful or self.paused:
            return
        try:
            self._kit.still_ours()
        except (TierError, OSError) as error:
            self.paused_until = time.monotonic() + _PAUSE_SECONDS
            log.debug("the store does not answer yet: %s", error)
        else:
            self.doubtful, self.on_trial = False, True

    def end(self) -> None:
        """It has gone well."""
        self.on_trial = False
        self.tried.clear()
        self.tried_victims.clear()

    def leave_alone(self, item: Item, tried: set[int]) -> None:
        """This one has stayed; `tried` is the set of whoever has tried it."""
        seconds = _NEVER_SECONDS if item.reason.startswith("never") else _STAY_SECONDS
        self.staying.add(item.ino, seconds)
        if item.failed and self.on_trial:
            tried.add(item.ino)

    def never_leaves(self, ino: int) -> bool:
        """A pattern of [never] spoke against this file when it was last tried."""
        return self.staying.has(ino, _NEVER_SECONDS)

    def next_of(self, items: list[Item]) -> list[Item]:
        """One that has not been tried, else the first: what is wrong may be wrong with a file alone."""
        left = [item for item in items if item.ino not in self.tried]
        if not left:
            self.tried.clear()
        return (left or items)[:1]
