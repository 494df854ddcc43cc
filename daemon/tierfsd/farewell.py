"""What a mount that has ended leaves on this disk only, for whoever shuts the machine down or gives it away."""

from __future__ import annotations

import contextlib
import logging
import os

from tierfs.errors import TierError
from tierfs.index import Index
from tierfs.marks import Mark, MarkReader
from tierfs.volume import Volume

log = logging.getLogger("supervisor")


def say_what_is_local_only(home: Volume) -> None:
    """Write it into the log."""
    if home.identity.view:
        return  # nothing of it is for the store
    try:
        with contextlib.closing(Index.open(home.path("index"), readonly=True)) as index:
            count, size = local_only(index, home.path("marks"))
            surveyed, names = index.surveyed, bool(index.noted_since())
    except (TierError, OSError) as error:
        log.error("it is not known what is in the store: %s", error)
        return
    if count:
        files = "1 file is" if count == 1 else f"{count} files are"
        log.warning("%s not in the store, %d bytes: on this disk only", files, size)
    if names:
        log.warning("names or attributes have changed that the store does not know of")
    if not surveyed:
        log.warning("not all files have been looked through: others may not be in the store either")


def local_only(index: Index, marks: str) -> tuple[int, int]:
    """How many files and bytes the store does not have: those that the index says, and those whose marks no
    mover has read, perhaps as none had begun yet. Raises IndexError_, OSError."""
    totals = index.totals()
    count, size = totals.dirty_files, totals.dirty_bytes
    for ino, left in unread(index, marks).items():
        record = index.get(ino)
        known = record is not None and record.dirty
        before = record.size if record is not None and known else 0
        if left is None:
            count, size = count - known, size - before
        else:
            count, size = count + (not known), size + left - before
    return count, size


def unread(index: Index, marks: str) -> dict[int, int | None]:
    """Inodes with marks that are not in the index: their size now; None: gone."""
    found: dict[int, int | None] = {}
    fd = os.open(marks, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        reader = MarkReader(fd, index.log_position())
        before = -1
        while reader.position != before:
            before = reader.position
            for entry in reader.read():
                if entry.kind is Mark.WRITE:
                    record = index.get(entry.ino)
                    found[entry.ino] = found.get(entry.ino) or (record.size if record is not None else 0)
                elif entry.kind is Mark.CLOSED and found.get(entry.ino, 0) is not None:  # else removed, open
                    found[entry.ino] = entry.a
                elif entry.kind is Mark.GONE:
                    found[entry.ino] = None
    finally:
        os.close(fd)
    return found
