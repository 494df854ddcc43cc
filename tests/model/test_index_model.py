"""The index beside plain dictionaries under random commits, some of them failing, and reopened at times."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import former
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tierfs.errors import TransitionError
from tierfs.index import Index, Totals
from tierfs.model import Copy, Record, Residency

INOS = st.integers(1, 6)
FIDS = st.integers(1, 6).map(lambda number: number.to_bytes(16, "big"))
COPIES = st.none() | st.integers(1, 3).map(lambda g: Copy(g, b"t" * 8, b"d" * 32, 10 * g, g, g, 1))
RECORDS = st.builds(
    Record,
    ino=INOS,
    handle=st.binary(max_size=12),
    fid=FIDS,
    generation=st.integers(1, 3),
    residency=st.sampled_from(Residency),
    size=st.integers(1, 3).map(lambda g: 10 * g),
    blocks=st.integers(0, 1 << 31),
    local=st.integers(0, 1 << 50),
    parent=st.integers(0, (1 << 64) - 1),
    name=st.binary(max_size=255),
    copy=COPIES,
    left_ctime=st.integers(-(1 << 62), 1 << 62),
)


def legal(before, record):
    if record.residency is Residency.RESIDENT:
        return True
    falls = before is not None and before.fid == record.fid and before.residency is Residency.RESIDENT
    if record.dirty or record.copy.size != record.size:
        return False
    return not (falls and record.residency is Residency.PARTIAL)


class IndexMachine(RuleBasedStateMachine):
    @initialize(found=st.lists(RECORDS, unique_by=(lambda r: r.ino, lambda r: r.fid)))
    def begin(self, found):
        """With an index of the former format, or (nothing in it) a new one."""
        self.path = tempfile.mkdtemp(prefix="tierfs-model-")
        found = [record for record in found if legal(None, record)]
        if found:
            former.write(Path(self.path), [(r, number * r.dirty) for number, r in enumerate(found, 1)])
        self.index = Index.open(self.path)
        self.records: dict[int, Record] = {record.ino: record for record in found}
        self.fids: dict[bytes, int] = {record.fid: record.ino for record in found}
        self.bits: dict[int, bytes] = {}
        self.queue: list[int] = [record.ino for record in found if record.dirty]

    def teardown(self):
        if hasattr(self, "index"):
            self.index.close()
            shutil.rmtree(self.path)

    def _drop_fid(self, record):
        if self.fids.get(record.fid) == record.ino:
            del self.fids[record.fid]

    @rule(record=RECORDS)
    def put(self, record):
        before = self.records.get(record.ino)
        future = self.index.commit(lambda w: w.put(record))
        if not legal(before, record):
            assert isinstance(future.exception(), TransitionError)
            return
        future.result()
        changed = before is None or (before.generation, before.size) != (record.generation, record.size)
        if record.ino in self.queue and (changed or not record.dirty):
            self.queue.remove(record.ino)
        if record.dirty and record.ino not in self.queue:
            self.queue.append(record.ino)
        if before is not None and before.fid != record.fid:
            self._drop_fid(before)
        if before is None or before.fid != record.fid:
            self.fids[record.fid] = record.ino
        if before is not None and before.residency is Residency.PARTIAL is not record.residency:
            self.bits.pop(record.ino, None)
        self.records[record.ino] = record

    @rule(ino=INOS)
    def delete(self, ino):
        self.index.commit(lambda w: w.delete(ino)).result()
        before = self.records.pop(ino, None)
        if before is not None:
            self._drop_fid(before)
        self.bits.pop(ino, None)
        if ino in self.queue:
            self.queue.remove(ino)

    @rule(ino=INOS, bits=st.binary(max_size=300))
    def put_bits(self, ino, bits):
        self.index.commit(lambda w: w.put_bits(ino, bits)).result()
        self.bits[ino] = bits

    @rule(ino=INOS)
    def close_file(self, ino):
        if ino not in self.records:
            return
        self.index.commit(lambda w: w.put(w.get(ino), touched=True)).result()
        if ino in self.queue:
            self.queue.remove(ino)
            self.queue.append(ino)

    @rule(record=RECORDS, ino=INOS)
    def fail_half_way(self, record, ino):
        def run(w):
            w.delete(ino)
            w.put(replace(record, residency=Residency.RESIDENT))
            w.put_bits(ino, b"never")
            raise ValueError("no")

        assert isinstance(self.index.commit(run).exception(), ValueError)

    @rule()
    def reopen(self):
        self.index.close()
        self.index = Index.open(self.path)

    @invariant()
    def all_is_as_in_the_dictionaries(self):
        if not hasattr(self, "index"):
            return
        assert {r.ino: r for r in self.index.records()} == self.records
        for ino in range(1, 7):
            assert self.index.get(ino) == self.records.get(ino)
            assert self.index.get_bits(ino) == self.bits.get(ino)
            fid = ino.to_bytes(16, "big")
            found, expected = self.index.get_by_fid(fid), self.fids.get(fid)
            assert found == (self.records[expected] if expected else None)
        assert self.index.quiet(1 << 63) == self.queue
        recount = self.index.commit(lambda w: w.recount(False)).result()
        assert recount.kept == recount.counted and not recount.damaged and not recount.misqueued
        dirty = [r.size for r in self.records.values() if r.dirty]
        everything = self.records.values()
        assert self.index.totals() == Totals(
            len(everything),
            sum(r.residency is Residency.STUB for r in everything),
            sum(r.local for r in everything),
            sum(r.size for r in everything),
            len(dirty),
            sum(dirty),
        )


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
