"""What the mover asks before it touches content: seals, to copy under, and guards, to punch under.

    sealed:  the mover is copying. A write-open breaks the seal: the generation rises and the copy is void.
    guarded: the mover is punching. Whatever would open or change the inode waits; a new mover voids the guard.

Both are refused where somebody may be writing or has the file open, and where a mark has yet to be drained.
"""

from __future__ import annotations

import logging
import os
from fcntl import F_RDLCK

from tierfs.appearance import Appearance
from tierfs.handles import Inode, ShownTimes
from tierfs.inflow import Inflow
from tierfs.marking import Marking
from tierfs.states import States
from tierfs.tree import Tree
from tierfs.vigil import Vigil
from tierfs.waits import Wait

log = logging.getLogger("gate")


class Guarding:
    """Belongs to the gate, and is called under its lock."""

    def __init__(
        self, tree: Tree, states: States, marking: Marking, appearance: Appearance, inflow: Inflow, vigil: Vigil
    ) -> None:
        self._tree = tree
        self._states = states
        self._marking = marking
        self._appearance = appearance
        self._inflow = inflow
        self._vigil = vigil

    def seal(self, ino: int, fd: int) -> int:
        """The generation sealed, or 0 where somebody may be writing: a handle, a mapping, a lost descriptor."""
        inode = self._states.inodes.get(ino)
        if os.fstat(fd).st_ino != ino or ino in self._marking.recent:
            return 0
        if inode is not None and (inode.writers or inode.content is not None or inode.guard is not None):
            return 0
        try:
            if not self._tree.try_lease(fd, F_RDLCK):
                return 0
        except OSError as error:
            log.warning("inode %d cannot be sealed: %s", ino, error)  # no leases here, or another's file
            return 0
        self._tree.unlease(fd)
        record = self._appearance.record(ino)
        if record is not None and record.handle == self._tree.handle_of(fd):
            generation = record.generation
        else:
            generation = self._marking.new_generation()
        if inode is not None:
            inode.marked = False
        self._marking.seals.add(ino)
        return generation

    def guard(self, ino: int, position: int) -> bool:
        """Keep the inode shut; False where it is in use or has a mark that the mover has not seen."""
        self._states.idle.drop(ino)
        inode = self._states.inodes.get(ino)
        if inode is not None and (inode.opens or inode.guard is not None or self._inflow.busy(ino)):
            return False
        if self._marking.recent.get(ino, -1) >= position:
            return False
        if inode is None:
            inode = Inode(ino, 0, b"")
            self._states.inodes[ino] = inode
        inode.shown = self._snapshot(ino)
        inode.guard = Wait()
        self._appearance.moving(ino)
        return True

    def _snapshot(self, ino: int) -> ShownTimes | None:
        """What the file shows now, before the punch moves its times."""
        record = self._appearance.record(ino)
        if record is None or not self._tree.privileged:
            copy = record.copy if record is not None else None
            return ShownTimes(copy.mtime, copy.ctime, record.blocks) if record and copy else None
        try:
            fd = self._tree.open_handle(record.handle, os.O_PATH)
        except OSError:
            return None  # gone meanwhile: nobody can ask for it
        try:
            shown = self._appearance.shown(os.fstat(fd), fd)
        finally:
            os.close(fd)
        return ShownTimes(shown.st_mtime_ns, shown.st_ctime_ns, shown.st_blocks)

    def end(self, inode: Inode) -> None:
        """Whoever waits may go on, if it is guarded."""
        if inode.guard is None:
            return
        guard, inode.guard = inode.guard, None
        self._vigil.guard_ended(inode.ino)
        self._appearance.moving(inode.ino)
        if inode.content is None:
            inode.shown = None
        self._states.leave(inode, -1)
        guard.fire()

    def end_of(self, inos: list[int]) -> None:
        """The same for all of these that have a state."""
        for ino in inos:
            inode = self._states.inodes.get(ino)
            if inode is not None:
                self.end(inode)

    def end_all(self) -> None:
        """What a mover was doing is void."""
        self._marking.seals.clear()
        self._states.idle.drop_all()
        self._appearance.doubt()
        for inode in list(self._states.inodes.values()):
            self.end(inode)
