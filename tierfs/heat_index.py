"""Heat in an LMDB environment of its own: rebuildable, so never synced, never shared with the durable index.

    table  key                     value
    heat   ino                     level, clock, last, shown, size, flags, order key
    score  order key, ino          size        (local files past probation; order key sorts as the score)
    queue  admission number, ino   size        (local files on probation; with _LENDING those that are lent)
    meta   "state"                 clock's bytes admitted, next admission number, bytes on probation

One thread of the mover writes, in batches; the mount server reads single entries. A former version takes what
is lent for what has come last on probation.
"""

from __future__ import annotations

import logging
import os
import shutil
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lmdb

from tierfs.datafile import keep_length
from tierfs.environment import open_tables
from tierfs.errors import IndexError_
from tierfs.policy.heat import Heat, admitted, brought, lent, score, seeded, shown_at, touched
from tierfs.policy.victims import overdue, victims

log = logging.getLogger("index")

_TABLES = ("heat", "score", "queue", "meta")
_ENTRY = struct.Struct("<dfIfQB8s")
_STATE = struct.Struct("<QQQ")
_KEY = struct.Struct(">8sQ")
_U64 = struct.Struct(">Q")
_PROBATION, _LISTED = 1, 2
_LENDING = 1 << 63  # in admission numbers: of what is lent, which is how it is known, behind all others
_PAGE = 256  # victims looked at in one transaction
_REPORTED = 15.0  # seconds: a use is known by then
_TOUCHES = 128  # files in one: pages that it changes are copied, and the file grows by the copies
_LAST = 0xFFFFFFFF


def order_key(value: float) -> bytes:
    """Eight bytes that sort as the number does (IEEE 754, sign folded)."""
    bits = struct.unpack(">Q", struct.pack(">d", value))[0]
    return _U64.pack(bits ^ (0xFFFFFFFFFFFFFFFF if bits >> 63 else 1 << 63))


class HeatIndex:
    """Thread-safe. All sizes in bytes; times in seconds of wall clock."""

    def __init__(self, path: str, capacity: int, by_bytes: bool = False, readonly: bool = False) -> None:
        """`capacity`: bytes of the local tier, the unit of the turnover clock. A damaged one is made anew."""
        self.path = path
        self.capacity = max(capacity, 1)
        self.by_bytes = by_bytes
        self._lock = threading.Lock()
        self._lent = 0  # bytes; counted at the beginning, since a former version does not keep count
        try:
            self._open(path, readonly)
        except (lmdb.Error, IndexError_) as error:
            if readonly:
                raise IndexError_(f"{path}: heat cannot be read: {error}") from error
            log.warning("heat is lost and begins anew: %s", error)
            shutil.rmtree(path, ignore_errors=True)
            os.makedirs(path, 0o700)
            self._open(path, readonly)
        if not readonly:
            self._lent = sum(size for _, size in self._walk("queue", _U64.pack(_LENDING)))

    def _open(self, path: str, readonly: bool) -> None:
        self._env, self._db = open_tables(path, _TABLES, readonly=readonly, durable=False)

    def close(self) -> None:
        """Close the environment; what the kernel has not written yet it will."""
        self._env.close()

    # --- reading ------------------------------------------------------------------------------------------

    def heat(self, ino: int, now: float | None = None) -> float:
        """The heat that people see; 0.0 of an unknown file."""
        with self._env.begin() as txn:
            found = _unpack(txn.get(_U64.pack(ino), db=self._db["heat"]))
        return shown_at(found[0], time.time() if now is None else now) if found else 0.0

    def last_use(self, ino: int) -> float | None:
        """Wall seconds of the last use; None of an unknown file."""
        heat = self.of(ino)
        return heat.last if heat is not None else None

    def of(self, ino: int) -> Heat | None:
        """All that is known of a file; None of an unknown one."""
        with self._env.begin() as txn:
            found = _unpack(txn.get(_U64.pack(ino), db=self._db["heat"]))
        return found[0] if found else None

    def victims(self, local_bytes: int, now: float | None = None) -> Iterator[int]:
        """Files in the order in which they should leave; the caller skips those that may not."""
        return victims(self, local_bytes, time.time() if now is None else now)

    def overdue(self, now: float | None = None) -> Iterator[int]:
        """Those that leave although there is room."""
        return overdue(self, self.capacity, time.time() if now is None else now)

    def by_score(self) -> Iterator[tuple[int, int]]:
        """(ino, size) of local files past probation, coldest first."""
        return self._walk("score")

    def by_admission(self) -> Iterator[tuple[int, int]]:
        """(ino, size) of local files on probation, oldest first."""
        return self._walk("queue", end=_U64.pack(_LENDING))

    def by_lending(self) -> Iterator[tuple[int, int, float]]:
        """(ino, size, wall seconds) of local files that are lent, oldest first."""
        for ino, size in self._walk("queue", _U64.pack(_LENDING)):
            heat = self.of(ino)
            yield ino, size, heat.last if heat is not None else 0.0

    def lent_bytes(self) -> int:
        """What those hold together that are lent."""
        return self._lent

    def probation_bytes(self) -> int:
        """What the files on probation hold together."""
        with self._env.begin() as txn:
            return int(self._state(txn)[2])

    def _walk(self, table: str, start: bytes = b"", end: bytes = b"\xff" * 17) -> Iterator[tuple[int, int]]:
        """From key `start` to `end`, in pages, each a short transaction: one held open would keep old pages
        alive."""
        while True:
            with self._env.begin() as txn, txn.cursor(db=self._db[table]) as cursor:
                rows = []
                if cursor.set_range(start):
                    for key, value in cursor:
                        if key >= end:
                            break
                        rows.append((bytes(key), bytes(value)))
                        if len(rows) >= _PAGE:
                            break
            for key, value in rows:
                yield _KEY.unpack(key)[1], _U64.unpack(value)[0]
            if len(rows) < _PAGE:
                return
            start = rows[-1][0] + b"\0"

    def _state(self, txn: Any) -> tuple[int, int, int]:
        raw = txn.get(b"state", db=self._db["meta"])
        volume, number, probation = _STATE.unpack(raw) if raw is not None else (0, 0, 0)
        return volume, number, probation

    # --- writing ------------------------------------------------------------------------------------------

    def touch_many(self, uses: Iterable[tuple[int, int, int]], now: float | None = None) -> None:
        """(ino, count, size) of files that were used."""
        moment = time.time() if now is None else now
        ordered = sorted(uses)
        for start in range(0, len(ordered), _TOUCHES):
            with self._batch() as batch:
                for ino, count, size in ordered[start : start + _TOUCHES]:
                    heat, queued = batch.get(ino)
                    here = bool(queued)
                    if heat and heat.lent and here:
                        batch.volume += heat.size  # this is when it is admitted
                    batch.put(ino, touched(heat or Heat(), batch.clock, moment, count, size, here), here)

    def admit(self, ino: int, size: int, grown: int, now: float | None = None) -> None:
        """The file is local now with `size` bytes, `grown` of them new: the clock moves on by that."""
        self.admit_many([(ino, size, grown)], now)

    def admit_many(
        self, files: Iterable[tuple[int, int, int]], now: float | None = None, unused: Set[int] = frozenset()
    ) -> None:
        """As `admit`, for many (ino, size, grown) in one transaction. `unused`: nobody has asked for these."""
        moment = time.time() if now is None else now
        with self._batch() as batch:
            for ino, size, grown in files:
                batch.volume += max(grown, 0)
                heat, queued = batch.get(ino)
                known = heat is not None and bool(queued) and not heat.lent
                if heat is not None and known:
                    new = replace(heat, size=size)
                elif ino in unused:
                    new = brought(heat, size)
                else:
                    new = admitted(heat, batch.clock, moment, size)
                batch.put(ino, new, True)

    def lend_many(self, files: Iterable[tuple[int, int]], now: float | None = None) -> None:
        """(ino, size) of files that a scan has brought in. The clock stands still, and what was here stays what
        it was."""
        moment = time.time() if now is None else now
        with self._batch() as batch:
            for ino, size in files:
                heat, queued = batch.get(ino)
                if heat is None or not queued or heat.lent:
                    batch.put(ino, lent(heat, moment, size), True)
                else:
                    batch.put(ino, replace(heat, size=size), True)

    def lend_known(self, files: Iterable[tuple[int, float]], now: float | None = None) -> None:
        """(ino, seconds ago) of files that have turned out to have been brought in by a scan then: those that
        nobody has used since are lent."""
        moment = time.time() if now is None else now
        with self._batch() as batch:
            for ino, age in files:
                heat, queued = batch.get(ino)
                if heat is not None and queued and heat.last <= moment - age + _REPORTED:
                    batch.put(ino, lent(heat, moment, heat.size), True)

    def seed_many(self, files: Iterable[tuple[int, int, float]], now: float | None = None) -> None:
        """(ino, size, seconds since last use) of files found in an adopted tree; known ones are left alone."""
        moment = time.time() if now is None else now
        with self._batch() as batch:
            for ino, size, age in files:
                heat, _ = batch.get(ino)
                if heat is None:
                    batch.put(ino, seeded(age, batch.clock, moment, size), True)

    def left(self, inos: Iterable[int]) -> None:
        """These are local no more: they keep their heat and leave the queues."""
        with self._batch() as batch:
            for ino in inos:
                heat, _ = batch.get(ino)
                if heat is not None:
                    batch.put(ino, heat, False)

    def forget(self, inos: Iterable[int]) -> None:
        """These files are gone."""
        with self._batch() as batch:
            for ino in inos:
                batch.drop(ino)

    @contextmanager
    def _batch(self) -> Iterator[_Batch]:
        try:
            with self._lock:
                with self._env.begin(write=True) as txn:
                    batch = _Batch(self, txn)
                    yield batch
                    batch.finish()
                self._lent = batch.lent
        except lmdb.Error as error:
            raise IndexError_(f"heat cannot be written: {error}") from error
        keep_length(self._env, self.path)


class _Batch:
    """One write transaction over heat and both queues."""

    def __init__(self, index: HeatIndex, txn: Any) -> None:
        self._index = index
        self._txn = txn
        self._db = index._db
        self.volume, self._number, self._probation = index._state(txn)
        self.lent = index._lent

    @property
    def clock(self) -> float:
        """V, in turnovers."""
        return self.volume / self._index.capacity

    def get(self, ino: int) -> tuple[Heat | None, bytes]:
        """A file's heat, and the key under which it is queued (empty: it is not)."""
        found = _unpack(self._txn.get(_U64.pack(ino), db=self._db["heat"]))
        return found if found else (None, b"")

    def put(self, ino: int, heat: Heat, local: bool) -> None:
        """Set a file's heat and its place in the queues."""
        before, queued = self.get(ino)
        key = b""
        if local and heat.probation:
            same = before is not None and before.probation and before.lent == heat.lent
            key = queued if queued and same else self._next_number(_LENDING if heat.lent else 0)
        elif local:
            key = order_key(score(heat, self._index.by_bytes))
        self._unqueue(ino, before, queued)
        if key:
            table = "queue" if heat.probation else "score"
            self._txn.put(_KEY.pack(key, ino), _U64.pack(heat.size), db=self._db[table])
            self._count(heat, heat.size)
        self._txn.put(_U64.pack(ino), _pack(heat, key), db=self._db["heat"])

    def drop(self, ino: int) -> None:
        """Forget a file."""
        before, queued = self.get(ino)
        self._unqueue(ino, before, queued)
        self._txn.delete(_U64.pack(ino), db=self._db["heat"])

    def _next_number(self, kind: int) -> bytes:
        self._number += 1
        return _U64.pack(kind | self._number)

    def _count(self, heat: Heat, size: int) -> None:
        if heat.lent:
            self.lent = max(0, self.lent + size)
        elif heat.probation:
            self._probation = max(0, self._probation + size)

    def _unqueue(self, ino: int, before: Heat | None, queued: bytes) -> None:
        if before is None or not queued:
            return
        table = "queue" if before.probation else "score"
        if self._txn.delete(_KEY.pack(queued, ino), db=self._db[table]):
            self._count(before, -before.size)

    def finish(self) -> None:
        """Write the state behind the tables."""
        self._txn.put(b"state", _STATE.pack(self.volume, self._number, self._probation), db=self._db["meta"])


def _pack(heat: Heat, key: bytes) -> bytes:
    flags = (_PROBATION if heat.probation else 0) | (_LISTED if key else 0)
    last = min(max(int(heat.last), 0), _LAST)
    return _ENTRY.pack(heat.level, heat.clock, last, min(heat.shown, 1e30), heat.size, flags, key)


def _unpack(raw: bytes | None) -> tuple[Heat, bytes] | None:
    if raw is None or len(raw) != _ENTRY.size:
        return None
    level, clock, last, shown, size, flags, key = _ENTRY.unpack(raw)
    waits, listed = bool(flags & _PROBATION), bool(flags & _LISTED)
    lent = waits and listed and _U64.unpack(key)[0] >= _LENDING
    return Heat(level, clock, last, shown, size, waits, lent), key if listed else b""
