"""Room on the local disk: who waits, for how long, and that waiting in vain is not repeated."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from tierfs.room import HOPELESS_SECONDS, LOADING_SECONDS, WAIT_SECONDS, Room
from tierfs.waits import Blocked


class Disk:
    """Stands in for a tree on a filesystem of 1600 bytes."""

    def __init__(self):
        self.available = 1600

    def space(self):
        return SimpleNamespace(total=1600, available=self.available)


@pytest.fixture
def disk():
    return Disk()


@pytest.fixture
def asked():
    return []


@pytest.fixture
def loading():
    """A mover is being loaded while there is something in it."""
    return []


@pytest.fixture
def room(disk, asked, loading):
    return Room(disk, lambda: asked.append(1), lambda: bool(loading))


def blocked(room):
    with pytest.raises(Blocked) as caught:
        room.need()
    return caught.value.wait


def test_with_room_nobody_waits_and_nobody_is_asked(room, asked):
    room.need()
    assert not asked and not room.waiting


def test_without_room_writers_wait_together_until_there_is_some(room, disk, asked):
    disk.available = 99
    first, second = blocked(room), blocked(room)
    assert first is second and asked
    room.look(time.monotonic())
    assert not first.done and len(asked) == 3
    disk.available = 100
    room.look(time.monotonic())
    assert first.done and first.errno == 0
    room.need()


def test_where_nothing_can_leave_nobody_waits(room, disk, monkeypatch):
    room.in_vain(time.monotonic())  # about nobody: who comes next waits all the same
    disk.available = 0
    now = time.monotonic()
    wait = blocked(room)
    room.in_vain(now)
    assert wait.done and wait.errno == 0 and not room.waiting
    room.need()
    monkeypatch.setattr(time, "monotonic", lambda: now + HOPELESS_SECONDS + 1)
    assert blocked(room) is not wait


def test_who_has_waited_in_vain_goes_on_and_waits_no_more_for_a_while(room, disk, monkeypatch):
    disk.available = 0
    now = time.monotonic()
    wait = blocked(room)
    room.look(now + WAIT_SECONDS + 1)
    assert wait.done and wait.errno == 0
    room.need()
    monkeypatch.setattr(time, "monotonic", lambda: now + WAIT_SECONDS + HOPELESS_SECONDS + 2)
    blocked(room)


def test_who_waits_goes_on_waiting_while_something_leaves(room, disk):
    """However slow the disk, the store or the machine: ENOSPC is for what is full of what cannot leave."""
    disk.available = 40
    now = time.monotonic()
    wait = blocked(room)
    for available in (42, 30, 60, 98):  # others write meanwhile
        now += WAIT_SECONDS / 2 - 1
        disk.available = available
        room.look(now)
        assert not wait.done
    disk.available = 97
    room.look(now + WAIT_SECONDS - 1)
    assert not wait.done
    room.look(now + WAIT_SECONDS + 1)
    assert wait.done and wait.errno == 0
    room.need()


def test_the_time_to_make_room_begins_when_the_mover_is_loaded(room, disk, loading):
    disk.available = 0
    loading.append("a busy machine")
    now = time.monotonic()
    wait = blocked(room)
    room.look(now + 30)
    assert not wait.done
    loading.clear()
    room.look(now + 30 + WAIT_SECONDS - 1)
    assert not wait.done
    room.look(now + 30 + WAIT_SECONDS + 1)
    assert wait.done


def test_nobody_waits_for_ever_for_a_mover_that_does_not_get_loaded(room, disk, loading):
    disk.available = 0
    loading.append("never ends")
    now = time.monotonic()
    wait = blocked(room)
    room.look(now + LOADING_SECONDS)
    assert not wait.done
    room.look(now + LOADING_SECONDS + WAIT_SECONDS + 1)
    assert wait.done
    room.need()
