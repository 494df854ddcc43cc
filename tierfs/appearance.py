"""What a file shows of itself while its content is elsewhere: times, blocks, extents, tier and digest."""

from __future__ import annotations

import logging
import os

from tierfs.errors import IndexError_
from tierfs.handles import Inode, Shown, ShownStat, ShownTimes
from tierfs.index import Index
from tierfs.ledger import KeptInode, Ledger
from tierfs.model import Record, Residency, Stub
from tierfs.tree import Tree

log = logging.getLogger("gate")

_LATE_SECONDS = 60.0  # the mover commits what has arrived every 2 s
_MOST_PLAIN = 100_000  # inode numbers, of about 60 bytes each
_PLAIN_SECONDS = 10.0  # a check that repairs the index tells nobody


class Appearance:
    """Read-only answers from the tree, the index and the server's own state; changes nothing."""

    def __init__(
        self,
        tree: Tree,
        index: Index | None,
        inodes: dict[int, Inode],
        recent: dict[int, int],
        ledger: Ledger,
    ) -> None:
        """`inodes` and `recent` (inode -> newest undrained mark) are the Gate's own and kept by it."""
        self._tree = tree
        self._ledger = ledger
        self.index = index
        self.inodes = inodes
        self._recent = recent
        # What a file showed whose content has come in part, until the index knows the times that this has left.
        # A successor has it from the ledger: what is taken from here in C, too, goes through `changed`.
        self.late: dict[int, tuple[ShownTimes, float]] = {}
        self._slots: dict[int, int] = {}  # in the ledger, of those that have no state of their own
        # Resident files that show what they are: only a punch changes that, and it begins with a guard.
        self.plain: set[int] = set()
        self._plain_until = 0.0

    def left(self, inode: Inode, now: float) -> None:
        """The state of this inode, which is still a stub, is about to be dropped."""
        if inode.shown is not None and os.fstat(inode.opath).st_nlink:
            self.late[inode.ino] = inode.shown, now + _LATE_SECONDS
            if inode.slot:
                self._slots[inode.ino], inode.slot = inode.slot, 0

    def entered(self, inode: Inode) -> None:
        """It has a state again, which keeps what is in the ledger of it."""
        if not inode.slot:
            inode.slot = self._slots.pop(inode.ino, 0)

    def take_over(self, kept: KeptInode, now: float) -> bool:
        """A server before us has left this of an inode that nobody has open. False: it means nothing now."""
        if kept.shown is None or kept.backing_id or not self._is_stub(kept.ino):
            return False
        self.late[kept.ino] = ShownTimes(*kept.shown), now + _LATE_SECONDS
        self._slots[kept.ino] = kept.slot
        return True

    def _is_stub(self, ino: int) -> bool:
        """The file that the index knows under this number, a stub, is there: no other has got its number."""
        record = self.record(ino)
        if record is None or record.copy is None or record.residency is Residency.RESIDENT:
            return False
        try:
            fd = self._tree.open_handle(record.handle, os.O_PATH)
        except OSError:
            return False
        try:
            return os.fstat(fd).st_nlink > 0
        finally:
            os.close(fd)

    def changed(self, ino: int) -> None:
        """Somebody has changed it: from now on it shows its own times."""
        if self.late.pop(ino, None) is not None:
            self._let_go(ino)

    def _let_go(self, ino: int) -> None:
        slot = self._slots.pop(ino, 0)
        if slot:
            self._ledger.drop_inode(slot)

    def moving(self, ino: int) -> None:
        """Its content is about to change place, or has just done so."""
        self.plain.discard(ino)

    def doubt(self) -> None:
        """Another mover begins: the index may have been put right."""
        self.plain.clear()

    def tick(self, now: float) -> None:
        """Forget what the index must know by now, and what it may know better."""
        if now >= self._plain_until:
            self._plain_until = now + _PLAIN_SECONDS
            self.plain.clear()
        while self.late:
            ino, (_, until) = next(iter(self.late.items()))
            if until > now:
                return
            del self.late[ino]
            self._let_go(ino)

    def shown(self, st: os.stat_result, opath: int | None = None) -> Shown:
        """What a stat of this regular file shows."""
        if self.is_itself(st.st_ino, st.st_ctime_ns, st.st_blocks):
            return st
        inode = self.inodes.get(st.st_ino)
        if inode is not None and inode.shown is not None:
            times = inode.shown
            return ShownStat(st, times.mtime, times.ctime, times.blocks)
        late = self.late.get(st.st_ino)
        record = self.record(st.st_ino)
        if late is not None and (record is None or record.left_ctime != st.st_ctime_ns):
            return ShownStat(st, late[0].mtime, late[0].ctime, late[0].blocks)
        if record is None:
            return st
        if record.residency is Residency.RESIDENT and record.left_ctime != st.st_ctime_ns:
            self._keep_plain(st.st_ino)
            return st
        if record.copy is None:
            return st
        stub = record.residency is not Residency.RESIDENT and record.size == st.st_size
        blocks = max(record.blocks, st.st_blocks) if stub else st.st_blocks
        if record.left_ctime == st.st_ctime_ns:
            return ShownStat(st, record.copy.mtime, record.copy.ctime, blocks)
        if blocks != st.st_blocks:
            return ShownStat(st, st.st_mtime_ns, st.st_ctime_ns, blocks)
        return st

    def is_itself(self, ino: int, ctime: int, blocks: int) -> bool:
        """Whether a regular file shows what it is: known, or said by the index without its whole record.

        False where it is in doubt.
        """
        if ino in self.plain:
            return True
        inode = self.inodes.get(ino)
        # Without blocks it is a stub, most likely, whose whole record is needed anyway.
        if not blocks or self.index is None or ino in self.late:
            return False
        if inode is not None and inode.shown is not None:
            return False
        try:
            plain = self.index.is_plain(ino, ctime)
        except IndexError_:
            return False  # the look at the record says what is wrong
        if plain:
            self._keep_plain(ino)
        return plain

    def _keep_plain(self, ino: int) -> None:
        if len(self.plain) >= _MOST_PLAIN:
            self.plain.clear()
        self.plain.add(ino)

    def stub_of(self, st: os.stat_result, opath: int) -> Stub | None:
        """What the inode's stub attribute says, None for a resident file."""
        inode = self.inodes.get(st.st_ino)
        if inode is not None and inode.content is not None:
            return inode.content.stub if inode.content.missing else None
        return self._tree.read_stub(opath)

    def extents(self, st: os.stat_result, opath: int) -> list[tuple[int, int]] | None:
        """The data ranges that SEEK_DATA and SEEK_HOLE show for a stub; None: ask the file itself."""
        stub = self.stub_of(st, opath)
        if stub is None:
            return None
        leaves = self.index.get_leaves(stub.fid, stub.generation) if self.index is not None else None
        if leaves is None or not leaves.extents:
            return [(0, st.st_size)]
        return list(leaves.extents)

    def tier_of(self, st: os.stat_result, opath: int) -> bytes:
        """`resident`, `partial` or `stub`."""
        if self.stub_of(st, opath) is None:
            return b"resident"
        return b"partial" if st.st_blocks and self._has_data(st, opath) else b"stub"

    def _has_data(self, st: os.stat_result, opath: int) -> bool:
        inode = self.inodes.get(st.st_ino)
        if inode is not None and inode.content is not None:
            return inode.content.missing < len(inode.content.present)
        record = self.record(st.st_ino)
        return record is not None and record.residency is Residency.PARTIAL

    def digest_of(self, st: os.stat_result, opath: int) -> bytes | None:
        """`sha256:<hex>` of the content (`blake3-64k:` of the list of leaf digests in a large file).

        None where no proven copy of the present content is known.
        """
        stub = self.stub_of(st, opath)
        if stub is not None:
            digest, large = stub.digest, st.st_size > 1 << stub.chunk_shift
        else:
            record = self.record(st.st_ino)
            if record is None or record.copy is None or record.dirty or st.st_ino in self._recent:
                return None
            copy = record.copy
            if copy.mtime != st.st_mtime_ns or st.st_ctime_ns not in (copy.ctime, record.left_ctime):
                return None
            digest, large = copy.digest, copy.size > 1 << copy.chunk_shift
        return (b"blake3-64k:" if large else b"sha256:") + digest.hex().encode()

    def record(self, ino: int) -> Record | None:
        """The index's record; None where it has none or it is damaged."""
        if self.index is None:
            return None
        try:
            return self.index.get(ino)
        except IndexError_ as error:
            # The stub attribute decides about content; without a record only shown times may be off.
            log.error("index record of inode %d: %s", ino, error)
            return None
