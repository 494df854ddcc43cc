"""How a mount server goes on where another has ended: with the files that were open, by the ledger."""

from __future__ import annotations

import errno
import os
import time

from tierfs.appearance import Appearance
from tierfs.handles import OPENING, Handle, Inode, ShownTimes
from tierfs.ledger import KeptInode, Ledger
from tierfs.states import SET_ID, States
from tierfs.tree import Tree


class Succession:
    """Call `begin`, then `restore` for each open file, then `end`. Belongs to the gate."""

    def __init__(self, tree: Tree, ledger: Ledger, states: States, appearance: Appearance) -> None:
        self._tree = tree
        self._appearance = appearance
        self._ledger = ledger
        self._states = states
        self._left: dict[int, KeptInode] = {}  # what the server before has left, and nobody has taken yet

    def begin(self) -> None:
        """Look at what was left."""
        self._left = {}
        for kept in list(self._ledger.load_inodes()):
            other = self._left.setdefault(kept.ino, kept)
            if other is not kept:  # killed at a change of it, or the number was another file's, which has ended
                self._left[kept.ino] = kept if kept.backing_id else other
                self._ledger.drop_inode(other.slot if kept.backing_id else kept.slot)

    def restore(
        self, opath: int, st: os.stat_result, flags: int, backing_id: int, parent: int, name: bytes
    ) -> Handle:
        """A file that is open already, as `Gate.open`. `opath` is the Gate's from success on."""
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        inode = self._inode(st.st_ino, parent, name)
        if backing_id != inode.backing_id:
            raise OSError(errno.EIO, "its registration is not known")
        try:
            self._states.enter(opath, st, parent, name)
            if inode.content is None:
                inode.shown = None
            if not st.st_nlink:
                # Its last release tells the mover: a file that never had a name is known by its mark alone.
                inode.handle = self._tree.handle_of(opath)
            fd = -1 if backing_id else self._tree.reopen(opath, flags & ~OPENING)
        except BaseException:
            self._states.leave(inode, opath)
            raise
        handle = Handle(inode, fd, flags, backing_id)
        inode.opens += 1
        inode.writers += writable
        # Its mark was made before its open was answered; a seal is given to nobody who has writers.
        inode.marked = inode.writers > 0 and inode.content is None
        inode.gone, inode.size = not st.st_nlink, st.st_size
        if backing_id and st.st_mode & SET_ID:
            # A change of mode moves ctime alone, a write both.
            inode.set_id = st.st_mtime_ns - (st.st_mtime_ns == st.st_ctime_ns)
        if inode.opath != opath:
            os.close(opath)
        return handle

    def _inode(self, ino: int, parent: int, name: bytes) -> Inode:
        """Its state, with what was left of it."""
        kept = self._left.pop(ino, None)
        inode = self._states.inodes.setdefault(ino, Inode(ino, parent, name))
        if kept is not None:
            inode.slot, inode.backing_id, inode.passthrough = kept.slot, kept.backing_id, bool(kept.backing_id)
            # Not what the inode says: a mover may have died while it moved its times.
            inode.shown = ShownTimes(*kept.shown) if kept.shown is not None else None
        return inode

    def end(self) -> None:
        """All open files are here: end the registrations that nobody uses."""
        left, self._left = self._left, {}
        for kept in left.values():
            if self._appearance.take_over(kept, time.monotonic()):
                continue
            if kept.backing_id and self._states.backing is not None:
                self._states.backing.close(kept.backing_id)
            self._ledger.drop_inode(kept.slot)
