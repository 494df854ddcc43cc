"""An index of the former format is read as it is, changes with its records, and is never misread."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import former
import lmdb
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierfs import pages
from tierfs.codec import is_plain, pack_record, unpack_record, unpack_since
from tierfs.errors import IndexError_
from tierfs.index import Index, Totals
from tierfs.index_writer import FORMAT
from tierfs.model import CHUNK_SHIFT, DOUBTED, Copy, Record, Residency

SIZES = st.integers(0, 70_000) | st.integers(0, (1 << 63) - 1)
TIMES = st.integers(-(1 << 63), (1 << 63) - 1)
GENERATIONS = st.integers(0, (1 << 48) - 1)
LATER = st.sampled_from((0, 1, -1, (1 << 31) - 1, 1 << 31, -(1 << 31), -(1 << 31) - 1, 1 << 62))
CHUNKS = st.sampled_from((CHUNK_SHIFT, 16, 31))
CUSTODIES = st.sampled_from((0, 1, 255, 256, DOUBTED))


@st.composite
def records(draw):
    """Of any shape: what is mostly left out is there or not."""
    ino = draw(st.integers(0, 1 << 33) | st.integers(0, (1 << 64) - 1))
    numbered = b"\1\0\0\0" + ino.to_bytes(8, "little")[:4] + draw(st.binary(min_size=4, max_size=4))
    generation, size = draw(GENERATIONS), draw(SIZES)
    blocks = draw(st.sampled_from((0, min(-(-size // 4096) * 8, 0xFFFFFFFF), 7, 0xFFFFFFFF)))
    mtime = draw(st.integers(-(1 << 61), 1 << 61))
    copy = Copy(
        draw(st.just(generation) | GENERATIONS), draw(st.binary(min_size=8, max_size=8)), os.urandom(32),
        draw(st.just(size) | SIZES), mtime, mtime + draw(LATER), draw(CUSTODIES), draw(CHUNKS),
    )  # fmt: skip
    return Record(
        ino, draw(st.just(numbered) | st.binary(max_size=132)), os.urandom(16), generation,
        draw(st.sampled_from(Residency)), size, blocks, draw(st.sampled_from((0, blocks * 512, 1, size))),
        draw(st.sampled_from((0, 2, 1 << 16, 1 << 32, (1 << 64) - 1))), draw(st.binary(max_size=255)),
        draw(st.none() | st.just(copy)), draw(st.just(0) | TIMES),
    )  # fmt: skip


@settings(max_examples=300)
@given(records(), st.sampled_from((0, 1, (1 << 64) - 1)))
def test_a_record_of_any_shape_comes_back(record, since):
    raw = pack_record(record, since)
    assert unpack_record(record.ino, raw) == record and unpack_since(record.ino, raw) == since
    plain = record.residency is Residency.RESIDENT
    assert is_plain(record.ino, raw, record.left_ctime) is False
    assert is_plain(record.ino, raw, record.left_ctime ^ 1) is plain


@settings(max_examples=60)
@given(records(), st.integers(0, 10_000), st.integers(1, 255))
def test_no_version_of_a_record_is_taken_for_another(record, at, bits):
    assert all(unpack_record(record.ino, former.pack_record(record, of)) == record for of in (1, 2))
    for raw in (pack_record(record, 5), former.pack_record(record, 2), former.pack_record(record, 1)):
        for version in set(range(256)) - {raw[0]}:
            with pytest.raises(IndexError_):
                unpack_record(record.ino, bytes([version]) + raw[1:])
        wrong = bytearray(raw)
        wrong[at % len(raw)] ^= bits
        with pytest.raises(IndexError_):
            unpack_since(record.ino, bytes(wrong))


def a_record(ino, *, dirty=False, **changes):
    generation = 3 << 28 | ino
    copy = Copy(generation - dirty, b"t" * 8, b"d" * 32, 1000, 11, 22, 2)
    handle = b"\1\0\0\0" + ino.to_bytes(4, "little") + b"gen!"
    fid = ino.to_bytes(16, "big")
    made = Record(
        ino, handle, fid, generation, Residency.RESIDENT, 1000, 8, 4096, 2, b"name%d" % ino, copy, 33
    )
    return replace(made, **changes)


STUB = a_record(1, residency=Residency.STUB, local=0)
CLEAN, NEVER = a_record(2), a_record(5, copy=None)
FIRST, SECOND = a_record(3, dirty=True), a_record(4, dirty=True)
OLD = [(STUB, 0), (CLEAN, 0), (FIRST, 1000), (SECOND, 2000), (NEVER, 3000)]


@pytest.fixture
def old(tmp_path):
    """The directory of an index of the former format."""
    former.write(tmp_path / "index", OLD)
    return tmp_path / "index"


def raw_meta(path):
    with lmdb.open(str(path), max_dbs=20, readonly=True, lock=False) as env, env.begin() as txn:
        return msgspec.msgpack.decode(txn.get(b"meta", db=env.open_db(b"meta", txn=txn, create=False))[4:])


def entries(index, table):
    with index._env.begin() as txn:
        return txn.stat(index.tables[table])["entries"]


def holds_all(index):
    """Everything that the former version knew."""
    assert list(index.records()) == [record for record, _ in OLD]
    assert [index.dirty_since(record.ino) for record, _ in OLD] == [since for _, since in OLD]
    assert index.quiet(1 << 62) == [3, 4, 5] and index.oldest_dirty() == 1000
    assert index.get_by_fid(FIRST.fid) == FIRST and index.log_position() == 640 and index.surveyed
    assert index.totals() == Totals(5, 1, 4 * 4096, 5000, 3, 3000)
    assert index.is_plain(2, 44) and not index.is_plain(2, 33) and not index.is_plain(1, 44)


def test_looking_at_a_former_index_leaves_it_as_it_was(old):
    """A version that is asked whether it could take over must not shut out the one that serves."""
    before = (old / "data.mdb").read_bytes()
    index = Index.open(str(old), readonly=True)
    holds_all(index)
    assert index.rescue(FIRST.fid) is None and list(index.rescue_keys()) == [], "a table it does not have"
    index.close()
    assert (old / "data.mdb").read_bytes() == before


def test_nothing_is_forgotten_by_taking_a_former_index_over(old):
    index = Index.open(str(old))
    holds_all(index)
    session = index.begin_session("a")
    assert (session.epoch, session.custody) == (4, 2), "as after any orderly end: no copy needs another proof"
    index.close()
    again = Index.open(str(old))
    holds_all(again)
    again.close()


def test_a_former_program_is_kept_from_an_index_taken_over(old):
    """It opens its tables, then compares the format, and refuses before it reads anything else."""
    Index.open(str(old)).close()
    assert raw_meta(old)["format"] == FORMAT == 2
    with lmdb.open(str(old), max_dbs=20, readonly=True, lock=False) as env:
        for name in former._TABLES:
            env.open_db(name.encode(), create=False)


def test_records_move_one_by_one_and_take_their_time_in_the_queue_with_them(old):
    index = Index.open(str(old))
    index.commit(lambda w: w.put(replace(FIRST, name=b"renamed"))).result()
    assert index.dirty_since(3) == 1000 and index.quiet(1 << 62) == [3, 4, 5], "its content did not change"
    assert entries(index, "dirty") == 2
    index.commit(lambda w: w.put(SECOND, touched=True)).result()
    assert index.quiet(1 << 62) == [3, 5, 4] and index.dirty_since(4) > 3000
    index.commit(lambda w: w.put(replace(NEVER, copy=a_record(5).copy))).result()
    assert index.quiet(1 << 62) == [3, 4] and index.dirty_since(5) == 0 and entries(index, "dirty") == 0
    index.commit(lambda w: [w.delete(ino) for ino in (3, 4)]).result()
    assert entries(index, "quiet") == 0 and index.totals().dirty_files == 0
    found = index.commit(lambda w: w.recount(False)).result()
    assert found.kept == found.counted and not found.damaged and not found.misqueued
    index.close()


def test_a_former_files_row_goes_with_the_file(old):
    index = Index.open(str(old))
    index.commit(lambda w: [w.delete(ino) for ino in (3, 4, 5)]).result()
    assert entries(index, "dirty") == entries(index, "quiet") == 0
    index.close()


@pytest.mark.parametrize("moment", range(6))
def test_cut_off_anywhere_the_way_over_goes_on(old, tmp_path, moment):
    """As it is on the disk after each commit of the way: each is whole, and the next open goes on from it."""
    changes = [
        lambda w: None,
        lambda w: w.put(replace(FIRST, name=b"renamed")),
        lambda w: w.put(SECOND, touched=True),
        lambda w: w.put(replace(NEVER, copy=a_record(5).copy)),
        lambda w: w.delete(1),
    ]
    index = Index.open(str(old))
    for change in changes[:moment]:
        index.commit(change).result()
    cut = tmp_path / "cut"
    cut.mkdir()
    shutil.copy(old / "data.mdb", cut / "data.mdb")
    index.close()
    pages.verify(str(cut / "data.mdb"))
    again = Index.open(str(cut))
    found = again.commit(lambda w: w.recount(False)).result()
    assert found.kept == found.counted and not found.damaged and not found.misqueued
    for change in changes[moment:]:
        again.commit(change).result()
    assert again.quiet(1 << 62) == [3, 4] and again.dirty_since(3) == 1000
    assert [record.ino for record in again.records()] == [2, 3, 4, 5]
    again.close()


def test_the_format_of_a_later_version_is_refused_and_left_alone(old):
    index = Index.open(str(old))
    with index.write() as writer:
        writer.meta.format = FORMAT + 1
    index.close()
    before = (old / "data.mdb").read_bytes()
    for readonly in (True, False):
        with pytest.raises(IndexError_, match="format 3, this version reads 2 and older: use"):
            Index.open(str(old), readonly=readonly)
    assert (old / "data.mdb").read_bytes() == before


# --- the queue of dirty files -----------------------------------------------------------------------------


def raw_put(index, table, key, value):
    index.commit(lambda w: w._txn.put(key, value, db=w._db[table])).result()


def recount(index, repair):
    return index.commit(lambda w: w.recount(repair)).result()


def test_a_dirty_file_that_is_not_queued_is_found_and_queued(old):
    index = Index.open(str(old))
    index.commit(lambda w: [w._txn.delete(former.u64(1000, 3), db=w._db["quiet"])]).result()
    raw_put(index, "files", former.u64(4), pack_record(SECOND))  # as if it had never been queued
    assert recount(index, False).misqueued == 3, "two files, and the row that one left behind"
    assert index.quiet(1 << 62) == [4, 5], "looking changes nothing"
    assert recount(index, True).misqueued == 3 and recount(index, False).misqueued == 0
    assert sorted(index.quiet(1 << 62)) == [3, 4, 5] and index.get(3) == FIRST
    index.close()


def damage(index, ino):
    raw_put(index, "files", former.u64(ino), b"\3 no record at all" * 3)


@pytest.mark.parametrize("form", ["now", "former"])
def test_a_damaged_record_leaves_nothing_in_the_queue_once_it_is_replaced(old, form):
    index = Index.open(str(old))
    if form == "now":
        index.commit(lambda w: [w.put(record, touched=True) for record in (FIRST, SECOND)]).result()
    for ino in (3, 4):
        damage(index, ino)
    index.commit(lambda w: (w.put(FIRST), w.delete(4))).result()
    assert index.quiet(1 << 62) == [5, 3] and entries(index, "dirty") == 1
    assert recount(index, False).misqueued == 0
    index.close()


def test_what_a_damaged_record_leaves_in_the_queue_is_removed(old):
    index = Index.open(str(old))
    damage(index, 3)
    found = recount(index, True)
    assert (found.damaged, found.misqueued) == (1, 1) and index.quiet(1 << 62) == [4, 5]
    index.close()
