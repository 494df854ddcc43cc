"""Files that come before they are asked for, with a tier and a mount server's gate and no kernel."""

from __future__ import annotations

import os
import time

import pytest
from tierfsd.heatkeeping import HeatKeeper
from tierfsd.scanning import Scanners
from tiering import Volume

from tierfs.heat_index import HeatIndex
from tierfs.policy.ahead import FIRST
from tierfs.store.faults import Fault, FaultyStore, Kind
from tierfs.store.memory import MemoryStore
from tierfs.wire import Touch, Touches

COUNT = 40
SIZE = 5000


def made(tmp_path, **settings):
    volume = Volume(tmp_path, store=FaultyStore(MemoryStore()), **settings)
    volume.server.mkdir(volume.path("d"))
    volume.server.mkdir(volume.path("e"))
    names = [f"{place}/f{number}" for place in "de" for number in range(COUNT)]
    for name in names:
        volume.server.create(volume.path(name), name.encode() * (SIZE // len(name)))
    assert all(item.demoted for item in volume.demote(*names))
    return volume


@pytest.fixture
def volume(tmp_path):
    volume = made(tmp_path)
    yield volume
    volume.store.disarm()
    volume.stop()


def read(volume, *names):
    for name in names:
        assert volume.server.read(volume.path(name)) == name.encode() * (SIZE // len(name))


def here(volume, place="d"):
    """The numbers of the files that are no stubs."""
    found = []
    for number in range(COUNT):
        fd = os.open(volume.path(f"{place}/f{number}"), os.O_PATH)
        if volume.tree.read_stub(fd) is None:
            found.append(number)
        os.close(fd)
    return found


def becomes(volume, numbers, place="d", seconds=20.0):
    until = time.monotonic() + seconds
    while here(volume, place) != numbers:
        assert time.monotonic() < until, f"{here(volume, place)} instead of {numbers}"
        time.sleep(0.02)
    time.sleep(0.2)
    assert here(volume, place) == numbers


def test_after_two_files_of_a_directory_the_next_come_by_themselves(volume):
    read(volume, "d/f3", "d/f4")
    becomes(volume, list(range(3, 5 + FIRST)))
    precision = volume.tier.neighbours.precision
    assert (precision.files, precision.used_files) == (FIRST, 0)
    read(volume, *(f"d/f{number}" for number in range(5, COUNT)))
    becomes(volume, list(range(3, COUNT)))
    assert here(volume, "e") == []


def test_one_file_of_each_directory_brings_nothing(volume):
    read(volume, "d/f3", "e/f3")
    becomes(volume, [3])
    becomes(volume, [3], "e")


def test_who_takes_his_time_brings_nothing(volume, monkeypatch):
    monkeypatch.setattr("tierfs.neighbours.SECONDS", 0.05)
    read(volume, "d/f3")
    time.sleep(0.2)
    read(volume, "d/f4")
    becomes(volume, [3, 4])


def test_it_can_be_switched_off(tmp_path):
    volume = made(tmp_path, prefetch=False)
    try:
        read(volume, "d/f3", "d/f4", "d/f5")
        becomes(volume, [3, 4, 5])
    finally:
        volume.stop()


def test_where_local_bytes_are_many_nothing_comes_ahead(tmp_path):
    volume = made(tmp_path, local_limit=12_000)
    try:
        read(volume, "d/f3", "d/f4", "d/f5", "d/f6")
        becomes(volume, [3, 4, 5, 6])
    finally:
        volume.stop()


def test_a_file_that_does_not_come_keeps_no_other_away(tmp_path):
    """Nobody waits for what comes ahead; it comes when it is read."""
    volume = made(tmp_path, fetch_timeout=1.0)
    try:
        volume.store.arm(Fault(Kind.ERROR, "get", volume.stub("d/f7").key, float("inf")))
        read(volume, "d/f3", "d/f4")
        until = time.monotonic() + 20
        while volume.tier.neighbours._waiting or volume.tier.neighbours._asked:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert 7 not in here(volume)
        volume.store.disarm()
        read(volume, *(f"d/f{number}" for number in range(COUNT)))
        becomes(volume, list(range(COUNT)))
    finally:
        volume.store.disarm()
        volume.stop()


def test_a_mover_that_ends_while_files_come_ahead_leaves_stubs(tmp_path):
    """The next one knows nothing of them, and each comes when it is read."""
    volume = made(tmp_path, fetch_timeout=5.0)
    try:
        keys = [volume.stub(f"d/f{number}").key for number in (9, 10)]
        volume.store.arm(*(Fault(Kind.ERROR, "get", key, float("inf")) for key in keys))
        read(volume, "d/f3", "d/f4")
        until = time.monotonic() + 20
        while len(volume.tier.neighbours._asked) < len(keys):
            assert time.monotonic() < until
            time.sleep(0.01)
        volume.restart(clean=False)
        assert {9, 10}.isdisjoint(here(volume))
        volume.store.disarm()
        read(volume, *(f"d/f{number}" for number in range(COUNT)))
        becomes(volume, list(range(COUNT)))
    finally:
        volume.store.disarm()
        volume.stop()


def test_of_a_store_that_does_not_answer_nothing_is_asked_ahead(tmp_path):
    volume = made(tmp_path, fetch_timeout=1.0)
    try:
        volume.store.arm(Fault(Kind.ERROR, "get", "", float("inf")))
        for name in ("d/f3", "d/f4", "d/f5"):
            with pytest.raises(OSError, match="no content"):
                volume.server.read(volume.path(name))
        assert not volume.tier.neighbours._waiting and not volume.tier.neighbours._asked
    finally:
        volume.store.disarm()
        volume.stop()


def test_what_comes_ahead_is_no_use_until_it_is_opened(volume, tmp_path):
    os.mkdir(tmp_path / "heat")
    heat = HeatIndex(str(tmp_path / "heat"), 1 << 30)
    keeper = HeatKeeper(volume.tier.kit, heat, volume.tier.neighbours.precision, Scanners(heat))
    read(volume, "d/f3", "d/f4")
    becomes(volume, list(range(3, 5 + FIRST)))
    keeper.flush()
    asked, ahead = (os.stat(volume.path(f"d/{name}")).st_ino for name in ("f4", "f5"))
    assert heat.last_use(asked) > 0 and heat.last_use(ahead) == 0
    assert ahead in [ino for ino, _ in heat.by_admission()]
    keeper.touches(Touches([Touch(ahead, 1, 0, 0.0, SIZE, 0, b"f5")]))
    keeper.flush()
    assert heat.last_use(ahead) > 0
    assert volume.tier.neighbours.precision.used_files == 1
    heat.close()
