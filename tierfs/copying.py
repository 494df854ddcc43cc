"""Taking copies (custody rules 1 to 4): sealed, read once, put under a new key, verified, committed.

    open → record current? → ctime older than a tick → seal → read, digest, put → verified or read back
         → tuple unchanged → marks drained, generation unchanged → commit

A file whose record is clean but whose tuple or custody is not what it was is read and compared the same way,
without an upload. The order stands in `Copier.bring_up`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from tierfs import failpoints, transitions
from tierfs.digests import SIDE_SUFFIX, Extents, is_sparse, leaf_digests, pack_side, sha256
from tierfs.errors import (
    BusyError,
    IndexError_,
    ObjectCorruptError,
    StoreError,
    StoreUnavailableError,
    TierError,
)
from tierfs.index import Writer
from tierfs.kit import TICK, Kit, abandon_intended, intend_all, may_be_gone, proven, read_exactly
from tierfs.model import DOUBTED, LEAF, Copy, Record, Residency, Stub, new_fid, new_tag, object_key
from tierfs.past import Ending
from tierfs.readback import Ref, presence
from tierfs.reusing import Sources
from tierfs.spelling import quoted
from tierfs.store.base import PART, Part, Put
from tierfs.transfer import Urgency

log = logging.getLogger("mover")

PIECE = PART  # so that parts consist of whole pieces
# Of S3. A sparse file may be larger on any disk: its zeros would be sent for days, in parts that fill memory.
MOST = 5 << 40
CHANGED = "was changed while it was copied"
_readers = ThreadPoolExecutor(4, "read")  # one piece ahead of each upload
_CLAIM_SECONDS = 10.0  # for the store's first answer after a mount


@dataclass(slots=True)
class Item:
    """One file on its way out. `reason` is set when it stays; `failed` where that is an error.

    `fd` is O_RDONLY and closed (-1) when the item is done with. `ordered`: somebody named it.
    """

    ino: int
    handle: bytes
    path: bytes = b""
    parent: int = 0
    name: bytes = b""
    size: int = 0
    ordered: bool = False
    fd: int = -1
    st: os.stat_result | None = None
    record: Record | None = None
    generation: int = 0
    fid: bytes = b""  # set with `tag` when it is sealed: the key of the object that a copy would be
    tag: bytes = b""  # empty again once the copy is committed
    reason: str = ""
    failed: bool = False
    away: bool = False  # the order ended since the store did not answer
    already: bool = False  # it is what it shall become
    again: bool = False  # a stub of which something is local
    demoted: bool = False
    uploaded: int = 0
    moved: int = 0  # how far its content has come, for those who watch

    @classmethod
    def of(cls, record: Record, ordered: bool = False) -> Item:
        """A file that the index knows."""
        place = b"", record.parent, record.name
        return cls(record.ino, record.handle, *place, record.size, ordered)

    @property
    def going(self) -> bool:
        """Nothing speaks against it yet."""
        return not self.reason and not self.already

    @property
    def key(self) -> str:
        """The object to put."""
        return object_key(self.fid, self.generation, self.tag)

    def stay(self, reason: str, failed: bool = False) -> None:
        """It stays as it is."""
        self.reason, self.failed = reason, failed

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass(slots=True)
class Taken:
    """What reading and putting one file came to."""

    copy: Copy
    key: str
    extents: Extents
    digests: bytes
    fresh: bool  # a new object was put


class Copier:
    """Brings files to the state in which their copy is proven."""

    def __init__(self, kit: Kit, drain: Callable[[], int]) -> None:
        self._kit = kit
        self._drain = drain
        self._sends_all = False  # the server was seen to put together what it was not told

    def bring_up(self, items: list[Item], cancelled: threading.Event) -> None:
        """After it every item that is still going has a record with a proven copy.

        The marks have been drained and the inodes claimed by the caller. Raises BusyError, IndexError_.
        """
        needy = [item for item in items if item.going and not item.again and not self._is_proven(item)]
        if not needy:
            return
        sealed = self._seal(needy)
        try:
            self._intend(sealed)
            submit = self._kit.uploads.submit
            futures = [(item, submit(Urgency.UPLOAD, partial(self._take, item, cancelled))) for item in sealed]
            taken = [(item, _outcome(item, future)) for item, future in futures]
            failpoints.hit(failpoints.COPY_PUT)
            self._commit([(item, t) for item, t in taken if t is not None])
            failpoints.hit(failpoints.COPY_COMMITTED)
        finally:
            self._kit.server.unseal([item.ino for item in sealed])
            self._abandon(sealed)

    def _intend(self, items: list[Item]) -> None:
        """Note durably what is about to be put: whatever of it no record comes to refer to is collected, also
        after a crash."""
        for item in items:
            item.fid = item.record.fid if item.record is not None else new_fid()
            item.tag = new_tag()
        keys = [item.key for item in items]
        if keys:
            self._kit.index.commit(partial(intend_all, keys)).result()
        failpoints.hit(failpoints.COPY_INTENDED)

    def _abandon(self, items: list[Item]) -> None:
        """What of this did not become a copy is garbage. Nobody waits: a crash leaves the intents."""
        keys = [item.key for item in items if item.tag]
        if not keys:
            return
        with suppress(IndexError_):  # closed: the next mover does it
            self._kit.index.post(partial(abandon_intended, keys))

    def _is_proven(self, item: Item) -> bool:
        item.st = os.fstat(item.fd)
        return proven(item.record, item.st, self._kit.custody)

    def _seal(self, items: list[Item]) -> list[Item]:
        """Those for which a seal was given, with a ctime that a later change cannot repeat."""
        for attempt in range(2):
            if any(_young(os.fstat(item.fd), time.time_ns()) for item in items):
                time.sleep(TICK / 1e9)
            asked = time.time_ns()
            given = self._kit.server.seal([item.ino for item in items], [item.fd for item in items])
            for item, generation in zip(items, given, strict=True):
                item.generation = generation
                item.st = os.fstat(item.fd)
            if not any(i.generation and i.st is not None and _young(i.st, asked) for i in items) or attempt:
                break
            self._kit.server.unseal([item.ino for item in items])
        sealed = []
        for item in items:
            assert item.st is not None
            if not item.generation:
                item.stay("is open for writing, or mapped")
            elif _young(item.st, asked) or not self._is_current(item):
                item.stay("is changing right now")
                self._kit.server.unseal([item.ino])
            else:
                sealed.append(item)
        return sealed

    def _is_current(self, item: Item) -> bool:
        return item.record is None or item.record.generation == item.generation

    # --- one file, in an upload thread --------------------------------------------------------------------

    def _take(self, item: Item, cancelled: threading.Event) -> Taken:
        assert item.st is not None
        taken = self._read_and_put(item, cancelled)
        now = os.fstat(item.fd)
        if _times(now) != _times(item.st) or not self._kit.server.sealed(item.ino):
            self._discard(taken)
            raise BusyError(CHANGED)
        return taken

    def _read_and_put(self, item: Item, cancelled: threading.Event) -> Taken:
        assert item.st is not None
        self._check(item, cancelled)
        size = item.st.st_size
        if size > MOST:
            raise BusyError(f"is larger than {MOST >> 40} TiB, which is the most that an object has")
        extents = self._kit.tree.extents(item.fd, size)
        large = size > 1 << self._kit.chunk_shift
        return self._take_large(item, extents, cancelled) if large else self._take_small(item, extents)

    def _check(self, item: Item, cancelled: threading.Event) -> None:
        if cancelled.is_set():
            raise BusyError("was cancelled")
        if not self._kit.server.sealed(item.ino):
            raise BusyError("was opened for writing while it was copied")

    def _take_small(self, item: Item, extents: Extents) -> Taken:
        assert item.st is not None
        size = item.st.st_size
        data = read_exactly(item.fd, 0, size)
        digest = sha256(data)
        known = self._known(item, digest)
        if known is not None and self._is_there(item):
            return Taken(known, item.key, extents, b"", fresh=False)
        taken = Taken(self._new_copy(item, digest), item.key, extents, b"", fresh=True)
        key = item.key
        with self._kept_if_good(taken):
            if not self._kit.store.put(key, data, size).verified and sha256(self._kit.store.get(key)) != digest:
                raise _differs(key)
            self._put_side(taken)
        self._count_sent(item, size)
        return taken

    def _take_large(self, item: Item, extents: Extents, cancelled: threading.Event) -> Taken:
        known = self._unchanged(item, cancelled)
        if known is not None and self._is_there(item):
            return Taken(known[0], item.key, extents, known[1], fresh=False)
        taken = Taken(self._new_copy(item, b""), item.key, extents, b"", fresh=True)
        with self._kept_if_good(taken):
            taken.digests = self._put_large(item, extents, cancelled)
            taken.copy = replace(taken.copy, digest=sha256(taken.digests))
            self._put_side(taken)
        return taken

    def _put_large(self, item: Item, extents: Extents, cancelled: threading.Event) -> bytes:
        """Put the content, and prove it; its digests."""
        assert item.st is not None
        size, part = item.st.st_size, self._kit.store.part_size(item.st.st_size)
        if part and not self._sends_all:
            sources = Sources(self._kit, part)
            sources.learn_copies(item.record)
            try:
                with sources.with_zeros(size, extents):
                    if sources:
                        return self._put_parts(item, sources, cancelled)
            except ObjectCorruptError as error:
                # A server that copies other bytes than it is told does so always.
                self._sends_all = True
                log.warning("%s: files are sent as a whole from now on: %s", quoted(item.path), error)
        digests: list[bytes] = []
        with closing(self._pieces(item, digests, cancelled)) as pieces:
            put = self._kit.store.put(item.key, self._sent(item, pieces), size)
        return self._proven(put, item, b"".join(digests), cancelled)

    def _put_parts(self, item: Item, sources: Sources, cancelled: threading.Event) -> bytes:
        """As `_put_large`, without what the store has."""
        assert item.st is not None
        digests: list[bytes] = []
        size = item.st.st_size
        with closing(self._pieces(item, digests, cancelled)) as pieces:
            put = self._kit.store.put_parts(item.key, self._parts(item, pieces, digests, sources), size)
        self._count_sent(item, size - put.copied - item.uploaded)  # what the store could not take after all
        return self._proven(put, item, b"".join(digests), cancelled)

    def _proven(self, put: Put, item: Item, digests: bytes, cancelled: threading.Event) -> bytes:
        """The digests, of what is in the store now. Raises ObjectCorruptError."""
        if not put.verified:
            self._read_back(item.key, digests, item, cancelled)
        return digests

    @contextmanager
    def _kept_if_good(self, taken: Taken) -> Iterator[None]:
        if self._kit.withheld:
            self._kit.claim_tried.wait(_CLAIM_SECONDS)
        if self._kit.withheld:
            raise StoreUnavailableError(self._kit.withheld)
        try:
            yield
        except (TierError, OSError):
            self._discard(taken)
            raise

    def _pieces(
        self, item: Item, digests: list[bytes], cancelled: threading.Event
    ) -> Generator[bytes, None, None]:
        """The content in pieces, while their leaf digests are appended to `digests`."""
        assert item.st is not None
        size = item.st.st_size
        coming = _readers.submit(_read_piece, item.fd, 0, size)
        try:
            for at in range(0, size, PIECE):
                self._check(item, cancelled)
                piece, found = coming.result()
                if at + PIECE < size:
                    coming = _readers.submit(_read_piece, item.fd, at + PIECE, size)
                digests.append(found)
                yield piece
                item.moved = at + len(piece)
        finally:
            wait([coming])  # it reads from a descriptor that is about to be closed

    def _sent(self, item: Item, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """The same, counted as it goes out."""
        item.uploaded = 0
        for piece in pieces:
            yield piece
            self._count_sent(item, len(piece))

    def _parts(
        self, item: Item, pieces: Iterator[bytes], digests: list[bytes], sources: Sources
    ) -> Iterator[Part]:
        """The pieces, of which the digests come to be in `digests`, in parts."""
        assert item.st is not None
        item.uploaded = 0
        for at in range(0, item.st.st_size, sources.size):
            known = len(digests)
            count = -(-min(sources.size, item.st.st_size - at) // PIECE)
            body = b"".join(islice(pieces, count))
            part = sources.part(body, b"".join(digests[known:]))
            yield part
            if not part.key:
                self._count_sent(item, len(body))

    def _count_sent(self, item: Item, count: int) -> None:
        item.uploaded += count
        self._kit.uploaded.add(count)

    def _read_back(self, key: str, digests: bytes, item: Item, cancelled: threading.Event) -> None:
        """Raises ObjectCorruptError unless the store gives the content back."""
        rest, at = b"", 0
        for piece in self._kit.store.stream(key):
            self._check(item, cancelled)
            rest += piece
            whole = len(rest) // LEAF * LEAF
            found = leaf_digests(memoryview(rest)[:whole])
            if found != digests[at : at + len(found)]:
                raise _differs(key)
            rest, at = rest[whole:], at + len(found)
        if leaf_digests(rest) != digests[at:]:
            raise _differs(key)

    def _unchanged(self, item: Item, cancelled: threading.Event) -> tuple[Copy, bytes] | None:
        """The present copy and its digests, where the content still is that of the copy; stops at the first
        leaf that differs."""
        assert item.st is not None
        record, size = item.record, item.st.st_size
        copy = record.copy if record is not None else None
        if record is None or copy is None or copy.custody == DOUBTED:
            return None
        if copy.size != size or copy.chunk_shift != self._kit.chunk_shift:
            return None
        leaves = self._kit.index.get_leaves(record.fid, copy.generation)
        if leaves is None or sha256(leaves.digests) != copy.digest:
            return None
        for at in range(0, size, PIECE):
            self._check(item, cancelled)
            found = leaf_digests(read_exactly(item.fd, at, min(PIECE, size - at)))
            start = at // LEAF * 32
            if found != leaves.digests[start : start + len(found)]:
                return None
        return self._refreshed(item, copy), leaves.digests

    def _known(self, item: Item, digest: bytes) -> Copy | None:
        """The present copy, if it is of a file of one chunk with this digest."""
        assert item.st is not None
        copy = item.record.copy if item.record is not None else None
        if copy is None or copy.custody == DOUBTED:
            return None
        if copy.digest != digest or copy.size != item.st.st_size:
            return None
        return self._refreshed(item, copy) if copy.size <= 1 << copy.chunk_shift else None

    def _is_there(self, item: Item) -> bool:
        """The store has the present copy, as far as can be told unread, where there is reason to ask."""
        record = item.record
        if record is None or record.copy is None or not may_be_gone(self._kit, record.copy):
            return True
        problem = presence(self._kit, Ref.of_stub(Stub.of(record.fid, record.copy), record.copy.size))
        if problem:
            log.warning("%s is copied out anew: %s", quoted(item.path), problem)
        return not problem

    def _refreshed(self, item: Item, copy: Copy) -> Copy:
        assert item.st is not None
        return replace(
            copy, mtime=item.st.st_mtime_ns, ctime=self._shown_ctime(item), custody=self._kit.custody
        )

    def _shown_ctime(self, item: Item) -> int:
        assert item.st is not None
        record = item.record
        if record is not None and record.copy is not None and record.left_ctime == item.st.st_ctime_ns:
            return record.copy.ctime
        return item.st.st_ctime_ns

    def _new_copy(self, item: Item, digest: bytes) -> Copy:
        assert item.st is not None
        return Copy(
            generation=item.generation,
            tag=item.tag,
            digest=digest,
            size=item.st.st_size,
            mtime=item.st.st_mtime_ns,
            ctime=self._shown_ctime(item),
            custody=self._kit.custody,
            chunk_shift=self._kit.chunk_shift,
        )

    def _put_side(self, taken: Taken) -> None:
        """Digests and extents reach the store before any punch (custody rule 3)."""
        if not taken.digests and not is_sparse(taken.copy.size, taken.extents):
            return
        key = taken.key + SIDE_SUFFIX
        raw = pack_side(taken.copy.size, taken.extents, taken.digests)
        if not self._kit.store.put(key, raw, len(raw)).verified and self._kit.store.get(key) != raw:
            raise _differs(key)

    def _discard(self, taken: Taken) -> None:
        """Remove an object that nothing will refer to."""
        if not taken.fresh:
            return
        try:
            self._kit.store.delete([taken.key, taken.key + SIDE_SUFFIX])
        except StoreError as error:
            log.info("an unused object is collected later: %s: %s", taken.key, error)

    # --- committing ---------------------------------------------------------------------------------------

    def _commit(self, taken: list[tuple[Item, Taken]]) -> None:
        """Drain the log, which has the mark of every write-open so far, then commit what is still true."""
        if not taken:
            return
        self._drain()
        futures = [(i, t, self._kit.index.commit(partial(_put_copy, i, t))) for i, t in taken]
        for item, outcome, future in futures:
            try:
                item.record = future.result()
                item.tag = b""
            except BusyError as error:
                item.stay(str(error))
                self._kit.uploads.post(Urgency.GARBAGE, partial(self._discard, outcome))


def _put_copy(item: Item, taken: Taken, w: Writer) -> Record:
    """In a write transaction: the record with its new copy. Raises BusyError where the file has changed."""
    assert item.st is not None
    before = w.get(item.ino)
    if before is not None and before.handle != item.handle:
        before = None
    if (before is None) != (item.record is None):
        raise BusyError(CHANGED)
    if before is None:
        if not os.fstat(item.fd).st_nlink:
            raise BusyError(CHANGED)  # the mark of its end is in the index: nobody would end it once more
        before = Record(
            item.ino, item.handle, item.fid, taken.copy.generation, parent=item.parent, name=item.name
        )
    elif before.generation != item.generation or before.residency is not Residency.RESIDENT:
        raise BusyError(CHANGED)
    st = item.st
    record = transitions.copied(before, taken.copy, st.st_size, st.st_blocks, st.st_ctime_ns)
    doubted = before.copy is not None and before.copy.custody == DOUBTED
    if doubted and not taken.fresh:
        raise BusyError(CHANGED)  # found bad while the file was compared with it
    if taken.fresh:
        if not w.intended(taken.key):
            raise BusyError(CHANGED)  # given up, and perhaps collected
        if doubted and before.copy is not None:
            w.bury_found(object_key(before.fid, before.copy.generation, before.copy.tag))  # no version to offer
        else:
            # The former content was the file's until this one was there.
            when, owner = taken.copy.ctime, (st.st_uid, st.st_gid)
            w.end(before, Ending(when, False, path=item.path, mode=st.st_mode, uid=owner[0], gid=owner[1]))
        if taken.digests or is_sparse(taken.copy.size, taken.extents):
            w.put_leaves(record.fid, taken.copy.generation, taken.digests, taken.extents)
    w.given(record.generation)
    w.fulfil(taken.key)
    w.put(record)
    return record


def _outcome(item: Item, future: Any) -> Taken | None:
    try:
        taken: Taken = future.result()
    except BusyError as error:
        item.stay(str(error))
    except (TierError, OSError) as error:
        item.stay(str(error), failed=True)
    else:
        return taken
    return None


def _differs(key: str) -> ObjectCorruptError:
    return ObjectCorruptError(f"the store gave back other bytes than it was given for {key}")


def _read_piece(fd: int, at: int, size: int) -> tuple[bytes, bytes]:
    """A piece and its leaf digests."""
    piece = read_exactly(fd, at, min(PIECE, size - at))
    return piece, leaf_digests(piece)


def _young(st: os.stat_result, now: int) -> bool:
    return abs(now - st.st_ctime_ns) < TICK


def _times(st: os.stat_result) -> tuple[int, int, int]:
    return st.st_size, st.st_mtime_ns, st.st_ctime_ns
