"""Room on the local disk: who begins to write waits while it is nearly full and something can still leave.

A passthrough write meets ENOSPC in the backing filesystem itself, where nothing can wait for an eviction. So
files are held back where writing begins: at CREATE and at an open for writing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tierfs.tree import Tree
from tierfs.waits import Blocked, Wait

SHARE = 16  # the low reserve: this part of the filesystem ...
MOST = 256 << 20  # ... and no more bytes than this
WAIT_SECONDS = 10.0  # for the next step of an eviction; then the write goes on and meets what there is
STEPS = 64  # of an eviction, from nothing to the low reserve
LOADING_SECONDS = 60.0  # before that for a mover that is still being loaded: a busy machine takes half of it
HOPELESS_SECONDS = 30.0  # after waiting in vain nobody waits for so long


class Room:
    """Belongs to the gate, and is called under its lock."""

    def __init__(self, tree: Tree, ask: Callable[[], None], loading: Callable[[], bool]) -> None:
        """`ask` tells the mover that space is short; `loading`: there is one, and it cannot hear that yet."""
        self._tree = tree
        self._ask = ask
        self._loading = loading
        self.low = min(MOST, tree.space().total // SHARE)
        self._wait: Wait | None = None
        self._latest = 0.0  # the end of this wait, whatever is still being loaded
        self._reached = 0  # the most steps since it began
        self._hopeless_until = 0.0

    @property
    def waiting(self) -> bool:
        """Somebody waits."""
        return self._wait is not None

    def need(self) -> None:
        """Raises Blocked while the disk is below its low reserve and waiting has not been in vain lately."""
        if self._ample():
            return
        now = time.monotonic()
        if now < self._hopeless_until:
            return
        self._ask()
        if self._wait is None:
            self._wait = Wait(now + WAIT_SECONDS)
            self._latest = now + LOADING_SECONDS + WAIT_SECONDS
            self._reached = self._steps()
        raise Blocked(self._wait)

    def look(self, now: float) -> None:
        """Let those go on who wait, when there is room or they have waited long enough."""
        wait = self._wait
        if wait is None:
            return
        if self._loading():
            wait.deadline = min(now + WAIT_SECONDS, self._latest)
        if (reached := self._steps()) > self._reached:
            self._reached, wait.deadline = reached, now + WAIT_SECONDS
        ample = self._ample()
        if not ample and wait.deadline is not None and now < wait.deadline:
            self._ask()
            return
        if not ample:
            self._hopeless_until = now + HOPELESS_SECONDS
        self._wait = None
        wait.fire()

    def in_vain(self, now: float) -> None:
        """Nothing can leave: who waits goes on, and meets what there is."""
        if self._wait is not None:
            wait, self._wait, self._hopeless_until = self._wait, None, now + HOPELESS_SECONDS
            wait.fire()

    def _steps(self) -> int:
        """How far it is from nothing to the low reserve."""
        return self._tree.space().available * STEPS // self.low

    def _ample(self) -> bool:
        return self._tree.space().available >= self.low
