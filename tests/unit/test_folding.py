"""A batch of marks, folded, leaves the index as each of them alone would."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from tierfs import draining
from tierfs.draining import apply
from tierfs.folding import Folded
from tierfs.index import Index
from tierfs.index_writer import Writer
from tierfs.marks import Entry, Mark
from tierfs.model import Copy, Record, Residency

DIRECTORY = 2
FILES = range(10, 18)
SUBDIRECTORIES = range(30, 34)


def handle(ino, life=1):
    return b"\1\0\0\0" + ino.to_bytes(4, "little") + life.to_bytes(4, "little")


def copied(ino, residency):
    copy = Copy(ino, b"t" * 8, b"d" * 32, 1000, 11, 22, 1)
    local, fid = 0 if residency is Residency.STUB else 4096, bytes([ino]) * 16
    return Record(ino, handle(ino), fid, ino, residency, 1000, 8, local, DIRECTORY, b"old", copy, 33)


@pytest.fixture
def make_index(tmp_path, monkeypatch):
    opened = []
    fids = Counter()

    def fid():
        fids[len(opened)] += 1
        return fids[len(opened)].to_bytes(16, "big")

    def make():
        opened.append(Index.open(str(tmp_path / str(len(opened)))))
        index = opened[-1]
        with index.write() as w:
            w.begin_notes(True)
            for ino, residency in zip(FILES, Residency, strict=False):
                w.put(copied(ino, residency))
                w.put_pin(ino, DIRECTORY, b"old")
        return index

    monkeypatch.setattr(draining, "new_fid", fid)
    monkeypatch.setattr(draining.time, "time_ns", lambda: 1_000)
    yield make
    for index in opened:
        index.close()


def marks(seed, count=60):
    """What may stand in a log, and more: also of numbers that another inode has without a mark of the end."""
    pick = random.Random(seed)
    for generation in range(100, 100 + count):
        ino, name = pick.choice(FILES), b"name%d" % pick.randrange(4)
        life, kind = pick.choice((1, 1, 1, 2)), pick.choice(list(Mark))
        a, b = (1000, 8) if kind is Mark.CLOSED else (pick.randrange(2), 5)
        if kind is Mark.ENTRY and a:
            a = pick.choice(SUBDIRECTORIES)
        if kind is Mark.DIR:
            ino = pick.choice(SUBDIRECTORIES)
        yield Entry(kind, ino, generation, DIRECTORY, a, b, handle(ino, life), name, 0)


def contents(index):
    """All that a batch may have changed, without the order of the notes and the time in the queue."""
    records = [index.get(ino) for ino in FILES]
    alike = [r if r is None else replace(r, fid=r.fid if r.copy else b"") for r in records]
    with index._env.begin() as txn:
        rows = {name: list(txn.cursor(db=index.tables[name])) for name in ("dirs", "pins", "bits", "pending")}
        queued = sorted(key[8:] for key, _ in txn.cursor(db=index.tables["quiet"]))
        fids = sorted(value for _, value in txn.cursor(db=index.tables["fids"]))
        ended = sorted(key for key, _ in txn.cursor(db=index.tables["versions"]))
    return alike, rows, queued, fids, ended, index.totals()


def noted(index):
    with index._env.begin() as txn:
        return {bytes(key) for key, _ in txn.cursor(db=index.tables["changes"])}


@pytest.mark.parametrize("seed", range(40))
def test_a_batch_leaves_what_its_marks_leave_one_by_one(make_index, seed):
    single, batch = make_index(), make_index()
    for entry in marks(seed):
        with single.write() as w:
            apply(w, entry, 1)
    with batch.write() as w:
        folded = Folded(w)
        for entry in marks(seed):
            apply(folded, entry, 1)
        folded.finish()
    assert contents(batch) == contents(single)
    missing = noted(single) - noted(batch)
    assert noted(batch) <= noted(single) and all(len(key) == 8 for key in missing)  # no name is among them
    assert all(batch.get(int.from_bytes(key, "big")) is None for key in missing)


def life_of(ino):
    place = {"parent": DIRECTORY, "handle": handle(ino), "name": b"temporary"}
    yield entry(Mark.WRITE, ino, **place)
    yield entry(Mark.CLOSED, ino, a=1000, b=8)
    yield entry(Mark.NAMED, ino, parent=DIRECTORY, name=b"other")
    yield entry(Mark.GONE, ino, **place)


def entry(kind, ino, parent=0, a=0, b=0, handle=b"", name=b""):
    return Entry(kind, ino, 1, parent, a, b, handle, name, 0)


def test_a_file_that_came_and_went_in_a_batch_is_never_written_down(make_index, monkeypatch):
    index, written = make_index(), []
    before = index.totals()
    with index.write() as w:
        monkeypatch.setattr(Writer, "put", lambda self, record, *rest: written.append(record))
        folded = Folded(w)
        for mark in life_of(99):
            apply(folded, mark, 1)
        folded.finish()
    assert not written and index.totals() == before
    assert (99).to_bytes(8, "big") not in noted(index)
    assert (DIRECTORY).to_bytes(8, "big") + b"other" in noted(index), "it may have been another's before"


def test_a_record_that_many_marks_are_about_is_read_and_written_once(make_index, monkeypatch):
    index, written, read = make_index(), [], []
    put, row = Writer.put, Writer.row
    with index.write() as w:
        monkeypatch.setattr(Writer, "put", lambda self, *rest: written.append(rest[0]) or put(self, *rest))
        monkeypatch.setattr(Writer, "row", lambda self, ino: read.append(ino) or row(self, ino))
        folded = Folded(w)
        for mark in list(life_of(99))[:3]:
            apply(folded, mark, 1)
        folded.finish()
    assert [r.ino for r in written] == read == [99]
    assert (index.get(99).name, index.get(99).size) == (b"other", 1000)
