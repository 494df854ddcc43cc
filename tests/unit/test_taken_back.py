"""A store that has been another machine's, or was put back to an earlier state: what it has lost stays here."""

from __future__ import annotations

import os

import pytest
from tiering import MIB, Volume

from tierfs.digests import SIDE_SUFFIX
from tierfs.index import Index
from tierfs.model import LEAF, Residency, Stub
from tierfs.store.faults import Fault, FaultyStore, Kind
from tierfs.store.memory import MemoryStore

SMALL, LARGE = os.urandom(20_000), os.urandom(5 * MIB + 12_345)


@pytest.fixture
def volume(tmp_path):
    made = Volume(tmp_path, store=FaultyStore(MemoryStore()), chunk_size=MIB, fetch_timeout=2.0)
    yield made
    made.store.disarm()
    made.stop()


def clean(volume, data):
    """A file that is here and in the store; its object there."""
    volume.server.create(volume.path("file"), data)
    volume.demote("file", punch=False)
    record = volume.record("file")
    assert not record.dirty
    return Stub.of(record.fid, record.copy).key


def comes_back(volume, data):
    assert volume.server.read(volume.path("file")) == data


@pytest.mark.parametrize(
    ("data", "suffix"), [(SMALL, ""), (LARGE, ""), (LARGE, SIDE_SUFFIX)], ids=["small", "large", "digests"]
)
def test_what_others_have_removed_is_copied_out_anew_before_it_leaves(volume, data, suffix):
    key = clean(volume, data)
    volume.take_back()
    volume.store.delete([key + suffix])
    (item,) = volume.demote("file")
    assert item.demoted, item.reason
    assert volume.stub("file").key != key
    comes_back(volume, data)


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_what_is_there_is_not_copied_again_and_asked_for_once(volume, data):
    key, calls = clean(volume, data), volume.store.calls
    volume.take_back()
    volume.demote("file")
    assert volume.stub("file").key == key
    puts = calls["put"]
    comes_back(volume, data)
    volume.settle("file")
    heads = calls["head"]
    volume.restart()
    volume.demote("file")
    assert volume.stub("file").key == key and (calls["put"], calls["head"]) == (puts, heads)


def test_with_the_store_away_it_stays(volume):
    clean(volume, SMALL)
    volume.take_back()
    volume.store.arm(Fault(Kind.ERROR, "*", times=float("inf")))
    (item,) = volume.demote("file")
    assert item.failed and volume.stub("file") is None
    volume.store.disarm()
    (item,) = volume.demote("file")
    assert item.demoted


def test_what_is_here_of_a_stub_stays(volume):
    clean(volume, LARGE)
    volume.demote("file")
    assert volume.server.read(volume.path("file"), 4 * MIB, LEAF) == LARGE[4 * MIB :][:LEAF]
    volume.restart()
    assert volume.record("file").residency is Residency.PARTIAL
    volume.take_back()
    before = os.stat(volume.path("file")).st_blocks
    (item,) = volume.demote("file")
    assert "another machine's" in item.reason and os.stat(volume.path("file")).st_blocks == before
    comes_back(volume, LARGE)
    volume.settle("file")
    (item,) = volume.demote("file")
    assert item.demoted


def test_only_who_finds_a_later_epoch_than_its_own_doubts_what_the_store_has(tmp_path):
    index = Index.open(str(tmp_path))
    first = index.begin_session("boot", 7)
    assert first.taken == 0, "a new index has no copies"
    index.end_session()
    index.commit(lambda w: w.set_surveyed(True)).result()
    again = index.begin_session("boot", first.epoch)
    assert (again.custody, again.taken) == (first.custody, 0)
    index.end_session()
    later = index.begin_session("boot", again.epoch + 1)
    assert later.custody == later.taken == again.custody + 1 and later.epoch > again.epoch + 1
    index.end_session()
    last = index.begin_session("boot", later.epoch)
    assert last.taken == later.taken and index.session == last
    assert index.surveyed, "the tree need not be looked through for that"
    crashed = index.begin_session("another boot", last.epoch + 1)
    assert crashed.taken == last.custody + 1 and not index.surveyed
    index.close()
