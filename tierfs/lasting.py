"""For how long the kernel may answer from what it was told, where edits behind the mount are seen at once.

All changes through the mount are the kernel's own knowledge but for one: who writes to a mapping of a file in
passthrough tells nobody, and may go on after the last close. So what has been opened for writing is `unproven`
until a moment's read lease shows that nobody can be writing; what is read of it after that is lasting. What is
looked up for the first time is `believed` for a moment, so that nobody waits for the proof; where it fails, the
kernel is told, before a second has passed: for so long attributes hold that are not lasting, too.
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
MOST_BELIEVED = 8192  # so that their proofs take no time to speak of
MOST_PROVEN = 8192  # of which that is remembered
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
        self.believed: dict[int, int] = {}  # inode -> the ctime (ns) of what the kernel was told
        # Inode -> its ctime (ns) when it was last proven. While that stays, nobody has written since; whoever
        # opens it through the mount to do so makes it unproven, and who does behind it is seen as ever.
        self.proven: dict[int, int] = {}

    def written(self, ino: int) -> None:
        """From now on somebody may change its content without a request."""
        if self.watched:
            self.unproven.add(ino)

    def ended(self, ino: int) -> None:
        """The kernel does not know it any more, so nobody has it open or mapped through the mount."""
        self.unproven.discard(ino)

    def doubt(self, st: os.stat_result) -> None:
        """What was changed a moment ago is proven when the kernel asks again: most is looked at once."""
        if self.watched and stat.S_ISREG(st.st_mode) and _fresh(st, time.time()) > 0:
            self.unproven.add(st.st_ino)

    def believe(self, st: os.stat_result) -> None:
        """The kernel is told of it for the first time. What was changed a moment ago is proven soon."""
        if len(self.believed) >= MOST_BELIEVED:
            self.doubt(st)
        elif self.watched and stat.S_ISREG(st.st_mode) and _fresh(st, time.time()) > 0:
            self.believed[st.st_ino] = st.st_ctime_ns

    def confirm(self, dirfd: int, name: bytes, ino: int, ctime: int) -> bool:
        """Whether the file of this name is what the kernel was told, and nobody can be writing."""
        if ino in self.unproven:
            return True  # opened for writing since, which the kernel was told then
        if not self._may_be_proven(ino):
            return False
        st = self._at_rest(dirfd, name, ino)
        if st is None:
            self.unproven.add(ino)
            return False
        self._remember(st)
        return st.st_ctime_ns == ctime

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
        if ino not in self.unproven and (
            _fresh(st, time.time()) <= 0 or self.proven.get(ino) == st.st_ctime_ns
        ):
            return False
        if not self._may_be_proven(ino):
            return False
        self.unproven.add(ino)
        now = self._at_rest(dirfd, name, ino)
        if now is None:
            return False
        self.unproven.discard(ino)
        self._remember(now)
        return True

    def _remember(self, st: os.stat_result) -> None:
        if len(self.proven) >= MOST_PROVEN:
            self.proven.clear()
        self.proven[st.st_ino] = st.st_ctime_ns

    def _may_be_proven(self, ino: int) -> bool:
        inode = self._inodes.get(ino)
        return inode is None or not (inode.writers or inode.guard is not None)

    def _at_rest(self, dirfd: int, name: bytes, ino: int) -> os.stat_result | None:
        """The file of this name and number, while nobody had it open for writing; None where that is not so."""
        try:
            fd = os.open(name, _PROBE, dir_fd=dirfd)
        except OSError:
            return None  # gone, or a lease of the mover's is in the way
        try:
            if not self._tree.try_lease(fd, F_RDLCK):
                return None
            st = os.fstat(fd)
            self._tree.unlease(fd)
        except OSError:
            return None  # no leases here
        finally:
            os.close(fd)
        return st if st.st_ino == ino else None

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
