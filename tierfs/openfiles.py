"""Open files by number, and the operations on their data. Placement of the content is the Gate's business.

What may take long is returned as Slow, to be run in a thread, with descriptors of its own: by then the file
may have changed its mode of access.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from tierfs import syscalls
from tierfs.errors import TierError
from tierfs.gate import Gate
from tierfs.handles import Handle, Inode
from tierfs.ledger import KeptFile
from tierfs.making import Caller, changed_by
from tierfs.nodes import Node, NodeTable
from tierfs.waits import Blocked, Slow, Stretch, Wait

log = logging.getLogger("gate")

_T = TypeVar("_T")
QUICK = 1 << 20  # bytes that are copied or allocated at once, without a thread
MOST_COPIED = 16 << 20  # bytes that one request copies: there are few threads, and the caller asks again


class OpenFiles:
    """The open regular files of a mount. Each call raises OSError(EBADF) for an unknown number."""

    def __init__(self, gate: Gate, nodes: NodeTable) -> None:
        self._gate = gate
        self._contents = gate.contents
        self._nodes = nodes
        self._ledger = gate.ledger
        self.handles: dict[int, tuple[Node, Handle]] = {}  # by number
        self._opened_by: dict[int, int] = {}  # request -> file, of those that were taken over
        self._late: dict[int, KeptFile] = {}  # by number, those of them that have not been found as yet
        self._found = Wait()  # for that

    def __len__(self) -> int:
        return len(self.handles)

    @property
    def writers(self) -> int:
        """How many of them are open for writing."""
        return sum(handle.writable for _, handle in self.handles.values())

    def add(self, node: Node, handle: Handle) -> int:
        """Keep this handle; its number."""
        number = self._ledger.file(node.id, handle.flags, handle.uid, handle.backing_id)
        self.handles[number] = node, handle
        self._nodes.opened(node)
        return number

    def restore(self) -> None:
        """Take over the open files that the ledger knows. One that cannot be reached any more is stale; but
        where the server was killed at a change of names, `restore_late` tries again when that has been told of.
        """
        for kept in self._ledger.load_files():
            self._late[kept.number] = kept
            self._opened_by[kept.request] = kept.number
        self.restore_late(last=not self._ledger.is_pending)

    def restore_late(self, *, last: bool) -> None:
        """Those that were not found where the ledger says; `last`: there will be no other try."""
        late, self._late = self._late, {}
        for kept in late.values():
            try:
                self._restore(kept)
            except (OSError, TierError) as error:
                if error.errno == errno.ESTALE and not last:
                    self._late[kept.number] = kept
                    continue
                # Whoever uses it is told EBADF; in passthrough its content is still at hand.
                log.error("an open file of node %d is lost to us: %s", kept.node, error)
                self._ledger.drop_file(kept.number)
        if not self._late:
            self._found.fire()

    @property
    def late(self) -> bool:
        """Some have not been found."""
        return bool(self._late)

    def _restore(self, kept: KeptFile) -> None:
        node = self._nodes.get(kept.node)
        opath, st = self._nodes.reach(node)
        try:
            name = self._nodes.name(node)
            restore = self._gate.succession.restore
            handle = restore(opath, st, kept.flags, kept.backing_id, node.parent_ino, name)
        except BaseException:
            os.close(opath)
            raise
        handle.uid = kept.uid
        self.handles[kept.number] = node, handle
        self._nodes.reopened(node, handle.inode.opath)

    def undo(self, request: int) -> None:
        """A request that is sent again has opened this file, and nobody has been told its number."""
        number = self._opened_by.pop(request, None)
        if number is not None and self._late.pop(number, None) is not None:
            self._ledger.drop_file(number)
        elif number is not None and number in self.handles:
            self.release(number)

    def get(self, fh: int) -> Handle:
        """The handle of this number. Raises Blocked too."""
        handle = self.find(fh)
        if handle is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return handle

    def find(self, fh: int | None) -> Handle | None:
        """The handle of this number if it is one of a regular file. Raises Blocked while it is not found."""
        entry = self.handles.get(fh) if fh is not None else None
        if entry is None and fh in self._late:
            raise Blocked(self._found)
        return entry[1] if entry is not None else None

    def release(self, fh: int) -> None:
        """The last reference is gone."""
        handle = self.get(fh)
        node = self.handles.pop(fh)[0]
        inode = handle.inode
        try:
            self._gate.release(handle)
        finally:
            try:
                self._tell_end(node, inode)
            finally:
                self._nodes.released(node)
                self._ledger.drop_file(fh)

    def _tell_end(self, node: Node, inode: Inode) -> None:
        """It never had a name, or it was marked again after its unlink had told the mover. Before its number is
        forgotten: a successor that knows of it tells its end, perhaps once more, when it is asked again."""
        last = self._nodes.last_of(node)
        if last is not None and inode.handle:
            self._gate.gone(last, inode.handle, inode.parent, inode.name)

    def read(self, fh: int, offset: int, size: int) -> bytes:
        """Up to `size` bytes. Raises Blocked, OSError."""
        return self._contents.read(self.get(fh), offset, size)

    def stretch(self, fh: int, offset: int, size: int) -> Stretch | None:
        """Where up to `size` bytes are; None where they have to be read. Raises Blocked, OSError."""
        return self._contents.stretch(self.get(fh), offset, size)

    def write(
        self,
        fh: int,
        offset: int,
        data: bytes | memoryview,
        kill_suidgid: bool = False,
        caller: Caller | None = None,
        flags: int = 0,
    ) -> Slow | int:
        """How many bytes were written; with O_SYNC or O_DSYNC in `flags` they are durable when that is told.

        `kill_suidgid`: set-id bits go. Raises Blocked, OSError.
        """
        handle = self.get(fh)
        if kill_suidgid:
            self._contents.ready(handle, True)
            changed_by(caller, handle.inode.opath)
        written = self._contents.write(handle, offset, data)
        if not flags & os.O_DSYNC:
            return written
        sync = self.fsync(fh, datasync=flags & os.O_SYNC != os.O_SYNC)

        def durable() -> int:
            sync.run()
            return written

        return Slow(durable)

    def flush(self, fh: int) -> None:
        """One descriptor of several was closed. Nothing is held back here."""
        self.get(fh)

    def fsync(self, fh: int, datasync: bool) -> Slow:
        """Make the file durable."""
        handle = self.get(fh)
        fd = self._own(handle, writable=False)
        sync = _closing(lambda: (os.fdatasync if datasync else os.fsync)(fd), fd)
        return Slow(sync if handle.fd >= 0 else partial(_told_to_all, handle, sync))

    def fallocate(
        self, fh: int, mode: int, offset: int, length: int, caller: Caller | None = None
    ) -> Slow | None:
        """The modes that the kernel passes on: what is run twice is as if run once. Raises Blocked, OSError."""
        handle = self.get(fh)
        self._contents.ready(handle, True)
        self._changing(handle, caller)
        if length <= QUICK:
            with self._contents.borrowed(handle, True) as borrowed:
                syscalls.fallocate(borrowed, mode, offset, length)
            return None
        fd = self._own(handle, writable=True)
        return Slow(_closing(lambda: syscalls.fallocate(fd, mode, offset, length), fd))

    def lseek(self, fh: int, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE; of a stub by the extents that it had. Raises ENXIO behind the end."""
        handle = self.get(fh)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        opath = handle.inode.opath
        st = os.fstat(opath)
        extents = self._gate.appearance.extents(st, opath)
        if extents is None:
            with self._contents.borrowed(handle, False) as fd:
                return os.lseek(fd, offset, whence)
        return seek_extents(extents, st.st_size, offset, whence)

    def copy_file_range(
        self, fh_in: int, offset_in: int, fh_out: int, offset_out: int, length: int,
        flags: int = 0, caller: Caller | None = None,
    ) -> Slow | int:  # fmt: skip
        """Copy between two files; how many bytes were. Raises Blocked until the source is local, OSError."""
        if flags:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        source, target = self.get(fh_in), self.get(fh_out)
        self._contents.ready(source, False)
        self._contents.ready(target, True)
        # Programs ask for all that there is, by a number beyond it.
        left = max(os.fstat(source.inode.opath).st_size - offset_in, 0)
        length = min(length, left, MOST_COPIED)
        self._changing(target, caller)
        fd_in = self._own(source, writable=False)
        try:
            fd_out = self._own(target, writable=True)
        except BaseException:
            os.close(fd_in)
            raise
        run = _closing(lambda: os.copy_file_range(fd_in, fd_out, length, offset_in, offset_out), fd_in, fd_out)
        return Slow(run) if length > QUICK else run()

    def _changing(self, handle: Handle, caller: Caller | None) -> None:
        if caller is not None and caller.uid != 0:
            changed_by(caller, handle.inode.opath)

    def _own(self, handle: Handle, *, writable: bool) -> int:
        """A descriptor that outlives this call; the caller closes it."""
        with self._contents.borrowed(handle, writable) as fd:
            return os.dup(fd)


def seek_extents(extents: list[tuple[int, int]], size: int, offset: int, whence: int) -> int:
    """Where lseek(2) would go in a file of these data ranges. Raises OSError(ENXIO)."""
    nowhere = OSError(errno.ENXIO, os.strerror(errno.ENXIO))
    if offset < 0 or offset >= size:
        raise nowhere
    at = offset
    for start, end in extents:
        if end <= at:
            continue
        if whence == os.SEEK_DATA:
            return max(start, at)
        if start > at:
            return at
        at = end
    if whence == os.SEEK_DATA:
        raise nowhere
    return min(at, size)


def _told_to_all(handle: Handle, sync: Callable[[], None]) -> None:
    """Sync a file in passthrough, by a descriptor that is opened for that. Of a write that failed the kernel
    tells the first such descriptor alone: who else had the file open, and asks later, hears of it here."""
    inode = handle.inode
    try:
        sync()
    except OSError:
        inode.faults += 1
        handle.heard = inode.faults
        raise
    if handle.heard != inode.faults:
        handle.heard = inode.faults
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def _closing(run: Callable[[], _T], *fds: int) -> Callable[[], _T]:
    def whole() -> _T:
        try:
            return run()
        finally:
            for fd in fds:
                os.close(fd)

    return whole
