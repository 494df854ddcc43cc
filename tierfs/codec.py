"""How records stand in the index: a version byte, a CRC-32, then fixed fields, handle and name.

The CRC is of the inode number and the rest, so that a record under a flipped key is no record of that inode
(version 2; a record of version 1 has the CRC of the rest alone, and is read).
"""

from __future__ import annotations

import struct
import zlib

from tierfs.errors import IndexError_
from tierfs.model import Copy, Record, Residency

_VERSION = 2
_KEYLESS = 1
_HEAD = struct.Struct("<BI")
# flags, file id, generation, size, blocks, local, parent, left ctime, lengths of handle and name
_BODY = struct.Struct("<B16s6sQIQQqBB")
_COPY = struct.Struct("<6s8s32sQqqIB")
_LEFT = struct.Struct("<q")
_LEFT_AT = struct.calcsize("<B16s6sQIQQ")
_HAS_COPY = 0x80


def pack_record(record: Record) -> bytes:
    """The bytes of a record; its inode number is the key and not part of them."""
    flags = int(record.residency) | (_HAS_COPY if record.copy is not None else 0)
    body = _BODY.pack(
        flags,
        record.fid,
        record.generation.to_bytes(6, "little"),
        record.size,
        min(record.blocks, 0xFFFFFFFF),
        record.local,
        record.parent,
        record.left_ctime,
        len(record.handle),
        len(record.name),
    )
    if record.copy is not None:
        body += _pack_copy(record.copy)
    body += record.handle + record.name
    return _HEAD.pack(_VERSION, _sum(record.ino, body)) + body


def _pack_copy(copy: Copy) -> bytes:
    return _COPY.pack(
        copy.generation.to_bytes(6, "little"),
        copy.tag,
        copy.digest,
        copy.size,
        copy.mtime,
        copy.ctime,
        copy.custody,
        copy.chunk_shift,
    )


def unpack_record(ino: int, raw: bytes) -> Record:
    """Raises IndexError_ where version or CRC are wrong."""
    body = _checked(ino, raw)
    flags, fid, generation, size, blocks, local, parent, left, handle_size, name_size = _BODY.unpack_from(body)
    at = _BODY.size
    copy = None
    if flags & _HAS_COPY:
        copy_generation, tag, digest, copy_size, mtime, ctime, custody, shift = _COPY.unpack_from(body, at)
        at += _COPY.size
        number = int.from_bytes(copy_generation, "little")
        copy = Copy(number, tag, digest, copy_size, mtime, ctime, custody, shift)
    handle = body[at : at + handle_size]
    name = body[at + handle_size : at + handle_size + name_size]
    number = int.from_bytes(generation, "little")
    residency = Residency(flags & ~_HAS_COPY)
    return Record(ino, handle, fid, number, residency, size, blocks, local, parent, name, copy, left)


def is_plain(ino: int, raw: bytes, ctime: int) -> bool:
    """Whether this is a whole record of a resident file that our own last move did not leave with this ctime.

    Much quicker than the record itself. False for a damaged one.
    """
    try:
        body = _checked(ino, raw)
    except IndexError_:
        return False
    return body[0] & ~_HAS_COPY == Residency.RESIDENT and _LEFT.unpack_from(body, _LEFT_AT)[0] != ctime


def _sum(ino: int, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(ino.to_bytes(8, "big")))


def _checked(ino: int, raw: bytes) -> bytes:
    if len(raw) < _HEAD.size + _BODY.size or raw[0] not in (_KEYLESS, _VERSION):
        raise IndexError_(f"the index's record of inode {ino} is of another version: `tierfs check --repair`")
    _, crc = _HEAD.unpack_from(raw)
    body = raw[_HEAD.size :]
    if crc != (zlib.crc32(body) if raw[0] == _KEYLESS else _sum(ino, body)):
        raise IndexError_(f"the index's record of inode {ino} is damaged: run `tierfs check --repair`")
    return body
