"""The server half of residency: who has a file open and how, and when its content may change place.

One I/O mode an inode, from first open to last release (the kernel's rule): PASSTHROUGH, where the kernel reads
and writes the backing file itself, or CACHED, where requests come here. A stub is never opened in passthrough.

    no handle --open--> stub? --no--> PASSTHROUGH (or CACHED: no privilege, set-id bits, file capabilities)
                          |
                         yes --small--> content fetched in OPEN, then as a resident file
                          +----large--> CACHED; reads fetch leaves, the first write waits until it is resident

Who perhaps only looks gets a small stub as a large one: backups open all files, with O_NOATIME, and then see
that most have not changed and need not be read; lsattr and Samba open with O_NONBLOCK, for attributes. A stub
that is only looked at has not been used. And touch opens for writing, and writes nothing.

What the Gate opens is in the care of its parts: `states` (what is kept of an inode), `contents` (data),
`marking` (the log of changes), `guarding` (what the mover may touch), `mover` (the link to it), `succession`
(what was open when another server ended).

Everything here runs under one lock or in one thread; the order in which it takes effect is the inode's order.
"""

from __future__ import annotations

import logging
import os
import time

from tierfs import wire
from tierfs.appearance import Appearance
from tierfs.contents import Contents
from tierfs.guarding import Guarding
from tierfs.handles import OPENING, Backing, Handle, Inode
from tierfs.index import Index
from tierfs.inflow import Inflow
from tierfs.intents import clamped
from tierfs.lasting import Lasting
from tierfs.ledger import Ledger
from tierfs.marking import POKE_SECONDS, Marking
from tierfs.marks import Mark, MarkWriter
from tierfs.model import EPOCH_SHIFT
from tierfs.moverlink import MoverLink
from tierfs.report import HeatReport, Outbox
from tierfs.room import Room
from tierfs.states import States
from tierfs.succession import Succession
from tierfs.tree import Tree, drop_set_id, fd_path
from tierfs.vigil import Vigil

log = logging.getLogger("gate")

HEAT_SECONDS = 5.0  # how often uses are reported to the mover
_LOOKING = os.O_NOATIME | os.O_NONBLOCK  # on a regular file the latter means nothing else
_TO_TOUCH = os.O_WRONLY | os.O_NONBLOCK  # as touch opens what is there


class Gate:
    """See the module's docstring. All methods, its parts' too, must be called under the binding's one lock."""

    def __init__(
        self,
        tree: Tree,
        index: Index | None,
        marks: MarkWriter,
        epoch: int,
        backing: Backing | None = None,
        link: wire.Link | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        """`index` is read only here; `epoch` is this session's, so that its generations are new.

        `ledger`: None where nobody will take over.
        """
        self.tree = tree
        self.ledger = ledger if ledger is not None else Ledger()
        self.ledger.generation = max(self.ledger.generation, epoch << EPOCH_SHIFT)
        self._outbox = Outbox()
        self._outbox.connect(link)
        self._vigil = Vigil()
        self.heat = HeatReport(self._outbox)
        self._inflow = inflow = Inflow(self._outbox.post)
        inodes: dict[int, Inode] = {}
        recent: dict[int, int] = {}
        self.appearance = Appearance(tree, index, inodes, recent, self.ledger)
        self.lasting = Lasting(tree, inodes)
        self.marking = Marking(
            tree, marks, self.ledger, recent, self.appearance, self.lasting, self._outbox.post
        )
        self.room = Room(tree, self.marking.space_is_short, self._mover_is_loading)
        self.states = States(tree, self.ledger, self.marking, self.appearance, inflow, self._hurry)
        self.states.backing = backing
        self.contents = Contents(tree, self.states, self.marking, inflow, self.heat)
        self.guarding = Guarding(tree, self.states, self.marking, self.appearance, inflow, self._vigil)
        self.mover = MoverLink(
            self._outbox, self._vigil, self.states, self.marking, self.guarding, inflow, self.room
        )
        self.succession = Succession(tree, self.ledger, self.states, self.appearance)
        self._next_heat = 0.0

    # --- opening and closing ------------------------------------------------------------------------------

    def open(
        self,
        opath: int,
        st: os.stat_result,
        flags: int,
        parent: int,
        name: bytes,
        pid: int = 0,
        looks: bool = False,
    ) -> Handle:
        """Open a regular file. `opath`, an O_PATH descriptor of it, is the Gate's from success on.

        `looks`: perhaps nothing will be read. Carries out O_TRUNC.

        Raises Blocked, OSError, ForeignStubError; then `opath` stays the caller's.
        """
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        if writable:
            self.need_room()
            looks = flags & (os.O_ACCMODE | os.O_NONBLOCK | os.O_APPEND | os.O_TRUNC) == _TO_TOUCH
        else:
            looks = looks or bool(flags & _LOOKING)
        inode = self.states.enter(opath, st, parent, name)
        try:
            if flags & os.O_TRUNC and writable:
                self.contents.cut(inode, opath)
            elif inode.content is not None:
                inode.content.opened_by(pid)
                if inode.content.small and not looks:
                    self._inflow.need(inode.ino, 0, inode.content.size, passable=True)
                if writable and inode.content.missing == 0:
                    self._inflow.need_settled(inode.ino)
            handle = self._admit(inode, opath, st, flags)
        except BaseException:
            self.states.leave(inode, opath)
            raise
        if inode.opath != opath:
            os.close(opath)
        inode.size = st.st_size
        if looks and not writable and inode.content is not None and not handle.backing_id:
            handle.unused_by = pid
        else:
            self.heat.touch(inode, st.st_size, pid)
        return handle

    def reopen(self, ino: int, flags: int, pid: int = 0) -> Handle | None:
        """Open a file that the kernel has registered already: it is resident, and of this very number. None
        where it is not, or something is to be done to it: `open` does that. Raises as `open`."""
        inode = self.states.inodes.get(ino)
        if inode is None or not inode.backing_id or flags & os.O_TRUNC:
            return None
        if inode.guard is not None or inode.content is not None:
            return None
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        if writable:
            self.need_room()
            if not inode.marked:
                self.marking.write(inode)
        self.states.idle.wake(ino)
        handle = Handle(inode, -1, flags, inode.backing_id)
        inode.opens += 1
        inode.writers += writable
        self.heat.touch(inode, inode.size, pid)
        return handle

    def need_room(self) -> None:
        """Call before a file is made. Raises Blocked while the local disk is nearly full and may be emptied."""
        if self._outbox.link is not None:
            self.room.need()

    def _mover_is_loading(self) -> bool:
        return self._outbox.link is not None and not self._vigil.pid

    def _hurry(self, ino: int) -> None:
        """Somebody waits until this inode is guarded no more."""
        self._vigil.wait_for_guard(ino, time.monotonic())
        self._outbox.post(wire.GuardBreak(ino))

    def created(self, fd: int, st: os.stat_result, flags: int, parent: int, name: bytes) -> Handle:
        """The handle of a file just made; takes the descriptor `fd` (open for reading and writing)."""
        inode = Inode(st.st_ino, parent, name)
        self.states.idle.drop(st.st_ino)
        self.states.idle.give_way(len(self.states.inodes))
        former = self.states.inodes.get(st.st_ino)
        if former is not None:
            self.guarding.end(former)  # it was unlinked under the guard, and its number is used again
        inode.opath = self.tree.reopen(fd, os.O_PATH)
        try:
            inode.handle = self.tree.handle_of(inode.opath)
            handle = Handle(inode, fd, flags, 0)
            self.marking.write(inode)
            if not handle.writable:
                self.marking.closed(inode)
        except BaseException:
            os.close(inode.opath)
            raise
        self.states.inodes[st.st_ino] = inode
        handle.backing_id = self.states.register(inode, st)
        if handle.backing_id:
            os.close(fd)
            handle.fd = -1
        inode.opens += 1
        inode.writers += handle.writable
        self.heat.touch(inode, st.st_size)
        return handle

    def release(self, handle: Handle) -> None:
        """The last reference to an open file is gone."""
        inode = handle.inode
        if handle.fd >= 0:
            os.close(handle.fd)
        try:
            if inode.set_id and handle.writable and handle.uid:
                self._drop_set_id_if_written(inode)
        finally:
            inode.opens -= 1
            inode.writers -= handle.writable
            self._released(inode, handle)

    def _released(self, inode: Inode, handle: Handle) -> None:
        try:
            if handle.writable and inode.writers == 0 and inode.marked:
                self.marking.closed(inode)
        finally:
            if inode.opens == 0 and not self.states.keep(inode):
                self.states.retire(inode)

    def given_set_id(self, ino: int, st: os.stat_result) -> None:
        """It has set-id bits now. Where the kernel writes past us, who wrote is seen when they close it,
        also of those who open it later."""
        inode = self.states.inodes.get(ino)
        if inode is not None and inode.passthrough:
            inode.set_id = st.st_ctime_ns

    def _drop_set_id_if_written(self, inode: Inode) -> None:
        if os.stat(fd_path(inode.opath)).st_mtime_ns > inode.set_id:
            drop_set_id(inode.opath)
            inode.set_id = 0

    def _admit(self, inode: Inode, opath: int, st: os.stat_result, flags: int) -> Handle:
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        whole = inode.content is None or inode.content.missing == 0
        if writable and inode.content is None and not inode.marked:
            self.marking.write(inode)
        self.states.idle.wake(inode.ino)
        backing_id = self.states.register(inode, st) if whole else 0
        fd = -1 if backing_id else self.tree.reopen(opath, flags & ~OPENING)
        handle = Handle(inode, fd, flags, backing_id)
        inode.opens += 1
        inode.writers += writable
        return handle

    # --- attributes ---------------------------------------------------------------------------------------

    def before_change(self, ino: int, *, registered: bool = False) -> None:
        """Call before metadata of a regular file changes.

        `registered`: it may stay so with the kernel, as fit for passthrough as before, and with a name.
        Raises Blocked while our own work moves its times, OSError where there is no room for its marks.
        """
        self.marking.need()
        if not registered:
            self.states.idle.drop(ino)
        inode = self.states.inodes.get(ino)
        if inode is None:
            return
        if inode.guard is not None:
            self.states.wait_for_guard(inode)
        if inode.content is not None and inode.content.settling:
            self._inflow.need_settled(ino)

    def known_by(self, ino: int, parent: int, name: bytes) -> bool:
        """Whether it is by this name that a regular file is known here."""
        inode = self.states.inodes.get(ino)
        return inode is not None and inode.name == name and inode.parent == parent

    def after_change(self, ino: int, st: os.stat_result, mtime_set: bool = False) -> None:
        """Call after it: `st` is fresh; `mtime_set` where the caller set the modification time."""
        self.appearance.changed(ino)
        inode = self.states.inodes.get(ino)
        if inode is None or inode.shown is None:
            return
        inode.shown.ctime = st.st_ctime_ns
        if mtime_set:
            inode.shown.mtime = st.st_mtime_ns
        if inode.content is not None:
            inode.content.shown = inode.shown.mtime, inode.shown.ctime
        self.states.note(inode)
        self.marking.append(Mark.TIMES, ino, a=clamped(inode.shown.mtime), b=clamped(inode.shown.ctime))

    def writers_open(self, ino: int) -> bool:
        """Attributes may change without the kernel's taking note: somebody has it open for writing.

        In passthrough a write through a mapping moves the times; elsewhere one takes set-id bits away.
        """
        inode = self.states.inodes.get(ino)
        return inode is not None and inode.writers > 0

    def set_pin(self, opath: int, st: os.stat_result, on: bool, parent: int, name: bytes) -> None:
        """Pin or unpin a file or directory itself; the mover lists it and fetches what is beneath."""
        self.tree.set_pin(opath, on)
        handle = self.tree.handle_of(opath)
        self.marking.append(Mark.PIN, st.st_ino, parent=parent, a=int(on), handle=handle, name=name)

    def named(self, ino: int, parent: int, name: bytes) -> None:
        """A regular file has got another name."""
        inode = self.states.inodes.get(ino)
        if inode is not None:
            inode.parent, inode.name = parent, name
        self.marking.append(Mark.NAMED, ino, parent=parent, name=name)

    def gone(self, st: os.stat_result, handle: bytes, parent: int, name: bytes) -> None:
        """The last name of a regular file, this one, is gone; `st` is from before or from the open file."""
        self.appearance.changed(st.st_ino)
        inode = self.states.inodes.get(st.st_ino)
        if inode is not None:
            inode.gone = True
            self.states.idle.drop(st.st_ino)
        self.marking.gone(st, handle, parent, name)

    def tick(self, now: float) -> float:
        """Deadlines, heat and the mover's waking. Returns after how many seconds to be called again."""
        self._outbox.flush()
        for ino in self._inflow.expire(now):
            self.states.leave_if_idle(ino)
        self.room.look(now)
        self.appearance.tick(now)
        next_idle = self.states.idle.expire(now)
        self.marking.tick(now)
        if now >= self._next_heat:
            self._next_heat = now + HEAT_SECONDS
            self.heat.flush()
        waited_for = self.mover.look_after(now)
        busy = self._outbox or self.marking.untold or self.heat or waited_for
        return POKE_SECONDS if busy else max(next_idle, POKE_SECONDS)
