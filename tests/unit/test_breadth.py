"""How many ranges are on their way at once: few, unless many are much quicker."""

import threading

import pytest
from tiering import MIB, Volume

from tierfs.arrivals import MOST_RANGE, Arrival, Request, Shown
from tierfs.breadth import AMPLE, FEW, MANY, Breadth
from tierfs.model import Stub, leaf_count
from tierfs.store.memory import MemoryStore

STUB = Stub(b"f" * 16, 7, b"t" * 8, b"d" * 32)
QUICK, SLOW = AMPLE * 1.5, AMPLE / 10  # bytes a second


def run(breadth: Breadth, rates: dict[int, float], size: int, now: float = 1000.0) -> float:
    """So many bytes come, at a rate for each number of ranges; when the last one does."""
    for _ in range(size // MIB):
        now += MIB / rates[breadth.count]
        breadth.came(MIB, breadth.count, now)
    return now


def test_few_are_enough_where_they_are_quick():
    breadth = Breadth()
    run(breadth, {FEW: QUICK, MANY: 3 * QUICK}, 1024 * MIB)
    assert breadth.count == FEW


def test_many_stay_where_each_connection_has_its_own_limit():
    breadth = Breadth()
    run(breadth, {FEW: FEW * SLOW, MANY: MANY * SLOW}, 1024 * MIB)
    assert breadth.count == MANY


def test_many_go_where_they_only_share_the_link():
    breadth, seen = Breadth(), set()
    now = 1000.0
    for _ in range(64):
        now = run(breadth, {FEW: SLOW, MANY: SLOW * 1.05}, 8 * MIB, now)
        seen.add(breadth.count)
    assert seen == {FEW, MANY}  # it has been tried
    assert breadth.count == FEW


def test_it_is_measured_anew_after_a_while():
    breadth = Breadth()
    now = run(breadth, {FEW: SLOW, MANY: SLOW}, 512 * MIB)
    assert breadth.count == FEW
    run(breadth, {FEW: SLOW, MANY: 2 * SLOW}, 512 * MIB, now + 400)
    assert breadth.count == MANY


def test_a_reader_that_takes_its_time_says_nothing_of_the_link():
    breadth, now = Breadth(), 1000.0
    for _ in range(1024):
        now += MIB / SLOW
        breadth.came(MIB, FEW - 1, now)
    assert breadth.count == FEW
    for _ in range(100):  # pauses between what is quick
        now = run(breadth, {FEW: SLOW, MANY: SLOW}, 64 * MIB, now + 5)
    assert breadth.count == FEW


@pytest.mark.parametrize(("count", "size"), [(FEW, MOST_RANGE), (MANY, 8 * MIB)])
def test_few_ranges_are_large_and_many_are_no_more_in_all_than_memory_is_for(count, size):
    length = 1024 * MIB
    shown, leaves = Shown(0, 0, 0, 0), bytearray(leaf_count(length))
    arrival = Arrival(1, STUB, length, -1, None, shown, b"digests", None, [], leaves, fresh=True)
    request = Request(1, 1, STUB.pack(), length, 0, length, whole=True, ahead=False, deadline=0.0)
    ranges = arrival.next_ranges(request, count)
    assert [each.end - each.start for each in ranges] == [size] * count


class Held(MemoryStore):
    """Gives nothing before it is let; counts who waits."""

    def __init__(self):
        super().__init__()
        self.let, self.changed = threading.Event(), threading.Condition()
        self.waiting = self.most = 0

    def get(self, key, start=0, length=None):
        if length is not None:
            with self.changed:
                self.waiting += 1
                self.most = max(self.most, self.waiting)
                self.changed.notify_all()
            self.let.wait(30)
            with self.changed:
                self.waiting -= 1
        return super().get(key, start, length)

    def await_waiting(self, count: int) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: self.waiting >= count, 10)


@pytest.fixture
def store():
    return Held()


@pytest.fixture
def volume(tmp_path, store):
    made = Volume(tmp_path, store, chunk_size=MIB, fetch_timeout=30.0)
    yield made
    store.let.set()
    made.stop()


def test_read_ahead_asks_for_few_ranges_and_holds_no_reader_up(volume, store):
    size, path = 80 * MIB, volume.path("big")
    volume.server.create(path, b"content " * (size // 8))
    store.let.set()
    (item,) = volume.demote("big")
    assert item.demoted, item.reason
    store.let.clear()
    store.most = 0
    handle = volume.server.open(path)
    ino = handle.inode.ino
    reader = threading.Thread(target=volume.server.read, args=(path, size - MIB, MIB))
    try:
        volume.server.run(lambda: volume.server.gate._inflow.ahead(ino, 0, size), seconds=5)
        assert store.await_waiting(FEW)
        reader.start()
        assert store.await_waiting(FEW + 1)  # the reader's own range
        assert store.most == FEW + 1
    finally:
        store.let.set()
        if reader.ident is not None:
            reader.join(20)
        volume.server.release(handle)
