"""What a change would find before it is made, in a form that fits shared memory."""

from __future__ import annotations

import enum
import mmap
import os
import struct
from typing import NamedTuple

_STAT = struct.Struct("@QQQQIIqqqqqQ")
STAT_SIZE = _STAT.size
_I64 = (-(1 << 63), (1 << 63) - 1)


class Doing(enum.IntEnum):
    """What a request is about to change that a second run would not find as the first did."""

    MAKE = 1
    LINK = 2
    UNLINK = 3
    RMDIR = 4
    RENAME = 5
    XATTR = 6


class Intent(NamedTuple):
    """What was there before a change. `when`: nanoseconds by the filesystem's clock."""

    doing: Doing
    when: int
    first: os.stat_result | None
    second: os.stat_result | None
    handle: bytes


def clamped(value: int) -> int:
    """What a field of 64 bits can hold: a time may lie beyond."""
    return min(max(value, _I64[0]), _I64[1])


def pack_stat(target: mmap.mmap | bytearray, at: int, st: os.stat_result) -> None:
    """Put attributes at this place, in STAT_SIZE bytes."""
    times: tuple[int, ...] = st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns
    try:
        _pack_stat(target, at, st, times)
    except struct.error:
        _pack_stat(target, at, st, tuple(map(clamped, times)))


def _pack_stat(target: mmap.mmap | bytearray, at: int, st: os.stat_result, times: tuple[int, ...]) -> None:
    _STAT.pack_into(
        target, at, st.st_mode, st.st_ino, st.st_dev, st.st_nlink, st.st_uid, st.st_gid,
        st.st_size, *times, st.st_blocks, st.st_rdev,
    )  # fmt: skip


def unpack_stat(source: mmap.mmap | bytes, at: int) -> os.stat_result:
    """What `pack_stat` put there."""
    mode, ino, dev, nlink, uid, gid, size, atime, mtime, ctime, blocks, rdev = _STAT.unpack_from(source, at)
    seconds = (atime // 10**9, mtime // 10**9, ctime // 10**9)
    more = {
        "st_atime_ns": atime, "st_mtime_ns": mtime, "st_ctime_ns": ctime,
        "st_blocks": blocks, "st_blksize": 4096, "st_rdev": rdev,
    }  # fmt: skip
    return os.stat_result((mode, ino, dev, nlink, uid, gid, size, *seconds), more)


def packed_stat(st: os.stat_result) -> bytes:
    """Attributes as the content of a node that is GONE."""
    packed = bytearray(STAT_SIZE)
    pack_stat(packed, 0, st)
    return bytes(packed)


def unpacked_stat(content: bytes) -> os.stat_result:
    """What `packed_stat` packed."""
    return unpack_stat(content, 0)
