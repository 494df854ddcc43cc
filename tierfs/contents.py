"""Reading, writing and cutting the content of open files, wherever it is: who must wait for it waits.

In passthrough the kernel does most of this by itself, and comes here only for what it leaves to a server.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tierfs.handles import Handle, Inode
from tierfs.inflow import Inflow
from tierfs.marking import Marking
from tierfs.report import HeatReport
from tierfs.states import States
from tierfs.tree import Tree
from tierfs.waits import Stretch


class Contents:
    """Belongs to the gate, and is called under its lock."""

    def __init__(
        self, tree: Tree, states: States, marking: Marking, inflow: Inflow, heat: HeatReport
    ) -> None:
        self._tree = tree
        self._states = states
        self._marking = marking
        self._inflow = inflow
        self._heat = heat

    # --- reading ------------------------------------------------------------------------------------------

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
        self._bring(handle, offset, size)
        if handle.unused_by >= 0:
            self._heat.touch(handle.inode, handle.inode.size, handle.unused_by)
            handle.unused_by = -1

    def _bring(self, handle: Handle, offset: int, size: int) -> None:
        inode, content = handle.inode, handle.inode.content
        if content is not None and content.missing:
            if content.small and offset < content.size:
                offset, size = 0, content.size  # it has one digest
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

    # --- changing -----------------------------------------------------------------------------------------

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
        with self._opened(handle.inode.opath, os.O_RDWR if writable else os.O_RDONLY) as fd:
            yield fd

    def _ready_to_change(self, inode: Inode) -> None:
        if inode.content is not None:
            self._inflow.need_settled(inode.ino)
        if not inode.marked:
            self._marking.write(inode)

    @contextmanager
    def _opened(self, opath: int, flags: int) -> Iterator[int]:
        fd = self._tree.reopen(opath, flags)
        try:
            yield fd
        finally:
            os.close(fd)

    # --- cutting ------------------------------------------------------------------------------------------

    def truncate(self, opath: int, st: os.stat_result, size: int, parent: int, name: bytes) -> None:
        """Set the size. A stub is fetched first, unless nothing of it is kept. Raises Blocked."""
        inode = self._states.enter(opath, st, parent, name)
        try:
            if size == 0:
                self.cut(inode, opath)
            else:
                self._ready_to_change(inode)
                with self._opened(opath, os.O_WRONLY) as fd:
                    os.ftruncate(fd, size)
            if not inode.writers:
                self._marking.closed(inode)
        finally:
            self._states.leave(inode, opath)

    def cut(self, inode: Inode, opath: int) -> None:
        """Truncate to nothing: nothing is fetched. Order: size, then attribute, then mark. Raises Blocked.

        Killed in between, a stub of size 0 is a truncation to be finished, which the next open does; a lost
        mark is found by the comparison of the copy's tuple.
        """
        if inode.content is not None:
            self._inflow.need_idle(inode.ino)
        if inode.content is None and not inode.marked:
            self._marking.write(inode)
        with self._opened(opath, os.O_WRONLY) as fd:
            os.ftruncate(fd, 0)
            if inode.content is not None:
                self._tree.clear_stub(fd)
        if inode.content is not None:
            inode.content, inode.shown = None, None
            self._states.note(inode)
            self._inflow.void(inode.ino)
            self._marking.write(inode)
