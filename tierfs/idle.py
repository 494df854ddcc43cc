"""Backing files that stay registered with the kernel for a while after their last release.

Programs open the same files again and again; to open one that is registered takes no system call. It pins the
inode, as an open file does, but is in no lease's way: the descriptor is of O_PATH. So it ends at once when the
file loses the name that it is known by, may no longer be fit for passthrough, or is to be guarded, and soon in
any case.
"""

from __future__ import annotations

import resource
import time
from collections import OrderedDict
from collections.abc import Callable

from tierfs.handles import Inode

# Descriptors, at most half of those that the process may have. With four times as many, work that goes through
# more files than that (unpacking, rsync, git add) is a fifteenth slower: nothing is in the processor's caches.
MOST = 4096
SECONDS = 5.0  # a file removed behind the mount keeps its blocks for so long

_NEVER = 3600.0


class Idle:
    """Inodes without a handle that are still registered, the one used last at the end."""

    __slots__ = ("__dict__", "most", "room")

    def __init__(self, retire: Callable[[Inode], None]) -> None:
        """`retire` ends the registration and drops the inode's state; the compiled form puts its own there."""
        self.retire = retire
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.most = max(1, min(MOST, descriptors // 2))
        # So many inodes in all, open ones too: who opens many files at once may have all descriptors.
        self.room = max(2, descriptors * 3 // 4)
        self.inodes: OrderedDict[int, tuple[Inode, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.inodes)

    def keep(self, inode: Inode, inodes: int) -> None:
        """Its last handle is gone. `inodes`: so many have a descriptor, this one too."""
        self.inodes[inode.ino] = inode, time.monotonic() + SECONDS
        if len(self.inodes) > self.most or inodes > self.room:
            self._end_oldest()

    def give_way(self, inodes: int) -> None:
        """One more than these many is about to have a descriptor."""
        if inodes >= self.room and self.inodes:
            self._end_oldest()

    def _end_oldest(self) -> None:
        self.retire(self.inodes.popitem(last=False)[1][0])

    def wake(self, ino: int) -> None:
        """It has a handle again."""
        self.inodes.pop(ino, None)

    def drop(self, ino: int) -> None:
        """End it now, if it is idle."""
        entry = self.inodes.pop(ino, None)
        if entry is not None:
            self.retire(entry[0])

    def drop_all(self) -> None:
        """End all."""
        while self.inodes:
            self.retire(self.inodes.popitem()[1][0])

    def expire(self, now: float) -> float:
        """End those whose time is over, at `now` of CLOCK_MONOTONIC; after how many seconds to look again."""
        while self.inodes:
            ino, (_, until) = next(iter(self.inodes.items()))
            if until > now:
                return until - now
            self.drop(ino)
        return _NEVER
