"""What a mover that ends in order, as for `tierfs restart`, is asked for comes by the next one."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from bare import until
from tiering import MIB, Volume

from tierfs.errors import StoreUnavailableError
from tierfs.store.memory import MemoryStore

SMALL, LARGE = 30_000, 3 * MIB


class Falling(MemoryStore):
    """One that gives no content while it is down."""

    down = False
    asked = 0

    def get(self, key, start=0, length=None):
        self.asked += 1
        if self.down:
            raise StoreUnavailableError("down")
        return super().get(key, start, length)


@pytest.fixture(params=[SMALL, LARGE], ids=["small", "large"])
def cold(request, tmp_path):
    """A volume with a stub, and what is in it."""
    made, content = Volume(tmp_path, store=Falling(), chunk_size=1 << 20), os.urandom(request.param)
    made.server.create(made.path("cold"), content)
    made.demote("cold")
    assert made.stub("cold") is not None
    yield made, content
    made.stop()


@pytest.fixture
def soon():
    """Runs a call in a thread of its own."""
    with ThreadPoolExecutor(2) as pool:
        yield pool.submit


def has_stopped_unheard(volume, asking):
    """Whoever asks it for something now is told nothing."""
    until(lambda: volume.server.gate._inflow.waiting or asking.done())
    for _ in range(2):  # the one that has been asked has said what it says, and that is heard
        volume.link.await_marks()
    return not asking.done()


def test_who_asks_one_that_has_stopped_is_served_by_the_next(cold, soon):
    volume, content = cold
    volume.tier.close()
    reading = soon(volume.server.read, volume.path("cold"))
    assert has_stopped_unheard(volume, reading)
    assert not volume.tier.kit.troubles.list(), "nobody has met an error"
    volume.next_mover()
    assert reading.result(20) == content


def test_who_waits_for_a_store_that_is_down_waits_on(cold, soon):
    """This one had time to ask it again, and gives that up."""
    volume, content = cold
    volume.store.down = True
    reading = soon(volume.server.read, volume.path("cold"))
    until(lambda: volume.store.asked)
    volume.tier.close()
    assert has_stopped_unheard(volume, reading)
    volume.store.down = False
    volume.next_mover()
    assert reading.result(20) == content


def test_who_wants_to_write_waits_on(cold, soon):
    volume, content = cold
    volume.tier.close()
    writing = soon(volume.server.write, volume.path("cold"), b"word", 5)
    assert has_stopped_unheard(volume, writing)
    volume.next_mover()
    writing.result(20)
    assert volume.server.read(volume.path("cold")) == content[:5] + b"word" + content[9:]


def test_who_empties_the_file_goes_on_with_the_next(cold, soon):
    """What is under way for readers ends with the one that it was asked of."""
    volume, content = cold
    volume.tier.close()
    reading = soon(volume.server.read, volume.path("cold"))
    assert has_stopped_unheard(volume, reading)
    cutting = soon(volume.server.open, volume.path("cold"), os.O_WRONLY | os.O_TRUNC)
    volume.next_mover()
    volume.server.release(cutting.result(20))
    assert content.startswith(reading.result(20)) and os.stat(volume.path("cold")).st_size == 0
