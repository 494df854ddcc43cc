"""The server half of residency: who has a file open and how, and when its content may change place.

One I/O mode an inode, from first open to last release (the kernel's rule): PASSTHROUGH, where the kernel reads
and writes the backing file itself, or CACHED, where requests come here. A stub is never opened in passthrough.

    no handle --open--> stub? --no--> PASSTHROUGH (or CACHED: no privilege, set-id bits, file capabilities)
                          |
                         yes --small--> content fetched in OPEN, then as a resident file
                          +----large--> CACHED; reads fetch leaves, the first write waits until it is resident

    guarded: the mover is punching. Whatever would open or change the inode waits; a new mover voids the guard.
    sealed:  the mover is copying. A write-open breaks the seal: the generation rises and the copy is void.

Everything here runs under one lock or in one thread; the order in which it takes effect is the inode's order.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fcntl import F_RDLCK

from tierfs import wire
from tierfs.appearance import Appearance
from tierfs.errors import TierError
from tierfs.handles import Backing, Handle, Inode, ShownTimes
from tierfs.idle import Idle
from tierfs.index import Index
from tierfs.inflow import Content, Inflow
from tierfs.intents import clamped
from tierfs.lasting import Lasting
from tierfs.ledger import KeptInode, Ledger
from tierfs.marks import MODE_BITS, Entry, Mark, MarkWriter
from tierfs.model import EPOCH_SHIFT, Residency, Stub
from tierfs.report import HeatReport, Outbox
from tierfs.room import Room
from tierfs.tree import Tree, drop_set_id, fd_path
from tierfs.vigil import Vigil
from tierfs.waits import Blocked, Stretch, Wait

log = logging.getLogger("gate")

HEAT_SECONDS = 5.0  # how often uses are reported to the mover
POKE_SECONDS = 0.25  # how often the mover is told of new marks
SET_ID = stat.S_ISUID | stat.S_ISGID
_CAPABILITY = "security.capability"
_MARKS = 4096  # bytes; more than the marks of any one operation take
_STRIP = os.O_TRUNC | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_DIRECT | os.O_NOFOLLOW


class Gate:
    """See the module's docstring. All methods must be called under the binding's one lock."""

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
        self.index = index
        self.marks = marks
        self.backing = backing
        self._outbox = Outbox()
        self._outbox.connect(link)
        self.heat = HeatReport(self._outbox)
        self.ledger = ledger if ledger is not None else Ledger()
        self.ledger.generation = max(self.ledger.generation, epoch << EPOCH_SHIFT)
        self._inodes: dict[int, Inode] = {}
        self.idle = Idle(self._retire)
        self.seals: set[int] = set()
        self.recent: dict[int, int] = {}  # ino -> position of its newest mark that the mover has not drained
        self._inflow = Inflow(self._outbox.post)
        self.room = Room(tree, self._space_is_short, self._mover_is_loading)
        self.appearance = Appearance(tree, index, self._inodes, self.recent)
        self.lasting = Lasting(tree, self._inodes)
        self._vigil = Vigil()
        # Told of a mover that does not get on: its pid, and why.
        self.on_stuck: Callable[[int, str], None] = lambda pid, reason: None
        self._left: dict[int, KeptInode] = {}  # of a server before, while taking over
        self._next_heat = 0.0
        self._next_poke = 0.0
        self._poked = marks.position

    # --- opening and closing ------------------------------------------------------------------------------

    def open(
        self, opath: int, st: os.stat_result, flags: int, parent: int, name: bytes, pid: int = 0
    ) -> Handle:
        """Open a regular file. `opath`, an O_PATH descriptor of it, is the Gate's from success on.

        Carries out O_TRUNC. Raises Blocked, OSError, ForeignStubError; then `opath` stays the caller's.
        """
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        if writable:
            self.need_room()
        inode = self._enter(opath, st, parent, name)
        try:
            if flags & os.O_TRUNC and writable:
                self._cut(inode, opath)
            elif inode.content is not None:
                if inode.content.small:
                    self._inflow.need(inode.ino, 0, inode.content.size, passable=True)
                if writable and inode.content.missing == 0:
                    self._inflow.need_settled(inode.ino)
            handle = self._admit(inode, opath, st, flags)
        except BaseException:
            self._leave(inode, opath)
            raise
        if inode.opath != opath:
            os.close(opath)
        inode.size = st.st_size
        self.heat.touch(inode, st.st_size)
        return handle

    def reopen(self, ino: int, flags: int) -> Handle | None:
        """Open a file that the kernel has registered already: it is resident, and of this very number. None
        where it is not, or something is to be done to it: `open` does that. Raises as `open`."""
        inode = self._inodes.get(ino)
        if inode is None or not inode.backing_id or flags & os.O_TRUNC:
            return None
        if inode.guard is not None or inode.content is not None:
            return None
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        if writable:
            self.need_room()
            if not inode.marked:
                self._mark_write(inode)
        self.idle.wake(ino)
        handle = Handle(inode, -1, flags, inode.backing_id)
        inode.opens += 1
        inode.writers += writable
        self.heat.touch(inode, inode.size)
        return handle

    # --- taking over --------------------------------------------------------------------------------------

    def take_over(self, undrained: Iterable[Entry]) -> None:
        """Begin where another server has ended: these are the marks that no mover has drained yet."""
        for entry in undrained:
            if entry.kind not in (Mark.ENTRY, Mark.ATTR):
                self.recent[entry.ino] = entry.end - 1
        self._left = {kept.ino: kept for kept in self.ledger.load_inodes()}

    def restore(
        self, opath: int, st: os.stat_result, flags: int, backing_id: int, parent: int, name: bytes
    ) -> Handle:
        """A file that is open already, as `open`. `opath` is the Gate's from success on."""
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        kept = self._left.pop(st.st_ino, None)
        inode = self._inodes.setdefault(st.st_ino, Inode(st.st_ino, parent, name))
        if kept is not None:
            inode.slot, inode.backing_id, inode.passthrough = kept.slot, kept.backing_id, bool(kept.backing_id)
            # Not what the inode says: a mover may have died while it moved its times.
            inode.shown = ShownTimes(*kept.shown) if kept.shown is not None else None
        if backing_id != inode.backing_id:
            raise OSError(errno.EIO, "its registration is not known")
        try:
            self._enter(opath, st, parent, name)
            if inode.content is None:
                inode.shown = None
            fd = -1 if backing_id else self.tree.reopen(opath, flags & ~_STRIP)
        except BaseException:
            self._leave(inode, opath)
            raise
        handle = Handle(inode, fd, flags, backing_id)
        inode.opens += 1
        inode.writers += writable
        # Its mark was made before its open was answered; a seal is given to nobody who has writers.
        inode.marked = inode.writers > 0 and inode.content is None
        inode.gone, inode.size = not st.st_nlink, st.st_size
        if backing_id and writable and st.st_mode & SET_ID:
            # A change of mode moves ctime alone, a write both.
            inode.set_id = st.st_mtime_ns - (st.st_mtime_ns == st.st_ctime_ns)
        if inode.opath != opath:
            os.close(opath)
        return handle

    def restored(self) -> None:
        """All open files are here: end the registrations that nobody uses."""
        left, self._left = self._left, {}
        for kept in left.values():
            if kept.backing_id and self.backing is not None:
                self.backing.close(kept.backing_id)
            self.ledger.drop_inode(kept.slot)

    def need_room(self) -> None:
        """Call before a file is made. Raises Blocked while the local disk is nearly full and may be emptied."""
        if self._outbox.link is not None:
            self.room.need()

    def _space_is_short(self) -> None:
        self._outbox.post(wire.Poke(self.marks.position, urgent=True))

    def _mover_is_loading(self) -> bool:
        return self._outbox.link is not None and not self._vigil.pid

    def created(self, fd: int, st: os.stat_result, flags: int, parent: int, name: bytes) -> Handle:
        """The handle of a file just made; takes the descriptor `fd` (open for reading and writing)."""
        inode = Inode(st.st_ino, parent, name)
        self.idle.drop(st.st_ino)
        former = self._inodes.get(st.st_ino)
        if former is not None:
            self._end_guard(former)  # it was unlinked under the guard, and its number is used again
        inode.opath = self.tree.reopen(fd, os.O_PATH)
        try:
            inode.handle = self.tree.handle_of(inode.opath)
            handle = Handle(inode, fd, flags, 0)
            self._mark_write(inode)
            if not handle.writable:
                self._mark_closed(inode)
        except BaseException:
            os.close(inode.opath)
            raise
        self._inodes[st.st_ino] = inode
        handle.backing_id = self._register(inode, st)
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
        if inode.set_id and handle.writable and handle.uid:
            self._drop_set_id_if_written(inode)
        inode.opens -= 1
        inode.writers -= handle.writable
        try:
            if handle.writable and inode.writers == 0 and inode.marked:
                self._mark_closed(inode)
        finally:
            if inode.opens == 0 and not self._kept(inode):
                self._retire(inode)

    def _kept(self, inode: Inode) -> bool:
        """It stays registered for a while, for whoever opens it next."""
        if not inode.backing_id or inode.marked or inode.set_id or inode.gone or not inode.name:
            return False
        self.idle.keep(inode)
        return True

    def _retire(self, inode: Inode) -> None:
        """Nobody has it open: end its registration and drop what nobody needs."""
        backing_id, inode.backing_id, inode.passthrough = inode.backing_id, 0, False
        try:
            if backing_id and self.backing is not None:
                self.backing.close(backing_id)
        finally:
            self._note(inode)
            self._leave(inode, -1)

    def given_set_id(self, ino: int, st: os.stat_result) -> None:
        """It has set-id bits now. Where the kernel writes past us, who wrote is seen when they close it."""
        inode = self._inodes.get(ino)
        if inode is not None and inode.passthrough and inode.writers:
            inode.set_id = st.st_ctime_ns

    def _drop_set_id_if_written(self, inode: Inode) -> None:
        if os.stat(fd_path(inode.opath)).st_mtime_ns > inode.set_id:
            inode.set_id = 0
            drop_set_id(inode.opath)

    def _enter(self, opath: int, st: os.stat_result, parent: int, name: bytes) -> Inode:
        """The inode's state, with what its stub attribute says now. Raises Blocked while it is guarded."""
        inode = self._inodes.get(st.st_ino)
        if inode is None:
            inode = Inode(st.st_ino, parent, name)
        elif inode.guard is not None:
            self._break_guard(inode)
        if inode.content is None and not inode.backing_id:
            stub = self.tree.read_stub(opath)
            if stub is not None and st.st_size == 0:
                self._finish_cut(inode, opath)
            elif stub is not None:
                self._take_in(inode, stub, opath, st)
        if inode.opath < 0:
            inode.opath = opath
        self._inodes[st.st_ino] = inode
        return inode

    def _finish_cut(self, inode: Inode, opath: int) -> None:
        """A truncation that was cut short, perhaps with its mark: empty files are never demoted."""
        former, inode.opath = inode.opath, opath
        try:
            self._mark_write(inode)
            self.tree.clear_stub(opath)
            self._mark_closed(inode)
        finally:
            inode.opath = former

    def _take_in(self, inode: Inode, stub: Stub, opath: int, st: os.stat_result) -> None:
        """Begin to keep the state of a stub's content."""
        self.appearance.moving(st.st_ino)
        record = self.appearance.record(st.st_ino)
        bits = None
        if record is not None and self.index is not None and record.residency is Residency.PARTIAL:
            copy = record.copy
            if copy is not None and copy.tag == stub.tag and copy.generation == stub.generation:
                bits = self.index.get_bits(st.st_ino)
        if inode.opath < 0:
            inode.opath = os.dup(opath)  # its owner may close `opath` while flights go on
        if inode.shown is None:
            shown = self.appearance.shown(st, opath)
            inode.shown = ShownTimes(shown.st_mtime_ns, shown.st_ctime_ns, shown.st_blocks)
        inode.content = Content(stub, st.st_size, bits)
        inode.content.shown = inode.shown.mtime, inode.shown.ctime
        self._note(inode)
        self._inflow.track(inode.ino, inode.content, inode.opath)

    def _leave(self, inode: Inode, opath: int) -> None:
        """Drop the state that nobody needs; `opath` is a descriptor that its owner is about to close."""
        if inode.opens or inode.backing_id or inode.guard is not None or self._inflow.busy(inode.ino):
            return
        if self._inodes.get(inode.ino) is inode:
            del self._inodes[inode.ino]
            if inode.content is not None:
                self.appearance.left(inode, time.monotonic())
        self._inflow.untrack(inode.ino)
        if inode.slot:
            self.ledger.drop_inode(inode.slot)
            inode.slot = 0
        if inode.opath >= 0 and inode.opath != opath:
            os.close(inode.opath)
        inode.opath = -1

    def _admit(self, inode: Inode, opath: int, st: os.stat_result, flags: int) -> Handle:
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        whole = inode.content is None or inode.content.missing == 0
        if writable and inode.content is None and not inode.marked:
            self._mark_write(inode)
        self.idle.wake(inode.ino)
        backing_id = self._register(inode, st) if whole else 0
        fd = -1 if backing_id else self.tree.reopen(opath, flags & ~_STRIP)
        handle = Handle(inode, fd, flags, backing_id)
        inode.opens += 1
        inode.writers += writable
        return handle

    def _register(self, inode: Inode, st: os.stat_result) -> int:
        """The backing id for one more passthrough handle; 0 where this open must be cached."""
        if inode.backing_id:
            return inode.backing_id
        if inode.opens or self.backing is None or st.st_mode & SET_ID:
            return 0
        if st.st_mode & 0o111 and self.tree.has_xattr(inode.opath, _CAPABILITY):
            # The kernel would not drop file capabilities at a passthrough write.
            return 0
        try:
            inode.backing_id = self.backing.open(inode.opath)
        except OSError as error:
            log.warning("inode %d is served without passthrough: %s", inode.ino, error)
            return 0
        inode.passthrough = True
        self._note(inode)
        return inode.backing_id

    def _note(self, inode: Inode) -> None:
        """Write down for a successor what cannot be read from the file."""
        shown = inode.shown if inode.content is not None else None
        if inode.backing_id or shown is not None:
            times = (shown.mtime, shown.ctime, shown.blocks) if shown is not None else None
            inode.slot = self.ledger.inode(inode.slot, inode.ino, inode.backing_id, times)
        elif inode.slot:
            self.ledger.drop_inode(inode.slot)
            inode.slot = 0

    # --- data ---------------------------------------------------------------------------------------------

    def read(self, handle: Handle, offset: int, size: int) -> bytes:
        """Up to `size` bytes. Raises Blocked until they are local."""
        content = handle.inode.content
        self._await(handle, offset, size)
        if handle.fd >= 0:
            data = os.pread(handle.fd, size, offset)
        else:
            with self.borrowed(handle, writable=False) as fd:
                data = os.pread(fd, size, offset)
        if content is not None and content.missing:
            return content.filled_in(data, offset)
        return data

    def stretch(self, handle: Handle, offset: int, size: int) -> Stretch | None:
        """Where up to `size` bytes are, None where they must be read. Raises Blocked until they are local."""
        content = handle.inode.content
        if handle.fd < 0:
            return None
        self._await(handle, offset, size)
        count = min(size, os.fstat(handle.fd).st_size - offset)
        if count <= 0 or (content is not None and content.lacks(offset, offset + count) is not None):
            return None
        return Stretch(handle.fd, offset, count)

    def _await(self, handle: Handle, offset: int, size: int) -> None:
        inode, content = handle.inode, handle.inode.content
        if content is not None and content.missing:
            end = min(offset + size, content.size)
            if offset >= end:
                return
            window = handle.ahead.advance(offset, end, content.size)
            try:
                self._inflow.need(inode.ino, offset, end, passable=True)
            finally:
                # Behind what is waited for, so that it comes second, but without waiting for that.
                if window is not None:
                    self._inflow.ahead(inode.ino, *window)

    def write(self, handle: Handle, offset: int, data: bytes | memoryview) -> int:
        """Write all of `data` at `offset`. Raises Blocked until the file is resident."""
        self._ready_to_change(handle.inode)
        with self.borrowed(handle, writable=True) as fd:
            return os.pwrite(fd, data, offset)

    def ready(self, handle: Handle, writable: bool) -> None:
        """Raises Blocked until the file's data may be changed (`writable`) or read as a whole."""
        if writable:
            self._ready_to_change(handle.inode)
        elif handle.inode.content is not None:
            self._inflow.need(handle.inode.ino, 0, handle.inode.content.size)

    @contextmanager
    def borrowed(self, handle: Handle, writable: bool) -> Iterator[int]:
        """A descriptor of the file's data for one system call. Raises Blocked as `ready` where writable."""
        if writable:
            self._ready_to_change(handle.inode)
        if handle.fd >= 0:
            yield handle.fd
            return
        fd = self.tree.reopen(handle.inode.opath, os.O_RDWR if writable else os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)

    def _ready_to_change(self, inode: Inode) -> None:
        if inode.content is not None:
            self._inflow.need_settled(inode.ino)
        if not inode.marked:
            self._mark_write(inode)

    def truncate(self, opath: int, st: os.stat_result, size: int, parent: int, name: bytes) -> None:
        """Set the size. A stub is fetched first, unless nothing of it is kept. Raises Blocked."""
        inode = self._enter(opath, st, parent, name)
        try:
            if size == 0:
                self._cut(inode, opath)
            else:
                self._ready_to_change(inode)
                with self._opened(opath, os.O_WRONLY) as fd:
                    os.ftruncate(fd, size)
            if not inode.writers:
                self._mark_closed(inode)
        finally:
            self._leave(inode, opath)

    def _cut(self, inode: Inode, opath: int) -> None:
        """Truncate to nothing: nothing is fetched. Order: size, then attribute, then mark.

        Killed in between, a stub of size 0 is a truncation to be finished, which the next open does; a lost
        mark is found by the comparison of the copy's tuple.
        """
        if inode.content is not None:
            self._inflow.need_idle(inode.ino)
        if inode.content is None and not inode.marked:
            self._mark_write(inode)
        with self._opened(opath, os.O_WRONLY) as fd:
            os.ftruncate(fd, 0)
            if inode.content is not None:
                self.tree.clear_stub(fd)
        if inode.content is not None:
            inode.content, inode.shown = None, None
            self._note(inode)
            self._inflow.void(inode.ino)
            self._mark_write(inode)

    @contextmanager
    def _opened(self, opath: int, flags: int) -> Iterator[int]:
        fd = self.tree.reopen(opath, flags)
        try:
            yield fd
        finally:
            os.close(fd)

    # --- attributes ---------------------------------------------------------------------------------------

    def before_change(self, ino: int, *, registered: bool = False) -> None:
        """Call before metadata of a regular file changes.

        `registered`: it may stay so with the kernel, as fit for passthrough as before, and with a name.
        Raises Blocked while our own work moves its times, OSError where there is no room for its marks.
        """
        self.need_marks()
        if not registered:
            self.idle.drop(ino)
        inode = self._inodes.get(ino)
        if inode is None:
            return
        if inode.guard is not None:
            self._break_guard(inode)
        if inode.content is not None and inode.content.settling:
            self._inflow.need_settled(ino)

    def after_change(self, ino: int, st: os.stat_result, mtime_set: bool = False) -> None:
        """Call after it: `st` is fresh; `mtime_set` where the caller set the modification time."""
        self.appearance.changed(ino)
        inode = self._inodes.get(ino)
        if inode is None or inode.shown is None:
            return
        inode.shown.ctime = st.st_ctime_ns
        if mtime_set:
            inode.shown.mtime = st.st_mtime_ns
        if inode.content is not None:
            inode.content.shown = inode.shown.mtime, inode.shown.ctime
        self._note(inode)
        self._append(Mark.TIMES, ino, a=clamped(inode.shown.mtime), b=clamped(inode.shown.ctime))

    def writers_open(self, ino: int) -> bool:
        """Attributes may change without the kernel's taking note: somebody has it open for writing.

        In passthrough a write through a mapping moves the times; elsewhere one takes set-id bits away.
        """
        inode = self._inodes.get(ino)
        return inode is not None and inode.writers > 0

    def set_pin(self, opath: int, st: os.stat_result, on: bool, parent: int, name: bytes) -> None:
        """Pin or unpin a file or directory itself; the mover lists it and fetches what is beneath."""
        self.tree.set_pin(opath, on)
        handle = self.tree.handle_of(opath)
        self._append(Mark.PIN, st.st_ino, parent=parent, a=int(on), handle=handle, name=name)

    # --- marks --------------------------------------------------------------------------------------------

    def need_marks(self) -> None:
        """Call before a change that marks follow: what cannot be marked must not happen. Raises OSError."""
        self.marks.ensure(_MARKS)

    def named(self, ino: int, parent: int, name: bytes) -> None:
        """A regular file has got another name."""
        inode = self._inodes.get(ino)
        if inode is not None:
            inode.parent, inode.name = parent, name
        self._append(Mark.NAMED, ino, parent=parent, name=name)

    def made_dir(self, ino: int, parent: int, name: bytes) -> None:
        """A directory was made or renamed."""
        self._append(Mark.DIR, ino, parent=parent, name=name)

    # What the namespace journal is to look at is no content: it stands in nobody's way (`_recent`).

    def entry(self, parent: int, name: bytes, removed_dir: int = 0) -> None:
        """A name has come, gone or changed its meaning; `removed_dir`: the directory that it was."""
        self.marks.append(Mark.ENTRY, 0, parent=parent, a=removed_dir, name=name)

    def attributes(self, st: os.stat_result, parent: int, name: bytes) -> None:
        """Mode, owner, times or extended attributes of an inode were set."""
        self.marks.append(Mark.ATTR, st.st_ino, parent=parent, a=int(stat.S_ISREG(st.st_mode)), name=name)

    def gone(self, st: os.stat_result, handle: bytes, parent: int, name: bytes) -> None:
        """The last name of a regular file, this one, is gone; `st` is from before or from the open file."""
        who = st.st_uid << MODE_BITS | st.st_mode
        self.appearance.changed(st.st_ino)
        inode = self._inodes.get(st.st_ino)
        if inode is not None:
            inode.gone = True
            self.idle.drop(st.st_ino)
        self._append(Mark.GONE, st.st_ino, parent=parent, a=who, b=st.st_gid, handle=handle, name=name)

    def _mark_write(self, inode: Inode) -> None:
        if not inode.handle:
            inode.handle = self.tree.handle_of(inode.opath)
        self._append(
            Mark.WRITE, inode.ino, self._new_generation(), inode.parent, handle=inode.handle, name=inode.name
        )
        # Not before: on a full disk there may be no room for the mark, and the next writer must try again.
        inode.marked = True
        inode.shown = None
        self.appearance.changed(inode.ino)
        if inode.ino in self.seals:
            self.seals.discard(inode.ino)
            self._outbox.post(wire.SealBroken([inode.ino]))

    def _new_generation(self) -> int:
        generation = self.ledger.generation + 1
        self.ledger.generation = generation
        return generation

    def _mark_closed(self, inode: Inode) -> None:
        st = os.fstat(inode.opath)
        inode.size = st.st_size
        self._append(Mark.CLOSED, inode.ino, parent=inode.parent, a=st.st_size, b=st.st_blocks)
        inode.marked = False

    def _append(
        self,
        kind: Mark,
        ino: int,
        generation: int = 0,
        parent: int = 0,
        a: int = 0,
        b: int = 0,
        handle: bytes = b"",
        name: bytes = b"",
    ) -> None:
        self.recent[ino] = self.marks.append(kind, ino, generation, parent, a, b, handle, name)
        if kind is Mark.WRITE:
            self.lasting.written(ino)

    # --- the link to the mover ----------------------------------------------------------------------------

    def set_link(self, link: wire.Link | None) -> None:
        """Talk to this mover from now on. What the old one was doing is void."""
        self._outbox.connect(link)
        self._vigil.begin()
        self.seals.clear()
        self.idle.drop_all()
        self.appearance.doubt()
        for inode in list(self._inodes.values()):
            self._end_guard(inode)
        if link is not None:
            self._inflow.new_mover()

    def _give_up_link(self, error: Exception) -> None:
        """Close our end. The mover may live, and be punching: its guards hold until the next one comes."""
        log.error("talking to the mover failed: %r", error)
        self._outbox.connect(None)
        self.seals.clear()

    def on_link_readable(self) -> None:
        """Take what the mover has sent."""
        while self._outbox.link is not None:
            try:
                received = self._outbox.link.receive()
            except BlockingIOError:
                return
            except ConnectionError as error:
                log.warning("lost the mover: %s", error)
                received = None
            except Exception as error:
                self._give_up_link(error)
                return
            if received is None:
                self.set_link(None)
                return
            message, fds = received
            self._vigil.heard()
            try:
                self._handle(message, fds)
            except Exception as error:
                self._give_up_link(error)
            finally:
                for fd in fds:
                    os.close(fd)

    def _handle(self, message: object, fds: list[int]) -> None:
        match message:
            case wire.Filled():
                self._inflow.filled(message)
            case wire.Passing() if len(fds) == 1:
                self._inflow.passed(message, fds[0])
            case wire.FetchEnd():
                self._inflow.ended(message)
                self._leave_if_idle(message.ino)
            case wire.Settled():
                self._on_settled(message)
            case wire.Seal():
                answers = [self._seal(ino, fd) for ino, fd in zip(message.inos, fds, strict=True)]
                self._outbox.post(wire.SealAnswer(message.id, answers))
            case wire.Unseal():
                self.seals.difference_update(message.inos)
            case wire.Guard():
                granted = [self._guard(ino, message.position) for ino in message.inos]
                self._outbox.post(wire.GuardAnswer(message.id, granted))
            case wire.GuardEnd():
                for ino in message.inos:
                    inode = self._inodes.get(ino)
                    if inode is not None:
                        self._end_guard(inode)
                self.room.look(time.monotonic())
            case wire.Drained():
                self._on_drained(message.position)
            case wire.Limits():
                self._inflow.limit(message.fetch_timeout)
            case wire.Hello():
                self._vigil.pid = message.pid
                self._on_drained(message.position)
            case wire.Bring():
                for ino, fd in zip(message.inos, fds, strict=True):
                    self._bring(ino, fd)

    def _bring(self, ino: int, fd: int) -> None:
        """Ask for a stub's content though nobody opens it. One that cannot be entered now is left alone: the
        mover asks again."""
        opath = os.dup(fd)
        try:
            inode = self._enter(opath, os.fstat(opath), 0, b"")
            try:
                if inode.content is not None:
                    self._inflow.bring(ino)
            finally:
                self._leave(inode, opath)
        except Blocked:
            log.debug("inode %d is guarded", ino)
        except (OSError, TierError) as error:
            log.warning("inode %d cannot be fetched as a whole: %s", ino, error)
        finally:
            os.close(opath)

    def _on_settled(self, message: wire.Settled) -> None:
        inode = self._inodes.get(message.ino)
        self._inflow.settled(message)
        if inode is not None and not message.errno:
            inode.content, inode.shown = None, None
            self._note(inode)
            self._inflow.untrack(message.ino)
        self._leave_if_idle(message.ino)

    def _leave_if_idle(self, ino: int) -> None:
        inode = self._inodes.get(ino)
        if inode is not None:
            self._leave(inode, -1)

    def _on_drained(self, position: int) -> None:
        for ino in [ino for ino, at in self.recent.items() if at < position]:
            del self.recent[ino]

    def _seal(self, ino: int, fd: int) -> int:
        """The generation sealed, or 0 where somebody may be writing: a handle, a mapping, a lost descriptor."""
        inode = self._inodes.get(ino)
        if os.fstat(fd).st_ino != ino or ino in self.recent:
            return 0
        if inode is not None and (inode.writers or inode.content is not None or inode.guard is not None):
            return 0
        try:
            if not self.tree.try_lease(fd, F_RDLCK):
                return 0
        except OSError as error:
            log.warning("inode %d cannot be sealed: %s", ino, error)  # no leases here, or another's file
            return 0
        self.tree.unlease(fd)
        record = self.appearance.record(ino)
        if record is not None and record.handle == self.tree.handle_of(fd):
            generation = record.generation
        else:
            generation = self._new_generation()
        if inode is not None:
            inode.marked = False
        self.seals.add(ino)
        return generation

    def _guard(self, ino: int, position: int) -> bool:
        """Keep the inode shut; False where it is in use or has a mark that the mover has not seen."""
        self.idle.drop(ino)
        inode = self._inodes.get(ino)
        if inode is not None and (inode.opens or inode.guard is not None or self._inflow.busy(ino)):
            return False
        if self.recent.get(ino, -1) >= position:
            return False
        if inode is None:
            inode = Inode(ino, 0, b"")
            self._inodes[ino] = inode
        inode.shown = self._snapshot(ino)
        inode.guard = Wait()
        self.appearance.moving(ino)
        return True

    def _snapshot(self, ino: int) -> ShownTimes | None:
        """What the file shows now, before the punch moves its times."""
        record = self.appearance.record(ino)
        if record is None or not self.tree.privileged:
            copy = record.copy if record is not None else None
            return ShownTimes(copy.mtime, copy.ctime, record.blocks) if record and copy else None
        try:
            fd = self.tree.open_handle(record.handle, os.O_PATH)
        except OSError:
            return None  # gone meanwhile: nobody can ask for it
        try:
            shown = self.appearance.shown(os.fstat(fd), fd)
        finally:
            os.close(fd)
        return ShownTimes(shown.st_mtime_ns, shown.st_ctime_ns, shown.st_blocks)

    def _break_guard(self, inode: Inode) -> None:
        """Somebody wants in: ask the mover to be quick, and wait. Always raises Blocked."""
        assert inode.guard is not None
        self._vigil.wait_for_guard(inode.ino, time.monotonic())
        self._outbox.post(wire.GuardBreak(inode.ino))
        raise Blocked(inode.guard)

    def _end_guard(self, inode: Inode) -> None:
        if inode.guard is None:
            return
        guard, inode.guard = inode.guard, None
        self._vigil.guard_ended(inode.ino)
        self.appearance.moving(inode.ino)
        if inode.content is None:
            inode.shown = None
        self._leave(inode, -1)
        guard.fire()

    def _reserve(self) -> None:
        try:
            self.marks.reserve()
        except OSError as error:
            log.warning("no room for the next part of the mark log: %s", error)

    def registered(self, ino: int) -> bool:
        """The kernel has the file itself: it outlives this process even without a name."""
        inode = self._inodes.get(ino)
        return inode is not None and bool(inode.backing_id)

    def holds(self) -> dict[str, int]:
        """How many inodes have a state here, in passthrough or guarded, and how many are sealed."""
        inodes = self._inodes.values()
        return {
            "inodes": len(inodes),
            "passthrough": sum(bool(inode.backing_id) for inode in inodes),
            "guarded": sum(inode.guard is not None for inode in inodes),
            "sealed": len(self.seals),
        }

    def _look_after_mover(self, now: float) -> None:
        """Somebody waits for it: is it there?"""
        if self._outbox.link is None and not self._vigil.pid:
            return  # there is none, and soon another
        if self._vigil.question_due(now):
            self._outbox.post(wire.Ping())
        problem = self._vigil.problem(now)
        if problem:
            self.on_stuck(self._vigil.pid, problem)

    def tick(self, now: float) -> float:
        """Deadlines, heat and the mover's waking. Returns after how many seconds to be called again."""
        self._outbox.flush()
        for ino in self._inflow.expire(now):
            self._leave_if_idle(ino)
        self.room.look(now)
        self.appearance.tick(now)
        next_idle = self.idle.expire(now)
        if now >= self._next_poke:
            self._next_poke = now + POKE_SECONDS
            self._reserve()
            if self.marks.position != self._poked:
                self._poked = self.marks.position
                self._outbox.post(wire.Poke(self._poked))
        if now >= self._next_heat:
            self._next_heat = now + HEAT_SECONDS
            self.heat.flush()
        waited_for = self._inflow.waiting or self.room.waiting or self._vigil.guards_waited_for
        if waited_for:
            self._look_after_mover(now)
        busy = self._outbox or self.marks.position != self._poked or self.heat or waited_for
        return POKE_SECONDS if busy else max(next_idle, POKE_SECONDS)
