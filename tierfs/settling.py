"""Making fetched content final (custody rules 10, 11, 14), in one thread for all files.

bits:    fdatasync → commit the bitmap, every 2 s or 64 MiB and when a file is left alone
settle:  fdatasync → commit pending → nobody comes in (guard, or the server waits for us)
         → stub attribute gone → fsync → commit RESIDENT → Settled
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from tierfs import failpoints, wire
from tierfs.arrivals import Arrival
from tierfs.errors import BusyError, TierError
from tierfs.filling import Filler
from tierfs.index import Writer
from tierfs.kit import Kit
from tierfs.model import DOUBTED, Copy, Record, Residency, new_fid
from tierfs.opening import current, note_pending

log = logging.getLogger("mover")

BITS_SECONDS = 2.0
BITS_BYTES = 1 << 30
# Whoever reads one file after another has used what has just come by then, and waits for the next: making it
# final takes no processor from it, and the work for several files is shared.
CALM_SECONDS = 0.005
_BATCH = 32
_ATTEMPTS = 2
_RELEASE_SECONDS = 10.0


class _Release(NamedTuple):
    arrival: Arrival
    done: threading.Event


class Settler:
    """Settles what the Filler has completed, and commits the bits of what it has not."""

    def __init__(self, kit: Kit, drain: Callable[[], int]) -> None:
        self._kit = kit
        self._drain = drain
        self._queue: queue.SimpleQueue[Arrival | _Release | None] = queue.SimpleQueue()
        self._hurried = threading.Event()
        self._thread: threading.Thread | None = None
        self.filler: Filler | None = None

    def start(self, filler: Filler) -> None:
        """Work in a thread of its own."""
        self.filler = filler
        self._thread = threading.Thread(target=self._run, name="settle", daemon=True)
        self._thread.start()

    def add(self, arrival: Arrival) -> None:
        """Every leaf of this file is here."""
        self._queue.put(arrival)
        if arrival.awaited:
            self._hurried.set()

    def hurry(self) -> None:
        """Somebody waits for a file that was added before."""
        self._hurried.set()

    def release(self, arrival: Arrival) -> None:
        """Commit the bits of a file that nobody asks for now, and forget it."""
        done = threading.Event()
        self._queue.put(_Release(arrival, done))
        self._hurried.set()
        done.wait(_RELEASE_SECONDS)

    def stop(self) -> None:
        """Settle what is there, commit all bits, and end."""
        self._queue.put(None)
        self._hurried.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        last = time.monotonic()
        stopping = False
        while not stopping:
            batch: list[Arrival] = []
            releases: list[_Release] = []
            for job in self._jobs(self._pause(last)):
                if job is None:
                    stopping = True
                elif isinstance(job, _Release):
                    releases.append(job)
                else:
                    batch.append(job)
            try:
                for release in releases:
                    self._let_go(release)
                if batch:
                    self.settle(batch)
                if stopping or time.monotonic() - last > BITS_SECONDS / 4:
                    last = time.monotonic()
                    self.commit_bits(everything=stopping)
            except Exception as error:
                log.exception("settling failed")
                self._give_up_all(batch, error)

    def _give_up_all(self, batch: list[Arrival], error: Exception) -> None:
        for arrival in batch:
            try:
                if not arrival.closed:
                    self._give_up(arrival, error)
            except Exception:  # this thread goes on, for the others
                log.exception("inode %d cannot be given up", arrival.ino)

    def _pause(self, last: float) -> float:
        """Seconds until bits should be looked at, as was done at `last`."""
        assert self.filler is not None
        if not self.filler.unsynced():
            return BITS_SECONDS / 2
        return max(0.05, last + BITS_SECONDS / 4 - time.monotonic())

    def _jobs(self, seconds: float) -> Iterator[Arrival | _Release | None]:
        """What has been queued: the first waited for, then what is there a moment later."""
        try:
            first = self._queue.get(timeout=seconds)
            if isinstance(first, Arrival) and not first.awaited:
                self._hurried.wait(CALM_SECONDS)
            self._hurried.clear()
            yield first
            for _ in range(_BATCH - 1):
                yield self._queue.get_nowait()
        except queue.Empty:
            return

    def _let_go(self, release: _Release) -> None:
        assert self.filler is not None
        try:
            if release.arrival.moved:
                self._commit_bits(release.arrival)
            self.filler.drop(release.arrival)
        except Exception:  # the bits are fetched again; whatever else is to be settled now is nobody's fault
            log.exception("inode %d is not let go of", release.arrival.ino)
        finally:
            release.done.set()

    # --- bits ---------------------------------------------------------------------------------------------

    def commit_bits(self, everything: bool = False) -> None:
        """Make durable what has arrived of unfinished files; forget those that nobody asks for any more."""
        assert self.filler is not None
        now = time.monotonic()
        for arrival in self.filler.unsynced():
            left_alone = not arrival.requests and now - arrival.used > BITS_SECONDS
            due = arrival.unsynced >= BITS_BYTES or now - arrival.used > BITS_SECONDS or everything
            if arrival.moved and due:
                self._commit_bits(arrival)
            if left_alone or everything:
                self.filler.drop(arrival)

    def _commit_bits(self, arrival: Arrival) -> None:
        with arrival.lock:
            if arrival.closed or arrival.settling:
                return
            if arrival.small and arrival.complete:
                return  # it is about to be settled
            grown, arrival.unsynced, arrival.moved = arrival.unsynced, 0, False
            bits = arrival.bits()
        try:
            os.fdatasync(arrival.fd)
        except OSError as error:
            self._give_up(arrival, error, lost=True)
            return
        local = os.fstat(arrival.fd).st_blocks * 512

        def commit(w: Writer) -> None:
            record = current(w, arrival)
            if record is None or record.copy is None:
                return
            with arrival.lock:  # here, where no mark of other times can come in between
                copy, left_ctime = arrival.as_here(record.copy), arrival.shown.own_ctime
            record = replace(record, copy=copy, left_ctime=left_ctime)
            if any(bits):  # nothing has come where there was no room for it
                record = replace(record, residency=Residency.PARTIAL, local=local)
                w.put_bits(arrival.ino, bits)
            w.put(record)

        try:
            self._kit.index.commit(commit).result()
        except TierError:  # an index without room for a moment: it is told the next time
            with arrival.lock:
                arrival.unsynced, arrival.moved = arrival.unsynced + grown, True
            raise
        if grown:
            self._kit.movements.here(arrival.ino, local, grown, arrival.lent)
        failpoints.hit(failpoints.FILL_BITS)

    # --- settling -----------------------------------------------------------------------------------------

    def settle(self, batch: list[Arrival]) -> None:
        """Take these files through to RESIDENT. Raises BusyError where the server is gone, IndexError_."""
        good = [arrival for arrival in batch if not arrival.closed and self._synced(arrival)]
        for future in [self._kit.index.commit(partial(note_pending, a)) for a in good]:
            future.result()
        failpoints.hit(failpoints.FILL_SYNCED)
        with ExitStack() as guards:
            left = [arrival.ino for arrival in good]
            for _ in range(_ATTEMPTS):
                if not left:
                    break
                # Denied: the file is open or waited for. Having heard Filled the server then keeps writers
                # waiting for Settled; a file that it heard of only now is guarded at the second attempt.
                for arrival in good:
                    if arrival.ino in left:
                        self._kit.server.send(wire.Filled(arrival.ino, 0, arrival.size))
                granted = guards.enter_context(self._kit.server.guard(left, self._drain()))
                left = [ino for ino in left if ino not in granted]
            # The last times that somebody has set here: our own writes may have covered them.
            self._drain()
            self._make_resident(good)

    def _synced(self, arrival: Arrival) -> bool:
        try:
            os.fdatasync(arrival.fd)
        except OSError as error:
            self._give_up(arrival, error, lost=True)
            return False
        return True

    def _make_resident(self, batch: list[Arrival]) -> None:
        done: list[Arrival] = []
        for arrival in batch:
            try:
                with arrival.lock:
                    with self._kit.writable(arrival.fd):
                        st = os.fstat(arrival.fd)
                        arrival.notice(st)
                        if st.st_mtime_ns != arrival.shown.mtime:
                            self._kit.tree.set_mtime(arrival.fd, arrival.shown.mtime)
                        self._kit.tree.clear_stub(arrival.fd)
                    arrival.keep_times()
                done.append(arrival)
            except OSError as error:
                self._give_up(arrival, error)
        for arrival in list(done):
            try:
                os.fsync(arrival.fd)
                arrival.notice(os.fstat(arrival.fd))
            except OSError as error:
                done.remove(arrival)
                self._give_up(arrival, error)
        failpoints.hit(failpoints.FILL_CLEARED)
        futures = [(a, self._kit.index.commit(partial(self._put_resident, a))) for a in done]
        for arrival, future in futures:
            try:
                future.result()
            except TierError as error:
                self._give_up(arrival, error)
            else:
                self._end(arrival, 0, "")

    def _put_resident(self, arrival: Arrival, w: Writer) -> None:
        st = os.fstat(arrival.fd)
        record = w.get(arrival.ino)
        handle = self._kit.tree.handle_of(arrival.fd)
        stub, shown = arrival.stub, arrival.shown
        w.drop_pending(arrival.ino)
        if record is not None and record.handle == handle and record.fid == stub.fid:
            copy = record.copy
            if record.generation != stub.generation or copy is None:
                return  # truncated: the mark is newer than what was fetched
            proven = arrival.fresh and copy.custody != DOUBTED  # found bad since it was read, perhaps
            custody = self._kit.custody if proven else copy.custody
            copy = arrival.as_here(replace(copy, custody=custody))
            w.put(_resident(record, st, copy, shown.own_ctime))
            return
        if not st.st_nlink:
            return  # the mark of its end is in the index, or will be: a record would be there for ever
        twin = self._kit.holder(stub.fid)
        if twin is not None and twin.ino != arrival.ino and twin.handle != handle:
            # Two inodes with one file id: this one, a copy made behind our back, gets an id of its own.
            w.put(_resident(Record(arrival.ino, handle, new_fid(), stub.generation), st, None, 0))
            return
        copy = Copy(
            stub.generation, stub.tag, stub.digest, arrival.size, shown.mtime, shown.ctime,
            self._kit.custody, stub.chunk_shift,
        )  # fmt: skip
        new = Record(arrival.ino, handle, stub.fid, stub.generation)
        w.put(_resident(new, st, arrival.as_here(copy), shown.own_ctime))

    def _give_up(self, arrival: Arrival, error: Exception, lost: bool = False) -> None:
        """`lost`: the disk has not taken what was written. The kernel says so once: pages stay in memory for
        a while, and the next sync passes over them. So all of it that has no bit has to come anew."""
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        name = self._kit.name_of(arrival.fd)
        self._kit.troubles.note(f"{name} could not be made resident: {error}", arrival.ino)
        self._end(arrival, number, str(error), lost)

    def _end(self, arrival: Arrival, number: int, reason: str, lost: bool = False) -> None:
        assert self.filler is not None
        self.filler.settled(arrival)
        try:
            self._kit.server.send(wire.Settled(arrival.ino, number, reason, lost))
        except BusyError:
            log.debug("the server is gone; a new one reads the attribute")
        self._kit.outcomes.tell(arrival.ino, number, reason)
        if not number:
            self._kit.movements.here(arrival.ino, arrival.size, arrival.size, arrival.lent)
            self._kit.troubles.solved(arrival.ino)


def _resident(record: Record, st: os.stat_result, copy: Copy | None, left_ctime: int) -> Record:
    return replace(
        record,
        residency=Residency.RESIDENT,
        size=st.st_size,
        blocks=st.st_blocks,
        local=st.st_blocks * 512,
        copy=copy,
        left_ctime=left_ctime,
    )
