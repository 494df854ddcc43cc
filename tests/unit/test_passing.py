"""Reading past a full disk: what has no room here is read all the same, and is taken for local by nobody."""

import errno
import os
import sys
import threading

import pytest
from bare import until
from test_tier_large import CountingStore
from tierfsd import eviction as evicting
from tierfsd.scheduler import Scheduler
from tiering import MIB, Volume

from tierfs import wire
from tierfs.heat_index import HeatIndex
from tierfs.inflow import Content, Inflow
from tierfs.kit import Kit
from tierfs.model import LEAF, Residency, Stub
from tierfs.waits import Blocked, Stretch

SIZE = 5 * MIB + 12_345


@pytest.fixture
def volume(tmp_path):
    made = Volume(tmp_path, CountingStore(), chunk_size=MIB, fetch_timeout=10.0)
    yield made
    made.stop()


@pytest.fixture
def files(volume):
    """The contents of two demoted files, `big` and `small`."""
    contents = {"big": os.urandom(SIZE), "small": os.urandom(100_000)}
    for name, data in contents.items():
        volume.server.create(volume.path(name), data)
    assert all(item.demoted for item in volume.demote(*contents))
    volume.store.ranges.clear()
    return contents


@pytest.fixture
def full(monkeypatch, files):
    """Says whether the disk is full; it is at first."""
    state = threading.Event()
    state.set()
    room = Kit.has_room
    monkeypatch.setattr(Kit, "has_room", lambda kit, count: not state.is_set() and room(kit, count))
    return state


def local(volume, name):
    return os.stat(volume.path(name)).st_blocks * 512


@pytest.mark.parametrize("name", ["big", "small"])
def test_a_file_is_read_past_a_full_disk(volume, files, full, name):
    before = local(volume, name)
    assert volume.server.read(volume.path(name)) == files[name]
    assert volume.server.read(volume.path(name), 70_000, 1000) == files[name][70_000:71_000]
    assert local(volume, name) == before, "nothing of it was kept"
    assert volume.stub(name) is not None
    assert volume.record(name).residency is not Residency.RESIDENT
    assert any("cannot be brought to this disk" in trouble.what for trouble in volume.tier.kit.troubles.list())


@pytest.mark.parametrize("name", ["big", "small"])
def test_with_room_again_it_comes_to_stay(volume, files, full, name):
    handle = volume.server.open(volume.path(name))
    try:
        head = volume.server.run(lambda: volume.server.gate.contents.read(handle, 0, 4096))
        assert head == files[name][:4096]
        full.clear()
        handle.inode.content.passages.expire(1e12)
        assert volume.server.read(volume.path(name)) == files[name]
    finally:
        volume.server.release(handle)
    volume.settle(name)
    assert volume.record(name).residency is Residency.RESIDENT
    with open(volume.path(name), "rb") as backing:
        assert backing.read() == files[name]


@pytest.mark.parametrize("name", ["big", "small"])
def test_what_is_partly_here_is_joined_with_what_is_not(volume, files, full, name):
    if name == "big":
        full.clear()
        volume.server.read(volume.path(name), MIB, 2 * LEAF)
        full.set()
    handle = volume.server.open(volume.path(name))
    try:
        for offset, size in [(MIB - 10, 5 * LEAF), (0, 100), (MIB + LEAF, MIB), (len(files[name]) - 5, 100)]:
            read = volume.server.run(lambda at=offset, n=size: volume.server.gate.contents.read(handle, at, n))
            assert read == files[name][offset : offset + size]
    finally:
        volume.server.release(handle)


def test_only_what_is_in_the_file_is_lent_from_it(volume, files, full):
    full.clear()
    volume.server.read(volume.path("big"), MIB, 2 * LEAF)
    full.set()
    handle, stretch = volume.server.open(volume.path("big")), volume.server.gate.contents.stretch
    try:
        lent = volume.server.run(lambda: stretch(handle, MIB, LEAF))
        assert lent == Stretch(handle.fd, MIB, LEAF)
        assert volume.server.run(lambda: stretch(handle, MIB - LEAF, 2 * LEAF)) is None
    finally:
        volume.server.release(handle)


@pytest.mark.parametrize("name", ["big", "small"])
def test_who_writes_is_told_that_the_disk_is_full(volume, files, full, name):
    with pytest.raises(OSError) as failed:
        volume.server.write(volume.path(name), b"new", 5)
    assert failed.value.errno == errno.ENOSPC
    assert volume.stub(name) is not None
    assert volume.server.read(volume.path(name)) == files[name]


@pytest.mark.parametrize("name", ["big", "small"])
def test_what_works_on_the_file_itself_gets_no_zeros(volume, files, full, name):
    """A copy_file_range, say, beside readers to whom the content was handed in memory."""
    gate, handle = volume.server.gate, volume.server.open(volume.path(name))
    try:
        volume.server.run(lambda: gate.contents.read(handle, 0, len(files[name])))
        with pytest.raises(OSError) as failed:
            volume.server.run(lambda: gate.contents.ready(handle, False))
        assert failed.value.errno == errno.ENOSPC
    finally:
        volume.server.release(handle)


def test_an_altered_object_is_not_passed_on(volume, files, full):
    key = volume.stub("big").key
    raw = bytearray(volume.store.get(key))
    raw[2 * MIB] ^= 1
    volume.store.delete([key])
    volume.store.put(key, bytes(raw), len(raw))
    assert volume.server.read(volume.path("big"), 0, 4096) == files["big"][:4096]
    with pytest.raises(OSError) as failed:
        volume.server.read(volume.path("big"), 2 * MIB, 4096)
    assert failed.value.errno == errno.EIO


@pytest.mark.parametrize("name", ["big", "small"])
def test_what_was_written_behind_the_mount_is_not_hidden_by_its_former_content(volume, files, full, name):
    """A stub whose blocks somebody has put back in part: neither is to be passed off for the other."""
    with open(volume.path(name), "r+b") as backing:
        backing.write(b"restored" * 512)
    with pytest.raises(OSError) as failed:
        volume.server.read(volume.path(name), 0, 4096)
    assert failed.value.errno == errno.EIO


def test_read_ahead_costs_nothing_on_a_full_disk(volume, files, full):
    assert volume.server.read(volume.path("big")) == files["big"]
    fetched = sum(length for _, length in volume.store.ranges)
    # The first pieces are fetched before it is known that they have no room.
    assert fetched <= 2 * SIZE + 8 * MIB


def memory(data):
    fd = os.memfd_create("test")
    os.write(fd, data)
    return fd


def stub(generation):
    return Stub(b"f" * 16, generation, b"t" * 8, b"d" * 32, 20)


def test_what_comes_late_is_not_shown_in_another_content():
    """It was fetched for what the file held before it was cut, written anew and demoted."""
    inflow = Inflow(lambda message, fds: None)
    content = Content(stub(2), 3 * LEAF, None)
    inflow.track(7, content, -1)
    fd = memory(b"x" * LEAF)
    try:
        inflow.passed(wire.Passing(7, stub(1).pack(), 0, LEAF), fd)
        assert not content.readable(0, LEAF)
        inflow.passed(wire.Passing(7, stub(2).pack(), 0, LEAF), fd)
        assert content.readable(0, LEAF) and not content.readable(0, LEAF + 1)
    finally:
        os.close(fd)
    inflow.untrack(7)
    assert not content.readable(0, LEAF)


def test_only_so_much_is_kept_and_not_for_long(monkeypatch):
    content = Content(stub(1), 40 * LEAF, None)
    for leaf in range(40):
        content.passages.take(leaf * LEAF, (leaf + 1) * LEAF, memory(bytes([leaf]) * 10))
    held = [leaf for leaf in range(40) if content.readable(leaf * LEAF, (leaf + 1) * LEAF)]
    assert held == list(range(24, 40))
    content.passages.expire(1e12)
    assert not content.readable(39 * LEAF, 40 * LEAF)


def test_a_reader_outlives_the_failure_of_a_writer_beside_it():
    """Both wait for the same bytes; the writer's fetch fails for want of room, the reader's is under way."""
    sent = []
    inflow = Inflow(lambda message, fds: sent.append(message))
    content = Content(stub(1), 3 * LEAF, None)
    inflow.track(7, content, -1)
    with pytest.raises(Blocked) as writer:
        inflow.need(7, 0, LEAF)
    with pytest.raises(Blocked) as reader:
        inflow.need(7, 0, LEAF, passable=True)
    first, second = sent
    assert (first.passable, second.passable) == (False, True)
    inflow.ended(wire.FetchEnd(first.id, 7, errno.ENOSPC))
    assert writer.value.wait.errno == errno.ENOSPC and not reader.value.wait.done
    fd = memory(b"x" * LEAF)
    inflow.passed(wire.Passing(7, stub(1).pack(), 0, LEAF), fd)
    os.close(fd)
    assert reader.value.wait.done and not reader.value.wait.errno
    assert content.filled_in(bytes(10), 5) == b"x" * 10
    inflow.untrack(7)


class Slow(threading.Event):
    """Counts evictions; each takes until it is set."""

    def __init__(self):
        super().__init__()
        self.evictions, self.begun = 0, threading.Event()

    def evict(self, wanted, *, urgent):
        self.evictions += 1
        self.begun.set()
        assert self.wait(30)
        return 0


@pytest.fixture
def scheduler(volume, tmp_path):
    heat = HeatIndex(str(tmp_path / "heat"), 1 << 30)
    yield Scheduler(volume.tier, heat, False, str(tmp_path / "ballast"))
    heat.close()


def test_who_waits_while_another_finds_no_room_does_not_look_again(scheduler, full, monkeypatch):
    slow = Slow()
    monkeypatch.setattr(scheduler.eviction, "evict", slow.evict)
    monkeypatch.setattr(evicting, "_ROOM_SECONDS", 0.0)
    readers = [threading.Thread(target=scheduler.eviction.make_room, args=(MIB, True)) for _ in range(16)]
    readers[0].start()
    assert slow.begun.wait(30)
    for reader in readers[1:]:
        reader.start()
    # All of them ask before the first one's attempt has ended: it goes on when they wait for the lock.
    assert until(lambda: sum(_waits(reader, scheduler.eviction._making) for reader in readers[1:]) == 15)
    slow.set()
    for reader in readers:
        reader.join(30)
    assert slow.evictions == evicting._ROOM_ATTEMPTS
    scheduler.eviction.make_room(MIB, True)
    assert slow.evictions == 2 * evicting._ROOM_ATTEMPTS, "who comes later tries for himself"


def _waits(thread, lock):
    frame = sys._current_frames().get(thread.ident)
    return frame is not None and frame.f_code.co_name == "make_room" and lock.locked()


def test_a_file_that_somebody_reads_is_no_victim(volume, files, scheduler, monkeypatch):
    """An eviction that waited for its end would keep its own readers waiting."""
    ino, get, go = os.stat(volume.path("big")).st_ino, volume.store.get, threading.Event()
    volume.server.read(volume.path("big"), 0, 4096)
    scheduler._heat.admit(ino, SIZE, SIZE)
    assert until(lambda: volume.record("big").local > 0)

    def victims():
        return [record.ino for record in scheduler.eviction.victims(urgent=True)]

    assert victims() == [ino]
    monkeypatch.setattr(volume.store, "get", lambda *args, **more: go.wait(30) and get(*args, **more))
    reader = threading.Thread(target=volume.server.read, args=(volume.path("big"), 4 * MIB, 4096))
    reader.start()
    try:
        assert until(lambda: volume.tier.filler.is_wanted(ino))
        assert victims() == []
    finally:
        go.set()
        reader.join(30)
    assert until(lambda: victims() == [ino])
