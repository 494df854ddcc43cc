"""The mark log: what the mount server hands to the index's only writer, through a mapped file.

Marks are appended without a sync: they survive a killed process, not a power cut (then custody is broken for
every file anyway). A position is a byte count since the log's beginning; files of SEGMENT bytes are named by
the position at which they start and removed once drained. Each entry carries a CRC, so that what a power cut
tore is recognised and ends the log.
"""

from __future__ import annotations

import enum
import errno
import itertools
import logging
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

log = logging.getLogger("gate")

SEGMENT = 4 * 1024 * 1024
SPARE = "spare"  # the next segment's file, with its blocks: a full disk must not fail an unlink half done
_HEAD = struct.Struct("<IHBx")  # crc, length of what follows, kind
_BODY = struct.Struct("<QQQqqBB")  # ino, generation, parent, a, b, handle length, name length
_ALIGN = 8
MODE_BITS = 16  # of st_mode, beside a number of 32 bits


class Mark(enum.IntEnum):
    """What happened. The fields a and b are given in brackets."""

    WRITE = 1  # opened for writing, truncated or created: content generation raised
    CLOSED = 2  # the last writing handle is closed [size, blocks]
    GONE = 3  # the last name is gone [owner << MODE_BITS | mode, group]
    NAMED = 4  # has another name (rename, link)
    DIR = 5  # a directory was made or renamed
    TIMES = 6  # shown times of a stub set [mtime, ctime]
    PIN = 7  # pinned or unpinned [1 or 0]
    ENTRY = 8  # this name in this directory (parent) has come, gone or been exchanged [directory removed, or 0]
    ATTR = 9  # owner, mode, times or attributes are others [1: of a regular file]


_KINDS = {kind.value: kind for kind in Mark}


class Entry(NamedTuple):
    """One mark, and the position behind it."""

    kind: Mark
    ino: int
    generation: int
    parent: int
    a: int
    b: int
    handle: bytes
    name: bytes
    end: int


def _segment_name(position: int) -> str:
    return f"marks-{position:016x}"


def _segments(dirfd: int) -> list[int]:
    # In a description of its own: two threads that list one would each be given a part of the names.
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dirfd)
    try:
        return sorted(int(name[6:], 16) for name in os.listdir(fd) if name.startswith("marks-"))
    finally:
        os.close(fd)


def _written(fd: int, end: int) -> Iterator[tuple[int, int]]:
    """What a segment has behind this place that was ever written; what else there is reads as zeros."""
    while end < SEGMENT:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        end = min(os.lseek(fd, start, os.SEEK_HOLE), SEGMENT)
        yield start, end


class MarkWriter:
    """The server's end. Appending costs about a microsecond and no system call."""

    # The compiled part reaches them where they are.
    __slots__ = ("_dirfd", "_has_spare", "position", "segment", "start")

    def __init__(self, dirfd: int, at_least: int = 0) -> None:
        """Continue the log in this directory behind its last whole entry.

        `at_least`: how far the index has read. A power cut may have taken away what it read; marks at lower
        positions would never be seen, so the log then goes on from there, in a new segment.
        """
        self._dirfd = dirfd
        self._has_spare = False
        reader = MarkReader(dirfd, None)
        while sum(1 for _ in reader.read()):
            pass  # to the very end: appending anywhere else would overwrite marks
        segments = _segments(dirfd)
        if reader.position < at_least:
            self._open(at_least, at_least)
        else:
            start = segments[-1] if segments else reader.position
            self._open(start, max(start, reader.position))
        self._erase_rest()
        try:
            self.reserve()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            log.warning("no room for the next part of the mark log: %s", error)  # it is tried again and again

    def _erase_rest(self) -> None:
        """Behind a torn entry there may be whole ones: they must not follow those that are written now.

        Only what was ever written is looked at: of a new volume that is nothing, and to read it takes 9 ms.
        """
        fd = os.open(_segment_name(self.start), os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._dirfd)
        try:
            written = list(_written(fd, self.position - self.start))
        finally:
            os.close(fd)
        for start, end in written:
            if self.segment[start:end] != (nothing := bytes(end - start)):
                self.segment[start:end] = nothing
                self.segment.flush()

    def reserve(self) -> None:
        """Keep a spare segment at hand, where as much is left besides. Raises OSError(ENOSPC); then `append`
        may, at the end of this one."""
        if self._has_spare:
            return
        space = os.fstatvfs(self._dirfd)
        if (space.f_bavail if os.geteuid() else space.f_bfree) * space.f_frsize < 2 * SEGMENT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fd = os.open(SPARE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self._dirfd)
        try:
            os.posix_fallocate(fd, 0, SEGMENT)
        finally:
            os.close(fd)
        self._has_spare = True

    def _open(self, start: int, position: int) -> None:
        name = _segment_name(start)
        if self._has_spare and name not in os.listdir(self._dirfd):
            os.rename(SPARE, name, src_dir_fd=self._dirfd, dst_dir_fd=self._dirfd)
            self._has_spare = False
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self._dirfd)
        try:
            # Real blocks, not a hole: a store into a mapped hole on a full disk would be a SIGBUS.
            os.posix_fallocate(fd, 0, SEGMENT)
            self.segment = mmap.mmap(fd, SEGMENT)
        except OSError:
            if os.fstat(fd).st_size < SEGMENT:
                # The next attempt must find the name free for the spare segment.
                os.unlink(name, dir_fd=self._dirfd)
            raise
        finally:
            os.close(fd)
        self.start = start
        self.position = position

    def ensure(self, size: int) -> None:
        """Make sure that marks of `size` bytes in all can be appended. Raises OSError(ENOSPC)."""
        if self.position - self.start + size + _HEAD.size > SEGMENT:
            self._next_segment()

    def _next_segment(self) -> None:
        full = self.segment
        self._open(self.position, self.position)
        full.close()

    def append(
        self,
        kind: Mark,
        ino: int,
        generation: int = 0,
        parent: int = 0,
        a: int = 0,
        b: int = 0,
        handle: bytes = b"",
        name: bytes = b"",
    ) -> int:
        """Append one mark and return its position. Raises OSError(ENOSPC) where a new segment does not fit."""
        body = _BODY.pack(ino, generation, parent, a, b, len(handle), len(name)) + handle + name
        size = -(-(_HEAD.size + len(body)) // _ALIGN) * _ALIGN
        offset = self.position - self.start
        if offset + size + _HEAD.size > SEGMENT:
            self._next_segment()
            offset = 0
        # The head goes in last: a reader in the other process sees an entry whole or not at all.
        at = offset + _HEAD.size
        self.segment[at : at + len(body)] = body
        self.segment[offset : offset + _HEAD.size] = _HEAD.pack(_crc(kind, body), len(body), kind)
        position = self.position
        self.position += size
        return position

    def close(self) -> None:
        """Unmap."""
        self.segment.close()


def _crc(kind: int, body: bytes) -> int:
    return zlib.crc32(body, kind) or 1


class MarkReader:
    """The mover's end: reads from a position onwards, as often as asked."""

    def __init__(self, dirfd: int, position: int | None) -> None:
        """`position`: where to go on, as kept in the index; None: at the oldest segment there is."""
        self._dirfd = dirfd
        segments = _segments(dirfd)
        self.position = position if position is not None else (segments[0] if segments else 0)

    def read(self, limit: int = 10_000) -> Iterator[Entry]:
        """The next whole entries, at most `limit`; `position` moves with them."""
        count = 0
        for start in self._ahead():
            try:
                data = self._map(start)
            except FileNotFoundError:
                # Drained and removed since it was listed: this is a new writer looking for the end.
                continue
            if data is None:
                return
            with data:
                if self.position < start:
                    self.position = start
                while count < limit:
                    entry = self._entry(data, start)
                    if entry is None:
                        break
                    self.position = entry.end
                    count += 1
                    yield entry
            if count >= limit:
                return

    def _map(self, start: int) -> mmap.mmap | None:
        """The segment that begins there; None where it is being made. Raises FileNotFoundError."""
        fd = os.open(_segment_name(start), os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._dirfd)
        try:
            whole = os.fstat(fd).st_size >= SEGMENT
            return mmap.mmap(fd, SEGMENT, access=mmap.ACCESS_READ) if whole else None
        finally:
            os.close(fd)

    def _ahead(self) -> list[int]:
        """Starts of the segments that hold or follow the position."""
        segments = _segments(self._dirfd)
        return [s for i, s in enumerate(segments) if i + 1 == len(segments) or segments[i + 1] > self.position]

    def _entry(self, data: mmap.mmap, start: int) -> Entry | None:
        offset = self.position - start
        if offset + _HEAD.size > SEGMENT:
            return None
        crc, length, kind = _HEAD.unpack_from(data, offset)
        body = data[offset + _HEAD.size : offset + _HEAD.size + length]
        if crc == 0 or len(body) != length or length < _BODY.size or _crc(kind, body) != crc:
            return None
        ino, generation, parent, a, b, handles, names = _BODY.unpack_from(body)
        handle = body[_BODY.size : _BODY.size + handles]
        name = body[_BODY.size + handles : _BODY.size + handles + names]
        size = -(-(_HEAD.size + length) // _ALIGN) * _ALIGN
        return Entry(_KINDS[kind], ino, generation, parent, a, b, handle, name, self.position + size)

    @property
    def lacks_some(self) -> bool:
        """Marks behind the position were drained, and are not there any more."""
        return all(start > self.position for start in _segments(self._dirfd))

    def newest_end(self) -> int:
        """Where the newest mark ends that is there now. In any thread, also while another reads."""
        segments = _segments(self._dirfd)
        if not segments:
            return self.position
        try:
            data = self._map(segments[-1])
        except FileNotFoundError:  # drained and removed since it was listed
            return self.position
        if data is None:
            return segments[-1]
        offset = max(0, self.position - segments[-1])
        with data:
            while offset + _HEAD.size <= SEGMENT:
                crc, length, _ = _HEAD.unpack_from(data, offset)
                if crc == 0:
                    break
                offset += -(-(_HEAD.size + length) // _ALIGN) * _ALIGN
        return segments[-1] + offset

    def forget(self, position: int) -> None:
        """Remove the segments that end at or before `position` (never the newest)."""
        segments = _segments(self._dirfd)
        for start, following in itertools.pairwise(segments):
            if following <= position:
                os.unlink(_segment_name(start), dir_fd=self._dirfd)
