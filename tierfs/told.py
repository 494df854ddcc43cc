"""For how long the kernel may answer from what it was told of a node: a hint, for listings.

Programs look at many names, and then list their directory, or the other way round. What the kernel was told
lately, and may go on believing, is left out of a listing. Wrong, the hint costs a request; nothing shown
depends on it.
"""

from __future__ import annotations

import mmap
import time

from tierfs.ledger import MOST_NODES, SLOT_BITS

LEFT = 2  # seconds that are left at least, so that whoever has listed a directory can use what he has
_SLOT = (1 << SLOT_BITS) - 1


class Told:
    """By the slots in the numbers of nodes, until when that is, as 32 bits of seconds of CLOCK_MONOTONIC."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, MOST_NODES * 4)  # only what is used takes memory
        self._until = memoryview(self.memory).cast("I")

    def note(self, nodeid: int, seconds: int) -> None:
        """Its name and its attributes hold for so long from now on."""
        self._until[nodeid & _SLOT] = int(time.monotonic()) + seconds

    def lasts(self, nodeid: int) -> bool:
        """They do still."""
        return self._until[nodeid & _SLOT] >= int(time.monotonic()) + LEFT
