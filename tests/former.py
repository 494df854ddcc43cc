"""An index as version 1 of its format has it, written without the program: what an upgrade finds. Frozen."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import lmdb
import msgspec

from tierfs.model import Record

_HEAD = struct.Struct("<BI")
_BODY = struct.Struct("<B16s6sQIQQqBB")
_COPY = struct.Struct("<6s8s32sQqqIB")
_TABLES = (
    "meta", "files", "fids", "bits", "leaves", "dirty", "quiet", "pins", "dirs", "pending", "changes",
    "tombs", "versions", "places", "orphans", "intents", "twins", "beats", "lists",
)  # fmt: skip


def pack_record(record: Record, version: int = 2) -> bytes:
    """A record of version 1 or 2."""
    copy = record.copy
    flags = int(record.residency) | (0x80 if copy is not None else 0)
    body = _BODY.pack(
        flags, record.fid, record.generation.to_bytes(6, "little"), record.size,
        min(record.blocks, 0xFFFFFFFF), record.local, record.parent, record.left_ctime,
        len(record.handle), len(record.name),
    )  # fmt: skip
    if copy is not None:
        body += _COPY.pack(
            copy.generation.to_bytes(6, "little"), copy.tag, copy.digest, copy.size, copy.mtime, copy.ctime,
            copy.custody, copy.chunk_shift,
        )  # fmt: skip
    body += record.handle + record.name
    begin = zlib.crc32(record.ino.to_bytes(8, "big")) if version == 2 else 0
    return _HEAD.pack(version, zlib.crc32(body, begin)) + body


def summed(value: bytes) -> bytes:
    """With its CRC."""
    return struct.pack("<I", zlib.crc32(value)) + value


def u64(*numbers: int) -> bytes:
    """As a key has them."""
    return struct.pack(f">{len(numbers)}Q", *numbers)


def write(path: Path, records: Iterable[tuple[Record, int]]) -> None:
    """An index with these records, each with the time at which it was queued as dirty (0: it is not)."""
    path.mkdir(exist_ok=True)
    totals = [0] * 6
    with lmdb.open(str(path), map_size=64 << 20, max_dbs=len(_TABLES)) as env:
        tables = {name: env.open_db(name.encode()) for name in _TABLES}
        with env.begin(write=True) as txn:
            for number, (record, since) in enumerate(records):
                key = u64(record.ino)
                txn.put(key, pack_record(record, 1 + number % 2), db=tables["files"])
                txn.put(record.fid, key, db=tables["fids"])
                if since:
                    txn.put(key, summed(u64(since)), db=tables["dirty"])
                    txn.put(u64(since, record.ino), b"", db=tables["quiet"])
                dirty = record.dirty
                values = (
                    1, int(record.residency == 2), record.local, record.size, int(dirty), dirty * record.size
                )  # fmt: skip
                totals = [before + value for before, value in zip(totals, values)]
            meta = {
                "format": 1, "epoch": 3, "custody": 2, "boot": "a", "clean": True, "log_position": 640,
                "totals": totals, "surveyed": True, "swept": 2, "unclean": 0, "noting": False, "noted": 0,
                "noted_since": 0,
            }  # fmt: skip
            txn.put(b"meta", summed(msgspec.msgpack.encode(meta)), db=tables["meta"])
