"""For how long the kernel may answer from what it was told, where edits behind the mount are seen at once.

All changes through the mount are the kernel's own knowledge but for one: who writes to a mapping of a file in
passthrough tells nobody, and may go on after the last close. So what has been opened for writing is `unproven`
until a moment's read lease shows that nobody can be writing; what is read of it after that is lasting.
"""

from __future__ import annotations

import os
import stat
import time
from fcntl import F_RDLCK

from tierfs.handles import Inode, Shown
from tierfs.tree import Tree

LONG = 3600  # seconds
# Of files: whoever writes behind the mount is seen when they close the file.
FILES = 300
FRESH = 60  # seconds from a change until it is on the disk: how many blocks it takes may change by that
RESTLESS = 2  # so long the next change is likely: programs write a file, look at it, set its times, rename it
_SET_ID = stat.S_ISUID | stat.S_ISGID
_PROBE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOATIME | os.O_CLOEXEC


class Lasting:
    """What is known of that. Changed by the thread that serves alone."""

    def __init__(self, tree: Tree, inodes: dict[int, Inode]) -> None:
        """`inodes` are the Gate's own."""
        self._tree = tree
        self._inodes = inodes
        self.watched = False  # edits behind the mount are seen
        self.unproven: set[int] = set()

    def written(self, ino: int) -> None:
        """From now on somebody may change its content without a request."""
        if self.watched:
            self.unproven.add(ino)

    def ended(self, ino: int) -> None:
        """The kernel does not know it any more, so nobody has it open or mapped through the mount."""
        self.unproven.discard(ino)

    def doubt(self, st: os.stat_result) -> None:
        """The kernel is told of it for the first time. What was changed a moment ago is proven when it asks
        again: most is looked at once."""
        if self.watched and stat.S_ISREG(st.st_mode) and _fresh(st, time.time()) > 0:
            self.unproven.add(st.st_ino)

    def is_restless(self, st: os.stat_result) -> bool:
        """Whoever has changed it just now through the mount will do so again: it is not worth a proof yet."""
        return st.st_ino in self._inodes and FRESH - RESTLESS < _fresh(st, time.time()) <= FRESH

    def prove(self, dirfd: int, name: bytes, st: os.stat_result) -> bool:
        """Whether the file of this name had to be proven, and is now: `st`, of before, does not count any more.

        So has what was changed a moment ago: behind the mount somebody may still be writing.
        """
        ino = st.st_ino
        if not self.watched or not stat.S_ISREG(st.st_mode):
            return False
        if ino not in self.unproven and _fresh(st, time.time()) <= 0:
            return False
        inode = self._inodes.get(ino)
        if inode is not None and (inode.writers or inode.guard is not None):
            return False
        self.unproven.add(ino)
        try:
            fd = os.open(name, _PROBE, dir_fd=dirfd)
        except OSError:
            return False  # gone, or a lease of the mover's is in the way
        try:
            if os.fstat(fd).st_ino != ino or not self._tree.try_lease(fd, F_RDLCK):
                return False
            self._tree.unlease(fd)
        except OSError:
            return False  # no leases here
        finally:
            os.close(fd)
        self.unproven.discard(ino)
        return True

    def of_name(self, st: Shown, short: int) -> int:
        """For how many seconds a name holds. Of several names of a file only the last is known here."""
        several = st.st_nlink != 1 and not stat.S_ISDIR(st.st_mode)
        return LONG if self.watched and not several else short

    def of_attributes(self, st: object, short: int, now: float) -> int:
        """For how many seconds attributes hold that are not about to change."""
        if not self.watched or not isinstance(st, os.stat_result):
            return short
        if not stat.S_ISREG(st.st_mode):
            return LONG
        if st.st_mode & _SET_ID or st.st_ino in self.unproven:
            return short
        inode = self._inodes.get(st.st_ino)
        if inode is not None and (inode.writers or inode.shown is not None):
            return short
        fresh = _fresh(st, now)
        return FILES if fresh <= 0 else max(min(fresh, FRESH), short)


def _fresh(st: os.stat_result, now: float) -> int:
    """For how many seconds it has still changed lately."""
    return int(st.st_ctime) + FRESH - int(now)
