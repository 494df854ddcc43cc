"""How much of a busy processor the mover takes: next to nothing, but for what somebody waits for.

Who reads a stub, or asks how things are, is answered with a usual share for as long as that takes. What is
ordered has one until it has used so much of a processor as a small order takes, and nobody feels; then a small
one: enough to get on beside a build. And a mover that begins or ends is always waited for, perhaps by an order
or an unmount, which has no way to tell it so.

`nice` counts within a scheduling group only, and with autogroups (sched(7)) every session is a group: beside a
program in another session a mover of nice 19 would get half of a processor. So it has a session of its own
(see `Child.start`), and it is the nice value of that group that changes. Where there are no autogroups, or a
service manager's groups take their place, the process's own counts, which stays at 19: only the group's can be
lowered again without a privilege.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable

from tierfs import slices

log = logging.getLogger("mover")

_GROUP = "/proc/self/autogroup"
_LOW, _ORDERED, _USUAL = 19, 10, 0
_CALM_SECONDS = 1.0  # after the last who waited
_LOOKS = 8  # in that time; the kernel takes a change ten times a second at most
_FIRST_SHARE = 0.1  # of that time, on a processor


def hurry_on(pid: int) -> None:
    """Of a mover that is to end: by itself it would hear of that when a busy processor comes to it."""
    with contextlib.suppress(OSError):  # it has ended, or there are no groups here
        _write(f"/proc/{pid}/autogroup", _USUAL)


def _write(path: str, nice: int) -> None:
    with open(path, "w") as file:
        file.write(str(nice))


class Priority:
    """Of this process. `hurry` is safe in any thread."""

    def __init__(self, path: str = _GROUP, calm_seconds: float = _CALM_SECONDS) -> None:
        self._path = path
        self._calm_seconds = calm_seconds
        self._lock = threading.Lock()
        self._asked = threading.Event()
        self._nice = _USUAL  # a session begins so
        self._until = 0.0
        self._used = 0.0  # of processors, when somebody last began to wait
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, waiting: Callable[[], bool], ordered: Callable[[], bool] = lambda: False) -> None:
        """Give way to everybody else, from a moment after nobody waits any more.

        `waiting`: whether somebody waits; `ordered`: whether for an order. A thread of its own asks both.
        """
        if not os.access(self._path, os.W_OK):
            return
        self.hurry()
        self._asked.set()
        self._thread = threading.Thread(
            target=self._calm_down, args=(waiting, ordered), name="priority", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End the thread; from now on, until the process ends, others wait for it."""
        self.hurry()
        self._stopping.set()
        self._asked.set()
        if self._thread is not None:
            self._thread.join()

    def hurry(self, ordered: bool = False) -> None:
        """Somebody waits for us: take a usual share, for a moment; for an order, until it has used it."""
        with self._lock:
            if not ordered:
                self._until = time.monotonic() + self._calm_seconds
            self._used = time.process_time()
            if self._nice != _USUAL:
                self._become(_USUAL)
                self._asked.set()  # also where it was changed too lately: then the thread does it

    def _calm_down(self, waiting: Callable[[], bool], ordered: Callable[[], bool]) -> None:
        while True:
            self._asked.wait()
            if self._stopping.wait(self._calm_seconds / _LOOKS):
                return
            try:
                self._look(waiting, ordered)
            except Exception:  # it is looked again in a moment
                log.exception("who waits cannot be told")

    def _look(self, waiting: Callable[[], bool], ordered: Callable[[], bool]) -> None:
        with self._lock:
            if waiting() or time.monotonic() < self._until:
                self._become(_USUAL)
            elif ordered():
                used = time.process_time() - self._used
                self._become(_USUAL if used < _FIRST_SHARE * self._calm_seconds else _ORDERED)
            elif self._become(_LOW):
                self._asked.clear()

    def _become(self, nice: int) -> bool:
        """Whether that is what counts now."""
        if nice == self._nice:
            return True
        try:
            _write(self._path, nice)
        except OSError as error:
            log.debug("nice %d is not set: %s", nice, error)
            return False
        # A longer slice has it displaced sooner, and run later: both are for work that nobody waits for.
        if (nice == _USUAL) != (self._nice == _USUAL):
            slices.stand_back_all(slices.DEFAULT if nice == _USUAL else slices.MOVER)
        self._nice = nice
        return True
