"""Rescue copies (custody rule 25) of files that never close: databases, logs, virtual machines.

No seal is given for such a file, so none of its copies proves anything. What is read of it while it is written
may be torn; it goes to the store all the same, under a key of its own, noted apart from all copies: nothing
that frees blocks, fetches or compares looks at it. A restore gives it back where nothing better is known, and
says so.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable
from functools import partial

from tierfs import failpoints
from tierfs.copying import CHANGED, Copier, Item, Taken
from tierfs.errors import BusyError
from tierfs.index import Rescue, Writer
from tierfs.kit import READ_FLAGS, Kit
from tierfs.model import Copy, Record, Residency

_MOST = 10_000  # files that are known to be as their copies are


class Rescuer(Copier):
    """Takes them, through the steps of a copy but for the seal."""

    def __init__(self, kit: Kit, drain: Callable[[], int]) -> None:
        super().__init__(kit, drain)
        # inode -> size, mtime, the copy that it equals
        self._same: dict[int, tuple[int, int, Copy | None]] = {}

    def rescue(self, record: Record, path: bytes, stopping: threading.Event) -> bool:
        """Take one of this dirty file, which stands at `path`; False where it needs none: nobody is writing it,
        or it has not changed since the last. Raises BusyError, StoreError, VolumeError (the store is another
        machine's), IndexError_, OSError."""
        item = Item(record.ino, record.handle, path, record.parent, record.name, record=record)
        try:
            item.fd = self._kit.open(record.ino, record.handle, READ_FLAGS, path)
            item.st = os.fstat(item.fd)
            item.generation = record.generation
            return self._is_needed(item, record) and self._take_it(item, stopping)
        finally:
            item.close()

    def _is_needed(self, item: Item, record: Record) -> bool:
        tree, st = self._kit.tree, item.st
        assert st is not None
        if not st.st_size or tree.read_stub(item.fd) is not None:
            return False
        if tree.try_lease(item.fd, fcntl.F_RDLCK):
            tree.unlease(item.fd)
            return False  # a copy can be taken
        if self._same.get(item.ino) == (st.st_size, st.st_mtime_ns, record.copy):
            return False
        last = self._kit.index.rescue(record.fid)
        return last is None or (last.size, last.mtime) != (st.st_size, st.st_mtime_ns)

    def _take_it(self, item: Item, stopping: threading.Event) -> bool:
        assert item.st is not None and item.record is not None
        self._kit.fence()
        self._intend([item])
        try:
            taken = self._read_and_put(item, stopping)
            if taken.fresh:
                failpoints.hit(failpoints.RESCUE_PUT)
                self._kit.index.commit(partial(_put_rescue, item, taken)).result()
                item.tag = b""
                failpoints.hit(failpoints.RESCUE_COMMITTED)
            else:
                if len(self._same) >= _MOST:
                    self._same.clear()
                self._same[item.ino] = item.st.st_size, item.st.st_mtime_ns, item.record.copy
            return taken.fresh
        finally:
            self._abandon([item])

    def _check(self, item: Item, cancelled: threading.Event) -> None:
        if cancelled.is_set():
            raise BusyError("was cancelled")


def _put_rescue(item: Item, taken: Taken, w: Writer) -> None:
    """In a write transaction. Raises BusyError where the file is not what it was when the reading began."""
    record, copy = w.get(item.ino), taken.copy
    if record is None or record.handle != item.handle or record.fid != item.fid or not record.dirty:
        raise BusyError(CHANGED)
    # Of another generation, it has had a copy meanwhile, which is newer than this, and whole.
    if record.generation != item.generation or record.residency is not Residency.RESIDENT:
        raise BusyError(CHANGED)
    if not w.intended(taken.key):
        raise BusyError(CHANGED)
    w.put_rescue(
        record.fid,
        Rescue(
            time.time_ns(), copy.generation, copy.tag, copy.digest, copy.size, copy.mtime, copy.ctime,
            copy.chunk_shift,
        ),
    )  # fmt: skip
    w.fulfil(taken.key)
    w.note(item.ino)
