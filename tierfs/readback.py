"""Copies read back from the store and compared with their digests: `tierfs check --read-data` and the scrub.

A pass goes through the index in the order of inode numbers. Its place (in a large file: which byte) and what it
has found damaged stand in a file of the state directory, written every few seconds, so that a pass which was
cut short goes on there. A file that is changed, made or removed meanwhile is read as it is when its turn comes.

What does not match is read once more before it is believed, and a finding counts only while the store is ours
and the file still has that copy: a disk of the network that is not mounted has lost nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial

import msgspec

from tierfs.digests import SIDE_SUFFIX, have_digests, leaf_digests, unpack_side
from tierfs.errors import ObjectArchivedError, ObjectCorruptError, ObjectMissingError
from tierfs.index import Writer
from tierfs.kit import Kit
from tierfs.model import DOUBTED, LEAF, Record, Residency, Stub, leaf_count
from tierfs.places import Places, join
from tierfs.volume import write_json

_PIECE = 4 << 20  # bytes of one request
_SMALL = 1 << 20  # up to this size files are read several at a time
_BATCH = 64
_SAVE_SECONDS = 5.0
_MOST_BAD = 1000  # kept by name
_LOOK_SECONDS = 0.1
_CLAIM_SECONDS = 5.0  # a fetch that is just settling
ARCHIVED = "its object is in the provider's archive, where it cannot be read before it is restored"


class StoppedError(Exception):
    """Whoever wanted this read wants it no more."""


@dataclass(frozen=True, slots=True)
class Ref:
    """Which object, and what it should be."""

    key: str
    size: int
    digest: bytes
    chunk_shift: int

    @classmethod
    def of_stub(cls, stub: Stub, size: int) -> Ref:
        """The object that a stub of this size stands for."""
        return cls(stub.key, size, stub.digest, stub.chunk_shift)

    @classmethod
    def of_record(cls, record: Record | None) -> Ref | None:
        """The copy of a file's present content, if it has one."""
        if record is None or record.copy is None or record.dirty:
            return None
        return cls.of_stub(Stub.of(record.fid, record.copy), record.copy.size)


class Pace:
    """At most `rate()` bytes a second (0: no limit), and none while `yields()`: somebody waits for a file."""

    def __init__(
        self, rate: Callable[[], float], stop: threading.Event, yields: Callable[[], bool] = lambda: False
    ) -> None:
        self._rate = rate
        self._stop = stop
        self._yields = yields
        self._lock = threading.Lock()
        self._free_at = 0.0

    def spend(self, count: int) -> None:
        """Before so many bytes are read: wait for their turn. Raises StoppedError."""
        rate = self._rate()
        with self._lock:
            turn = max(self._free_at, time.monotonic())
            self._free_at = turn + (count / rate if rate else 0.0)
        while (left := turn - time.monotonic()) > 0 or self._yields():
            if self._stop.wait(min(left, 1.0) if left > 0 else _LOOK_SECONDS):
                break
        if self._stop.is_set():
            raise StoppedError


def examine(kit: Kit, ref: Ref, pace: Pace, start: int = 0, passed: Callable[[int], None] | None = None) -> str:
    """What is wrong with an object, "" if nothing. `passed` is told up to which byte all is well.

    `start`: from there on, where the file is larger than a chunk. Raises StoppedError, and StoreError where the
    store gives no answer.
    """
    with kit.in_use.holding(ref.key):
        return _look(kit, ref, pace, start, passed) and _look(kit, ref, pace, start, None)


def presence(kit: Kit, ref: Ref) -> str:
    """What is wrong with an object as far as can be told unread, "" if nothing. Raises StoreError."""
    try:
        size = kit.store.head(ref.key).size
    except ObjectMissingError:
        return "its object is not in the store"
    if size != ref.size:
        return f"its object has {size} bytes instead of {ref.size}"
    try:
        if ref.size > 1 << ref.chunk_shift:
            kit.store.head(ref.key + SIDE_SUFFIX)
    except ObjectMissingError:
        return "the list of its digests is not in the store"
    return ""


def _look(kit: Kit, ref: Ref, pace: Pace, start: int, passed: Callable[[int], None] | None) -> str:
    problem = presence(kit, ref)
    if problem:
        return problem
    try:
        wrong = _wrong_at(kit, ref, pace, start, passed or (lambda at: None))
    except ObjectArchivedError:
        return ARCHIVED
    except ObjectMissingError:
        return "its object is not in the store"
    except ObjectCorruptError as error:
        return f"its object is damaged ({error})"
    return "" if wrong is None else f"its object does not have the recorded digest (at byte {wrong})"


def _wrong_at(kit: Kit, ref: Ref, pace: Pace, start: int, passed: Callable[[int], None]) -> int | None:
    """Where content does not match, as near as the digests tell."""
    large = ref.size > 1 << ref.chunk_shift
    digests, whole = b"", hashlib.sha256()
    if large:
        digests, _ = unpack_side(kit.store.get(ref.key + SIDE_SUFFIX), ref.size, ref.digest)
    at = start if large else 0
    while at < ref.size:
        count = min(_PIECE, ref.size - at)
        pace.spend(count)
        data = kit.store.get(ref.key, at, count)
        if large:
            found, wanted = leaf_digests(data), digests[at // LEAF * 32 :][: leaf_count(count) * 32]
            if found != wanted and not have_digests(data, wanted):
                leaves = (i for i in range(0, len(wanted), 32) if found[i : i + 32] != wanted[i : i + 32])
                return at + next(leaves) // 32 * LEAF
        else:
            whole.update(data)
        at += count
        passed(at)
    return 0 if not large and whole.digest() != ref.digest else None


def drop_copy(kit: Kit, record: Record) -> bool:
    """A resident file's copy is of no use: without one it is dirty, and goes out again. Whether that was done.

    The object is kept as a former version is: it may be the reading that was wrong.
    """
    if kit.withheld or record.residency is not Residency.RESIDENT:
        return False
    if not kit.claims.take(record.ino, _CLAIM_SECONDS):
        return False
    try:
        return kit.index.commit(partial(_drop, record)).result()
    finally:
        kit.claims.give(record.ino)


def doubt_copy(kit: Kit, record: Record) -> None:
    """This copy is not to be believed any more: what is here of its content stays, and before all of it may
    leave the disk it is copied out anew. Nothing else changes. Raises IndexError_."""
    kit.index.commit(partial(_doubt, record)).result()


def _doubt(before: Record, w: Writer) -> None:
    record = w.get(before.ino)
    if record is None or record.copy is None or before.copy is None:
        return
    # The object, not the tuple: times may have been set meanwhile, and content that is only being opened for
    # writing may be compared with this copy later.
    was, is_ = ((r.fid, c.generation, c.tag) for r, c in ((before, before.copy), (record, record.copy)))
    if was == is_ and record.copy.custody != DOUBTED:
        w.put(replace(record, copy=replace(record.copy, custody=DOUBTED)))


def _drop(before: Record, w: Writer) -> bool:
    record = w.get(before.ino)
    if record is None or record.copy != before.copy or record.residency is not Residency.RESIDENT:
        return False
    ref = Ref.of_record(record)
    if ref is None:
        return False
    w.put(replace(record, copy=None, left_ctime=0))
    w.bury_found(ref.key)
    return True


# --- a pass -----------------------------------------------------------------------------------------------


class Bad(msgspec.Struct, frozen=True):
    """A copy that cannot be had back, of a file that is not all here."""

    ino: int
    key: str
    what: str
    path: bytes
    at: float


class Place(msgspec.Struct):
    """How far a pass has come. Moments in seconds since the epoch; `ended` 0: it has not.

    `ino` and `offset`: what is read next. `files` and `bytes`: read so far. `bad`: at most 1,000 of the `lost`,
    by name.
    """

    began: float = 0.0
    saved: float = 0.0
    ended: float = 0.0
    ino: int = 0
    offset: int = 0
    files: int = 0
    bytes: int = 0
    lost: int = 0
    bad: list[Bad] = []


def load_place(path: str) -> Place | None:
    """What was saved there; None where there is nothing, or nothing that can be read: a pass begins anew."""
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(), type=Place)
    except (OSError, msgspec.MsgspecError):
        return None


@dataclass(frozen=True, slots=True)
class Finding:
    """A damaged copy, or (`archived`) one that cannot be read.

    `repaired`: its file is all here, and will be copied out again.
    """

    what: str
    path: bytes
    repaired: bool
    archived: bool = False


class Pass:
    """Reads all copies, from `place` on. A bad copy of a resident file is not believed any more.

    `repair`: it is dropped, so that the file goes out again by itself.
    """

    def __init__(
        self,
        kit: Kit,
        places: Places,
        drain: Callable[[], int],
        path: str,
        place: Place,
        pace: Pace,
        *,
        repair: bool,
        workers: int = 1,
        known: frozenset[str] = frozenset(),
    ) -> None:
        """`path`: the file that keeps the place. `known`: keys of objects that need no look."""
        self.place = place
        self._kit = kit
        self._places = places
        self._drain = drain
        self._path = path
        self._pace = pace
        self._repair = repair
        self._workers = workers
        self._known = set(known)
        self._lock = threading.Lock()
        self._next_save = 0.0

    def run(self, report: Callable[[Place, bytes], None] = lambda place, name: None) -> Iterator[Finding]:
        """Read on to the end, giving what is found; `place.ended` says whether that was reached.

        Raises StoreError, IndexError_ and OSError where that cannot be; the place is kept.
        """
        try:
            with ThreadPoolExecutor(self._workers, "readback") as pool, contextlib.suppress(StoppedError):
                yield from self._again()
                while batch := list(self._kit.index.records(self.place.ino, _BATCH)):
                    yield from self._batch(batch, pool, report)
                self.place.ended = time.time()
        finally:
            self.save()

    def save(self) -> None:
        """Keep the place, durably. Raises OSError."""
        with self._lock:
            self.place.saved = time.time()
            write_json(self._path, msgspec.to_builtins(self.place))
            self._next_save = time.monotonic() + _SAVE_SECONDS

    def _again(self) -> Iterator[Finding]:
        """What was found bad before may have been put right since, or be gone."""
        before, self.place.bad = self.place.bad, []
        self.place.lost -= len(before)
        for at, bad in enumerate(before):
            try:
                record = self._kit.index.get(bad.ino)
                ref = Ref.of_record(record)
                if record is not None and ref is not None and ref.key == bad.key:
                    yield from self._judge(record, ref, examine(self._kit, ref, self._pace))
                self._known.add(bad.key)
            except BaseException:
                self.place.bad += before[at:]
                self.place.lost += len(before) - at
                raise

    def _batch(
        self, batch: list[Record], pool: ThreadPoolExecutor, report: Callable[[Place, bytes], None]
    ) -> Iterator[Finding]:
        """Small files together, in front of the next large one; the place is behind them when all are read."""
        small: list[tuple[Record, Ref]] = []
        for record in batch:
            ref = Ref.of_record(record)
            if ref is None or ref.key in self._known:
                continue
            if ref.size <= _SMALL:
                small.append((record, ref))
                continue
            if small:
                yield from self._small(small, pool, record.ino)
                small = []
            yield from self._large(record, ref, report)
        yield from self._small(small, pool, batch[-1].ino + 1)
        report(self.place, batch[-1].name)

    def _small(
        self, refs: list[tuple[Record, Ref]], pool: ThreadPoolExecutor, following: int
    ) -> Iterator[Finding]:
        if self._workers == 1:
            for record, ref in refs:
                yield from self._judge(record, ref, examine(self._kit, ref, self._pace))
        else:
            # With the caller's priority at the store.
            jobs = [pool.submit(copy_context().run, examine, self._kit, ref, self._pace) for _, ref in refs]
            try:
                for (record, ref), job in zip(refs, jobs, strict=True):
                    yield from self._judge(record, ref, job.result())
            finally:
                for job in jobs:
                    job.cancel()
        self._advance(following, len(refs), sum(ref.size for _, ref in refs))

    def _large(self, record: Record, ref: Ref, report: Callable[[Place, bytes], None]) -> Iterator[Finding]:
        start = self.place.offset if self.place.ino == record.ino else 0
        if start % LEAF or start >= ref.size or ref.size <= 1 << ref.chunk_shift:
            start = 0
        self.place.ino, self.place.offset = record.ino, start
        read = self.place.bytes - start

        def passed(at: int) -> None:
            self.place.offset, self.place.bytes = at - at % LEAF, read + at
            self._save_now_and_then()
            report(self.place, record.name)

        yield from self._judge(record, ref, examine(self._kit, ref, self._pace, start, passed))
        self.place.bytes = read + ref.size
        self._advance(record.ino + 1, 1, 0)

    def _advance(self, ino: int, files: int, count: int) -> None:
        self.place.ino, self.place.offset = ino, 0
        self.place.files += files
        self.place.bytes += count
        self._save_now_and_then()

    def _save_now_and_then(self) -> None:
        if time.monotonic() >= self._next_save:
            self.save()

    def _judge(self, before: Record, ref: Ref, what: str) -> Iterator[Finding]:
        if not what:
            return
        self._kit.still_ours()
        self._drain()
        record = self._kit.index.get(before.ino)
        if record is None or record.handle != before.handle or Ref.of_record(record) != ref:
            if what != ARCHIVED:
                doubt_copy(self._kit, before)  # opened for writing perhaps, and not changed
            return  # changed or removed since
        path = _path_of(self._kit, self._places, record)
        told = f"{what}: {ref.key}"
        if what == ARCHIVED:
            yield Finding(told, path, repaired=False, archived=True)
            return
        if self._repair and drop_copy(self._kit, record):
            yield Finding(told, path, repaired=True)
            return
        doubt_copy(self._kit, record)
        self.place.lost += 1
        if len(self.place.bad) < _MOST_BAD:
            self.place.bad.append(Bad(record.ino, ref.key, told, path, time.time()))
        yield Finding(told, path, repaired=False)


def _path_of(kit: Kit, places: Places, record: Record) -> bytes:
    """Where a file stands, as well as can be told."""
    above = places.directory(record.parent)
    guess = join(above.path, record.name) if above is not None else None
    try:
        fd = kit.open(record.ino, record.handle, os.O_PATH | os.O_NOFOLLOW, guess)
    except OSError:
        return guess or record.name
    try:
        place = places.of_file(fd, record.parent, record.name)
    except OSError:
        place = None
    finally:
        os.close(fd)
    return place.path if place is not None else guess or record.name
