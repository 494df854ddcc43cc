"""How long a thread runs before another is preferred to it: the time slices of the scheduler (sched(7)).

A thread that wakes displaces at once one with a longer slice than its own; for one with a shorter or the same
it may have to wait. Who has a long one and much to compute also comes later, among others that compute. Linux
has slices from 6.12 on; older kernels, and systems without the compiled part, leave all as it is, which costs
time alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache

from tierfs.fuse import compiled

log = logging.getLogger("slices")

# Nanoseconds.
DEFAULT = 0  # the kernel's, of 0.7 to 2.8 ms
SERVER = 20_000_000  # who has been answered runs at once
MOVER = 100_000_000  # whoever wakes does, the server too; the longest there is


def stand_back(nanoseconds: int) -> None:
    """Set the slice of the calling thread, and of those that it begins."""
    _set([0], nanoseconds)


def stand_back_all(nanoseconds: int) -> None:
    """Set the slices of all threads of this process."""
    _set([int(name) for name in os.listdir("/proc/self/task")], nanoseconds)


@cache
def _setter() -> Callable[[int, int], None] | None:
    """Of a thread's slice. To find it takes a look at all sources: not while somebody waits."""
    module, _why_not = compiled.find()
    return module.time_slice if module is not None else None


def _set(threads: list[int], nanoseconds: int) -> None:
    setter = _setter()
    if setter is None:
        return
    for thread in threads:
        try:
            setter(thread, nanoseconds)
        except ProcessLookupError:
            continue  # it has ended
        except OSError as error:
            log.info("the time slice stays as it is: %s", error)  # a sandbox
            return
