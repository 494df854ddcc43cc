"""The scrub: when a pass is due, what it does with what it finds, and that it goes on where it was."""

from __future__ import annotations

import os
from dataclasses import dataclass

import msgspec
import pytest
from tierfsd.scrubbing import AUTO_SECONDS, Scrubber
from tiering import Volume

from tierfs import config
from tierfs.errors import ConfigError, ObjectArchivedError, StoreUnavailableError
from tierfs.readback import Ref, load_place
from tierfs.store.decorators import Decorator
from tierfs.store.memory import MemoryStore

DAY = 86400.0


@dataclass
class Clock:
    now: float = 1e9

    def __call__(self):
        return self.now


class Store(Decorator):
    """Counts what is read; `down` answers nothing."""

    def __init__(self):
        super().__init__(MemoryStore())
        self.reads, self.down, self.archived = [], False, set()

    def get(self, key, start=0, length=None):
        if self.down:
            raise StoreUnavailableError("nobody answers")
        if key in self.archived:
            raise ObjectArchivedError(f"{key}: the provider has archived it")
        self.reads.append(key)
        return super().get(key, start, length)


@pytest.fixture
def volume(tmp_path):
    made = Volume(tmp_path, store=Store())
    yield made
    made.stop()


@pytest.fixture
def filled(volume):
    """Two stubs and a clean resident file."""
    for name in ("one", "two", "here"):
        volume.server.create(volume.path(name), os.urandom(2000))
    assert all(item.demoted for item in volume.demote("one", "two"))
    volume.demote("here", punch=False)
    volume.store.reads.clear()
    return volume


def scrubber(volume, clock, free=True):
    return Scrubber(volume.tier, str(volume.base / "scrub.json"), free, clock)


def due(volume, clock, free=True):
    """One whose pass is due at its next turn."""
    made = scrubber(volume, clock, free)
    assert made.turn()
    clock.now += AUTO_SECONDS
    return made


def key_of(volume, name):
    return Ref.of_record(volume.record(name)).key


def spoil(volume, name):
    key = key_of(volume, name)
    raw = bytearray(volume.store.get(key))
    raw[7] ^= 1
    volume.store.delete([key])
    volume.store.put(key, bytes(raw), len(raw))
    volume.store.reads.clear()


def test_a_new_volume_is_not_read_at_once_and_then_every_so_often(filled):
    clock = Clock()
    made = scrubber(filled, clock)
    made.turn()
    clock.now += AUTO_SECONDS - 1
    made.turn()
    assert filled.store.reads == []
    clock.now += 1
    made.turn()
    assert sorted(filled.store.reads) == sorted(key_of(filled, name) for name in ("one", "two", "here"))
    status = made.status()
    assert (status.files, status.bytes, status.damaged, status.running) == (3, 6000, 0, False)
    made.turn()
    clock.now += AUTO_SECONDS - 1
    made.turn()
    assert len(filled.store.reads) == 3
    clock.now += 1
    made.turn()
    assert len(filled.store.reads) == 6


def test_where_reading_is_paid_for_nothing_is_read_unless_it_is_asked_for(filled):
    clock = Clock()
    made = scrubber(filled, clock, free=False)
    made.turn()
    clock.now += 10 * AUTO_SECONDS
    made.turn()
    assert filled.store.reads == [] and made.status().every == 0
    filled.tier.reconfigure(msgspec.structs.replace(filled.config, scrub_every=30 * DAY))
    made.turn()
    clock.now += 30 * DAY
    made.turn()
    assert len(filled.store.reads) == 3


def test_a_damaged_copy_of_a_stub_is_named_until_it_is_well(filled):
    clock = Clock()
    good = filled.store.get(key_of(filled, "one"))
    made = due(filled, clock)
    spoil(filled, "one")
    made.turn()
    (problem,) = made.problems()
    assert "'one'" in problem.what and "digest" in problem.what and made.status().damaged == 1
    again = scrubber(filled, clock)  # another mover: it is remembered
    assert again.problems() == [problem]
    filled.store.delete([key_of(filled, "one")])
    filled.store.put(key_of(filled, "one"), good, len(good))
    clock.now += AUTO_SECONDS
    again.turn()
    assert again.problems() == [] and again.status().damaged == 0


@pytest.mark.parametrize("end", ["removed", "overwritten"])
def test_a_lost_copy_that_nobody_needs_any_more_is_no_problem(filled, end):
    clock = Clock()
    made = due(filled, clock)
    filled.store.delete([key_of(filled, "two")])
    made.turn()
    assert ["'two'" in problem.what for problem in made.problems()] == [True]
    if end == "removed":
        filled.server.unlink(filled.path("two"))
    else:
        filled.server.write(filled.path("two"), b"new", flags=os.O_WRONLY | os.O_TRUNC)
    filled.tier.drain()
    assert made.problems() == [] and made.status().damaged == 0


@pytest.mark.parametrize("damage", ["missing", "rotten"])
def test_a_resident_file_whose_copy_is_bad_is_copied_again(filled, damage):
    clock = Clock()
    made, key = due(filled, clock), key_of(filled, "here")
    if damage == "missing":
        filled.store.delete([key])
    else:
        spoil(filled, "here")
    made.turn()
    assert made.problems() == [] and filled.record("here").dirty
    assert filled.index.oldest_dirty() is not None  # replication sees it
    filled.demote("here", punch=False)
    assert key_of(filled, "here") != key
    clock.now += AUTO_SECONDS
    made.turn()
    assert made.status().files == 3 and not filled.record("here").dirty


def test_a_pass_goes_on_after_a_stop_and_after_the_store_was_away(filled):
    clock = Clock()
    made = due(filled, clock)
    filled.store.down = True
    assert not made.turn()
    assert made.problems() == [] and load_place(str(filled.base / "scrub.json")).ended == 0
    filled.store.down = False
    made.stop()
    made.turn()
    assert filled.store.reads == []  # stopped: nothing more is read
    again = scrubber(filled, clock)
    again.turn()
    assert len(filled.store.reads) == 3 and again.status().ended > 0


def test_what_is_in_an_archive_is_no_damage_and_ends_no_pass(filled, caplog):
    clock = Clock()
    made = due(filled, clock)
    filled.store.archived = {key_of(filled, "one"), key_of(filled, "here")}
    made.turn()
    status = made.status()
    assert (status.files, status.damaged, made.problems()) == (3, 0, []) and status.ended > 0
    assert not filled.record("here").dirty
    assert "2 copies cannot be read back: the provider has put them into an archive" in caplog.text


def test_a_clock_that_was_set_back_delays_by_one_time_at_most(filled):
    clock = Clock()
    made = due(filled, clock)
    clock.now -= 1000 * AUTO_SECONDS
    made.turn()
    clock.now += AUTO_SECONDS
    made.turn()
    assert len(filled.store.reads) == 3


def test_nothing_is_read_while_another_machine_has_the_store(filled):
    clock = Clock()
    made = due(filled, clock)
    filled.tier.kit.withheld = "another machine has it"
    made.turn()
    assert filled.store.reads == []


def test_nothing_is_done_for_each_file_at_a_start(filled, monkeypatch):
    def no(*args, **kwargs):
        raise AssertionError("the index was gone through")

    clock = Clock()
    due(filled, clock)
    clock.now -= AUTO_SECONDS
    monkeypatch.setattr(type(filled.index), "_scan", no)
    made = scrubber(filled, clock)
    assert made.turn() and made.status().files == 0 and made.problems() == []


@pytest.mark.parametrize(
    ("text", "every"),
    [('"auto"', None), ('"never"', 0.0), ('"30d"', 30 * DAY)],
)
def test_how_often_is_configured(text, every):
    assert config.parse(f"scrub_every = {text}").scrub_every == every


@pytest.mark.parametrize("line", ['scrub_every = "often"', 'scrub_every = "1s"', "scrub_rate = 0"])
def test_a_bad_setting_is_named(line):
    with pytest.raises(ConfigError, match=line.split()[0]):
        config.parse(line)
