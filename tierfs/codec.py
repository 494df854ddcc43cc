"""How records stand in the index: version byte, CRC-32, a shape, and the fields that the shape says are there.

A home has very many records and most of their fields are what one expects, so that those are left out: two
records of the same kind of file have the same shape, and fields of the same width. What is left out is zero, or
follows from the rest: `blocks` from the size, `local` from the blocks, the handle from the inode number, and of
a copy the size and generation from the file's and ctime from mtime.

    version u8, CRC-32 u32, shape u24, then of these the ones in the shape, in this order:
    left ctime i64 · since u64 · file id 16 · generation u48 · size · parent · blocks u32 · local u64
    · of the handle: the inode's generation u32, or its length u8
    · of a copy: tag 8 · digest 32 · mtime i64 · ctime, or ctime - mtime i32 · generation u48 · size u64
    · its custody · log2 of its chunk size u8
    then the handle, where it is no number, and the name to the end

*Since* is when the file was queued as dirty (ns): the queue's, not the record's. The CRC is of the version, the
inode number and the rest, so that a record under a flipped key is no record of that inode. Records of versions
1 (CRC of the rest alone) and 2 (of inode number and rest) have all fields, and are read; since when they are
dirty stands in a table of its own.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from functools import lru_cache

from tierfs.errors import IndexError_
from tierfs.model import CHUNK_SHIFT, Copy, Record, Residency, clamped

_VERSION = 3
_FIXED = 2
_KEYLESS = 1
_HEAD = struct.Struct("<BI")
_SHAPE = 3  # bytes

_RESIDENCY = 0b11
_LEFT, _SINCE, _COPY, _HANDLE = 1 << 2, 1 << 3, 1 << 4, 1 << 5  # _HANDLE: one that is no number
_BLOCKS, _LOCAL, _LOCAL_IS_BLOCKS = 1 << 6, 1 << 7, 1 << 8
_SIZE_AT, _PARENT_AT = 9, 11  # two bits each: which of _WIDTHS
_WIDTHS = ("", "H", "I", "Q")
_CTIME_NEAR, _CTIME, _GENERATION, _SIZE, _CUSTODY, _SHIFT = (1 << bit for bit in range(13, 19))

_I64 = struct.Struct("<q")
_U64 = struct.Struct("<Q")
_NUMBERED = b"\x01\0\0\0"  # FILEID_INO32_GEN of linux/exportfs.h: inode number and generation, u32 each
_NUMBERED_SIZE = 12
_MOST_BLOCKS = 0xFFFFFFFF
_NEAR = 1 << 31


@lru_cache(maxsize=1024)
def _layout(shape: int) -> struct.Struct:
    """The fields of a shape. There are a few dozen in any volume."""
    form = "<"
    form += "q" if shape & _LEFT else ""
    form += "Q" if shape & _SINCE else ""
    form += "16sIH" + _WIDTHS[shape >> _SIZE_AT & 3] + _WIDTHS[shape >> _PARENT_AT & 3]
    form += "I" if shape & _BLOCKS else ""
    form += "Q" if shape & _LOCAL else ""
    form += "B" if shape & _HANDLE else "I"
    if shape & _COPY:
        form += "8s32sq"
        form += "q" if shape & _CTIME else "i" if shape & _CTIME_NEAR else ""
        form += "IH" if shape & _GENERATION else ""
        form += "Q" if shape & _SIZE else ""
        form += "I" if shape & _CUSTODY else "B"
        form += "B" if shape & _SHIFT else ""
    return struct.Struct(form)


def _width(value: int) -> int:
    """Which of _WIDTHS holds it."""
    if value < 1 << 16:
        return 1 if value else 0
    return 2 if value < 1 << 32 else 3


def _usual_blocks(size: int) -> int:
    """Of a file without holes, in pages of 4 KiB."""
    return min((size + 4095) // 4096 * 8, _MOST_BLOCKS)


def pack_record(record: Record, since: int = 0) -> bytes:
    """The bytes of a record; its inode number is the key and not part of them. `since` in ns, 0: not queued."""
    size, parent, handle = record.size, record.parent, record.handle
    size_width, parent_width = _width(size), _width(parent)
    shape = int(record.residency) | size_width << _SIZE_AT | parent_width << _PARENT_AT
    fields: list[int | bytes] = []
    if record.left_ctime:
        shape |= _LEFT
        fields.append(record.left_ctime)
    if since:
        shape |= _SINCE
        fields.append(since)
    fields += (record.fid, record.generation & 0xFFFFFFFF, record.generation >> 32)
    if size_width:
        fields.append(size)
    if parent_width:
        fields.append(parent)
    blocks = min(record.blocks, _MOST_BLOCKS)
    if blocks != _usual_blocks(size):
        shape |= _BLOCKS
        fields.append(blocks)
    if record.local and record.local == blocks * 512:
        shape |= _LOCAL_IS_BLOCKS
    elif record.local:
        shape |= _LOCAL
        fields.append(record.local)
    if len(handle) == _NUMBERED_SIZE and handle[:8] == _numbered(record.ino):
        handle, number = b"", int.from_bytes(handle[8:], "little")
        fields.append(number)
    else:
        shape |= _HANDLE
        fields.append(len(handle))
    if record.copy is not None:
        shape |= _COPY | _pack_copy(record, record.copy, fields)
    try:
        packed = _layout(shape).pack(*fields)
    except struct.error:
        if (near := _representable(record)) == record:
            raise
        return pack_record(near, since)
    body = shape.to_bytes(_SHAPE, "little") + packed + handle + record.name
    return _HEAD.pack(_VERSION, _sum(_VERSION, record.ino, body)) + body


def _representable(record: Record) -> Record:
    """With times that an i64 holds: a file may have one behind the year 2262. As such a record is not what the
    file says, no copy is proven by it, and the file stays."""
    copy = record.copy
    if copy is not None:
        copy = replace(copy, mtime=clamped(copy.mtime), ctime=clamped(copy.ctime))
    return replace(record, copy=copy, left_ctime=clamped(record.left_ctime))


def _numbered(ino: int) -> bytes:
    """What a handle begins with that names this inode by number; nothing does for one beyond 32 bits."""
    return _NUMBERED + ino.to_bytes(8, "little")[:4] if ino < 1 << 32 else b""


def _pack_copy(record: Record, copy: Copy, fields: list[int | bytes]) -> int:
    """Append its fields; what they add to the shape."""
    shape = 0
    fields += (copy.tag, copy.digest, copy.mtime)
    later = copy.ctime - copy.mtime
    if not -_NEAR <= later < _NEAR:
        shape |= _CTIME
        fields.append(copy.ctime)
    elif later:
        shape |= _CTIME_NEAR
        fields.append(later)
    if copy.generation != record.generation:
        shape |= _GENERATION
        fields += (copy.generation & 0xFFFFFFFF, copy.generation >> 32)
    if copy.size != record.size:
        shape |= _SIZE
        fields.append(copy.size)
    shape |= 0 if copy.custody < 256 else _CUSTODY
    fields.append(copy.custody)
    if copy.chunk_shift != CHUNK_SHIFT:
        shape |= _SHIFT
        fields.append(copy.chunk_shift)
    return shape


def unpack_record(ino: int, raw: bytes) -> Record:
    """Raises IndexError_ where version or CRC are wrong."""
    return unpack_row(ino, raw)[0]


def unpack_row(ino: int, raw: bytes) -> tuple[Record, int | None]:
    """The record, and when the file was queued as dirty (`unpack_since`), at once.

    Raises IndexError_ where version or CRC are wrong.
    """
    body = _checked(ino, raw)
    if raw[0] != _VERSION:
        return _unpack_fixed(ino, body), None
    shape = int.from_bytes(body[:_SHAPE], "little")
    layout = _layout(shape)
    take = iter(layout.unpack_from(body, _SHAPE)).__next__
    left = take() if shape & _LEFT else 0
    since = take() if shape & _SINCE else 0
    fid: bytes = take()
    generation = take() | take() << 32
    size = take() if shape >> _SIZE_AT & 3 else 0
    parent = take() if shape >> _PARENT_AT & 3 else 0
    blocks = take() if shape & _BLOCKS else _usual_blocks(size)
    local = take() if shape & _LOCAL else blocks * 512 if shape & _LOCAL_IS_BLOCKS else 0
    at = _SHAPE + layout.size
    number = take()
    if shape & _HANDLE:
        handle = body[at : at + number]
        at += number
    else:
        handle = _numbered(ino) + number.to_bytes(4, "little")
    copy = None
    if shape & _COPY:
        tag, digest, mtime = take(), take(), take()
        ctime = take() if shape & _CTIME else mtime + take() if shape & _CTIME_NEAR else mtime
        copied = take() | take() << 32 if shape & _GENERATION else generation
        copy_size = take() if shape & _SIZE else size
        custody = take()
        copy = Copy(
            copied, tag, digest, copy_size, mtime, ctime, custody, take() if shape & _SHIFT else CHUNK_SHIFT
        )
    residency = Residency(shape & _RESIDENCY)
    name = body[at:]
    return Record(ino, handle, fid, generation, residency, size, blocks, local, parent, name, copy, left), since


def unpack_since(ino: int, raw: bytes) -> int | None:
    """When the file was queued as dirty (ns; 0: it is not queued); None: a table of its own says so.

    Raises IndexError_ where version or CRC are wrong.
    """
    body = _checked(ino, raw)
    if raw[0] != _VERSION:
        return None
    if not body[0] & _SINCE:
        return 0
    return int(_U64.unpack_from(body, _SHAPE + (_I64.size if body[0] & _LEFT else 0))[0])


def is_plain(ino: int, raw: bytes, ctime: int) -> bool:
    """Whether this is a whole record of a resident file that our own last move did not leave with this ctime.

    Much quicker than the record itself. False for a damaged one.
    """
    try:
        body = _checked(ino, raw)
    except IndexError_:
        return False
    if raw[0] != _VERSION:
        return body[0] & ~_HAS_COPY == Residency.RESIDENT and _I64.unpack_from(body, _LEFT_AT)[0] != ctime
    if body[0] & _RESIDENCY:  # RESIDENT is 0
        return False
    return (_I64.unpack_from(body, _SHAPE)[0] if body[0] & _LEFT else 0) != ctime


def _sum(version: int, ino: int, body: bytes) -> int:
    if version == _KEYLESS:
        return zlib.crc32(body)
    # Without the version a flipped one would have fields read as others, and the sum agree.
    begin = zlib.crc32(bytes((version,))) if version == _VERSION else 0
    return zlib.crc32(body, zlib.crc32(ino.to_bytes(8, "big"), begin))


def _checked(ino: int, raw: bytes) -> bytes:
    version = raw[0] if raw else 0
    if version not in _LEAST or len(raw) < _LEAST[version]:
        raise IndexError_(f"the index's record of inode {ino} is of another version: `tierfs check --repair`")
    _, crc = _HEAD.unpack_from(raw)
    body = raw[_HEAD.size :]
    if crc != _sum(version, ino, body):
        raise IndexError_(f"the index's record of inode {ino} is damaged: run `tierfs check --repair`")
    return body


# --- versions 1 and 2 -------------------------------------------------------------------------------------

# flags, file id, generation, size, blocks, local, parent, left ctime, lengths of handle and name
_BODY = struct.Struct("<B16s6sQIQQqBB")
_FIXED_COPY = struct.Struct("<6s8s32sQqqIB")
_LEFT_AT = struct.calcsize("<B16s6sQIQQ")
_HAS_COPY = 0x80
_LEAST = {
    _KEYLESS: _HEAD.size + _BODY.size, _FIXED: _HEAD.size + _BODY.size,
    _VERSION: _HEAD.size + _SHAPE + _layout(0).size,
}  # fmt: skip


def _unpack_fixed(ino: int, body: bytes) -> Record:
    flags, fid, generation, size, blocks, local, parent, left, handle_size, name_size = _BODY.unpack_from(body)
    at = _BODY.size
    copy = None
    if flags & _HAS_COPY:
        copied, tag, digest, copy_size, mtime, ctime, custody, shift = _FIXED_COPY.unpack_from(body, at)
        at += _FIXED_COPY.size
        copy = Copy(int.from_bytes(copied, "little"), tag, digest, copy_size, mtime, ctime, custody, shift)
    handle = body[at : at + handle_size]
    name = body[at + handle_size : at + handle_size + name_size]
    number = int.from_bytes(generation, "little")
    residency = Residency(flags & ~_HAS_COPY)
    return Record(ino, handle, fid, number, residency, size, blocks, local, parent, name, copy, left)
