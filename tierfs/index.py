"""The durable index in LMDB: what is known of each file. The mover alone writes, the mount server reads.

    table   key                      value                  written by           resolved (removed) by
    meta    name                     see _META              begin/end_session    never
    files   ino                      codec.Record           marks, tier          GONE mark, survey
    fids    file id                  ino                    put, with files      delete, with files
    bits    ino                      leaf bitmap            filling              settling, a new copy
    leaves  file id, generation      digests and extents    copying              collection of that copy
    dirty   ino                      since ns               put, with files      put with a copy, delete
    quiet   since ns, ino            (empty)                with dirty           with dirty
    tombs   since ns, object key     file handle            bury                 collection, after the grace
    pins    ino                      parent, name           PIN mark             PIN mark, GONE mark
    dirs    ino                      parent, name           DIR mark, survey     a later hint
    pending ino                      (empty)                before a punch       after it; else by recovery

Integers are big-endian, so that keys sort. Every value but the empty ones carries a CRC: LMDB has none, and a
flipped value would come back silently. A truncated file would kill the process at its first touch, so the size
is compared with the last page in use before anything is read.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import lmdb
import msgspec

from tierfs.codec import pack_record, unpack_record
from tierfs.errors import IndexError_
from tierfs.model import Record, Residency, object_key

log = logging.getLogger("index")

R = TypeVar("R")
FORMAT = 1
MAP_SIZE = 64 << 30  # virtual; the file grows as it is used
BATCH = 512  # commits that share one sync
_TABLES = ("meta", "files", "fids", "bits", "leaves", "dirty", "quiet", "tombs", "pins", "dirs", "pending")
_U64 = struct.Struct(">Q")
_U64X2 = struct.Struct(">QQ")
_CRC = struct.Struct("<I")


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


@dataclass(frozen=True, slots=True)
class Session:
    """This mount's epoch (generations begin anew in it) and the custody epoch in which proofs are made."""

    epoch: int
    custody: int


class _Meta(msgspec.Struct):
    """The one value of `meta`. `clean`: the last session ended in order."""

    format: int = FORMAT
    epoch: int = 0
    custody: int = 0
    boot: str = ""
    clean: bool = True
    log_position: int | None = None
    totals: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
    surveyed: bool = False
    swept: int = -1


def _sum(value: bytes) -> bytes:
    return _CRC.pack(zlib.crc32(value)) + value


def _checked(what: str, raw: bytes) -> bytes:
    if len(raw) < _CRC.size or zlib.crc32(raw[_CRC.size :]) != _CRC.unpack_from(raw)[0]:
        raise IndexError_(f"the index's {what} is damaged: run `tierfs check --repair`")
    return raw[_CRC.size :]


def _place(what: str, raw: bytes) -> tuple[int, bytes]:
    body = _checked(what, raw)
    return _U64.unpack_from(body)[0], body[_U64.size :]


def check_size(path: str) -> None:
    """Raises IndexError_ where the data file is shorter than its newest meta page says."""
    file = os.path.join(path, "data.mdb")
    try:
        size = os.path.getsize(file)
        with open(file, "rb") as opened:
            head = opened.read(2 * 4096)
    except FileNotFoundError:
        return
    if size == 0:
        return
    # LMDB's meta pages: 16 bytes of page header, then magic, version, address, map size, two databases of 48
    # bytes (the first four bytes of the first are the page size), last page, transaction (lmdb's mdb.c).
    page = struct.unpack_from("<I", head, 16 + 24)[0] if len(head) >= 4096 else 0
    if len(head) < 8192 or page < 512:
        raise IndexError_(f"{file} is cut short or no index: run `tierfs check --repair`")
    newest, last_page = -1, 0
    for at in (0, page):
        with open(file, "rb") as opened:
            opened.seek(at)
            meta = opened.read(256)
        magic = struct.unpack_from("<I", meta, 16)[0]
        last, txn = struct.unpack_from("<QQ", meta, 16 + 24 + 96)
        if magic == 0xBEEFC0DE and txn > newest:
            newest, last_page = txn, last
    if newest < 0 or size < (last_page + 1) * page:
        raise IndexError_(f"{file} is cut short: run `tierfs check --repair`")


class Writer:
    """What a function given to `commit` may do. Reads see the transaction's own writes."""

    def __init__(self, index: Index, txn: Any) -> None:
        self._index = index
        self._txn = txn
        self._db = index.tables
        self.meta = index.read_meta(txn)
        self._totals = list(self.meta.totals)

    def finish(self) -> None:
        """Write what was summed up. Called by the committer, once."""
        self.meta.totals = tuple(self._totals)
        self._txn.put(b"meta", _sum(msgspec.msgpack.encode(self.meta)), db=self._db["meta"])

    def _count(self, record: Record, sign: int) -> None:
        stub, dirty = record.residency is Residency.STUB, record.dirty
        values = (1, int(stub), record.local, record.size, int(dirty), record.size if dirty else 0)
        for at, value in enumerate(values):
            self._totals[at] = max(0, self._totals[at] + sign * value)

    def get(self, ino: int) -> Record | None:
        """The record of an inode. Raises IndexError_."""
        raw = self._txn.get(_U64.pack(ino), db=self._db["files"])
        return None if raw is None else unpack_record(ino, raw)

    def put(self, record: Record) -> None:
        """Set a record; totals, the dirty queue and the file id's entry follow."""
        before = self._before(record.ino)
        if before is not None:
            self._count(before, -1)
            if before.fid != record.fid:
                self._txn.delete(before.fid, db=self._db["fids"])
        self._count(record, 1)
        key = _U64.pack(record.ino)
        self._txn.put(key, pack_record(record), db=self._db["files"])
        if before is None or before.fid != record.fid:
            self._txn.put(record.fid, key, db=self._db["fids"])
        self._queue(record, before)
        if record.residency is not Residency.PARTIAL and before and before.residency is Residency.PARTIAL:
            self._txn.delete(key, db=self._db["bits"])

    def _before(self, ino: int) -> Record | None:
        try:
            return self.get(ino)
        except IndexError_ as error:
            # A damaged record is replaced by what is known now; totals are put right by a check.
            log.error("replacing a damaged record: %s", error)
            return None

    def _queue(self, record: Record, before: Record | None) -> None:
        """Keep the dirty queue: a file stands in it since its content was last seen to change."""
        changed = before is None or (before.generation, before.size) != (record.generation, record.size)
        if record.dirty and not changed and self._dirty_since(record.ino) is not None:
            return
        self._unqueue(record.ino)
        if record.dirty:
            since = time.time_ns()
            self._txn.put(_U64.pack(record.ino), _sum(_U64.pack(since)), db=self._db["dirty"])
            self._txn.put(_U64X2.pack(since, record.ino), b"", db=self._db["quiet"])

    def touch_dirty(self, ino: int) -> None:
        """The file was closed only now: its quiet time begins again."""
        if self._dirty_since(ino) is None:
            return
        self._unqueue(ino)
        since = time.time_ns()
        self._txn.put(_U64.pack(ino), _sum(_U64.pack(since)), db=self._db["dirty"])
        self._txn.put(_U64X2.pack(since, ino), b"", db=self._db["quiet"])

    def _dirty_since(self, ino: int) -> int | None:
        raw = self._txn.get(_U64.pack(ino), db=self._db["dirty"])
        return None if raw is None else int(_U64.unpack(_checked("dirty queue", raw))[0])

    def _unqueue(self, ino: int) -> None:
        since = self._dirty_since(ino)
        if since is not None:
            self._txn.delete(_U64.pack(ino), db=self._db["dirty"])
            self._txn.delete(_U64X2.pack(since, ino), db=self._db["quiet"])

    def delete(self, ino: int) -> None:
        """Forget an inode; what is in the store is another matter (`bury`)."""
        before = self._before(ino)
        key = _U64.pack(ino)
        if before is not None:
            self._count(before, -1)
            self._txn.delete(before.fid, db=self._db["fids"])
        self._unqueue(ino)
        for table in ("files", "bits", "pins", "pending"):
            self._txn.delete(key, db=self._db[table])

    def put_bits(self, ino: int, bits: bytes) -> None:
        """Which leaves of a partial file are durably local, one bit each, least significant first."""
        self._txn.put(_U64.pack(ino), _sum(bits), db=self._db["bits"])

    def put_leaves(self, fid: bytes, generation: int, digests: bytes, extents: list[tuple[int, int]]) -> None:
        """The digest list and data extents of one copy."""
        value = struct.pack("<I", len(extents)) + b"".join(struct.pack("<QQ", *e) for e in extents) + digests
        self._txn.put(fid + _U64.pack(generation), _sum(value), db=self._db["leaves"])

    def drop_leaves(self, fid: bytes, generation: int) -> None:
        """That copy is no more."""
        self._txn.delete(fid + _U64.pack(generation), db=self._db["leaves"])

    def bury(self, record: Record, when: int) -> None:
        """The record's copy is not referenced any more since `when` (ns): collect it after the grace time."""
        if record.copy is None:
            return
        key = object_key(record.fid, record.copy.generation, record.copy.tag)
        self._txn.put(_U64.pack(when) + key.encode(), record.handle, db=self._db["tombs"])

    def drop_tombstone(self, when: int, key: str) -> None:
        """That object is gone from the store."""
        self._txn.delete(_U64.pack(when) + key.encode(), db=self._db["tombs"])

    def put_dir(self, ino: int, parent: int, name: bytes) -> None:
        """Where a directory was last seen."""
        self._txn.put(_U64.pack(ino), _sum(_U64.pack(parent) + name), db=self._db["dirs"])

    def drop_dir(self, ino: int) -> None:
        """That directory is gone."""
        self._txn.delete(_U64.pack(ino), db=self._db["dirs"])

    def put_pin(self, ino: int, parent: int, name: bytes) -> None:
        """List a pin; the attribute on the inode is what counts."""
        self._txn.put(_U64.pack(ino), _sum(_U64.pack(parent) + name), db=self._db["pins"])

    def drop_pin(self, ino: int) -> None:
        """It is pinned no more."""
        self._txn.delete(_U64.pack(ino), db=self._db["pins"])

    def put_pending(self, ino: int) -> None:
        """The inode is about to be punched: recovery looks at it."""
        self._txn.put(_U64.pack(ino), b"", db=self._db["pending"])

    def drop_pending(self, ino: int) -> None:
        """The punch is over."""
        self._txn.delete(_U64.pack(ino), db=self._db["pending"])

    def set_log_position(self, position: int) -> None:
        """All marks before this position are applied, in this very transaction."""
        self.meta.log_position = position

    def set_surveyed(self, done: bool) -> None:
        """Every file of the tree has a record, compared with it in the present custody epoch."""
        self.meta.surveyed, self.meta.swept = done, self.meta.custody


@dataclass(slots=True)
class _Job:
    run: Callable[[Writer], Any]
    future: Future[Any]


class Index:
    """One process's view of the index. Reads are thread-safe; writes go through `commit`."""

    def __init__(self, path: str, env: Any, tables: dict[str, Any], readonly: bool) -> None:
        """Use `Index.open`."""
        self.path = path
        self.tables = tables
        self._env = env
        self._readonly = readonly
        self._wake = threading.Condition()
        self._jobs: list[_Job] = []
        self._closed = False
        self._committer: threading.Thread | None = None

    @classmethod
    def open(cls, path: str, readonly: bool = False) -> Index:
        """Open the environment in directory `path`, making it unless `readonly`; once a process, after fork.

        Raises IndexError_ where it is damaged or of an unknown format.
        """
        check_size(path)
        try:
            env = lmdb.open(
                path, map_size=MAP_SIZE, max_dbs=len(_TABLES), readonly=readonly, create=not readonly,
                max_readers=64, metasync=True, sync=True, readahead=False,
            )  # fmt: skip
            tables = {name: env.open_db(name.encode(), create=not readonly) for name in _TABLES}
        except lmdb.Error as exc:
            raise IndexError_(f"{path}: the index does not open: {exc}: run `tierfs check --repair`") from exc
        index = cls(path, env, tables, readonly)
        with env.begin() as txn:
            found = index.read_meta(txn).format
        if found != FORMAT:
            raise IndexError_(f"{path}: the index has format {found}, this version reads {FORMAT}")
        return index

    def close(self) -> None:
        """Finish what was submitted and close."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._committer is not None:
            self._committer.join()
        self._env.close()

    # --- reading ------------------------------------------------------------------------------------------

    def _get(self, table: str, key: bytes) -> bytes | None:
        # A transaction for each look: the binding keeps spare ones, and one left open would hold old pages.
        with self._env.begin() as txn:
            value: bytes | None = txn.get(key, db=self.tables[table])
        return value

    def get(self, ino: int) -> Record | None:
        """The record of an inode. Raises IndexError_."""
        raw = self._get("files", _U64.pack(ino))
        return None if raw is None else unpack_record(ino, raw)

    def get_by_fid(self, fid: bytes) -> Record | None:
        """The record of a file id. Raises IndexError_."""
        raw = self._get("fids", fid)
        return None if raw is None else self.get(_U64.unpack(raw)[0])

    def get_bits(self, ino: int) -> bytes | None:
        """The leaf bitmap of a partial file. Raises IndexError_."""
        raw = self._get("bits", _U64.pack(ino))
        return None if raw is None else _checked(f"bitmap of inode {ino}", raw)

    def get_leaves(self, fid: bytes, generation: int) -> Leaves | None:
        """Digests and extents of one copy. Raises IndexError_."""
        raw = self._get("leaves", fid + _U64.pack(generation))
        if raw is None:
            return None
        body = _checked(f"digests of file {fid.hex()}", raw)
        count = struct.unpack_from("<I", body)[0]
        extents = [struct.unpack_from("<QQ", body, 4 + 16 * i) for i in range(count)]
        return Leaves(body[4 + 16 * count :], [(start, end) for start, end in extents])

    def get_dir(self, ino: int) -> tuple[int, bytes] | None:
        """Parent and name under which a directory was last seen. Raises IndexError_."""
        raw = self._get("dirs", _U64.pack(ino))
        return None if raw is None else _place(f"directory {ino}", raw)

    def read_meta(self, txn: Any) -> _Meta:
        """The meta value as this transaction sees it. Raises IndexError_."""
        raw = txn.get(b"meta", db=self.tables["meta"])
        if raw is None:
            return _Meta()
        return msgspec.msgpack.decode(_checked("meta value", raw), type=_Meta)

    def _meta(self) -> _Meta:
        raw = self._get("meta", b"meta")
        return _Meta() if raw is None else msgspec.msgpack.decode(_checked("meta value", raw), type=_Meta)

    def log_position(self) -> int | None:
        """Where to go on reading the mark log; None: it has never been read."""
        return self._meta().log_position

    @property
    def session(self) -> Session:
        """The present session."""
        meta = self._meta()
        return Session(meta.epoch, meta.custody)

    @property
    def surveyed(self) -> bool:
        """Every file of the tree has a record, compared with it in the present custody epoch."""
        meta = self._meta()
        return meta.surveyed and meta.swept == meta.custody

    def totals(self) -> Totals:
        """Sums over all records."""
        return Totals(*self._meta().totals)

    def _scan(self, table: str, start: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        with self._env.begin() as txn, txn.cursor(db=self.tables[table]) as cursor:
            if not cursor.set_range(start):
                return []
            found = []
            for item in cursor:
                found.append(item)
                if len(found) >= limit:
                    break
            return found

    def quiet(self, before_ns: int, limit: int = 256) -> list[int]:
        """Dirty files unchanged since before this time, longest first."""
        rows = [_U64X2.unpack(key) for key, _ in self._scan("quiet", b"", limit)]
        return [ino for since, ino in rows if since < before_ns]

    def oldest_dirty(self) -> int | None:
        """Since when (ns) the longest waiting dirty file is dirty."""
        rows = self._scan("quiet", b"", 1)
        return int(_U64X2.unpack(rows[0][0])[0]) if rows else None

    def tombstones(self, before_ns: int, limit: int = 1000) -> list[tuple[int, str]]:
        """(since ns, object key) of what may be collected, oldest first."""
        rows = [(_U64.unpack_from(key)[0], key[8:].decode()) for key, _ in self._scan("tombs", b"", limit)]
        return [(when, key) for when, key in rows if when < before_ns]

    def tombstone_handle(self, when: int, key: str) -> bytes:
        """The file handle that a buried object's file had."""
        return self._get("tombs", _U64.pack(when) + key.encode()) or b""

    def pending(self) -> list[int]:
        """Inodes whose punch was under way."""
        return [_U64.unpack(key)[0] for key, _ in self._scan("pending", b"", 1 << 20)]

    def pins(self) -> list[tuple[int, int, bytes]]:
        """(inode, parent, name) of everything pinned itself. Raises IndexError_."""
        return [(_U64.unpack(key)[0], *_place("pin", raw)) for key, raw in self._scan("pins", b"", 1 << 20)]

    def records(self, start: int = 0, limit: int = 1000) -> Iterator[Record]:
        """Records from inode `start` on, in order: for checks and background sweeps. Raises IndexError_."""
        for key, raw in self._scan("files", _U64.pack(start), limit):
            yield unpack_record(_U64.unpack(key)[0], raw)

    # --- writing ------------------------------------------------------------------------------------------

    def commit(self, run: Callable[[Writer], R]) -> Future[R]:
        """Run this in a synced transaction that it shares with others; its result is there once durable.

        One that raises must have written nothing before: its exception goes into its future, and the others
        are committed. Raises IndexError_ once closed.
        """
        future: Future[R] = Future()
        with self._wake:
            if self._closed or self._readonly:
                raise IndexError_("the index is closed")
            if self._committer is None:
                self._committer = threading.Thread(target=self._run_committer, name="index", daemon=True)
                self._committer.start()
            self._jobs.append(_Job(run, future))
            self._wake.notify()
        return future

    @contextmanager
    def write(self) -> Iterator[Writer]:
        """One synced transaction of the caller's own; nothing is written if the block raises."""
        try:
            with self._env.begin(write=True) as txn:
                writer = Writer(self, txn)
                yield writer
                writer.finish()
        except lmdb.Error as exc:
            raise IndexError_(f"{self.path}: the index cannot be written: {exc}") from exc

    def _run_committer(self) -> None:
        while True:
            with self._wake:
                while not self._jobs and not self._closed:
                    self._wake.wait()
                if not self._jobs:
                    return
                batch, self._jobs = self._jobs[:BATCH], self._jobs[BATCH:]
            self._commit_batch(batch)

    def _commit_batch(self, batch: list[_Job]) -> None:
        done: list[tuple[_Job, Any]] = []
        failed: list[tuple[_Job, BaseException]] = []
        try:
            with self.write() as writer:
                for job in batch:
                    try:
                        done.append((job, job.run(writer)))
                    except lmdb.Error:
                        raise
                    except Exception as error:
                        failed.append((job, error))
        except Exception as error:
            for job in batch:
                job.future.set_exception(error)
            return
        for job, result in done:
            job.future.set_result(result)
        for job, problem in failed:
            job.future.set_exception(problem)

    # --- sessions -----------------------------------------------------------------------------------------

    def begin_session(self, boot: str, floor: int = 0) -> Session:
        """A new epoch above `floor`, durably. Custody goes on after an orderly end, or within one boot.

        Otherwise writes may have been lost with their marks: the custody epoch rises, and every proof of the
        earlier one needs the local bytes hashed again.
        """
        with self.write() as writer:
            meta = writer.meta
            if not meta.clean and meta.boot != boot:
                meta.custody += 1
            meta.epoch, meta.boot, meta.clean = max(meta.epoch, floor) + 1, boot, False
            return Session(meta.epoch, meta.custody)

    def end_session(self) -> None:
        """The volume was unmounted in order, with no handle left."""
        with self.write() as writer:
            writer.meta.clean = True

    def break_custody(self) -> int:
        """Trust no earlier proof (the index was rebuilt, the tree restored). Returns the new custody epoch."""
        with self.write() as writer:
            writer.meta.custody += 1
            return writer.meta.custody
