"""Whether it is worth trying to copy out now: of the store in general, and of one file after another.

After most of what was tried has failed there is a pause. Then one small question is put to the store, and when
that is answered one file is tried before the others, as its bucket may be full.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import NamedTuple

from tierfs.errors import TierError
from tierfs.inodes import InodeSet
from tierfs.kit import Kit
from tierfs.tier import Item

log = logging.getLogger("scheduler")

_STAY_SECONDS = 30.0  # a file that could not go is left alone so long
_NEVER_SECONDS = 3600.0
_PAUSE_SECONDS = 60.0  # after most of what was tried has failed
_PART = 8  # of its time, by which a file may be left alone for less


class _Group(NamedTuple):
    """Files that came one after another, and are left alone until the same moment (of CLOCK_MONOTONIC)."""

    began: float
    until: float
    inos: InodeSet


class Stayers:
    """Files that are left alone for a time. Thread-safe; there may be as many as a volume has files, and each
    takes a bit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By how long they are. Neither this nor a tuple is changed in its place: others look without the lock.
        self._groups: dict[float, tuple[_Group, ...]] = {}
        self._over = InodeSet()
        self._anew = False

    def __contains__(self, ino: int) -> bool:
        return any(ino in group.inos for groups in self._groups.values() for group in groups)

    def has(self, ino: int, seconds: float) -> bool:
        """One that was to be left alone for just so long."""
        return any(ino in group.inos for group in self._groups.get(seconds, ()))

    def add(self, ino: int, seconds: float) -> None:
        """For so long from now."""
        now = time.monotonic()
        with self._lock:
            for groups in self._groups.values():
                for group in groups:
                    group.inos.discard(ino)
            self._over.discard(ino)
            groups = self._groups.get(seconds, ())
            if not groups or now >= groups[-1].began + max(seconds / _PART, 1.0):
                groups = (*groups, _Group(now, now + seconds, InodeSet()))
                self._groups = {**self._groups, seconds: groups}
            groups[-1].inos.add(ino)

    def forget(self) -> None:
        """Those whose time is over are no more left alone."""
        with self._lock:
            now = float("inf") if self._anew else time.monotonic()
            self._anew = False
            for seconds, groups in self._groups.items():
                if groups and groups[0].until <= now:
                    for group in groups:
                        if group.until <= now:
                            self._over.take_in(group.inos)
                    left = tuple(group for group in groups if group.until > now)
                    self._groups = {**self._groups, seconds: left}

    def begin_anew(self) -> None:
        """The next `forget` is of all: why they were left alone may hold no longer. Not at once, as somebody
        may be about to add what was tried before."""
        self._anew = True

    def take_over(self, most: int) -> list[int]:
        """So many of those that were forgotten, each once."""
        with self._lock:
            return self._over.take(most)

    def drop_over(self) -> None:
        """Nobody needs to be told of those that were forgotten."""
        with self._lock:
            self._over = InodeSet()


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
