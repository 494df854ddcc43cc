"""What a transaction may do to the index, and how its values stand there. See index.py for the key table."""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from tierfs import transitions
from tierfs.codec import pack_record, unpack_record, unpack_row, unpack_since
from tierfs.errors import IndexDamagedError, IndexError_
from tierfs.model import Record, Residency, object_key
from tierfs.past import U64, Garbage, PastWriter, ascending, checked, summed, whole

FORMAT = 2
READABLE = (1, FORMAT)  # an index of format 1 becomes one of 2 record by record, as they change
_UNKNOWN = -1
U64X2 = struct.Struct(">QQ")
U32 = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over all records; `local_bytes` is what resident and partial files occupy."""

    files: int = 0
    stubs: int = 0
    local_bytes: int = 0
    total_bytes: int = 0
    dirty_files: int = 0
    dirty_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Leaves:
    """Digests of a copy's leaves (32 bytes each; empty for a small file) and its data extents [start, end)."""

    digests: bytes
    extents: list[tuple[int, int]]


class Recount(NamedTuple):
    """The sums as kept and as counted over all records, and how many of these and of the queue are wrong."""

    kept: Totals
    counted: Totals
    damaged: int
    misqueued: int


class Meta(msgspec.Struct):
    """The value `meta` of its table. `clean`: the last session ended in order; `unclean` counts the others.

    `taken`: the last custody epoch that began since others had had the store; 0: none has. `newest`: the
    largest generation that content was given. `noting`: changes are noted for the journal, the newest under
    number `noted`, the oldest of those that wait at `noted_since` (ns; 0: none waits). `root`: the file handle
    of the tree's root; empty: not known.
    """

    format: int = FORMAT
    epoch: int = 0
    custody: int = 0
    taken: int = 0
    boot: str = ""
    clean: bool = True
    log_position: int | None = None
    totals: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
    surveyed: bool = False
    swept: int = -1
    unclean: int = 0
    newest: int = 0
    noting: bool = False
    noted: int = 0
    noted_since: int = 0
    past: Garbage = msgspec.field(default_factory=Garbage)
    root: bytes = b""


class Chain(msgspec.Struct, frozen=True):
    """How far the namespace journal has come: the chain's name; the last segment's epoch, sequence and digest;
    the bytes and objects written since the last whole snapshot; that one's size, and the `unclean` of its
    beginning (-1: there is none, -2: something could not be read: the next session takes another)."""

    root: str
    epoch: int
    sequence: int
    digest: str
    written: int = 0
    segments: int = 0
    snapshot: int = 0
    unclean: int = -1


def read_chain(raw: bytes | None) -> Chain | None:
    """The chain's value. Raises IndexDamagedError: nothing can be written behind a place that is not known."""
    if raw is None:
        return None
    try:
        return msgspec.msgpack.decode(checked("journal's state", raw), type=Chain)
    except (IndexError_, msgspec.DecodeError) as error:
        raise IndexDamagedError(str(error)) from error


class Rescue(msgspec.Struct, array_like=True, frozen=True):
    """What was read at `at` (ns) of a file that somebody was writing: perhaps no state that it ever had. Never
    a reason to free blocks; what a lost disk leaves of a file that nothing better is known of."""

    at: int
    generation: int
    tag: bytes
    digest: bytes
    size: int
    mtime: int
    ctime: int
    chunk_shift: int

    def key(self, fid: bytes) -> str:
        """The object's key."""
        return object_key(fid, self.generation, self.tag)


def read_rescue(fid: bytes, raw: bytes) -> Rescue:
    """The value. Raises IndexError_ where it is damaged."""
    return msgspec.msgpack.decode(checked(f"rescue copy of file {fid.hex()}", raw), type=Rescue)


class Note(NamedTuple):
    """Something that the namespace journal has yet to look at: a name in a directory (by inode number), or with
    name b"" an inode. `serial` rises with each note."""

    ino: int
    name: bytes
    serial: int


def note_serial(raw: bytes) -> int:
    """The serial of a note; -1 of a damaged one, which is looked at as any other."""
    body = whole(checked, "note", raw)
    return -1 if body is None else int(U64.unpack(body)[0])


def queued_since(ino: int, raw: bytes, dirty: Callable[[bytes], bytes | None]) -> int:
    """When (ns) the file of this record was queued as dirty; 0: it is not. `dirty` looks into that table.

    Raises IndexError_ where the record is damaged.
    """
    since = unpack_since(ino, raw)
    return since if since is not None else _in_former_queue(ino, dirty)


def _in_former_queue(ino: int, dirty: Callable[[bytes], bytes | None]) -> int:
    """When (ns) it was queued, as a table of its own says where the record is of a version that does not."""
    row = dirty(U64.pack(ino))
    body = None if row is None else whole(checked, "dirty queue", row)
    return 0 if body is None else int(U64.unpack(body)[0])


def _summed_bits(ino: int, bits: bytes) -> bytes:
    """With a CRC of the inode number too: another's bitmap would show holes as content."""
    return U32.pack(zlib.crc32(bits, zlib.crc32(U64.pack(ino)))) + bits


def checked_bits(ino: int, raw: bytes) -> bytes:
    """The bitmap. Raises IndexError_ where it is damaged, or another inode's."""
    bits = raw[U32.size :]
    if _summed_bits(ino, bits) != raw:
        raise IndexError_(f"the index's bitmap of inode {ino} is damaged: what it says is fetched again")
    return bits


def _told(record: Record) -> tuple[object, ...]:
    """What the journal tells of a record."""
    copy = record.copy
    shown = (copy.generation, copy.tag, copy.mtime, copy.ctime) if copy is not None else None
    return record.fid, record.generation, record.size, shown


class Writer(PastWriter):
    """What a function given to `commit` may do. Reads see the transaction's own writes."""

    def __init__(self, txn: Any, tables: dict[str, Any], meta: Meta) -> None:
        self._txn = txn
        self._db = tables
        self.meta = meta
        self._totals = list(self.meta.totals)

    @property
    def past(self) -> Garbage:
        """What the meta value says of garbage."""
        return self.meta.past

    @contextmanager
    def undoing(self, env: Any) -> Iterator[None]:
        """A transaction within this one (one microsecond): undone, with its sums, if the block raises."""
        outer, totals = self._txn, list(self._totals)
        meta = msgspec.structs.replace(self.meta, past=msgspec.structs.replace(self.meta.past))
        try:
            with env.begin(write=True, parent=outer) as self._txn:
                yield
        except BaseException:
            self._totals, self.meta = totals, meta
            raise
        finally:
            self._txn = outer

    def finish(self) -> None:
        """Write what was summed up. Called by the committer, once."""
        self.meta.totals = tuple(self._totals)
        self._txn.put(b"meta", summed(msgspec.msgpack.encode(self.meta)), db=self._db["meta"])

    def _count(self, record: Record, sign: int) -> None:
        stub, dirty = record.residency is Residency.STUB, record.dirty
        values = (1, int(stub), record.local, record.size, int(dirty), record.size if dirty else 0)
        for at, value in enumerate(values):
            total = self._totals[at] + sign * value
            self._totals[at] = total if total > 0 else 0

    def get(self, ino: int) -> Record | None:
        """The record of an inode; a damaged one is none, and the next mount looks through the tree."""
        return self.row(ino)[0]

    def row(self, ino: int) -> tuple[Record | None, int]:
        """A record, and when (ns) it was queued as dirty; 0: it is not, _UNKNOWN: the record is damaged."""
        raw = self._txn.get(U64.pack(ino), db=self._db["files"])
        if raw is None:
            return None, 0
        found = whole(unpack_row, ino, raw)
        if found is None:
            self.meta.surveyed = False
            return None, _UNKNOWN
        record, since = found
        return record, since if since is not None else _in_former_queue(ino, self._dirty_row)

    def _dirty_row(self, key: bytes) -> bytes | None:
        row: bytes | None = self._txn.get(key, db=self._db["dirty"])
        return row

    def _queued_since(self, ino: int, raw: bytes) -> int:
        return queued_since(ino, raw, self._dirty_row)

    def put(
        self, record: Record, touched: bool = False, row: tuple[Record | None, int] | None = None
    ) -> None:
        """Set a record; totals, the dirty queue and the file id's entry follow. Raises TransitionError.

        `touched`: it was closed only now, so that its quiet time begins again. `row`: what `row` says of it,
        where that is known.
        """
        before, since = row if row is not None else self.row(record.ino)
        transitions.check(before, record)
        if before is not None:
            self._count(before, -1)
            if before.fid != record.fid:
                self._drop_fid(before)
        self._count(record, 1)
        key = U64.pack(record.ino)
        since = self._queue(record, before, since, touched)
        self._txn.put(key, pack_record(record, since), db=self._db["files"])
        if before is None or before.fid != record.fid:
            self._txn.put(record.fid, key, db=self._db["fids"])
        if before is not None and before.dirty and (not record.dirty or before.fid != record.fid):
            self.end_rescue(before.fid)
        if before is None or _told(before) != _told(record):
            self.note(record.ino)
        if record.residency is not Residency.PARTIAL and before and before.residency is Residency.PARTIAL:
            self._txn.delete(key, db=self._db["bits"])

    def has_file(self, fid: bytes) -> bool:
        """Some inode has this file id."""
        return self._txn.get(fid, db=self._db["fids"]) is not None

    def has_copy(self, fid: bytes, generation: int) -> bool:
        """The file has a copy of this generation, or its record is damaged and does not say."""
        at = self._txn.get(fid, db=self._db["fids"])
        if at is None:
            return False
        record, since = self.row(U64.unpack(at)[0])
        if record is None:
            return since == _UNKNOWN
        return record.fid == fid and record.copy is not None and record.copy.generation == generation

    def _drop_fid(self, record: Record) -> None:
        """Unless another inode has the file id by now: a copy of a stub made behind the mount's back."""
        if self._txn.get(record.fid, db=self._db["fids"]) == U64.pack(record.ino):
            self._txn.delete(record.fid, db=self._db["fids"])

    def _queue(self, record: Record, before: Record | None, since: int, touched: bool) -> int:
        """Keep the dirty queue: a file stands in it since its content was seen to change, or it was closed.

        `since`: when it was queued; returned is the same for the record as it is now.
        """
        changed = before is None or (before.generation, before.size) != (record.generation, record.size)
        if since and record.dirty and not changed and not touched:
            self._txn.delete(U64.pack(record.ino), db=self._db["dirty"])
            return since
        self._unqueue(record.ino, since)
        return self._enqueue(record.ino) if record.dirty else 0

    def _enqueue(self, ino: int) -> int:
        since = time.time_ns()
        self._txn.put(U64X2.pack(since, ino), b"", db=self._db["quiet"])
        return since

    def _unqueue(self, ino: int, since: int) -> None:
        if not since:
            return
        rows = [U64X2.pack(since, ino)] if since != _UNKNOWN else [*self._rows_of(ino)]
        for row in rows:
            self._txn.delete(row, db=self._db["quiet"])
        self._txn.delete(U64.pack(ino), db=self._db["dirty"])

    def _rows_of(self, ino: int) -> Iterator[bytes]:
        """Its rows in the queue, by looking at all."""
        with self._txn.cursor(db=self._db["quiet"]) as cursor:
            yield from (bytes(key) for key, _ in ascending("quiet", cursor) if U64X2.unpack(key)[1] == ino)

    def recount(self, repair: bool) -> Recount:
        """Look at all records. `repair`: the sums become the counted ones, what is damaged is dropped, and the
        dirty files, no others, are queued."""
        kept, damaged, unqueued = Totals(*self._totals), [], []
        self._totals = [0] * len(self._totals)
        with self._txn.cursor(db=self._db["files"]) as cursor:
            for key, raw in ascending("files", cursor):
                ino = U64.unpack(key)[0]
                record = whole(unpack_record, ino, raw)
                if record is None:
                    damaged.append(bytes(key))
                    continue
                self._count(record, 1)
                since = self._queued_since(ino, raw)
                row = since and self._txn.get(U64X2.pack(since, ino), db=self._db["quiet"])
                if record.dirty and row != b"":
                    unqueued.append(record)
        counted = Totals(*self._totals)
        stale = list(self._stale_rows())
        if not repair:
            self._totals = [getattr(kept, name) for name in Totals.__slots__]
            return Recount(kept, counted, len(damaged), len(unqueued) + len(stale))
        for key in damaged:
            for table in ("files", "dirty"):
                self._txn.delete(key, db=self._db[table])
        for key in stale:
            self._txn.delete(key, db=self._db["quiet"])
        for record in unqueued:
            raw = pack_record(record, self._enqueue(record.ino))
            self._txn.put(U64.pack(record.ino), raw, db=self._db["files"])
        return Recount(kept, counted, len(damaged), len(unqueued) + len(stale))

    def _stale_rows(self) -> Iterator[bytes]:
        """Keys in the queue that no record of a dirty file says to be its own: what damage has left."""
        with self._txn.cursor(db=self._db["quiet"]) as cursor:
            for key, _ in ascending("quiet", cursor):
                since, ino = U64X2.unpack(key)
                record, said = self.row(ino)
                if record is None or not record.dirty or said != since:
                    yield bytes(key)

    def delete(self, ino: int, row: tuple[Record | None, int] | None = None) -> None:
        """Forget an inode; what is in the store is another matter (`bury`). `row` as in `put`."""
        before, since = row if row is not None else self.row(ino)
        key = U64.pack(ino)
        if before is not None:
            self._count(before, -1)
            self._drop_fid(before)
            self.end_rescue(before.fid)
        self._unqueue(ino, since)
        for table in ("files", "bits", "pins", "pending"):
            self._txn.delete(key, db=self._db[table])

    def put_bits(self, ino: int, bits: bytes) -> None:
        """Which leaves of a partial file are durably local, one bit each, least significant first."""
        self._txn.put(U64.pack(ino), _summed_bits(ino, bits), db=self._db["bits"])

    def put_leaves(self, fid: bytes, generation: int, digests: bytes, extents: list[tuple[int, int]]) -> None:
        """The digest list and data extents of one copy."""
        value = struct.pack("<I", len(extents)) + b"".join(struct.pack("<QQ", *e) for e in extents) + digests
        self._txn.put(fid + U64.pack(generation), summed(value), db=self._db["leaves"])

    def drop_leaves(self, fid: bytes, generation: int) -> None:
        """That copy is no more."""
        self._txn.delete(fid + U64.pack(generation), db=self._db["leaves"])

    def put_rescue(self, fid: bytes, rescue: Rescue) -> None:
        """In place of an earlier one."""
        self.end_rescue(fid)
        self._txn.put(fid, summed(msgspec.msgpack.encode(rescue)), db=self._db["rescues"])

    def end_rescue(self, fid: bytes) -> None:
        """The file has a copy, or is gone. Its object is kept as long as the journal's past may tell of it."""
        raw = self._txn.pop(fid, db=self._db["rescues"])
        rescue = None if raw is None else whole(read_rescue, fid, raw)
        if rescue is not None:
            self.bury_found(rescue.key(fid))

    def put_dir(self, ino: int, parent: int, name: bytes) -> None:
        """Where a directory was last seen."""
        self._txn.put(U64.pack(ino), summed(U64.pack(parent) + name), db=self._db["dirs"])

    def drop_dir(self, ino: int) -> None:
        """That directory is gone."""
        self._txn.delete(U64.pack(ino), db=self._db["dirs"])

    def put_pin(self, ino: int, parent: int, name: bytes) -> None:
        """List a pin; the attribute on the inode is what counts."""
        self._txn.put(U64.pack(ino), summed(U64.pack(parent) + name), db=self._db["pins"])

    def drop_pin(self, ino: int) -> None:
        """It is pinned no more."""
        self._txn.delete(U64.pack(ino), db=self._db["pins"])

    def put_pending(self, ino: int) -> None:
        """The inode is about to be punched: recovery looks at it."""
        self._txn.put(U64.pack(ino), b"", db=self._db["pending"])

    def drop_pending(self, ino: int) -> None:
        """The punch is over."""
        self._txn.delete(U64.pack(ino), db=self._db["pending"])

    # --- the namespace journal ----------------------------------------------------------------------------

    def note(self, ino: int, name: bytes = b"") -> None:
        """The journal shall look at this name in this directory, or (b"") at this inode."""
        if not self.meta.noting:
            return
        self.meta.noted += 1
        if not self.meta.noted_since:
            self.meta.noted_since = time.time_ns()
        value = summed(U64.pack(self.meta.noted))
        self._txn.put(U64.pack(ino) + name, value, db=self._db["changes"])

    def journalled(self, notes: list[Note], chain: Chain, since: int) -> None:
        """These have been looked at, at `since` (ns) or later, and what was seen is in the store."""
        for ino, name, serial in notes:
            key = U64.pack(ino) + name
            raw = self._txn.get(key, db=self._db["changes"])
            if raw is not None and note_serial(raw) == serial:
                self._txn.delete(key, db=self._db["changes"])
        left = self._txn.stat(self._db["changes"])["entries"]
        self.meta.noted_since = since if left else 0
        self.set_chain(chain)

    def begin_notes(self, on: bool) -> None:
        """Forget all notes, and note changes from now on or not."""
        self._txn.drop(self._db["changes"], delete=False)
        self.meta.noting, self.meta.noted_since = on, 0

    def set_chain(self, chain: Chain) -> None:
        """How far the journal has come."""
        self._txn.put(b"chain", summed(msgspec.msgpack.encode(chain)), db=self._db["meta"])

    def get_chain(self) -> Chain | None:
        """As set."""
        return read_chain(self._txn.get(b"chain", db=self._db["meta"]))

    def set_log_position(self, position: int) -> None:
        """All marks before this position are applied, in this very transaction."""
        self.meta.log_position = position

    def given(self, generation: int) -> None:
        """Content has been given it: the next session begins above it."""
        self.meta.newest = max(self.meta.newest, generation)

    def set_surveyed(self, done: bool) -> None:
        """Every file of the tree has a record, compared with it in the present custody epoch."""
        self.meta.surveyed, self.meta.swept = done, self.meta.custody
