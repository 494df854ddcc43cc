"""When marks go into the index: in a pause of the changes, unless somebody needs them sooner."""

from __future__ import annotations

from types import SimpleNamespace

import lmdb
import pytest
from tierfsd import pace
from tierfsd.pace import Pace
from tierfsd.space import Space

from tierfs.index import Totals
from tierfs.marks import SEGMENT


class World:
    """A tier with just what a Pace asks of it."""

    def __init__(self, monkeypatch, **settings):
        self.now, self.available, self.local, self.drains = 100.0, 1 << 40, 0, 0
        limits = {"local_limit": 0, "high": 0.9, "low": 0.8, "min_free": 0.05}
        limits |= {"quiet_seconds": 30.0, "journal_seconds": 60.0}
        self.drainer = SimpleNamespace(position=0)
        tree = SimpleNamespace(space=lambda: SimpleNamespace(available=self.available, total=1 << 41))
        index = SimpleNamespace(totals=lambda: Totals(local_bytes=self.local))
        self.kit = SimpleNamespace(config=SimpleNamespace(**limits | settings), tree=tree, index=index)
        self.end = 0
        monkeypatch.setattr(pace.time, "monotonic", lambda: self.now)
        self.pace = Pace(self, Space(self.kit, False))

    def drain(self):
        self.drainer.position = self.end
        self.drains += 1

    def changes(self, seconds, size=100):
        """For so long, as the server tells of it; whether any of it was due meanwhile."""
        for _ in range(int(seconds * 4)):
            self.now += 0.25
            self.end += size
            self.pace.told(self.end)
            if self.pace.is_due():
                return True
        return False


def test_marks_wait_for_a_pause_of_the_changes(monkeypatch):
    world = World(monkeypatch)
    assert world.pace.is_due() and world.pace.due_at > 1e9, "nobody has told of any: look"
    assert not world.changes(5)
    assert world.pace.due_at == world.now + pace._PAUSE
    world.now += pace._PAUSE
    assert world.pace.is_due()
    world.pace.drain()
    assert world.drains == 1 and not world.changes(5), "the next storm has its own time"


@pytest.mark.parametrize(
    ("quiet", "journal", "most"),
    [(30.0, 60.0, pace._MOST_SECONDS), (2.0, 60.0, 2.0), (0.0, 60.0, 0.0), (30.0, 20.0, 5.0)],
)
def test_but_not_for_ever_nor_long_by_what_copies_and_the_journal_wait_for(monkeypatch, quiet, journal, most):
    world = World(monkeypatch, quiet_seconds=quiet, journal_seconds=journal)
    assert world.changes(60)
    assert world.now == pytest.approx(100.25 + most)


def test_nor_where_there_are_very_many(monkeypatch):
    world = World(monkeypatch)
    assert world.changes(60, size=SEGMENT // 8) and world.end == SEGMENT


def test_nor_where_the_files_may_have_grown_beyond_their_limit(monkeypatch):
    world = World(monkeypatch, local_limit=1 << 30)
    world.local = 800 << 20
    world.pace.drain()
    assert not world.changes(1)
    world.available -= 100 << 20
    assert not world.changes(1)
    world.available -= 50 << 20  # 950 MiB of 1 GiB, if all of that is in files of ours
    assert world.changes(0.25)
    world.pace.drain()
    assert not world.changes(1), "it was not: the index says so now"


def test_nor_where_the_filesystem_runs_low(monkeypatch):
    world = World(monkeypatch)
    assert not world.changes(1)
    world.available = 1 << 36
    assert world.changes(0.25)


def test_what_another_has_drained_waits_no_more(monkeypatch):
    world = World(monkeypatch)
    assert not world.changes(8)
    world.drain()
    assert world.pace.due_at > 1e9
    assert not world.changes(8), "the time of the next begins with them"


def test_an_index_that_cannot_be_asked_is_a_failure_of_the_round(monkeypatch):
    world = World(monkeypatch, local_limit=1 << 30)
    world.kit.index.totals = broken
    world.end = 100
    world.pace.told(world.end)
    with pytest.raises(lmdb.Error):
        world.pace.is_due()


def broken():
    raise lmdb.Error("damaged")
