"""Freeing the blocks of files whose copy is proven (custody rules 5 to 7, 12, 14). The only caller of a punch.

    guard (no handle, no undrained mark) → F_WRLCK → tuple, generation, custody, pins → DemotionProof
      → fdatasync → stub attribute, fsync → commit STUB and pending → F_WRLCK still? → punch → times → fsync
      → commit left_ctime, not pending → unlease → guard ends

Up to the commit of STUB whoever wants in wins: the attribute is taken away again. Behind it the punch is
finished, which takes a millisecond; a lost lease backs out even then.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from tierfs import failpoints, syscalls, transitions
from tierfs.copying import Item
from tierfs.digests import have_digests, sha256
from tierfs.errors import BusyError, ForeignStubError, TierError
from tierfs.index import Writer
from tierfs.kit import GONE, WRITE_FLAGS, Kit, may_be_gone, proven, read_exactly, unopened
from tierfs.model import DOUBTED, LEAF, Copy, Record, Residency, Stub
from tierfs.places import Places

log = logging.getLogger("mover")

BATCH = 64
_MINT = object()


class DemotionProof:
    """That one inode's blocks may go: `st` under the write lease equals what its verified copy was taken from.

    Only `Puncher` can make one; `punch` takes nothing else.
    """

    __slots__ = ("copy", "record", "st")

    def __init__(self, mint: object, record: Record, copy: Copy, st: os.stat_result) -> None:
        if mint is not _MINT:
            raise TypeError("only the Puncher proves that blocks may be freed")
        self.record = record
        self.copy = copy
        self.st = st


@dataclass(slots=True)
class _Held:
    """A file under guard and write lease."""

    item: Item
    fd: int
    proof: DemotionProof | None = None
    marked: bool = False  # it may have the stub attribute
    committed: bool = False
    punched: bool = False  # blocks may be gone


class Puncher:
    """Turns clean resident files into stubs."""

    def __init__(self, kit: Kit, drain: Callable[[], int], places: Places) -> None:
        self._kit = kit
        self._drain = drain
        self._places = places

    def punch(self, items: list[Item]) -> None:
        """Punch those items of at most BATCH that are still going; the others say why they stay.

        The inodes are claimed by the caller. Raises BusyError where the server is gone, IndexError_, OSError.
        """
        for item in items:
            item.close()  # a read descriptor of ours would be in the way of the write lease
        position = self._drain()
        with self._kit.server.guard([item.ino for item in items], position) as granted:
            held: list[_Held] = []
            try:
                for item in items:
                    if item.ino in granted:
                        self._hold(item, held)
                    else:
                        item.stay("is open")
                self._make_stubs(held)
            finally:
                for file in held:
                    self._let_go(file)

    # --- proof --------------------------------------------------------------------------------------------

    def _hold(self, item: Item, held: list[_Held]) -> None:
        try:
            fd = self._open(item)
        except OSError as error:
            item.stay(unopened(error))
            return
        file = _Held(item, fd)
        held.append(file)
        try:
            if not self._kit.tree.try_lease(fd, fcntl.F_WRLCK):
                item.stay("is open or mapped")
                return
            file.proof = self._prove_again(item, fd) if item.again else self._prove(item, fd)
        except (ForeignStubError, OSError) as error:  # of this file, and no reason for the others
            item.stay(str(error), failed=True)

    def _open(self, item: Item) -> int:
        opath = self._kit.open(item.ino, item.handle, os.O_PATH | os.O_NOFOLLOW, item.path)
        try:
            item.st = os.fstat(opath)
            with self._kit.writable(opath):
                return self._kit.tree.reopen(opath, WRITE_FLAGS & ~os.O_NOFOLLOW)
        finally:
            os.close(opath)

    def _prove(self, item: Item, fd: int) -> DemotionProof | None:
        """The one place that mints a proof; None (with a reason) where anything is in doubt."""
        before, st = item.st, os.fstat(fd)
        assert before is not None
        record = self._kit.index.get(item.ino)
        # Where mtime is put back after a change between that look and the lease, only ctime tells. But without
        # privileges opening may have moved it (Kit.writable); then everything else must be as before.
        opening_moved = not self._kit.tree.privileged and not before.st_mode & stat.S_IWUSR
        now = before if opening_moved else st
        if (before.st_mtime_ns, before.st_size) != (st.st_mtime_ns, st.st_size):
            item.stay("is changing right now")
        elif record is None or record.copy is None or record.handle != item.handle:
            item.stay("has no copy")
        elif max(st.st_mtime_ns, st.st_ctime_ns) >= 1 << 63:  # more than a record holds: no copy is bound to it
            item.stay("has a time after the year 2262")
        elif not proven(record, now, self._kit.custody) or record.residency is not Residency.RESIDENT:
            item.stay("was changed after it was copied")
        elif self._may_go(item, fd, record):
            return DemotionProof(_MINT, record, record.copy, st)
        return None

    def _prove_again(self, item: Item, fd: int) -> DemotionProof | None:
        """For a stub of which something has come back: what is local was checked when it was written, and
        nothing has touched the inode since; otherwise each leaf is compared with its digest."""
        st, record = os.fstat(fd), self._kit.index.get(item.ino)
        copy = record.copy if record is not None else None
        if record is None or copy is None or record.handle != item.handle:
            item.stay("has no record: a look through the tree makes one")
        elif self._kit.tree.read_stub(fd) != Stub.of(record.fid, copy) or copy.size != st.st_size:
            item.stay("its stub is not that of its record", failed=True)
        elif copy.custody == DOUBTED:
            item.stay("its copy was found bad: what is here of it stays")
        elif may_be_gone(self._kit, copy):
            item.stay("the store was another machine's meanwhile: what is here of it stays")
        elif self._may_go(item, fd, record):
            checked = record.residency is Residency.PARTIAL and copy.custody == self._kit.custody
            untouched = st.st_ctime_ns == record.left_ctime and st.st_mtime_ns == copy.mtime
            if not (checked and untouched) and not self._local_is_copy(item, fd, record, copy):
                item.stay("holds data that is not its copy's", failed=True)
                return None
            if not untouched:
                # Its attributes were changed: those times are shown.
                copy = replace(copy, mtime=st.st_mtime_ns, ctime=st.st_ctime_ns)
            return DemotionProof(_MINT, record, copy, st)
        return None

    def _local_is_copy(self, item: Item, fd: int, record: Record, copy: Copy) -> bool:
        """Every leaf that holds data has the copy's digest. Gives up when somebody waits for the file."""
        extents = self._kit.tree.extents(fd, copy.size)
        if copy.size <= 1 << copy.chunk_shift:
            return not extents or sha256(read_exactly(fd, 0, copy.size)) == copy.digest
        leaves = self._kit.index.get_leaves(record.fid, copy.generation)
        if leaves is None or sha256(leaves.digests) != copy.digest:
            return False
        for leaf in sorted({n for low, high in extents for n in range(low // LEAF, -(-high // LEAF))}):
            data = read_exactly(fd, leaf * LEAF, min(LEAF, copy.size - leaf * LEAF))
            wanted = leaves.digests[leaf * 32 : leaf * 32 + 32]
            if not have_digests(data, wanted) or self._kit.server.wanted(item.ino):
                return False
        return True

    def _may_go(self, item: Item, fd: int, record: Record) -> bool:
        """Nothing is pinned, neither it nor above it; where it stays the item says so."""
        place = self._places.of_file(fd, record.parent, record.name)
        if place is None:
            item.stay("was moved just now" if os.fstat(fd).st_nlink else GONE)
        elif place.pinned:
            item.stay("is pinned")
        return item.going

    # --- from resident to stub ----------------------------------------------------------------------------

    def _sync(self, held: list[_Held]) -> None:
        """Content and size are on the disk before the attribute may be, which any commit of the filesystem's
        journal takes there: after a power cut it would be on a file that is not its copy's, and that nobody can
        open. All are on their way before the first is waited for, whose commit then does for most of them."""
        for step in (syscalls.begin_writing, os.fdatasync):
            for file in held:
                try:
                    if file.proof is not None and not file.item.again and file.item.going:
                        step(file.fd)
                except OSError as error:
                    file.item.stay(f"its content cannot be written to the disk: {error.strerror}", failed=True)

    def _make_stubs(self, held: list[_Held]) -> None:
        tree = self._kit.tree
        self._sync(held)
        for file in held:
            if file.proof is not None and not file.item.again and file.item.going:
                file.marked = True
                try:
                    with self._kit.writable(file.fd):
                        tree.write_stub(file.fd, Stub.of(file.proof.record.fid, file.proof.copy))
                except OSError as error:
                    file.item.stay(f"its stub cannot be written: {error.strerror}", failed=True)
        for file in held:
            if file.marked and file.item.going:
                # The first one commits the journal for all.
                os.fsync(file.fd)
        failpoints.hit(failpoints.STUB_WRITTEN)
        ready = [file for file in held if file.proof and file.item.going and self._undisturbed(file)]
        self._commit_stubs(ready)
        failpoints.hit(failpoints.STUB_COMMITTED)
        punched = [file for file in ready if file.committed and self._punch(file)]
        for file in punched:
            os.fsync(file.fd)
        failpoints.hit(failpoints.PUNCH_SYNCED)
        self._commit_punched(punched)

    def _undisturbed(self, file: _Held) -> bool:
        if self._kit.tree.lease_kind(file.fd) == fcntl.F_WRLCK and not self._kit.server.wanted(file.item.ino):
            return True
        file.item.stay("was opened meanwhile")
        return False

    def _commit_stubs(self, files: list[_Held]) -> None:
        futures = []
        for file in files:
            assert file.proof is not None
            before = file.proof.record
            blocks = before.blocks if file.item.again else file.proof.st.st_blocks
            stub = transitions.stubbed(before, blocks, file.proof.copy)
            futures.append(self._kit.index.commit(partial(_put_stub, before, stub)))
        for file, future in zip(files, futures, strict=True):
            try:
                future.result()
                file.committed = True
            except BusyError as error:
                file.item.stay(str(error))

    def _punch(self, file: _Held) -> bool:
        """Free the blocks. A lease that is being broken means somebody got in past the guard: then not."""
        proof, tree = file.proof, self._kit.tree
        assert proof is not None
        if tree.lease_kind(file.fd) != fcntl.F_WRLCK:
            file.item.stay("was opened meanwhile")
            return False
        file.punched = True
        tree.punch(file.fd, proof.st)
        failpoints.hit(failpoints.PUNCHED)
        tree.set_times(file.fd, proof.st.st_atime_ns, proof.st.st_mtime_ns)
        return True

    def _commit_punched(self, files: list[_Held]) -> None:
        futures = []
        for file in files:
            st = os.fstat(file.fd)
            futures.append(self._kit.index.commit(partial(_put_punched, st)))
        for file, future in zip(files, futures, strict=True):
            future.result()
            file.item.demoted = True
            self._kit.movements.left(file.item.ino)

    # --- afterwards ---------------------------------------------------------------------------------------

    def _let_go(self, file: _Held) -> None:
        """What was not punched is as it was before; then the lease ends."""
        try:
            if file.marked and not file.punched:
                self._back_out(file)
        except (OSError, TierError) as error:
            what = f"inode {file.item.ino} could not be made resident again: {error}"
            self._kit.troubles.note(what, file.item.ino)
        finally:
            os.close(file.fd)

    def _back_out(self, file: _Held) -> None:
        """All blocks are there: the attribute goes, durably, and the record is RESIDENT."""
        assert file.proof is not None
        with self._kit.writable(file.fd):
            self._kit.tree.clear_stub(file.fd)
        os.fsync(file.fd)
        st, before = os.fstat(file.fd), file.proof.record
        # Under an unbroken lease this ctime is our own doing, and the content still the proven one.
        ours = self._kit.tree.lease_kind(file.fd) == fcntl.F_WRLCK
        self._kit.index.commit(partial(_put_resident, before, st, ours)).result()


def _put_stub(before: Record, stub: Record, w: Writer) -> None:
    """Raises BusyError unless the record is what the proof was made from."""
    if w.get(before.ino) != before:
        raise BusyError("was changed meanwhile")
    w.put(stub)
    w.put_pending(before.ino)


def _put_punched(st: os.stat_result, w: Writer) -> None:
    record = w.get(st.st_ino)
    if record is not None and record.residency is Residency.STUB:
        w.put(transitions.punched(record, st.st_ctime_ns, st.st_blocks))
    w.drop_pending(st.st_ino)


def _put_resident(before: Record, st: os.stat_result, ours: bool, w: Writer) -> None:
    record = w.get(before.ino)
    if record is not None and record.generation == before.generation and record.handle == before.handle:
        left = st.st_ctime_ns if ours else record.left_ctime
        w.put(transitions.whole(record, st.st_blocks, left))
    w.drop_pending(before.ino)
