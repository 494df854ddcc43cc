"""When what was believed is proven: in pauses, and otherwise in time not at all."""

import pytest
from tierfsd.confirming import END_SECONDS, PAUSE_SECONDS, START_SECONDS, Confirming

NEVER = float("inf")


class World:
    """What is believed, and what became of it."""

    def __init__(self, count):
        self.believed = dict.fromkeys(range(count))
        self.proven, self.doubted = [], []
        self.confirming = Confirming(self.believed, self.taker(self.proven), self.taker(self.doubted))

    def taker(self, to):
        def take(most):
            for key in list(self.believed)[:most]:
                to.append(key)
                del self.believed[key]

        return take

    def run(self, now, until, served):
        """Turns until then, each as soon as it is due, or a millisecond later."""
        while now < until:
            self.confirming.turn(now, served)
            now = max(now + 0.001, min(self.confirming.due, until)) if not served else now + 0.001
        return now


def test_nothing_is_due_while_nothing_is_believed():
    world = World(0)
    world.confirming.turn(1.0, 64)
    assert world.confirming.due == NEVER


@pytest.mark.parametrize("count", [1, 5000])
def test_a_pause_is_used(count):
    world = World(count)
    world.run(0.0, START_SECONDS - 0.001, 0)
    assert not world.proven
    world.run(START_SECONDS, END_SECONDS, 0)
    assert world.proven == list(range(count)) and not world.doubted
    world.confirming.turn(END_SECONDS, 0)
    assert world.confirming.due == NEVER


def test_whoever_asks_without_a_pause_waits_for_no_proof():
    world = World(5000)
    world.run(0.0, END_SECONDS, 64)
    assert not world.proven and not world.doubted
    world.run(END_SECONDS, 1.0, 64)
    assert not world.proven and world.doubted == list(range(5000))


def test_a_request_ends_a_pause():
    world = World(5000)
    now = world.run(0.0, START_SECONDS + 10 * PAUSE_SECONDS, 0)
    done = len(world.proven)
    assert 0 < done < 5000
    for _ in range(20):
        world.confirming.turn(now, 1)
        now += PAUSE_SECONDS
    assert len(world.proven) == done
    world.confirming.turn(now, 0)
    world.confirming.turn(now + PAUSE_SECONDS, 0)
    assert len(world.proven) > done


def test_what_is_believed_later_has_its_own_time():
    world = World(1)
    world.run(0.0, END_SECONDS, 0)
    world.believed[7] = None
    world.confirming.turn(10.0, 1)
    assert world.confirming.due == 10.0 + START_SECONDS
