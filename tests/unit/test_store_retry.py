"""Retries: what is tried again, how long, and what happens to answers that got lost. No real time passes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tierfs.errors import (
    ObjectCorruptError,
    ObjectMissingError,
    PreconditionError,
    StoreDeniedError,
    StoreThrottledError,
    StoreUnavailableError,
)
from tierfs.store.base import ObjectInfo
from tierfs.store.faults import Fault, FaultyStore, Kind
from tierfs.store.memory import MemoryStore
from tierfs.store.priority import Priority, priority
from tierfs.store.retry import RetryBudget, RetryingStore, RetryPolicy


class World:
    """A faulty store behind retries, and a clock that only waits move."""

    def __init__(self, draw: float = 1.0) -> None:
        self.now = 0.0
        self.waits: list[float] = []
        self.memory = MemoryStore()
        self.faulty = FaultyStore(self.memory)
        foreground = RetryPolicy(first=1, longest=8, deadline=30)
        background = RetryPolicy(first=2, longest=16, deadline=100)
        self.store = RetryingStore(
            self.faulty, foreground, background, clock=lambda: self.now, pause=self.pause, draw=lambda: draw
        )

    def pause(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now += seconds
        return False


@pytest.fixture
def world() -> World:
    return World()


def test_waits_double_up_to_the_longest_and_end_at_the_deadline(world: World) -> None:
    world.faulty.arm(Fault(Kind.ERROR, times=100))
    with pytest.raises(StoreUnavailableError):
        world.store.get("a")
    assert world.waits == [1, 2, 4, 8, 8, 7]
    assert world.now == 30


def test_waits_are_drawn_below_their_bound() -> None:
    world = World(draw=0.25)
    world.memory.put("a", b"1", 1)
    world.faulty.arm(Fault(Kind.ERROR, times=3))
    assert world.store.get("a") == b"1"
    assert world.waits == [0.25, 0.5, 1]


def test_background_has_its_own_patience(world: World) -> None:
    world.faulty.arm(Fault(Kind.ERROR, times=100))
    with pytest.raises(StoreUnavailableError), priority(Priority.GARBAGE):
        world.store.get("a")
    assert world.now == 100
    assert world.waits[:3] == [2, 4, 8]


@pytest.mark.parametrize("error", [StoreUnavailableError("x"), StoreThrottledError("x")])
@pytest.mark.parametrize("operation", ["put", "put_if", "get", "head", "delete", "list", "stream"])
def test_what_may_pass_is_tried_again(world: World, operation: str, error: StoreUnavailableError) -> None:
    world.memory.put("a", b"12", 2)
    world.faulty.arm(Fault(Kind.ERROR, operation, times=2, error=error))
    calls = {
        "put": lambda: world.store.put("a", b"34", 2),
        "put_if": lambda: world.store.put_if("b", b"x", None),
        "get": lambda: world.store.get("a"),
        "head": lambda: world.store.head("a"),
        "delete": lambda: world.store.delete(["a"]),
        "list": lambda: list(world.store.list("")),
        "stream": lambda: list(world.store.stream("a")),
    }
    calls[operation]()
    assert world.faulty.calls[operation] == 3


@pytest.mark.parametrize(
    "error", [StoreDeniedError("x"), ObjectMissingError("x"), ObjectCorruptError("x"), PreconditionError("x")]
)
def test_what_will_not_pass_is_final(world: World, error: Exception) -> None:
    world.faulty.arm(Fault(Kind.ERROR, error=error))
    with pytest.raises(type(error)):
        world.store.get("a")
    assert world.waits == []


def test_a_body_that_can_be_read_once_is_sent_once(world: World) -> None:
    world.faulty.arm(Fault(Kind.ERROR, "put"))
    with pytest.raises(StoreUnavailableError):
        world.store.put("a", iter([b"12"]), 2)
    world.faulty.arm(Fault(Kind.LOST, "put"))
    world.store.put("a", [b"12"], 2)
    assert world.faulty.calls["put"] == 3
    assert world.memory.get("a") == b"12"


def test_a_conditional_write_whose_answer_got_lost_is_known_again(world: World) -> None:
    world.faulty.arm(Fault(Kind.LOST, "put_if"))
    answer = world.store.put_if("a", b"mine", None)
    assert answer.etag == world.memory.head("a").etag
    world.faulty.arm(Fault(Kind.LOST, "put_if"))
    world.store.put_if("a", b"mine again", answer.etag)
    assert world.memory.get("a") == b"mine again"


def test_another_writer_is_not_taken_for_ourselves(world: World) -> None:
    world.memory.put("a", b"theirs", 6)
    world.faulty.arm(Fault(Kind.ERROR, "put_if"))
    with pytest.raises(PreconditionError):
        world.store.put_if("a", b"mine", None)
    with pytest.raises(PreconditionError):  # equal bytes prove nothing where our write cannot have happened
        world.store.put_if("a", b"theirs", None)


def test_a_stream_goes_on_where_it_broke(world: World) -> None:
    data = bytes(range(256)) * 40_000
    world.memory.put("a", data, len(data))
    world.faulty.arm(Fault(Kind.LOST, "stream", times=4))
    assert b"".join(world.store.stream("a", 5)) == data[5:]
    world.faulty.arm(Fault(Kind.LOST, "stream", times=4))
    assert b"".join(world.store.stream("a", 5, 9_000_000)) == data[5:9_000_005]


def test_a_listing_goes_on_where_it_broke(world: World) -> None:
    class Breaking(MemoryStore):
        breaks = 2

        def list(self, prefix: str) -> Iterator[ObjectInfo]:
            for count, info in enumerate(sorted(super().list(prefix), key=lambda info: info.key)):
                if count == 2 and self.breaks:
                    self.breaks -= 1
                    raise StoreUnavailableError("midway")
                yield info

    inner = Breaking()
    for name in "dacbe":
        inner.put(name, b"", 0)
    store = RetryingStore(inner, clock=lambda: world.now, pause=world.pause)
    assert [info.key for info in store.list("")] == list("abcde")


def test_without_budget_waits_are_long(world: World) -> None:
    budget = RetryBudget(size=2)
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    for _ in range(10):
        budget.earn()
    budget.earn()
    assert budget.spend()
    world.faulty.arm(Fault(Kind.ERROR, times=1000))
    for _ in range(6):
        with pytest.raises(StoreUnavailableError):
            world.store.get("a")
    world.waits.clear()
    with pytest.raises(StoreUnavailableError):
        world.store.get("a")
    assert world.waits == [8, 8, 8, 6]


def test_closing_ends_the_waiting() -> None:
    store = RetryingStore(FaultyStore(MemoryStore()), RetryPolicy(first=1000, longest=1000, deadline=9999))
    store.inner.arm(Fault(Kind.ERROR, times=10))
    store.close()
    with pytest.raises(StoreUnavailableError):
        store.inner.arm(Fault(Kind.ERROR, times=10))
        store.get("a")
