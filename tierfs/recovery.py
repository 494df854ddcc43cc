"""After a crash, and on demand: what the tree, the index and the store say of each file, compared.

`finish_pending` runs when a mover starts; the `check_*` functions are `tierfs check`. Nothing here punches
(custody rule 12), and nothing is repaired that could be somebody's work.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from tierfs import failpoints
from tierfs.digests import leaf_digests, sha256
from tierfs.errors import TierError
from tierfs.index import Writer
from tierfs.kit import WRITE_FLAGS, Kit, is_gone, read_exactly
from tierfs.lent import Note
from tierfs.model import UNPROVEN, Copy, Record, Residency, Stub
from tierfs.readback import Pace, Ref, doubt_copy, drop_copy, examine, presence
from tierfs.shortened import lengthen
from tierfs.spelling import quoted
from tierfs.survey import fresh_record, put_instead, put_new
from tierfs.tier import Tier
from tierfs.tree import fd_path

log = logging.getLogger("recovery")

_PIECE = 8 << 20
_CLAIM_SECONDS = 5.0  # a fetch that is just settling


# --- demotions and fetches that were cut short ------------------------------------------------------------


def finish_pending(tier: Tier) -> int:
    """Bring every file whose punch or settling was cut short to a state of its own; how many are left.

    Left are those that are open now: the fetch that their opening begins will end it.
    """
    position = tier.drain()
    left = take_back(tier)
    for ino in tier.kit.index.pending():
        if not tier.kit.claims.take(ino):
            left += 1
            continue
        try:
            with tier.kit.server.guard([ino], position) as granted:
                if ino in granted:
                    _finish(tier, ino)
                else:
                    left += 1
        except (OSError, TierError) as error:
            left += 1
            tier.kit.troubles.note(f"inode {ino}: what a crash left cannot be finished: {error}", ino)
        finally:
            tier.kit.claims.give(ino)
    return left


def take_back(tier: Tier) -> int:
    """Give files the modes back that they had before a process that was killed worked on them; how many are
    left. One that is not found by what the index knows is gone only when the tree has been looked through."""
    kit, left = tier.kit, 0
    for note in kit.tree.lent.left():
        try:
            if not _took_back(tier, note) and not kit.index.surveyed:
                left += 1
                continue
            kit.tree.lent.drop(note)
        except OSError as error:
            left += 1
            kit.troubles.note(f"the mode of inode {note.ino} is not yet put back: {error.strerror}", note.ino)
    return left


def _took_back(tier: Tier, note: Note) -> bool:
    """False where the file is not to be found."""
    path = _path_of(tier, note.ino)
    if path is None:
        return False
    try:
        fd = os.open(path or b".", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=tier.kit.tree.rootfd)
    except OSError as error:
        if is_gone(error):
            return False
        raise
    try:
        return tier.kit.tree.lent.take_back(note, fd, fd_path(fd))
    finally:
        os.close(fd)


def _path_of(tier: Tier, ino: int) -> bytes | None:
    """Where the index has a file or a directory with this number."""
    record = tier.kit.index.get(ino)
    above = tier.places.directory(ino if record is None else record.parent)
    if above is None:
        return None
    return above.path if record is None else os.path.join(above.path, record.name)


def _finish(tier: Tier, ino: int) -> None:
    kit = tier.kit
    record = kit.index.get(ino)
    if record is None or record.copy is None:
        kit.index.commit(lambda w: w.drop_pending(ino)).result()
        return
    above = tier.places.directory(record.parent)
    path = os.path.join(above.path, record.name) if above is not None else None
    try:
        opath = kit.open(ino, record.handle, os.O_PATH | os.O_NOFOLLOW, path)
    except OSError as error:
        if error.errno not in (errno.ESTALE, errno.ENOENT, errno.ENOTDIR):
            raise
        kit.index.commit(lambda w: w.drop_pending(ino)).result()  # gone since; its mark follows
        return
    try:
        with kit.writable(opath):
            fd = kit.tree.reopen(opath, WRITE_FLAGS & ~os.O_NOFOLLOW)
            try:
                _finish_open(kit, fd, record, record.copy)
            finally:
                os.close(fd)
    finally:
        os.close(opath)


def _finish_open(kit: Kit, fd: int, record: Record, copy: Copy) -> None:
    """Under the guard. The attribute is gone: resident. All blocks are the copy's: resident again. No data: a
    stub whose times may have to be put back. Anything between stays a stub, and fetching it compares pages."""
    kit.tree.read_anew(fd)  # a write that failed may be why there was a crash
    st, stub = os.fstat(fd), kit.tree.read_stub(fd)
    if stub is None:
        os.fsync(fd)
        _commit(kit, record, st, Residency.RESIDENT, proven=False)
    elif stub != Stub.of(record.fid, copy):
        log.warning("inode %d: its stub is not that of its record; the stub counts", record.ino)
        kit.index.commit(lambda w: w.drop_pending(record.ino)).result()
    elif not kit.tree.extents(fd, st.st_size):
        _put_times_back(kit, fd, st, copy)
        os.fsync(fd)
        _commit(kit, record, os.fstat(fd), Residency.STUB)
    elif kit.tree.try_lease(fd, fcntl.F_WRLCK) and st.st_size == copy.size and _is_copy(fd, copy):
        _put_times_back(kit, fd, st, copy)
        kit.tree.clear_stub(fd)
        os.fsync(fd)
        _commit(kit, record, os.fstat(fd), Residency.RESIDENT)
    else:
        if st.st_size == copy.size:
            _put_times_back(kit, fd, st, copy)
        _commit(kit, record, os.fstat(fd), record.residency, proven=False)


def _put_times_back(kit: Kit, fd: int, st: os.stat_result, copy: Copy) -> None:
    """A punch or a fetch was cut short between the blocks and the times."""
    if st.st_mtime_ns != copy.mtime:
        kit.tree.set_times(fd, st.st_atime_ns, copy.mtime)


def _commit(
    kit: Kit, before: Record, st: os.stat_result, residency: Residency, *, proven: bool = True
) -> None:
    """`proven`: what is local was compared just now, or is nothing."""

    def commit(w: Writer) -> None:
        record = w.get(before.ino)
        if record is not None and record.handle == before.handle and record.generation == before.generation:
            assert record.copy is not None
            # Restored times mean that the last change of ctime was ours as well.
            left = st.st_ctime_ns if st.st_mtime_ns == record.copy.mtime else record.left_ctime
            copy = replace(record.copy, custody=record.copy.custody | (0 if proven else UNPROVEN))
            w.put(replace(record, residency=residency, local=st.st_blocks * 512, left_ctime=left, copy=copy))
        w.drop_pending(before.ino)

    failpoints.hit(failpoints.RECOVER_MENDED)
    kit.index.commit(commit).result()
    failpoints.hit(failpoints.RECOVER_COMMITTED)


def _is_copy(fd: int, copy: Copy) -> bool:
    """The file's bytes are those of its copy."""
    if copy.size <= 1 << copy.chunk_shift:
        return sha256(read_exactly(fd, 0, copy.size)) == copy.digest
    digests = b"".join(
        leaf_digests(read_exactly(fd, at, min(_PIECE, copy.size - at))) for at in range(0, copy.size, _PIECE)
    )
    return sha256(digests) == copy.digest


# --- tierfs check -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """One thing that a check found. `repaired`: it is gone now."""

    what: str
    path: bytes = b""
    repaired: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """One regular file of the tree, open by an O_PATH descriptor, and what is known of it."""

    kit: Kit
    path: bytes
    fd: int
    st: os.stat_result
    stub: Stub | None
    record: Record | None
    repair: bool
    read_data: bool
    drain: Callable[[], int]

    @property
    def is_cut(self) -> bool:
        """It is the stub of its record, and of another length than its copy: `check_stub` tells."""
        record, stub = self.record, self.stub
        if record is None or record.copy is None or stub is None:
            return False
        return Stub.of(record.fid, record.copy) == stub and record.copy.size != self.st.st_size


Check = Callable[[Case], Iterator[Found]]


def check_record(case: Case) -> Iterator[Found]:
    """Every regular file has a record, and it says what the stub attribute says."""
    record = case.record
    if record is None:
        yield Found("has no record in the index, or a damaged one", case.path, case.repair and _record(case))
        return
    resident = record.residency is Residency.RESIDENT
    if (case.stub is None) == resident or case.is_cut or _is_moving(case, record):
        return
    said, is_ = record.residency.name.lower(), "resident" if case.stub is None else "a stub"
    repaired = False
    if case.repair and case.stub is None:
        case.kit.index.commit(partial(_make_resident, record.ino)).result()
        repaired = True
    elif case.repair:
        repaired = _record(case)
    yield Found(f"the index says {said}, but it is {is_}", case.path, repaired)


def _is_moving(case: Case, record: Record) -> bool:
    """Between the attribute and the record, which are two: a punch or a fetch is making them agree just now, or
    has done so since the look at them. What a crash has left in between was finished before the check began."""
    index, claims = case.kit.index, case.kit.claims
    if index.is_pending(record.ino) or index.get(record.ino) != record:
        return True
    if not claims.take(record.ino, _CLAIM_SECONDS):
        return True
    try:  # it may have been moved and moved back
        now, stub = index.get(record.ino), case.kit.tree.read_stub(case.fd)
        return now is None or (stub is None) == (now.residency is Residency.RESIDENT)
    finally:
        claims.give(record.ino)


def check_stub(case: Case) -> Iterator[Found]:
    """A stub is that of its record, and of its copy's size."""
    record, stub = case.record, case.stub
    if record is None or stub is None or record.copy is None:
        return
    if Stub.of(record.fid, record.copy) != stub:
        repaired = case.repair and _record(case)
        yield Found("its stub is not that of its record (the stub counts)", case.path, repaired)
    elif case.is_cut:
        what = f"is {case.st.st_size} bytes long, its copy {record.copy.size}"
        why = lengthen(case.kit, case.drain, case.fd, stub) if case.repair else ""
        yield Found(f"{what}, and {why}" if why else what, case.path, case.repair and not why)


def _record(case: Case) -> bool:
    """Give the file a record made from itself; False where that has to wait, or may not be.

    A stub attribute on a file that has a record of its own is believed only where the file has no data: what
    has may be somebody's work. Nothing else works on the inode meanwhile, nothing has changed since the look.
    """
    kit = case.kit
    if not kit.claims.take(case.st.st_ino, _CLAIM_SECONDS):
        return False
    try:
        st, handle = os.fstat(case.fd), kit.tree.handle_of(case.fd)
        before = kit.index.get(st.st_ino)
        if before is not None and before.handle != handle:
            before = None
        if before != case.record or kit.tree.read_stub(case.fd) != case.stub:
            return False
        if case.record is not None and not _is_empty(kit, case.fd, st):
            return False
        parent = os.stat(os.path.dirname(case.path) or b".", dir_fd=kit.tree.rootfd).st_ino
        record = fresh_record(kit, case.fd, st, handle, parent, os.path.basename(case.path))
        twin = kit.holder(record.fid)
        if twin is not None and twin.ino != record.ino:
            return False  # a copy of a stub has no record until it is fetched
        if case.record is None:
            kit.index.commit(partial(put_new, record, case.fd, None)).result()
        else:
            kit.index.commit(partial(put_instead, case.record, record)).result()
        made = kit.index.get(record.ino)
        return made is not None and made.handle == handle and made.fid == record.fid
    except OSError as error:
        log.warning("%s gets no record: %s", quoted(case.path), error)
        return False
    finally:
        kit.claims.give(case.st.st_ino)


def _is_empty(kit: Kit, opath: int, st: os.stat_result) -> bool:
    fd = kit.tree.reopen(opath, os.O_RDONLY | os.O_NOATIME)
    try:
        return not kit.tree.extents(fd, st.st_size)
    finally:
        os.close(fd)


def check_object(case: Case) -> Iterator[Found]:
    """What a file refers to is in the store, in full.

    With `read_data` it is read here where a pass through the index would not come by it.
    """
    record, stub, size = case.record, case.stub, case.st.st_size
    if case.is_cut and record is not None and record.copy is not None:
        size = record.copy.size
    ref = Ref.of_stub(stub, size) if stub is not None else Ref.of_record(record)
    if ref is None:
        return
    problem = presence(case.kit, ref)
    if problem and stub is not None and case.repair and not lengthen(case.kit, case.drain, case.fd, stub):
        # Its record was lost, and the next one knew no other length.
        yield Found(f"{problem}: {ref.key}", case.path, repaired=True)
        return
    if not problem and case.read_data and Ref.of_record(record) != ref:
        problem = examine(case.kit, ref, Pace(lambda: 0.0, threading.Event()))
    if problem:
        repaired = False
        if record is not None and Ref.of_record(record) == ref:
            repaired = case.repair and stub is None and drop_copy(case.kit, record)
            if not repaired:
                doubt_copy(case.kit, record)
        yield Found(f"{problem}: {ref.key}", case.path, repaired)


def _make_resident(ino: int, w: Writer) -> None:
    record = w.get(ino)
    if record is not None and record.residency is not Residency.RESIDENT:
        w.put(replace(record, residency=Residency.RESIDENT, left_ctime=0))


CHECKS: tuple[Check, ...] = (check_record, check_stub, check_object)
