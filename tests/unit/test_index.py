"""The durable index: what is put is found, damage is noticed, totals and queues follow, commits are shared."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace

import lmdb
import pytest

from tierfs import index as index_module
from tierfs import pages
from tierfs.codec import is_plain, pack_record, unpack_record
from tierfs.draining import apply
from tierfs.errors import IndexError_
from tierfs.index import Index, Totals
from tierfs.marks import Entry, Mark
from tierfs.model import Copy, Record, Residency, make_generation
from tierfs.past import Ending


def record(ino=5, *, copied=True, residency=Residency.RESIDENT, **changes):
    generation = make_generation(1, ino)
    copy = Copy(generation, b"t" * 8, b"d" * 32, 1000, 11, 22, 1) if copied else None
    made = Record(
        ino, b"\1\0\0\0handle%d" % ino, ino.to_bytes(16, "big"), generation, residency, 1000, 8, 4096, 2,
        b"name \xff\n", copy, 33,
    )  # fmt: skip
    return replace(made, **changes)


@pytest.fixture
def index(tmp_path):
    opened = Index.open(str(tmp_path))
    yield opened
    opened.close()


def put(index, *records):
    for future in [index.commit(lambda w, r=r: w.put(r)) for r in records]:
        future.result()


def test_a_record_is_found_by_inode_and_by_file_id(index):
    put(index, record(5), record(6, copied=False))
    assert index.get(5) == record(5) and index.get(6) == record(6, copied=False)
    assert index.get_by_fid(record(5).fid) == record(5)
    assert index.get(7) is None and index.get_by_fid(b"x" * 16) is None


@pytest.mark.parametrize("residency", list(Residency))
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("left", [0, 77, -1, 1 << 62])
def test_a_file_is_plain_where_its_whole_record_says_so(residency, copied, left):
    raw = pack_record(record(residency=residency, copied=copied, left_ctime=left))
    for ctime in (0, 77, 78, -1, 1 << 62):
        whole = unpack_record(5, raw)
        assert is_plain(5, raw, ctime) is (whole.residency is Residency.RESIDENT and whole.left_ctime != ctime)


def test_what_is_plain_is_asked_of_the_index(index):
    put(index, record(5, left_ctime=77), record(6, residency=Residency.STUB, left_ctime=77))
    assert index.is_plain(5, 78) and not index.is_plain(5, 77)
    assert not index.is_plain(6, 78)
    assert not index.is_plain(7, 78), "there is no record"


def test_no_damaged_record_is_plain():
    raw = pack_record(record(left_ctime=77))
    assert is_plain(5, raw, 78)
    assert not is_plain(6, raw, 78), "another inode's"
    for at in range(len(raw)):
        assert not is_plain(5, raw[:at], 78)
        for bit in range(8):
            assert not is_plain(5, raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :], 78)


def test_totals_follow_every_change(index):
    put(index, record(5), record(6, copied=False))
    assert index.totals() == Totals(2, 0, 8192, 2000, 1, 1000)
    put(index, record(5, residency=Residency.STUB, local=0))
    assert index.totals() == Totals(2, 1, 4096, 2000, 1, 1000)
    index.commit(lambda w: w.delete(6)).result()
    assert index.totals() == Totals(1, 1, 0, 1000, 0, 0)


def test_the_dirty_queue_is_ordered_by_the_last_change(index):
    put(index, record(5, copied=False), record(6, copied=False))
    assert index.quiet(time.time_ns()) == [5, 6]
    assert index.quiet(0) == []
    index.commit(lambda w: w.put(w.get(5), touched=True)).result()
    assert index.quiet(time.time_ns()) == [6, 5]
    put(index, record(6))
    assert index.quiet(time.time_ns()) == [5]


def test_a_metadata_change_does_not_restart_the_quiet_time(index):
    put(index, record(5, copied=False), record(6, copied=False), record(5, copied=False, name=b"new"))
    assert index.quiet(time.time_ns()) == [5, 6]


def test_another_file_on_a_reused_inode_replaces_the_file_id(index):
    put(index, record(5), replace(record(5), fid=b"n" * 16))
    assert index.get_by_fid(record(5).fid) is None
    assert index.get_by_fid(b"n" * 16).ino == 5


@pytest.fixture
def much_later(monkeypatch):
    """What ends within a test has not waited for its time."""
    monkeypatch.setattr(index_module, "LATER_SECONDS", 60.0)


def test_what_is_to_be_committed_later_waits_until_it_is_waited_for(index, much_later):
    future = index.commit(lambda w: w.put(record(5)), later=True)
    with pytest.raises(TimeoutError):
        future.result(0.1)
    index.hurry()
    future.result(10)
    assert index.get(5)


def test_or_until_its_time_has_come(index, monkeypatch):
    monkeypatch.setattr(index_module, "LATER_SECONDS", 0.05)
    index.commit(lambda w: w.put(record(5)), later=True).result(10)


def test_or_shares_the_next_commit(index, much_later):
    future = index.commit(lambda w: w.put(record(5)), later=True)
    index.commit(lambda w: w.put(record(6))).result(10)
    assert future.done()


def test_or_is_committed_at_the_end(tmp_path, much_later):
    opened = Index.open(str(tmp_path))
    future = opened.commit(lambda w: w.put(record(5)), later=True)
    opened.close()
    assert future.done()


def test_a_failing_commit_spoils_no_other(index):
    def fail(writer):
        raise ValueError("no")

    jobs = [lambda w: w.put(record(5)), fail, lambda w: w.put(record(6))]
    futures = [index.commit(job) for job in jobs]
    futures[0].result()
    futures[2].result()
    with pytest.raises(ValueError, match="no"):
        futures[1].result()
    assert index.get(5) and index.get(6)


def test_what_a_failing_commit_had_written_is_undone(index):
    def half(w):
        w.put(record(5, copied=False))
        w.set_log_position(9)
        raise ValueError("no")

    futures = [index.commit(job) for job in (lambda w: w.put(record(6)), half, lambda w: w.put(record(7)))]
    assert [type(future.exception()) for future in futures] == [type(None), ValueError, type(None)]
    assert index.get(5) is None and index.log_position() is None
    assert index.totals() == Totals(2, 0, 8192, 2000, 0, 0) and index.quiet(time.time_ns()) == []


def test_a_cancelled_commit_is_left_out(index):
    begun, held = threading.Event(), threading.Event()
    first = index.commit(lambda w: begun.set() or held.wait(10))
    assert begun.wait(10)
    second = index.commit(lambda w: w.put(record(5)))
    third = index.commit(lambda w: w.put(record(6)))
    assert second.cancel()
    held.set()
    assert first.result() and third.result() is None
    assert index.get(5) is None and index.get(6)


def test_bits_leaves_pins_dirs_pending_and_tombstones(index):
    def fill(w):
        w.put(record(5, residency=Residency.PARTIAL))
        w.put_bits(5, b"\5")
        w.put_leaves(b"f" * 16, 9, b"d" * 64, [(0, 10), (1 << 40, 2 << 40)])
        w.put_pin(5, 2, b"p\n\xff")
        w.put_dir(2, 1, b"dir")
        w.put_pending(5)
        w.end(record(5), Ending(77))

    index.commit(fill).result()
    leaves = index.get_leaves(b"f" * 16, 9)
    assert index.get_bits(5) == b"\5"
    assert (leaves.digests, leaves.extents) == (b"d" * 64, [(0, 10), (1 << 40, 2 << 40)])
    assert index.has_pins and index.pins() == [(5, 2, b"p\n\xff")] and index.get_dir(2) == (1, b"dir")
    assert index.pending() == [5]
    ((beat, key),) = index.tombstones(0)
    assert beat == 0 and key.startswith("data/") and index.tombstones(-1) == []
    index.commit(lambda w: w.put(record(5))).result()
    assert index.get_bits(5) is None


def test_custody_goes_on_within_a_boot_or_after_an_orderly_end_only(tmp_path):
    def session(boot, end):
        index = Index.open(str(tmp_path))
        found = index.begin_session(boot)
        if end:
            index.end_session()
        index.close()
        return found

    first, second = session("a", True), session("b", True)
    assert second.epoch == first.epoch + 1 and second.custody == first.custody
    assert session("b", False).custody == first.custody
    assert session("b", False).custody == first.custody
    assert session("c", False).custody == first.custody + 1
    assert session("c", True).custody == first.custody + 1


def test_a_session_begins_above_all_generations_that_were_given(tmp_path):
    """One of months, in which more files are written than an epoch has generations, runs on into the next."""
    index = Index.open(str(tmp_path))
    first = index.begin_session("a")
    index.commit(lambda w: w.given(make_generation(first.epoch, 9))).result()
    assert index.last_epoch == first.epoch
    index.commit(lambda w: w.given(make_generation(first.epoch + 2, 7))).result()
    index.commit(lambda w: w.given(make_generation(first.epoch, 10))).result()
    assert index.session == first and index.last_epoch == first.epoch + 2
    assert index.begin_session("a", first.epoch).epoch == first.epoch + 3
    index.close()


def test_the_log_position_moves_in_the_transaction_of_its_effects(index):
    assert index.log_position() is None
    index.commit(lambda w: (w.put(record(5)), w.set_log_position(640))).result()
    assert index.log_position() == 640


def test_a_truncated_file_is_refused_before_it_can_kill_the_process(tmp_path):
    index = Index.open(str(tmp_path))
    put(index, *[record(i) for i in range(1, 200)])
    index.close()
    file = tmp_path / "data.mdb"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(IndexError_, match="cut short"):
        Index.open(str(tmp_path))


def made_and_removed(index):
    with index.write() as writer:
        for ino in range(1, 3000):
            writer.put(record(ino, copied=False))
        for ino in range(2999, 9, -1):
            writer.delete(ino)


def test_a_batch_of_files_made_and_removed_leaves_a_whole_file(tmp_path):
    index = Index.open(str(tmp_path))
    made_and_removed(index)
    index.close()
    Index.open(str(tmp_path)).close()


def test_free_pages_beyond_the_end_are_no_damage(tmp_path, monkeypatch):
    """A writer killed between its commit and the extension of the file."""
    monkeypatch.setattr("tierfs.index.keep_length", lambda env, path: None)
    index = Index.open(str(tmp_path))
    made_and_removed(index)
    index.close()
    with open(tmp_path / "data.mdb", "rb") as file:
        newest = pages.read_metas(file.fileno(), "")[-1]
    assert (tmp_path / "data.mdb").stat().st_size < (newest.last + 1) * newest.page_size
    again = Index.open(str(tmp_path))
    assert again.get(9) == record(9, copied=False) and again.get(10) is None
    again.close()


@pytest.mark.parametrize("size", [1, 100, 4096, 8191])
def test_no_index_at_all_is_refused(tmp_path, size):
    (tmp_path / "data.mdb").write_bytes(b"x" * size)
    with pytest.raises(IndexError_):
        Index.open(str(tmp_path))


def test_a_flipped_bit_in_a_record_is_noticed(tmp_path):
    index = Index.open(str(tmp_path))
    put(index, record(5))
    index.close()
    file = tmp_path / "data.mdb"
    data = bytearray(file.read_bytes())
    at = data.rfind(b"name \xff\n")
    while at >= 0:
        data[at] ^= 1
        at = data.rfind(b"name \xff\n", 0, at)
    file.write_bytes(data)
    index = Index.open(str(tmp_path))
    assert index.get(5) is None and list(index.records()) == []
    with pytest.raises(IndexError_, match="damaged"):
        index.get_by_fid(record(5).fid)  # what the collector goes by
    put(index, record(5))
    assert index.get(5) == record(5)
    index.close()


def _read_elsewhere(path, ino, pipe):
    index = Index.open(path, readonly=True)
    pipe.send(index.get(ino))
    pipe.recv()
    pipe.send(index.get(ino))
    index.close()


def test_another_process_reads_what_was_committed(tmp_path):
    index = Index.open(str(tmp_path))
    put(index, record(5))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_read_elsewhere, args=(str(tmp_path), 5, theirs))
    process.start()
    assert ours.recv() == record(5)
    put(index, record(5, name=b"other"))
    ours.send(None)
    assert ours.recv().name == b"other"
    process.join(10)
    index.close()


def _write_forever(path, pipe):
    index = Index.open(path)
    for ino in range(1, 1 << 30):
        index.commit(lambda w, ino=ino: w.put(record(ino))).result()
        pipe.send(ino)


def test_what_was_acknowledged_survives_a_kill(tmp_path):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_write_forever, args=(str(tmp_path), theirs))
    process.start()
    theirs.close()
    while (last := ours.recv()) < 50:
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    try:
        while True:
            last = ours.recv()
    except EOFError:
        pass
    index = Index.open(str(tmp_path))
    assert all(index.get(ino) == record(ino) for ino in range(1, last + 1))
    assert index.totals().files >= last
    index.close()


def test_an_unknown_format_is_refused(tmp_path):
    index = Index.open(str(tmp_path))
    with index.write() as writer:
        writer.meta.format = 99
    index.close()
    with pytest.raises(IndexError_, match="format 99"):
        Index.open(str(tmp_path))


def numbered(ino, **changes):
    """As a usual filesystem has it, with its handle."""
    handle = b"\1\0\0\0" + ino.to_bytes(4, "little") + os.urandom(4)
    now = time.time_ns()
    copy = Copy(make_generation(1, ino), os.urandom(8), os.urandom(32), 4096, now - 10**10, now, 1)
    usual = {"handle": handle, "fid": os.urandom(16), "name": b"file-%06d.txt" % ino, "parent": 5_000_000}
    return record(ino, **{**usual, "size": 4096, "copy": copy, "left_ctime": now, **changes})


def test_ten_thousand_stubs_take_at_most_210_bytes_each(tmp_path):
    """Pages in use: the file also holds pages that later commits will use again."""
    index = Index.open(str(tmp_path))
    with index.write() as writer:
        for ino in range(1, 10_001):
            writer.put(numbered(ino, residency=Residency.STUB, local=0))
    index.close()
    with lmdb.open(str(tmp_path), max_dbs=20, readonly=True) as env, env.begin() as txn:
        used = 0
        for name in (b"files", b"fids", b"dirty", b"quiet"):
            stat = txn.stat(env.open_db(name, txn=txn, create=False))
            used += (stat["leaf_pages"] + stat["branch_pages"]) * stat["psize"]
    assert used / 10_000 <= 210


def test_the_file_of_ten_thousand_files_that_were_made_copied_and_demoted_is_at_most_4_mb(tmp_path):
    """With what waits for the journal, and free pages: in many small commits, as a mover does it."""
    index = Index.open(str(tmp_path))
    index.commit(lambda w: w.begin_notes(True)).result()

    def each(change):
        for first in range(1, 10_001, 250):
            with index.write() as writer:
                for ino in range(first, first + 250):
                    change(writer, ino)

    def made(w, ino):
        w.note(5_000_000, b"file-%06d.txt" % ino)
        w.put(numbered(ino, copy=None, size=0, blocks=0, local=0, left_ctime=0))

    def closed(w, ino):
        w.put(replace(w.get(ino), size=4096, blocks=8, local=4096), touched=True)
        w.note(ino)

    def copied(w, ino):
        w.put(replace(w.get(ino), copy=numbered(ino).copy))

    def punched(w, ino):
        w.put(replace(w.get(ino), residency=Residency.STUB, local=0, left_ctime=time.time_ns()))

    for change in (made, closed, copied, punched):
        each(change)
    assert index.totals().stubs == 10_000 and index.note_count() == 20_000
    index.close()
    assert (tmp_path / "data.mdb").stat().st_size <= 400 * 10_000


def test_a_directory_that_is_removed_is_pinned_no_more(index):
    with index.write() as writer:
        writer.put_dir(7, 2, b"dir")
        writer.put_pin(7, 2, b"dir")
        apply(writer, Entry(Mark.ENTRY, 0, 0, 2, 7, 0, b"", b"dir", 0), 0)
    assert not index.has_pins and not index.pins() and index.get_dir(7) is None
