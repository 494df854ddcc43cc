"""What is on this disk only: the files that have waited longest for the store, and which of them are open."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator

from tierfs import control
from tierfs.kit import READ_FLAGS, Kit
from tierfs.model import Record
from tierfs.places import Places, join

MOST = 100  # that are looked at
_PAGE = 1000
_PASSED = 200_000  # of those that never leave, in a fifth of a second


def waiting(kit: Kit, places: Places, never: Callable[[int], bool]) -> list[control.Waiting]:
    """The dirty files, longest waiting first, at most `MOST`; not those that `never` leave, as far as that is
    known: they would hide the others for ever. Raises IndexError_."""
    found = []
    for record in _queued(kit, never):
        above = places.directory(record.parent)
        path = join(above.path, record.name) if above is not None else None
        size, is_open = _look(kit, record, path)
        age = max(0.0, time.time() - kit.index.dirty_since(record.ino) / 1e9)
        rescue = kit.index.rescue(record.fid)
        rescued = max(1.0, time.time() - rescue.at / 1e9) if rescue is not None else 0.0
        grown = size - record.size
        found.append(control.Waiting(path or record.name, size, age, is_open, grown, rescued))
    return found


def _queued(kit: Kit, never: Callable[[int], bool]) -> Iterator[Record]:
    at, count = (0, 0), 0
    for _ in range(_PASSED // _PAGE):
        rows = kit.index.queued(at, (1 << 63) - 1, _PAGE)
        for since, ino in rows:
            at = since, ino + 1
            record = None if never(ino) else kit.index.get(ino)
            if record is not None and record.dirty:
                yield record
                count += 1
                if count == MOST:
                    return
        if len(rows) < _PAGE:
            return


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
