"""A file that was read in part shows its own times, whoever serves it: its content has moved the real ones.

The index hears of that within two seconds. Until then the server knows, and its successor, should it be killed.
"""

from __future__ import annotations

import contextlib
import os
import time

import pytest
from tiering import MIB, Volume

from tierfs.gate import Gate

SIZE = 3 * MIB + 777


@pytest.fixture
def volume(tmp_path, monkeypatch):
    made = Volume(tmp_path, chunk_size=MIB)
    # The mover is as it is in those two seconds.
    monkeypatch.setattr(made.tier._settler, "commit_bits", lambda everything=False: None)
    made.server.create(made.path("a"), os.urandom(SIZE))
    yield made
    monkeypatch.undo()
    made.stop()


@pytest.fixture
def before(volume):
    """Its times, before it was demoted and read in part."""
    times = times_of(os.stat(volume.path("a")))
    assert volume.demote("a")[0].demoted
    time.sleep(0.05)
    read_in_part(volume)
    assert times_of(volume.server.shown(volume.path("a"))) == times != times_of(os.stat(volume.path("a")))
    return times


def times_of(st):
    return st.st_mtime_ns, st.st_ctime_ns


def read_in_part(volume):
    volume.server.read(volume.path("a"), 0, 4096)
    ino, deadline = os.stat(volume.path("a")).st_ino, time.monotonic() + 20
    while ino in volume.server.gate.states.inodes:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def shown_by_successor(volume):
    """What another server shows, that has taken over what this one has left in the ledger."""
    gate = volume.server.gate
    other = Gate(volume.tree, volume.index, volume.marks, volume.session.epoch, ledger=gate.ledger)
    take_over(other)
    assert len(other.appearance.late) == len(gate.appearance.late)
    if not os.path.exists(volume.path("a")):
        return None
    opath = os.open(volume.path("a"), os.O_PATH)
    try:
        return times_of(other.appearance.shown(os.fstat(opath), opath))
    finally:
        os.close(opath)


def take_over(gate):
    with free_slots_as_they_are(gate.ledger):
        gate.succession.begin()
    gate.succession.end()


def kept(volume):
    """What a successor would find in the ledger."""
    with free_slots_as_they_are(volume.server.gate.ledger):
        return list(volume.server.gate.ledger.load_inodes())


@contextlib.contextmanager
def free_slots_as_they_are(ledger):
    """It is read once in each process as a rule, which then knows what is free."""
    free = ledger._inodes.free[:]
    yield
    ledger._inodes.free[:] = free


def test_a_successor_shows_the_same_times(volume, before):
    assert shown_by_successor(volume) == before


def test_a_successor_shows_what_somebody_has_set_since(volume, before):
    volume.server.chmod(volume.path("a"), 0o600)
    real = times_of(os.stat(volume.path("a")))
    assert times_of(volume.server.shown(volume.path("a"))) == shown_by_successor(volume) == real
    assert kept(volume) == []


def test_nothing_is_left_of_what_has_gone(volume, before):
    volume.server.unlink(volume.path("a"))
    assert kept(volume) == [] and shown_by_successor(volume) is None


def test_what_is_opened_again_keeps_its_place(volume, before):
    (first,) = kept(volume)
    read_in_part(volume)
    assert kept(volume) == [first]
    with volume.server.lock:
        volume.server.gate.appearance.tick(time.monotonic() + 1000)
    assert kept(volume) == [] and not volume.server.gate.appearance.late


def test_a_number_that_another_file_has_by_now_says_nothing(volume, before):
    (left,) = kept(volume)
    record = volume.index.get(left.ino)
    os.unlink(volume.path("a"))  # behind the mount: nobody is told
    gate = volume.server.gate
    other = Gate(volume.tree, volume.index, volume.marks, volume.session.epoch, ledger=gate.ledger)
    assert volume.index.get(left.ino) == record
    take_over(other)
    assert not other.appearance.late and kept(volume) == []
