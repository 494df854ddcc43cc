"""From a Fetch to the state of its file (custody rules 8 to 10): what the stub says, what is believed of it.

Believed are the stub attribute and what matches the copy's digests: leaves that are whole on the local disk
already (a demotion or a fetch that a crash cut short) and leaves that are all hole are not fetched. A file that
is all data and does not match is somebody else's work: its blocks win, and it becomes resident and dirty.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

from tierfs import failpoints
from tierfs.arrivals import HERE, Arrival, Request, leaves_from_bits, outside, shown_times
from tierfs.digests import SIDE_SUFFIX, Extents, have_digests, leaf_digests, sha256, unpack_side
from tierfs.errors import (
    BucketMissingError,
    BusyError,
    FetchTimeoutError,
    ForeignStubError,
    ObjectCorruptError,
    StoreDeniedError,
    StoreUnavailableError,
)
from tierfs.index import Writer
from tierfs.kit import WRITE_FLAGS, Kit, read_exactly
from tierfs.model import LEAF, Record, Residency, Stub, new_fid
from tierfs.past import Ending

log = logging.getLogger("mover")

T = TypeVar("T")
_CLAIM_SECONDS = 30.0
_LONGEST_PAUSE = 5.0
# Where somebody has a lease, as the server for the moment of a proof (lasting.Lasting.prove), this waits until
# it is given back; the kernel takes it after /proc/sys/fs/lease-break-time.
_WAITING_FLAGS = WRITE_FLAGS & ~(os.O_NOFOLLOW | os.O_NONBLOCK)
# Credentials are renewed, a disk is plugged in again: whoever reads waits for that as for a network.
_AWAY = (StoreUnavailableError, StoreDeniedError, BucketMissingError)


class AlreadyResident(Exception):
    """There is no stub attribute (any more): nothing to fetch."""


class Opener:
    """Opens files for filling. `stopping` ends all patience."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self.stopping = threading.Event()

    def open(self, request: Request, opath: int) -> Arrival:
        """The file's state, its inode claimed. Raises AlreadyResident, TierError, OSError."""
        kit, ino = self._kit, request.ino
        if not kit.claims.take(ino, _CLAIM_SECONDS):
            raise BusyError(f"inode {ino} is being worked on")
        fd = -1
        try:
            with kit.writable(opath):
                fd = kit.tree.reopen(opath, _WAITING_FLAGS)
            st, stub = os.fstat(fd), kit.tree.read_stub(fd)
            if stub is None:
                self._found_resident(ino, fd)
            elif stub.pack() != request.stub or st.st_size != request.size or st.st_ino != ino:
                raise ForeignStubError(f"inode {ino}: its stub is not the one that was opened")
            else:
                return self._arrival(request, fd, st, stub)
            raise AlreadyResident
        except BaseException:
            if fd >= 0:
                os.close(fd)
            kit.claims.give(ino)
            raise

    def _found_resident(self, ino: int, fd: int) -> None:
        os.fsync(fd)  # whoever removed the attribute may not have come that far
        self._kit.index.commit(partial(_put_resident, ino)).result()

    def _arrival(self, request: Request, fd: int, st: os.stat_result, stub: Stub) -> Arrival:
        kit, ino = self._kit, request.ino
        record = self._record(ino, fd, stub)
        copy = record.copy if record is not None else None
        if copy is not None and copy.size != st.st_size:
            raise ForeignStubError(
                f"inode {ino}: its size is {st.st_size}, its copy's {copy.size}: nothing is overwritten;"
                " `tierfs check --repair` gives it its length again"
            )
        digests, extents = self._lists(request, record, stub)
        bits = None
        if record is not None and record.residency is Residency.PARTIAL and digests:
            bits = kit.index.get_bits(ino)
        leaves = leaves_from_bits(st.st_size, bits)
        data, suspect = self._data_of(fd, st, leaves)
        shown = shown_times(record, copy, st, request.shown if kit.index.is_pending(ino) else None)
        arrival = Arrival(
            ino, stub, st.st_size, fd, record, shown, digests, extents, suspect, leaves, fresh=bits is None
        )
        # Leaves that are believed to be here may have been written over since.
        arrival.touched = bits is not None and record is not None and record.left_ctime != st.st_ctime_ns
        self._recognise(arrival)
        if data == [(0, st.st_size)] and not bits and not arrival.complete:
            self._take_over(arrival)
            raise AlreadyResident
        return arrival

    def _data_of(self, fd: int, st: os.stat_result, leaves: bytearray) -> tuple[Extents, Extents]:
        """Where the file has data, and where it does in leaves that are not known to be here."""
        tree = self._kit.tree
        data = tree.extents(fd, st.st_size) if st.st_blocks else []
        suspect = outside(data, leaves, st.st_size)
        if not suspect:
            return data, suspect
        tree.read_anew(fd)
        data = tree.extents(fd, st.st_size)
        return data, outside(data, leaves, st.st_size)

    def _record(self, ino: int, fd: int, stub: Stub) -> Record | None:
        """The index's record, if it is of this very stub."""
        record = self._kit.index.get(ino)
        if record is None or record.copy is None or record.handle != self._kit.tree.handle_of(fd):
            return None
        return record if Stub.of(record.fid, record.copy) == stub else None

    def _lists(self, request: Request, record: Record | None, stub: Stub) -> tuple[bytes, Extents | None]:
        """(leaf digests, extents): from the index, else from the store."""
        size = request.size
        known = self._kit.index.get_leaves(stub.fid, stub.generation)
        if size <= 1 << stub.chunk_shift:
            if known is not None and not known.digests and record is not None:
                return b"", known.extents
            return b"", [(0, size)] if record is not None else None
        if known is not None and sha256(known.digests) == stub.digest:
            return known.digests, known.extents
        digests, extents = self.patiently(
            lambda: unpack_side(self._kit.store.get(stub.key + SIDE_SUFFIX), size, stub.digest), request
        )
        self._kit.index.post(lambda w: w.put_leaves(stub.fid, stub.generation, digests, extents))
        failpoints.hit(failpoints.OPEN_LISTED)
        return digests, extents

    def _recognise(self, arrival: Arrival) -> None:
        """Mark the leaves whose local bytes are the copy's."""
        if arrival.small:
            if arrival.suspect and sha256(read_exactly(arrival.fd, 0, arrival.size)) == arrival.stub.digest:
                arrival.leaves[:] = bytes([HERE]) * len(arrival.leaves)
            return
        touched = {leaf for low, high in arrival.suspect for leaf in range(low // LEAF, -(-high // LEAF))}
        zeros = leaf_digests(bytes(LEAF))
        sparse = zeros in arrival.digests
        for leaf in range(len(arrival.leaves)) if sparse else sorted(touched):
            wanted = arrival.digests[leaf * 32 : leaf * 32 + 32]
            if arrival.leaves[leaf] == HERE or (leaf not in touched and wanted != zeros):
                continue
            length = min(LEAF, arrival.size - leaf * LEAF)
            if leaf not in touched or have_digests(read_exactly(arrival.fd, leaf * LEAF, length), wanted):
                arrival.leaves[leaf] = HERE

    def _take_over(self, arrival: Arrival) -> None:
        """All of the file is data that is not the copy's: it is kept, as a new file's."""
        log.warning("inode %d: was written over behind the mount: what is there is kept", arrival.ino)
        with self._kit.writable(arrival.fd):
            self._kit.tree.clear_stub(arrival.fd)
        os.fsync(arrival.fd)
        failpoints.hit(failpoints.OPEN_KEPT)
        handle = self._kit.tree.handle_of(arrival.fd)
        self._kit.index.commit(partial(_put_foreign, handle, arrival.fd, arrival.stub.generation)).result()

    def patiently(self, get: Callable[[], T], request: Request) -> T:
        """Try until the request's deadline while the store is away, and once more after wrong bytes.

        Raises FetchTimeoutError, StoreError.
        """
        corrupt, pause = False, 0.05
        while True:
            try:
                return get()
            except ObjectCorruptError:
                if corrupt:
                    raise
                corrupt = True
            except _AWAY as exc:
                left = request.deadline - time.monotonic()
                if left < pause or request.cancelled or self.stopping.is_set():
                    timeout = self._kit.config.fetch_timeout
                    raise FetchTimeoutError(f"no content within {timeout:g} s: {exc}") from exc
                self.stopping.wait(pause * random.uniform(0.5, 1.0))
                pause = min(pause * 2, _LONGEST_PAUSE)


def _put_resident(ino: int, w: Writer) -> None:
    """The stub attribute is durably gone, so that is what the record says too."""
    record = w.get(ino)
    if record is not None and record.residency is not Residency.RESIDENT:
        w.put(replace(record, residency=Residency.RESIDENT))


def _put_foreign(handle: bytes, fd: int, generation: int, w: Writer) -> None:
    st = os.fstat(fd)
    before = w.get(st.st_ino)
    w.drop_pending(st.st_ino)
    if not st.st_nlink and (before is None or before.handle != handle):
        return  # the mark of its end is in the index: a record would be there for ever
    new = Record(
        st.st_ino, handle, new_fid(), generation, size=st.st_size, blocks=st.st_blocks, local=st.st_blocks * 512
    )
    if before is not None and before.handle == handle:
        w.end(before, Ending(st.st_ctime_ns, deleted=False, mode=st.st_mode, uid=st.st_uid, gid=st.st_gid))
        new = replace(new, parent=before.parent, name=before.name)
    w.put(new)


def current(w: Writer, arrival: Arrival) -> Record | None:
    """The record, if it still is of the content that is arriving."""
    record = w.get(arrival.ino)
    if record is None or record.fid != arrival.stub.fid or record.generation != arrival.stub.generation:
        return None
    return record if record.residency is not Residency.RESIDENT else None


def note_pending(arrival: Arrival, w: Writer) -> None:
    """From here on a crash may leave other times than those to show, and in the end a whole file without
    attribute under a record that says STUB: recovery puts both right."""
    record = current(w, arrival)
    if record is not None and record.copy is not None:
        w.put(replace(record, copy=arrival.as_here(record.copy), left_ctime=arrival.shown.own_ctime))
        w.put_pending(arrival.ino)
