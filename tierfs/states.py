"""The inodes that have a state in the mount server, from the first who needs it until nobody does.

An inode is entered when it is opened, truncated or to be brought: what its stub attribute says at that moment
is its state. It is left when it has no handle, no registration with the kernel, no guard and no content on its
way. What of it cannot be read from the file is written down for a successor.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable

from tierfs.appearance import Appearance
from tierfs.handles import Backing, Inode, ShownTimes
from tierfs.idle import Idle
from tierfs.inflow import Content, Inflow
from tierfs.ledger import Ledger
from tierfs.marking import Marking
from tierfs.model import Residency, Stub
from tierfs.tree import Tree
from tierfs.waits import Blocked

log = logging.getLogger("gate")

SET_ID = stat.S_ISUID | stat.S_ISGID
_CAPABILITY = "security.capability"


class States:
    """Belongs to the gate, and is called under its lock."""

    def __init__(
        self,
        tree: Tree,
        ledger: Ledger,
        marking: Marking,
        appearance: Appearance,
        inflow: Inflow,
        hurry: Callable[[int], None],
    ) -> None:
        """`hurry` asks the mover to be quick with an inode that it guards."""
        self._tree = tree
        self._ledger = ledger
        self._marking = marking
        self._appearance = appearance
        self._inflow = inflow
        self._hurry = hurry
        self.inodes = appearance.inodes
        self.backing: Backing | None = None  # None: no passthrough
        self.idle = Idle(self.retire)

    # --- entering and leaving -----------------------------------------------------------------------------

    def enter(self, opath: int, st: os.stat_result, parent: int, name: bytes) -> Inode:
        """The inode's state, with what its stub attribute says now. Raises Blocked while it is guarded."""
        inode = self.inodes.get(st.st_ino)
        if inode is None:
            self.idle.give_way(len(self.inodes))
            inode = Inode(st.st_ino, parent, name)
        elif inode.guard is not None:
            self.wait_for_guard(inode)
        if inode.content is None and not inode.backing_id:
            stub = self._tree.read_stub(opath)
            if stub is not None and st.st_size == 0:
                self._finish_cut(inode, opath)
            elif stub is not None:
                self._take_in(inode, stub, opath, st)
        if inode.opath < 0:
            inode.opath = opath
        self.inodes[st.st_ino] = inode
        return inode

    def wait_for_guard(self, inode: Inode) -> None:
        """Somebody wants in: ask the mover to be quick, and wait. Always raises Blocked."""
        assert inode.guard is not None
        self._hurry(inode.ino)
        raise Blocked(inode.guard)

    def _finish_cut(self, inode: Inode, opath: int) -> None:
        """A truncation that was cut short, perhaps with its mark: empty files are never demoted."""
        former, inode.opath = inode.opath, opath
        try:
            self._marking.write(inode)
            self._tree.clear_stub(opath)
            self._marking.closed(inode)
        finally:
            inode.opath = former

    def _take_in(self, inode: Inode, stub: Stub, opath: int, st: os.stat_result) -> None:
        """Begin to keep the state of a stub's content."""
        self._appearance.moving(st.st_ino)
        bits = self._bits_of(stub, st.st_ino, opath)
        if inode.opath < 0:
            inode.opath = os.dup(opath)  # its owner may close `opath` while flights go on
        if inode.shown is None:
            shown = self._appearance.shown(st, opath)
            inode.shown = ShownTimes(shown.st_mtime_ns, shown.st_ctime_ns, shown.st_blocks)
        inode.content = Content(stub, st.st_size, bits)
        inode.content.shown = inode.shown.mtime, inode.shown.ctime
        self.note(inode)
        self._inflow.track(inode.ino, inode.content, inode.opath)

    def _bits_of(self, stub: Stub, ino: int, opath: int) -> bytes | None:
        """The leaves of this content that the index knows to be local; None: none, or those of a former file of
        that number, whose stub somebody has put back behind the mount."""
        record, index = self._appearance.record(ino), self._appearance.index
        if record is None or index is None or record.residency is not Residency.PARTIAL:
            return None
        copy = record.copy
        if copy is None or copy.tag != stub.tag or copy.generation != stub.generation:
            return None
        if record.handle != self._tree.handle_of(opath):
            return None
        return index.get_bits(ino)

    def disbelieve(self, inode: Inode) -> None:
        """What has come of its content may not be there any more, but for what the index knows."""
        if inode.content is not None:
            inode.content.believe(self._bits_of(inode.content.stub, inode.ino, inode.opath))

    def leave(self, inode: Inode, opath: int) -> None:
        """Drop the state that nobody needs; `opath` is a descriptor that its owner is about to close."""
        if inode.opens or inode.backing_id or inode.guard is not None or self._inflow.busy(inode.ino):
            return
        if self.inodes.get(inode.ino) is inode:
            del self.inodes[inode.ino]
            if inode.content is not None:
                self._appearance.left(inode, time.monotonic())
        self._inflow.untrack(inode.ino)
        if inode.slot:
            self._ledger.drop_inode(inode.slot)
            inode.slot = 0
        if inode.opath >= 0 and inode.opath != opath:
            os.close(inode.opath)
        inode.opath = -1

    def leave_if_idle(self, ino: int) -> None:
        """Drop its state if it has one that nobody needs."""
        inode = self.inodes.get(ino)
        if inode is not None:
            self.leave(inode, -1)

    # --- registrations with the kernel --------------------------------------------------------------------

    def register(self, inode: Inode, st: os.stat_result) -> int:
        """The backing id for one more passthrough handle; 0 where this open must be cached."""
        if inode.backing_id:
            return inode.backing_id
        if inode.opens or self.backing is None or st.st_mode & SET_ID:
            return 0
        if st.st_mode & 0o111 and self._tree.has_xattr(inode.opath, _CAPABILITY):
            # The kernel would not drop file capabilities at a passthrough write.
            return 0
        try:
            inode.backing_id = self.backing.open(inode.opath)
        except OSError as error:
            log.warning("inode %d is served without passthrough: %s", inode.ino, error)
            return 0
        inode.passthrough = True
        self.note(inode)
        return inode.backing_id

    def keep(self, inode: Inode) -> bool:
        """Its last handle is gone: let it be registered for a while, for whoever opens it next. False: it
        cannot be."""
        if not inode.backing_id or inode.marked or inode.set_id or inode.gone or not inode.name:
            return False
        self.idle.keep(inode, len(self.inodes))
        return True

    def retire(self, inode: Inode) -> None:
        """Nobody has it open: end its registration and drop what nobody needs."""
        backing_id, inode.backing_id, inode.passthrough = inode.backing_id, 0, False
        try:
            if backing_id and self.backing is not None:
                self.backing.close(backing_id)
        finally:
            self.note(inode)
            self.leave(inode, -1)

    def note(self, inode: Inode) -> None:
        """Write down for a successor what cannot be read from the file."""
        shown = inode.shown if inode.content is not None else None
        self._appearance.entered(inode)
        if inode.backing_id or shown is not None:
            times = (shown.mtime, shown.ctime, shown.blocks) if shown is not None else None
            inode.slot = self._ledger.inode(inode.slot, inode.ino, inode.backing_id, times)
        elif inode.slot:
            self._ledger.drop_inode(inode.slot)
            inode.slot = 0

    # --- what is known of them ----------------------------------------------------------------------------

    def registered(self, ino: int) -> bool:
        """The kernel has the file itself: it outlives this process even without a name."""
        inode = self.inodes.get(ino)
        return inode is not None and bool(inode.backing_id)

    def holds(self) -> dict[str, int]:
        """How many inodes have a state here, in passthrough or guarded, and how many are sealed."""
        inodes = self.inodes.values()
        return {
            "inodes": len(inodes),
            "passthrough": sum(bool(inode.backing_id) for inode in inodes),
            "guarded": sum(inode.guard is not None for inode in inodes),
            "sealed": len(self._marking.seals),
        }
