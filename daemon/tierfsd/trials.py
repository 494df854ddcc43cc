"""Whether it is worth trying to copy out now: of the store in general, and of one file after another.

After most of what was tried has failed there is a pause. Then one small question is put to the store, and when
that is answered one file is tried before the others, as its bucket may be full.
"""

from __future__ import annotations

import logging
import time

from tierfs.errors import TierError
from tierfs.kit import Kit
from tierfs.tier import Item

log = logging.getLogger("scheduler")

_STAY_SECONDS = 30.0  # a file that could not go is left alone so long
_NEVER_SECONDS = 3600.0
_PAUSE_SECONDS = 60.0  # after most of what was tried has failed


class Trials:
    """What eviction and replication know in common. Both may be at work at once."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self.doubtful = False  # most of what was last tried has failed: the store is asked before files are
        self.on_trial = False  # it answers again: one file is tried before the others
        self.paused_until = 0.0
        self.pause_reason = ""
        self.staying: dict[int, float] = {}  # inode -> until when it is left alone
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
        self.staying[item.ino] = time.monotonic() + seconds
        if item.failed and self.on_trial:
            tried.add(item.ino)

    def forget_stayers(self) -> None:
        """Those whose time is over may be tried again."""
        now = time.monotonic()
        for ino, until in list(self.staying.items()):  # a copy: another thread may add to it or forget them too
            if until <= now:
                self.staying.pop(ino, None)

    def next_of(self, items: list[Item]) -> list[Item]:
        """One that has not been tried, else the first: what is wrong may be wrong with a file alone."""
        left = [item for item in items if item.ino not in self.tried]
        if not left:
            self.tried.clear()
        return (left or items)[:1]
