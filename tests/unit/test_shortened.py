"""A stub that is shorter than its copy: `tierfs check --repair` gives it its length and its content again where
what is here is the copy's beginning, and leaves all else to a person."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import pytest
from tierfsd import checking
from tiering import Job

from tierfs import recovery, shortened, syscalls
from tierfs.codec import pack_record
from tierfs.digests import SIDE_SUFFIX
from tierfs.model import LEAF, Residency, Stub
from tierfs.past import U64

SMALL, LARGE = 300_000, (9 << 20) + 777
LENGTHS = (1, 4096, 10_000, LEAF, LEAF + 1, SMALL - 1)
ELSE = b"somebody's work"


class Cut:
    """A file that became a stub in the last moment before a power cut, which took its end: as the disk has it
    then, the attribute is there, and the index says what it said before."""

    def __init__(self, volume, size, length, *, blocks=True, stub=False):
        self.volume, self.path, self.data = volume, volume.path("f"), os.urandom(size)
        volume.server.create(self.path, self.data)
        volume.demote("f", punch=stub)
        self.before, self.mtime = volume.record("f"), os.stat(self.path).st_mtime_ns
        with self.writable() as file:
            volume.tree.write_stub(file.fileno(), Stub.of(self.before.fid, self.before.copy))
            if not blocks:
                file.truncate(0)
            file.truncate(length)

    def writable(self):
        return open(self.path, "r+b", buffering=0)

    def check(self, repair=False):
        found = checking.check(self.volume.tier, repair, None, Job()).findings
        assert {finding.path for finding in found} <= {b"f"}
        return [(finding.what, finding.repaired) for finding in found]

    def is_well(self):
        assert self.check() == []
        st, record = os.stat(self.path), self.volume.record("f")
        assert (st.st_size, st.st_mtime_ns) == (len(self.data), self.mtime)
        assert (record.fid, record.generation) == (self.before.fid, self.before.generation) and not record.dirty
        assert self.volume.server.read(self.path) == self.data
        assert self.volume.record("f").fid == self.before.fid, "it was taken for somebody's work"
        assert os.stat(self.path).st_mtime_ns == self.mtime

    def is_left(self, why):
        """And not a byte of it is another one than before."""
        with open(self.path, "rb") as file:
            here = file.read()
        ((what, repaired),) = self.check(repair=True)
        assert why in what and not repaired
        with open(self.path, "rb") as file:
            assert file.read() == here
        assert self.volume.stub("f") is not None
        with pytest.raises(OSError, match=r"\[Errno 5\]"):
            self.volume.server.read(self.path)


@pytest.mark.parametrize("blocks", [True, False], ids=["data", "holes"])
@pytest.mark.parametrize(
    ("size", "length"), [(SMALL, each) for each in LENGTHS] + [(LARGE, each) for each in (*LENGTHS, LARGE - 1)]
)
def test_what_is_a_piece_of_its_copy_becomes_whole_again(volume, size, length, blocks):
    cut = Cut(volume, size, length, blocks=blocks)
    with pytest.raises(OSError, match="check --repair"):
        volume.server.read(cut.path)
    told = f"is {length} bytes long, its copy {size}"
    assert cut.check() == [(told, False)]
    assert cut.check(repair=True) == [(told, True)]
    cut.is_well()


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_one_that_was_cut_after_its_punch(volume, size):
    cut = Cut(volume, size, 10_000, stub=True)
    assert cut.before.residency is Residency.STUB
    assert [repaired for _, repaired in cut.check(repair=True)] == [True]
    cut.is_well()


def test_one_of_which_the_index_knew_what_had_come_back(volume):
    """The leaves that were here are not, where the file was cut."""
    cut = Cut(volume, LARGE, LARGE, stub=True)
    cut.volume.server.read(cut.path, 0, 3 * LEAF)
    volume.tier._settler.commit_bits(everything=True)
    assert volume.record("f").residency is Residency.PARTIAL
    os.truncate(cut.path, LEAF)
    assert [repaired for _, repaired in cut.check(repair=True)] == [True]
    assert volume.index.get_bits(cut.before.ino) is None
    cut.mtime = os.stat(cut.path).st_mtime_ns
    cut.is_well()


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_holes_between_what_is_here(volume, size):
    cut = Cut(volume, size, 100_000)
    with cut.writable() as file:
        mode = syscalls.FALLOC_PUNCH_HOLE | syscalls.FALLOC_KEEP_SIZE
        syscalls.fallocate(file.fileno(), mode, 4096, 8192)
    assert [repaired for _, repaired in cut.check(repair=True)] == [True]
    cut.is_well()


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_one_whose_record_was_lost_too(volume, size):
    """What is made of the file knows no other length than the one that it has."""
    cut = Cut(volume, size, 10_000, blocks=False)
    volume.index.commit(lambda w: w.delete(cut.before.ino)).result()
    assert len(cut.check()) == 2
    assert [repaired for _, repaired in cut.check(repair=True)] == [True, True]
    cut.mtime = os.stat(cut.path).st_mtime_ns
    cut.is_well()


@pytest.mark.parametrize("at", [0, 9_000, 70_000])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_work_that_somebody_did_in_it_is_left(volume, size, at):
    cut = Cut(volume, size, 100_000)
    with cut.writable() as file:
        os.pwrite(file.fileno(), ELSE, at)
    cut.is_left("holds what is not its copy's: `tierfs restore-version`")


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_one_that_is_longer_than_its_copy_is_left(volume, size):
    Cut(volume, size, size + 5000).is_left("holds what is not its copy's")


def test_one_that_is_dirty_is_left(volume):
    """What is here may be newer than the copy."""
    cut = Cut(volume, SMALL, 10_000)
    newer = replace(volume.record("f"), generation=cut.before.generation + 1)
    raw = pack_record(newer)
    volume.index.commit(lambda w: w._txn.put(U64.pack(newer.ino), raw, db=w._db["files"])).result()
    volume.index.commit(lambda w: w.recount(True)).result()
    cut.is_left("its stub is not that of its record")


def test_one_that_is_empty_is_a_truncation(volume):
    cut = Cut(volume, SMALL, 0)
    ((what, repaired),) = cut.check(repair=True)
    assert "is being emptied" in what and not repaired and os.stat(cut.path).st_size == 0


def test_one_that_somebody_has_open_is_left(volume):
    cut = Cut(volume, LARGE, 10_000)
    handle = cut.volume.server.open(cut.path, os.O_RDONLY | os.O_NOATIME)
    ((what, repaired),) = cut.check(repair=True)
    assert what.endswith("is open") and not repaired
    volume.server.release(handle)
    with open(cut.path, "rb"):  # behind the mount
        ((what, repaired),) = cut.check(repair=True)
    assert what.endswith("is open or mapped") and not repaired
    assert os.stat(cut.path).st_size == 10_000
    assert [repaired for _, repaired in cut.check(repair=True)] == [True]
    cut.is_well()


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_copy_that_is_not_what_it_was_gives_nothing_back(volume, size):
    cut = Cut(volume, size, 10_000)
    key = volume.stub("f").key
    side = SIDE_SUFFIX if size == LARGE else ""
    volume.store.delete([key + side])
    volume.store.put(key + side, [bytes(100)], 100)
    found = cut.check(repair=True)
    assert "its object is of no use" in found[0][0] and not any(repaired for _, repaired in found)
    assert os.stat(cut.path).st_size == 10_000 and volume.stub("f") is not None
    assert volume.record("f").copy is not None, "the only trace of its content was given up"


STEPS = {
    "noted": (shortened, "_write"),
    "end-of-leaf": (os, "fdatasync"),
    "leaf": (os, "ftruncate"),
    "length": (os, "fsync"),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("length", [10_000, SMALL - 1])
def test_cut_short_itself_it_is_ended_by_the_next_one(volume, monkeypatch, size, length, step):
    cut = Cut(volume, size, length)
    real = getattr(*STEPS[step])

    def fail(*words):
        raise OSError(errno.EIO, "the power")

    with monkeypatch.context() as patch:
        patch.setattr(*STEPS[step], fail)
        ((what, repaired),) = cut.check(repair=True)
        assert what.endswith("the power") and not repaired
    assert getattr(*STEPS[step]) is real
    assert volume.index.is_pending(cut.before.ino)
    recovery.finish_pending(volume.tier)
    cut.check(repair=True)
    cut.is_well()


@pytest.mark.parametrize("here", ["all", "part", "nothing"])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_one_of_the_right_length_that_the_index_calls_resident_needs_no_repair(volume, size, here):
    """The attribute is on the disk, its record is not: reading it brings what is not here."""
    cut = Cut(volume, size, size, blocks=here != "nothing")
    assert volume.record("f").residency is Residency.RESIDENT
    if here == "part":
        with cut.writable() as file:
            mode = syscalls.FALLOC_PUNCH_HOLE | syscalls.FALLOC_KEEP_SIZE
            syscalls.fallocate(file.fileno(), mode, 4096, 8192)
    assert cut.check() == [("the index says resident, but it is a stub", False)]
    assert volume.server.read(cut.path) == cut.data
    volume.settle("f")
    cut.mtime = os.stat(cut.path).st_mtime_ns
    cut.is_well()
