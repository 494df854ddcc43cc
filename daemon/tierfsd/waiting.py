"""What is on this disk only: the files that have waited longest for the store, and which of them are open."""

from __future__ import annotations

import fcntl
import os
import time

from tierfs import control
from tierfs.kit import READ_FLAGS, Kit
from tierfs.model import Record
from tierfs.places import Places, join

MOST = 100  # that are looked at


def waiting(kit: Kit, places: Places) -> list[control.Waiting]:
    """The dirty files, longest waiting first, at most `MOST`. Raises IndexError_."""
    found = []
    for ino in kit.index.quiet(1 << 63, limit=MOST):
        record = kit.index.get(ino)
        if record is None or not record.dirty:
            continue
        above = places.directory(record.parent)
        path = join(above.path, record.name) if above is not None else None
        size, is_open = _look(kit, record, path)
        age = max(0.0, time.time() - kit.index.dirty_since(ino) / 1e9)
        rescue = kit.index.rescue(record.fid)
        rescued = max(1.0, time.time() - rescue.at / 1e9) if rescue is not None else 0.0
        grown = size - record.size
        found.append(control.Waiting(path or record.name, size, age, is_open, grown, rescued))
    return found


def _look(kit: Kit, record: Record, path: bytes | None) -> tuple[int, bool]:
    """(size as it is now, somebody may be writing it). One that is worked on is left alone: an open would break
    the lease that guards it."""
    if not kit.claims.take(record.ino):
        return record.size, False
    try:
        fd = kit.open(record.ino, record.handle, READ_FLAGS, path)
        try:
            # Closing gives the lease back.
            return os.fstat(fd).st_size, not kit.tree.try_lease(fd, fcntl.F_RDLCK)
        finally:
            os.close(fd)
    except OSError:
        return record.size, False  # gone, or leases are not to be had
    finally:
        kit.claims.give(record.ino)
