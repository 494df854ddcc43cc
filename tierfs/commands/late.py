"""What programs changed between the last look of `umount --wait` and the unmount itself."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from tierfs import config
from tierfs.errors import VolumeError
from tierfs.index import Index
from tierfs.marks import Mark, MarkReader

_ALL = 1 << 30  # marks
_MORE = 1000  # rows that may have come since they were counted


def refuse_what_came_late(mountpoint: str, state: str, position: int) -> None:
    """Who was told to wait is told that not all is in the store after all. `position`: how far the mark log had
    been looked at. Raises VolumeError."""
    never = config.load(os.path.join(state, config.FILE_NAME)).never.matcher()
    marks = os.path.join(state, "marks")
    with contextlib.closing(Index.open(os.path.join(state, "index"), readonly=True)) as index:
        files = left(index, marks, position, never)
        names = bool(index.noted_since()) or _has_names(index, marks)
    if files or names:
        what = f"{files} files were" if files else "names or attributes were"
        raise VolumeError(
            f"{mountpoint}: is unmounted, but {what} changed meanwhile and are on this disk only: mount it and"
            " try again"
        )


def left(index: Index, marks: str, position: int, never: Callable[[bytes], bool]) -> int:
    """How many files that may leave were written behind this place in the log, and are not in the store."""
    applied = index.log_position() or 0
    with _reader(marks, position) as reader:
        written = set(_all_dirty(index)) if reader.lacks_some else set[int]()
        unread = set[int]()  # of which the index does not know: no mover has come to that
        for entry in reader.read(limit=_ALL):
            if entry.kind is Mark.WRITE:
                written.add(entry.ino)
                if entry.end > applied:
                    unread.add(entry.ino)
            elif entry.kind is Mark.GONE:
                written.discard(entry.ino)
                unread.discard(entry.ino)
    return sum(_is_left(index, ino, never, ino in unread) for ino in written)


def _is_left(index: Index, ino: int, never: Callable[[bytes], bool], unread: bool) -> bool:
    record = index.get(ino)
    if record is None:
        return True
    if not record.dirty and not unread:
        return False
    parts, parent = [record.name], record.parent
    while (above := index.get_dir(parent)) is not None:
        parent = above[0]
        parts.append(above[1])
    return not never(b"/".join(reversed(parts)))


def _all_dirty(index: Index) -> list[int]:
    return index.quiet(1 << 63, limit=index.totals().dirty_files + _MORE)


def _has_names(index: Index, marks: str) -> bool:
    """Whether names or attributes were changed of which the index does not know."""
    with _reader(marks, index.log_position() or 0) as reader:
        return any(entry.kind is not Mark.CLOSED for entry in reader.read(limit=_ALL))


@contextlib.contextmanager
def _reader(marks: str, position: int) -> Iterator[MarkReader]:
    fd = os.open(marks, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield MarkReader(fd, position)
    finally:
        os.close(fd)
