"""How long a thread runs before another is preferred to it: the time slices of the scheduler (sched(7)).

A thread that wakes displaces at once one with a longer slice than its own; for one with a shorter or the same
it may have to wait. How soon a thread runs among others that compute is as it was. Linux has slices from 6.12
on; older kernels, and systems without the compiled part, leave all as it is, which costs time alone.
"""

from __future__ import annotations

import logging

from tierfs.fuse import compiled

log = logging.getLogger("slices")

# Nanoseconds. The kernel's default is 0.7 to 2.8 ms, the longest 100 ms.
SERVER = 20_000_000  # who has been answered runs at once
MOVER = 100_000_000  # whoever wakes does, the server too


def stand_back(nanoseconds: int) -> None:
    """Set the slice of the calling thread and of all that it begins."""
    module, _why_not = compiled.find()
    if module is None:
        return
    try:
        module.time_slice(nanoseconds)
    except OSError as error:
        log.info("the time slice stays as it is: %s", error)  # a sandbox
