"""What programs changed between the last look of `umount --wait` and the unmount itself."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from tierfs import config
from tierfs.errors import VolumeError
from tierfs.index import Index
from tierfs.marks import Mark, MarkReader


def refuse_what_came_late(mountpoint: str, state: str, position: int) -> None:
    """Who was told to wait is told that not all is in the store after all. `position`: how far the mark log had
    been looked at. Raises VolumeError."""
    never = config.load(os.path.join(state, config.FILE_NAME)).never.matcher()
    with contextlib.closing(Index.open(os.path.join(state, "index"), readonly=True)) as index:
        files = left(index, os.path.join(state, "marks"), position, never)
        names = bool(index.noted_since())
    if files or names:
        what = f"{files} files were" if files else "names or attributes were"
        raise VolumeError(
            f"{mountpoint}: is unmounted, but {what} changed meanwhile and are on this disk only: mount it and"
            " try again"
        )


def left(index: Index, marks: str, position: int, never: Callable[[bytes], bool]) -> int:
    """How many files that may leave were written behind this place in the log, and are not in the store."""
    return sum(_is_left(index, ino, never) for ino in _written_since(marks, position))


def _is_left(index: Index, ino: int, never: Callable[[bytes], bool]) -> bool:
    record = index.get(ino)
    if record is None or not record.dirty:
        return record is None
    parts, parent = [record.name], record.parent
    while (above := index.get_dir(parent)) is not None:
        parent = above[0]
        parts.append(above[1])
    return not never(b"/".join(reversed(parts)))


def _written_since(marks: str, position: int) -> set[int]:
    """Inodes whose content was changed behind this place in the mark log, and that are there still."""
    found: set[int] = set()
    fd = os.open(marks, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for entry in MarkReader(fd, position).read(limit=1 << 30):
            if entry.kind is Mark.WRITE:
                found.add(entry.ino)
            elif entry.kind is Mark.GONE:
                found.discard(entry.ino)
    finally:
        os.close(fd)
    return found
