"""The throttle: fewer requests when the server objects, and who goes first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tierfs.errors import StoreThrottledError, StoreUnavailableError
from tierfs.store.faults import Fault, FaultyStore, Kind
from tierfs.store.memory import MemoryStore
from tierfs.store.priority import Priority, current_priority, priority
from tierfs.store.throttle import Gate, ThrottledStore


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Holder:
    """A thread that holds a request until told to end."""

    def __init__(self, gate: Gate, level: Priority, log: list[Priority] | None = None) -> None:
        self.entered, self._end = threading.Event(), threading.Event()
        self._gate, self._level, self._log = gate, level, log
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with self._gate.request(self._level):
            if self._log is not None:
                self._log.append(self._level)
            self.entered.set()
            self._end.wait(10)

    def end(self) -> None:
        self._end.set()
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def holders() -> Iterator[list[Holder]]:
    held: list[Holder] = []
    yield held
    for holder in held:
        holder._end.set()
    for holder in held:
        holder.end()


def test_the_limit_halves_once_an_event_and_grows_back_slowly() -> None:
    times = [0.0]
    gate = Gate(32, clock=lambda: times[-1])

    def refused() -> None:
        with pytest.raises(StoreThrottledError), gate.request(Priority.FOREGROUND):
            raise StoreThrottledError("slow down")

    refused()
    refused()
    assert gate.limit == 16
    for second in range(1, 7):
        times.append(float(second))
        refused()
    assert gate.limit == 1
    for _ in range(40):
        with gate.request(Priority.FOREGROUND):
            pass
    assert 5 <= gate.limit <= 9
    with pytest.raises(StoreUnavailableError), gate.request(Priority.FOREGROUND):
        raise StoreUnavailableError("away says nothing about load")
    assert 5 <= gate.limit <= 9


def test_at_most_the_limit_at_once(holders: list[Holder]) -> None:
    gate = Gate(2)
    holders += [Holder(gate, Priority.UPLOAD) for _ in range(3)]
    until(lambda: sum(holder.entered.is_set() for holder in holders) == 2)
    time.sleep(0.02)
    assert sum(holder.entered.is_set() for holder in holders) == 2
    next(holder for holder in holders if holder.entered.is_set()).end()
    until(lambda: all(holder.entered.is_set() for holder in holders))


def test_a_reader_never_waits_for_uploads(holders: list[Holder]) -> None:
    gate = Gate(1)
    holders += [Holder(gate, Priority.UPLOAD), Holder(gate, Priority.UPLOAD)]
    until(lambda: any(holder.entered.is_set() for holder in holders))
    holders.append(Holder(gate, Priority.FOREGROUND))
    assert holders[-1].entered.wait(10)


def test_waiting_requests_go_by_priority(holders: list[Holder]) -> None:
    gate, order = Gate(1), []
    holders.append(Holder(gate, Priority.FOREGROUND))
    assert holders[0].entered.wait(10)
    for level in (Priority.GARBAGE, Priority.UPLOAD, Priority.FOREGROUND):
        waiting = len(gate._queue)
        holders.append(Holder(gate, level, order))
        until(lambda waiting=waiting: len(gate._queue) > waiting)
    for holder in (holders[0], holders[3], holders[2], holders[1]):
        assert holder.entered.wait(10)
        holder.end()
    assert order == [Priority.FOREGROUND, Priority.UPLOAD, Priority.GARBAGE]


def test_the_block_decides_over_the_operation() -> None:
    assert current_priority(Priority.UPLOAD) is Priority.UPLOAD
    with priority(Priority.FOREGROUND):
        assert current_priority(Priority.UPLOAD) is Priority.FOREGROUND
        with priority(Priority.GARBAGE):
            assert current_priority(Priority.UPLOAD) is Priority.GARBAGE
    assert current_priority(Priority.UPLOAD) is Priority.UPLOAD


def test_a_server_that_objects_gets_fewer_requests() -> None:
    faulty = FaultyStore(MemoryStore())
    store = ThrottledStore(faulty, most=8)
    faulty.arm(Fault(Kind.ERROR, "put", error=StoreThrottledError("slow down")))
    with pytest.raises(StoreThrottledError):
        store.put("a", b"", 0)
    assert store.gate.limit == 4


def test_faults_hang_until_released() -> None:
    faulty = FaultyStore(MemoryStore())
    faulty.arm(Fault(Kind.HANG, "get"))
    failed = threading.Event()

    def read() -> None:
        with pytest.raises(StoreUnavailableError):
            faulty.get("a")
        failed.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert not failed.wait(0.02)
    faulty.release()
    assert failed.wait(10)
    thread.join()


def test_faults_alter_one_bit() -> None:
    faulty = FaultyStore(MemoryStore())
    faulty.put("a", bytes(100), 100)
    for read in (lambda: faulty.get("a"), lambda: b"".join(faulty.stream("a"))):
        faulty.arm(Fault(Kind.FLIP))
        assert sum(byte.bit_count() for byte in read()) == 1
        assert read() == bytes(100)


def test_another_size_holds_at_once() -> None:
    gate = Gate(1)
    first, second = Holder(gate, Priority.UPLOAD), Holder(gate, Priority.UPLOAD)
    until(lambda: first.entered.is_set() or second.entered.is_set())
    time.sleep(0.05)
    assert first.entered.is_set() != second.entered.is_set()
    gate.resize(2)
    until(lambda: first.entered.is_set() and second.entered.is_set())
    first.end()
    second.end()
    gate.resize(8)
    with pytest.raises(StoreThrottledError), gate.request(Priority.UPLOAD):
        raise StoreThrottledError("slow down")
    assert gate.limit == 4
    gate.resize(16)
    assert gate.limit == 4, "what the server bears has not changed"
