"""The durable index in LMDB: what is known of each file. The mover alone writes, the mount server reads.

    table   key                      value                  written by           resolved (removed) by
    meta    name                     see Meta               begin/end_session    never
    files   ino                      codec.Record           marks, tier          GONE mark, survey
    fids    file id                  ino                    put, with files      delete, with files
    bits    ino                      leaf bitmap            filling              settling, a new copy
    leaves  file id, generation      digests and extents    copying              collection of that copy
    quiet   since ns, ino            (empty)                put, with files      put with a copy, delete
    dirty   ino                      since ns               format 1             put, delete
    pins    ino                      parent, name           PIN mark             PIN mark, GONE mark
    dirs    ino                      parent, name           DIR mark, survey     a later hint
    pending ino                      (empty)                before a punch       after it; else by recovery
    changes ino, name                serial                 marks, put           journal, when a segment has it
    rescues file id                  Rescue                 rescuing             put of a clean record, delete

The tables of what is past stand in past.py. Integers are big-endian, so that keys sort. Every value but the
empty ones carries a CRC: LMDB has none, and a flipped value would come back silently. What a writer may do
stands in index_writer.py.

Since when a file is dirty stands in its record, so that its row in `quiet` can be found. Beside a record of
format 1, which has no place for it, it stands in `dirty`; a version that knows format 1 alone opens that table
before it looks at the format, and then refuses.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import lmdb
import msgspec

from tierfs import pages
from tierfs.codec import is_plain, unpack_record
from tierfs.datafile import DATA, LOCK, keep_length
from tierfs.environment import failure, is_dead, open_tables
from tierfs.errors import IndexDamagedError, IndexError_, IndexFullError
from tierfs.index_writer import (
    FORMAT,
    READABLE,
    U64X2,
    Chain,
    Leaves,
    Meta,
    Note,
    Rescue,
    Totals,
    Writer,
    checked_bits,
    note_serial,
    queued_since,
    read_chain,
    read_rescue,
)
from tierfs.model import Record, epoch_of
from tierfs.past import PAST_TABLES, U64, Garbage, PastReader, ascending, checked, place, whole
from tierfs.unawaited import log_failure

log = logging.getLogger("index")

__all__ = ["Chain", "Index", "Leaves", "Note", "Rescue", "Session", "Totals", "Writer"]

R = TypeVar("R")
BATCH = 512  # commits that share one sync
LATER_SECONDS = 0.003  # until a request that is being made has left
_TABLES = (
    "meta", "files", "fids", "bits", "leaves", "dirty", "quiet", "pins", "dirs", "pending", "changes",
    "rescues", *PAST_TABLES,
)  # fmt: skip

_LATER = ("rescues",)


@dataclass(frozen=True, slots=True)
class Session:
    """This mount's epoch (generations begin anew in it) and the custody epoch in which proofs are made.

    Of copies that were proven before the custody epoch `taken` others may have removed the objects.
    """

    epoch: int
    custody: int
    taken: int = 0


@dataclass(slots=True)
class _Job:
    run: Callable[[Writer], Any]
    future: Future[Any]
    later: bool


class Index(PastReader):
    """One process's view of the index. Reads are thread-safe; writes go through `commit`.

    `on_lost(reason, damaged)` is called, in whichever thread notices, when this process can do no more with it.
    `make_room` is called where a commit found no room on the disk: whether it is worth trying again.
    """

    def __init__(self, path: str, env: Any, tables: dict[str, Any], readonly: bool) -> None:
        """Use `Index.open`."""
        self.path = path
        self.tables = tables
        self._env = env
        self._readonly = readonly
        self._wake = threading.Condition()
        self._jobs: list[_Job] = []
        self._closed = False
        self.on_lost: Callable[[str, bool], None] = lambda reason, damaged: None
        self.make_room: Callable[[], bool] = lambda: False
        self._committer: threading.Thread | None = None

    @classmethod
    def open(cls, path: str, readonly: bool = False) -> Index:
        """Open the environment in directory `path`, making it unless `readonly`; once a process, after fork.

        Raises IndexError_ where it is damaged or of an unknown format.
        """
        env, tables = open_tables(path, _TABLES, readonly=readonly, durable=True, later=_LATER)
        index = cls(path, env, tables, readonly)
        try:
            found = index._meta().format
            index.chain()
            if found not in READABLE:
                known = f"this version reads {FORMAT} and older: use the one that wrote it, or a later one"
                raise IndexError_(f"{path}: the index has format {found}, {known}")
            if found != FORMAT and not readonly:
                with index.write() as writer:  # before any record that the former version would misread
                    writer.meta.format = FORMAT
        except BaseException:
            env.close()
            raise
        return index

    def close(self) -> None:
        """Finish what was submitted and close."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._committer is not None:
            self._committer.join()
        self._env.close()

    @property
    def file(self) -> tuple[str, str, int, int]:
        """The paths of its file and of its locks, how large it may become, and the size of its pages."""
        data, lock = (os.path.join(self.path, name) for name in (DATA, LOCK))
        return data, lock, self._env.info()["map_size"], self._env.stat()["psize"]

    # --- reading ------------------------------------------------------------------------------------------

    def _get(self, table: str, key: bytes) -> bytes | None:
        if table not in self.tables:
            return None
        # A transaction for each look: the binding keeps spare ones, and one left open would hold old pages.
        try:
            with self._env.begin() as txn:
                value: bytes | None = txn.get(key, db=self.tables[table])
        except lmdb.Error as exc:
            raise self._unreadable(exc) from exc
        return value

    def _unreadable(self, error: Exception) -> IndexError_:
        return self._told(failure(self.path, "cannot be read", error), is_dead(error))

    def _told(self, error: IndexError_, dead: bool = False) -> IndexError_:
        damaged = isinstance(error, IndexDamagedError)
        if damaged or dead:
            self.on_lost(str(error), damaged)
        return error

    def get(self, ino: int) -> Record | None:
        """The record of an inode; a damaged one is none (see `whole`). Raises IndexError_."""
        raw = self._get("files", U64.pack(ino))
        return None if raw is None else whole(unpack_record, ino, raw)

    def is_plain(self, ino: int, ctime: int) -> bool:
        """Whether there is a whole record which says that the file shows what it is. Raises IndexError_."""
        raw = self._get("files", U64.pack(ino))
        return raw is not None and is_plain(ino, raw, ctime)

    def get_by_fid(self, fid: bytes) -> Record | None:
        """The record of a file id. Raises IndexError_, also where it is damaged: garbage is what has none."""
        at = self._get("fids", fid)
        raw = self._get("files", at) if at is not None else None
        if raw is None or at is None:
            return None
        record = unpack_record(U64.unpack(at)[0], raw)
        if record.fid != fid:
            raise IndexError_(f"the index's entry of file {fid.hex()} is damaged: run `tierfs check --repair`")
        return record

    def get_bits(self, ino: int) -> bytes | None:
        """The leaf bitmap of a partial file. Raises IndexError_."""
        raw = self._get("bits", U64.pack(ino))
        return None if raw is None else whole(checked_bits, ino, raw)

    def get_leaves(self, fid: bytes, generation: int) -> Leaves | None:
        """Digests and extents of one copy. Raises IndexError_."""
        raw = self._get("leaves", fid + U64.pack(generation))
        if raw is None:
            return None
        body = whole(checked, f"digests of file {fid.hex()}", raw)
        if body is None:
            return None
        count = struct.unpack_from("<I", body)[0]
        extents = [struct.unpack_from("<QQ", body, 4 + 16 * i) for i in range(count)]
        return Leaves(body[4 + 16 * count :], [(start, end) for start, end in extents])

    def rescue(self, fid: bytes) -> Rescue | None:
        """The rescue copy of a file that is dirty. Raises IndexError_."""
        raw = self._get("rescues", fid)
        return None if raw is None else whole(read_rescue, fid, raw)

    def rescue_keys(self) -> Iterator[str]:
        """The objects of all rescue copies. Raises IndexError_."""
        for fid, raw in self._walk("rescues", b""):
            rescue = whole(read_rescue, fid, raw)
            if rescue is not None:
                yield rescue.key(fid)

    def get_dir(self, ino: int) -> tuple[int, bytes] | None:
        """Parent and name under which a directory was last seen. Raises IndexError_."""
        raw = self._get("dirs", U64.pack(ino))
        return None if raw is None else whole(place, f"directory {ino}", raw)

    def dirs(self) -> Iterator[tuple[int, int, bytes]]:
        """(inode, parent, name) of each directory as it was last seen. Raises IndexError_."""
        for key, raw in self._walk("dirs", b""):
            ino = U64.unpack(key)[0]
            found = whole(place, f"directory {ino}", raw)
            if found is not None:
                yield ino, *found

    def verify(self) -> pages.Walked:
        """Look at all pages as they are now, while others write on. Raises IndexDamagedError, OSError.

        `on_lost` is not called: whoever asks says what is to be done.
        """
        file = os.path.join(self.path, DATA)
        while True:
            with self._env.begin() as txn:  # which keeps the pages of its moment from being used again
                try:
                    return pages.verify(file, txn.id())
                except LookupError:
                    continue  # two commits came in between

    def read_meta(self, txn: Any) -> Meta:
        """The meta value as this transaction sees it. Raises IndexError_."""
        return self._read_meta(txn.get(b"meta", db=self.tables["meta"]))

    def _meta(self) -> Meta:
        return self._read_meta(self._get("meta", b"meta"))

    def _read_meta(self, raw: bytes | None) -> Meta:
        if raw is None:
            return Meta()
        try:
            return msgspec.msgpack.decode(checked("meta value", raw), type=Meta)
        except (IndexError_, msgspec.DecodeError) as error:
            raise self._told(IndexDamagedError(f"{self.path}: {error}")) from error

    def log_position(self) -> int | None:
        """Where to go on reading the mark log; None: it has never been read."""
        return self._meta().log_position

    @property
    def session(self) -> Session:
        """The present session."""
        meta = self._meta()
        return Session(meta.epoch, meta.custody, meta.taken)

    @property
    def last_epoch(self) -> int:
        """This session's epoch, or a later one if its generations have run on into that."""
        meta = self._meta()
        return max(meta.epoch, epoch_of(meta.newest))

    @property
    def past(self) -> Garbage:
        """The last beat's number and clock, and the tree's root."""
        return self._meta().past

    @property
    def surveyed(self) -> bool:
        """Every file of the tree has a record, compared with it in the present custody epoch."""
        meta = self._meta()
        return meta.surveyed and meta.swept == meta.custody

    @property
    def never_surveyed(self) -> bool:
        """It is new, or made anew: no look through the tree has come to its end."""
        return self._meta().swept < 0

    def totals(self) -> Totals:
        """Sums over all records."""
        return Totals(*self._meta().totals)

    def _scan(self, table: str, start: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        if table not in self.tables:
            return []
        try:
            with self._env.begin() as txn, txn.cursor(db=self.tables[table]) as cursor:
                return list(islice(ascending(table, cursor), limit)) if cursor.set_range(start) else []
        except (lmdb.Error, IndexDamagedError) as exc:
            raise self._unreadable(exc) from exc

    def quiet(self, before_ns: int, limit: int = 256) -> list[int]:
        """Dirty files unchanged since before this time, longest first."""
        return [ino for _, ino in self.queued((0, 0), before_ns, limit)]

    def queued(self, start: tuple[int, int], before_ns: int, limit: int) -> list[tuple[int, int]]:
        """(since, ino) of dirty files in the order of the queue, from `start` on."""
        rows = [U64X2.unpack(key) for key, _ in self._scan("quiet", U64X2.pack(*start), limit)]
        return [(since, ino) for since, ino in rows if since < before_ns]

    def misdated(self, now_ns: int, limit: int = 256) -> list[int]:
        """Dirty files queued under a time that is yet to come: the clock has been set back since."""
        return [U64X2.unpack(key)[1] for key, _ in self._scan("quiet", U64X2.pack(now_ns, 0), limit)]

    def oldest_dirty(self) -> int | None:
        """Since when (ns) the longest waiting dirty file is dirty."""
        rows = self._scan("quiet", b"", 1)
        return int(U64X2.unpack(rows[0][0])[0]) if rows else None

    def pending(self) -> list[int]:
        """Inodes whose punch was under way."""
        return [U64.unpack(key)[0] for key, _ in self._scan("pending", b"", 1 << 20)]

    def is_pending(self, ino: int) -> bool:
        """Our own work is moving this inode's blocks and times. Raises IndexError_."""
        return self._get("pending", U64.pack(ino)) is not None

    def pins(self) -> list[tuple[int, int, bytes]]:
        """(inode, parent, name) of everything pinned itself. Raises IndexError_."""
        rows = [(U64.unpack(key)[0], whole(place, "pin", raw)) for key, raw in self._scan("pins", b"", 1 << 20)]
        return [(ino, *found) for ino, found in rows if found is not None]

    @property
    def has_pins(self) -> bool:
        """Something is pinned. Raises IndexError_."""
        return bool(self._scan("pins", b"", 1))

    def records(self, start: int = 0, limit: int = 1000) -> Iterator[Record]:
        """Records from inode `start` on, in order: for checks and background sweeps. Raises IndexError_."""
        for key, raw in self._scan("files", U64.pack(start), limit):
            record = whole(unpack_record, U64.unpack(key)[0], raw)
            if record is not None:
                yield record

    def notes(self) -> list[Note]:
        """All that the namespace journal has yet to look at, as of one moment. Raises IndexError_."""
        rows = self._scan("changes", b"", 1 << 30)
        return [Note(U64.unpack_from(key)[0], key[8:], note_serial(raw)) for key, raw in rows]

    def note_count(self) -> int:
        """How many there are. Raises IndexError_."""
        try:
            with self._env.begin() as txn:
                return int(txn.stat(self.tables["changes"])["entries"])
        except lmdb.Error as exc:
            raise self._unreadable(exc) from exc

    def noted_since(self) -> int:
        """When (ns) the oldest of the notes was made; 0: there is none."""
        return self._meta().noted_since

    def noting(self) -> tuple[bool, int]:
        """Whether changes are noted for the journal, and how many sessions have ended without order."""
        meta = self._meta()
        return meta.noting, meta.unclean

    def chain(self) -> Chain | None:
        """How far the namespace journal has come. Raises IndexError_."""
        try:
            return read_chain(self._get("meta", b"chain"))
        except IndexDamagedError as error:
            raise self._told(IndexDamagedError(f"{self.path}: {error}")) from error

    def dirty_since(self, ino: int) -> int:
        """When (ns) a file was queued as dirty; 0: it is not. Raises IndexError_."""
        raw = self._get("files", U64.pack(ino))
        if raw is None:
            return 0
        return whole(lambda at, found: queued_since(at, found, self._dirty), ino, raw) or 0

    def _dirty(self, key: bytes) -> bytes | None:
        return self._get("dirty", key)

    # --- writing ------------------------------------------------------------------------------------------

    def commit(self, run: Callable[[Writer], R], later: bool = False) -> Future[R]:
        """Run this in a synced transaction that it shares with others; its result is there once durable.

        What one that raises has written is undone, its exception goes into its future, and the others are
        committed. A cancelled one is left out. `later`: whoever asks has something better to do at first, and
        begins to wait with `hurry`. Raises IndexError_ once closed.
        """
        future: Future[R] = Future()
        with self._wake:
            if self._closed or self._readonly:
                raise IndexError_("the index is closed")
            if self._committer is None:
                committer = threading.Thread(target=self._run_committer, name="index", daemon=True)
                committer.start()  # not always: there may be too many threads
                self._committer = committer
            self._jobs.append(_Job(run, future, later))
            self._wake.notify()
        return future

    def hurry(self) -> None:
        """What was to be committed later is waited for now."""
        with self._wake:
            for job in self._jobs:
                job.later = False
            self._wake.notify()

    def post(self, run: Callable[[Writer], object]) -> None:
        """The same for what nobody waits for: the log says how it failed. Raises IndexError_ once closed."""
        self.commit(run).add_done_callback(log_failure(log, "a commit"))

    @contextmanager
    def write(self) -> Iterator[Writer]:
        """One synced transaction of the caller's own; nothing is written if the block raises."""
        try:
            with self._env.begin(write=True) as txn:
                writer = Writer(txn, self.tables, self.read_meta(txn))
                yield writer
                writer.finish()
        except (lmdb.Error, IndexDamagedError) as exc:
            raise self._told(failure(self.path, "cannot be written", exc), is_dead(exc)) from exc
        keep_length(self._env, self.path)

    def _run_committer(self) -> None:
        while True:
            with self._wake:
                while not self._jobs and not self._closed:
                    self._wake.wait()
                if not self._jobs:
                    return
                if all(job.later for job in self._jobs) and not self._closed:
                    self._wake.wait(LATER_SECONDS)
                batch, self._jobs = self._jobs[:BATCH], self._jobs[BATCH:]
            self._commit_batch(batch)

    def _commit_batch(self, jobs: list[_Job]) -> None:
        batch = [job for job in jobs if job.future.set_running_or_notify_cancel()]
        outcomes, failures = self._try_batch(batch)
        if any(isinstance(error, IndexFullError) for error in failures.values()) and self._has_made_room():
            outcomes, failures = self._try_batch(batch)
        for at, job in enumerate(batch):
            if at in failures:
                job.future.set_exception(failures[at])
            else:
                job.future.set_result(outcomes[at])

    def _has_made_room(self) -> bool:
        try:
            return self.make_room()
        except Exception:  # others' commits must not wait for ever for this thread
            log.exception("no room can be made for the index")
            return False

    def _try_batch(self, batch: list[_Job]) -> tuple[list[Any], dict[int, Exception]]:
        """Results, and what failed of them: some alone, or all, with nothing written."""
        outcomes: list[Any] = []
        failures: dict[int, Exception] = {}
        try:
            with self.write() as writer:
                for at, job in enumerate(batch):
                    outcomes.append(None)
                    try:
                        with writer.undoing(self._env):
                            outcomes[at] = job.run(writer)
                    except (lmdb.Error, IndexDamagedError):
                        raise
                    except Exception as error:
                        failures[at] = error
        except Exception as error:
            return [], dict.fromkeys(range(len(batch)), error)
        return outcomes, failures

    # --- sessions -----------------------------------------------------------------------------------------

    def power_was_lost(self, boot: str) -> bool:
        """The last session ended with the machine, not in order: what is never synced may be torn."""
        meta = self._meta()
        return not meta.clean and meta.boot != boot

    def is_of(self, root: bytes) -> bool:
        """Whether the tree whose root has this file handle is the one that the last session served."""
        return self._meta().root in (b"", root)

    def begin_session(self, boot: str, floor: int = 0, root: bytes = b"") -> Session:
        """A new epoch above `floor` and all generations, durably. Custody goes on after an orderly end, or in
        one boot. `root`: the file handle of the tree's root.

        Otherwise writes may have been lost with their marks: the custody epoch rises, and every proof of the
        earlier one needs the local bytes hashed again. So it does where others have had the store, in which
        what was proven before is looked for as well.
        """
        with self.write() as writer:
            meta = writer.meta
            # An epoch that this index has not had: the store was another machine's meanwhile, and so is the
            # newest snapshot of the namespace in it.
            meta.unclean += not meta.clean or floor > meta.epoch
            if floor > meta.epoch:
                writer.taken_over()
            others = 0 < meta.epoch < floor
            lost = not meta.clean and meta.boot != boot
            looked = not lost and meta.swept == meta.custody  # the tree is as it was, whoever had the store
            meta.custody += lost or others
            meta.swept = meta.custody if looked else meta.swept
            meta.taken = meta.custody if others else meta.taken
            meta.root = root
            meta.epoch, meta.boot, meta.clean = max(meta.epoch, floor, epoch_of(meta.newest)) + 1, boot, False
            return Session(meta.epoch, meta.custody, meta.taken)

    def end_session(self) -> None:
        """The volume was unmounted in order, with no handle left."""
        with self.write() as writer:
            writer.meta.clean = True
