"""Content on its way in: who is woken when, what is asked for, and what a truncation waits for."""

from __future__ import annotations

import errno
import time
from functools import partial

import pytest

from tierfs import wire
from tierfs.inflow import FAILED_SECONDS, FIRST_AHEAD, SMALL_AHEAD, Content, Inflow, ReadAhead
from tierfs.model import LEAF, Stub
from tierfs.waits import Blocked, Wait

STUB = Stub(b"f" * 16, 7, b"t" * 8, b"d" * 32)
MIB = 1 << 20


class Peer:
    """Collects what would go to the mover."""

    def __init__(self):
        self.sent = []

    def __call__(self, message, fds):
        self.sent.append(message)

    def take(self, kind):
        found = [m for m in self.sent if isinstance(m, kind)]
        self.sent = [m for m in self.sent if not isinstance(m, kind)]
        return found


def start(size=16 * MIB, bits=None):
    peer = Peer()
    inflow = Inflow(peer)
    content = Content(STUB, size, bits)
    inflow.track(5, content, 9)
    return peer, inflow, content


def blocked(call, *args) -> Wait:
    with pytest.raises(Blocked) as caught:
        call(*args)
    return caught.value.wait


def test_a_read_asks_for_its_leaves_and_is_woken_when_all_are_here():
    peer, inflow, _ = start()
    wait = blocked(inflow.need, 5, 100, LEAF + 1)
    (fetch,) = peer.take(wire.Fetch)
    assert (fetch.start, fetch.length, fetch.whole, fetch.stub) == (0, 2 * LEAF, False, STUB.pack())
    inflow.filled(wire.Filled(5, 0, LEAF))
    assert not wait.done
    inflow.filled(wire.Filled(5, LEAF, LEAF))
    assert wait.done and wait.errno == 0
    inflow.need(5, 100, LEAF + 1)


def test_a_shorter_deadline_counts_for_who_waits_already():
    """The mover says it when it is there, which may be after the first cold read."""
    _, inflow, _ = start()
    wait = blocked(inflow.need, 5, 0, 100)
    inflow.limit(2.0)
    assert not inflow.expire(time.monotonic() + 1.5) and not wait.done
    assert inflow.expire(time.monotonic() + 2.5) == [5] and wait.errno == errno.EIO


def test_two_readers_of_one_range_cause_one_flight():
    peer, inflow, _ = start()
    first, second = blocked(inflow.need, 5, 0, 10), blocked(inflow.need, 5, 0, 20)
    assert len(peer.take(wire.Fetch)) == 1
    inflow.filled(wire.Filled(5, 0, LEAF))
    assert first.done and second.done


def test_a_failed_flight_fails_only_those_who_wait_for_its_range():
    peer, inflow, _ = start()
    near, far = blocked(inflow.need, 5, 0, 10), blocked(inflow.need, 5, 8 * MIB, 8 * MIB + 1)
    first = peer.take(wire.Fetch)[0]
    inflow.ended(wire.FetchEnd(first.id, 5, errno.EIO, "gone"))
    assert (near.errno, near.reason) == (errno.EIO, "gone")
    assert not far.done


@pytest.mark.parametrize("late", [False, True])
def test_what_has_just_failed_is_not_waited_for_once_more(monkeypatch, late):
    """The kernel has read ahead; now it asks for the one page that its caller waits for."""
    peer, inflow, _ = start()
    now = time.monotonic()
    wait = blocked(inflow.need, 5, 0, 2 * LEAF)
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    (fetch,) = peer.take(wire.Fetch)
    if late:
        inflow.expire(wait.deadline)
    else:
        inflow.ended(wire.FetchEnd(fetch.id, 5, errno.EIO, "gone"))
    peer.take(wire.Fetch)
    assert wait.errno == errno.EIO
    with pytest.raises(OSError, match="no content within" if late else "gone") as caught:
        inflow.need(5, LEAF, LEAF + 100)
    assert caught.value.errno == errno.EIO and not peer.sent
    blocked(inflow.need, 5, LEAF, 3 * LEAF)  # of this not all has been asked for
    monkeypatch.setattr(time, "monotonic", lambda: now + 60 + FAILED_SECONDS)
    blocked(inflow.need, 5, LEAF, LEAF + 100)


@pytest.mark.parametrize(
    ("size", "error", "seconds"),
    [(16 * MIB, errno.ECANCELED, 60), (MIB, errno.EIO, 60), (16 * MIB, errno.EIO, 0)],
)
def test_what_was_cancelled_comes_in_open_or_has_failed_at_once_is_asked_for_again(
    monkeypatch, size, error, seconds
):
    peer, inflow, _ = start(size)
    now = time.monotonic()
    blocked(inflow.need, 5, 0, 100)
    monkeypatch.setattr(time, "monotonic", lambda: now + seconds)
    (fetch,) = peer.take(wire.Fetch)
    inflow.ended(wire.FetchEnd(fetch.id, 5, error, "x"))
    blocked(inflow.need, 5, 0, 100)


def test_a_failed_read_ahead_is_asked_again_for_those_who_wait():
    peer, inflow, _ = start()
    inflow.ahead(5, 0, MIB)
    (ahead,) = peer.take(wire.Fetch)
    wait = blocked(inflow.need, 5, 0, 10)
    peer.take(wire.Fetch)
    inflow.ended(wire.FetchEnd(ahead.id, 5, errno.EIO, "x"))
    assert not wait.done


def test_what_read_ahead_is_just_bringing_is_not_asked_for_again():
    peer, inflow, _ = start(size=64 * MIB)
    read = partial(inflow.need, passable=True)
    inflow.ahead(5, 0, 32 * MIB)
    peer.take(wire.Fetch)
    blocked(read, 5, 0, MIB)
    (first,) = peer.take(wire.Fetch)  # nothing of it has come: it may be far behind others
    inflow.filled(wire.Filled(5, 0, MIB))
    wait = blocked(read, 5, MIB, 2 * MIB)
    assert not peer.take(wire.Fetch)
    blocked(read, 5, 20 * MIB, 21 * MIB)  # where somebody reads who does not read on
    assert len(peer.take(wire.Fetch)) == 1
    blocked(read, 5, 32 * MIB - LEAF, 32 * MIB + LEAF)  # half of it is not asked for at all
    assert len(peer.take(wire.Fetch)) == 1
    inflow.ended(wire.FetchEnd(first.id, 5, 0))
    inflow.filled(wire.Filled(5, MIB, MIB))
    assert wait.done and not wait.errno


def test_who_waits_for_read_ahead_is_asked_for_when_that_takes_its_time_or_fails():
    peer, inflow, _ = start(size=64 * MIB)
    read = partial(inflow.need, passable=True)
    inflow.ahead(5, 0, 32 * MIB)
    (ahead,) = peer.take(wire.Fetch)
    inflow.filled(wire.Filled(5, 0, MIB))
    wait = blocked(read, 5, MIB, 2 * MIB)
    inflow.expire(time.monotonic())
    (again,) = peer.take(wire.Fetch)
    assert (again.start, again.length, again.ahead) == (MIB, MIB, False)
    later = blocked(read, 5, 2 * MIB, 3 * MIB)
    inflow.ended(wire.FetchEnd(ahead.id, 5, errno.ECANCELED, "x"))
    (last,) = peer.take(wire.Fetch)
    assert (last.start, last.length, last.ahead) == (2 * MIB, MIB, False)
    inflow.ended(wire.FetchEnd(last.id, 5, errno.EIO, "gone"))
    assert later.errno == errno.EIO and not wait.done


def test_a_small_file_is_asked_for_whole_and_writers_wait_for_settled():
    peer, inflow, content = start(size=100)
    reader = blocked(inflow.need, 5, 0, 100)
    writer = blocked(inflow.need_settled, 5)
    assert all(f.whole for f in peer.take(wire.Fetch))
    inflow.filled(wire.Filled(5, 0, 100))
    assert reader.done and not writer.done and content.settling and inflow.busy(5)
    inflow.settled(wire.Settled(5))
    assert writer.done and writer.errno == 0 and not content.settling


def test_who_waits_asks_for_himself_whatever_is_ordered():
    """For orders the mover takes a small share of a busy processor. One that fails is no answer to others."""
    peer, inflow, _ = start()
    inflow.bring(5)
    inflow.bring(5)
    (ordered,) = peer.take(wire.Fetch)
    assert ordered.whole and ordered.ordered
    waits = [blocked(inflow.need_settled, 5), blocked(inflow.need, 5, 0, LEAF), blocked(inflow.need_settled, 5)]
    own = peer.take(wire.Fetch)
    assert [fetch.ordered for fetch in own] == [False]
    inflow.bring(5)
    inflow.ended(wire.FetchEnd(ordered.id, 5, errno.EIO, "no content"))
    assert not peer.take(wire.Fetch) and not any(wait.done for wait in waits)
    inflow.ended(wire.FetchEnd(own[0].id, 5, errno.EIO, "gone"))
    assert [wait.errno for wait in waits] == [errno.EIO] * 3


def test_settling_that_fails_fails_the_writer_and_can_be_tried_again():
    peer, inflow, _ = start(size=100)
    writer = blocked(inflow.need_settled, 5)
    peer.take(wire.Fetch)
    inflow.settled(wire.Settled(5, errno.ENOSPC, "full"))
    assert writer.errno == errno.ENOSPC
    again = blocked(inflow.need_settled, 5)
    assert len(peer.take(wire.Fetch)) == 1 and not again.done


def test_a_truncation_cancels_flights_and_waits_until_they_have_ended():
    peer, inflow, _ = start()
    reader = blocked(inflow.need, 5, 0, 10)
    (fetch,) = peer.take(wire.Fetch)
    truncation = blocked(inflow.need_idle, 5)
    assert [m.id for m in peer.take(wire.CancelFetch)] == [fetch.id]
    inflow.ended(wire.FetchEnd(fetch.id, 5, errno.ECANCELED))
    assert truncation.done and truncation.errno == 0 and not reader.done
    assert peer.take(wire.Fetch) == []
    inflow.need_idle(5)
    inflow.void(5)
    assert reader.done and reader.errno == 0


def test_an_interrupted_truncation_lets_the_readers_go_on():
    peer, inflow, _ = start()
    blocked(inflow.need, 5, 0, 10)
    (fetch,) = peer.take(wire.Fetch)
    blocked(inflow.need_idle, 5)
    inflow.ended(wire.FetchEnd(fetch.id, 5, errno.ECANCELED))
    inflow.expire(0.0)
    assert len(peer.take(wire.Fetch)) == 1


def test_deadlines_fail_with_eio():
    _, inflow, _ = start()
    wait = blocked(inflow.need, 5, 0, 10)
    assert inflow.waiting
    inflow.expire(wait.deadline + 1)
    assert wait.errno == errno.EIO and not inflow.waiting


def test_a_new_mover_is_asked_for_what_is_still_in_the_air():
    peer, inflow, _ = start()
    blocked(inflow.need, 5, 0, 10)
    (fetch,) = peer.take(wire.Fetch)
    inflow.new_mover()
    assert peer.take(wire.Fetch) == [fetch]


def test_bits_of_a_partial_file_are_taken_from_the_index():
    _, inflow, content = start(size=3 * LEAF, bits=bytes([0b101]))
    assert content.missing == 1
    inflow.need(5, 0, LEAF)
    assert content.lacks(0, 3 * LEAF) == (LEAF, 2 * LEAF)


def test_the_last_leaf_of_an_odd_size_counts():
    _, _, content = start(size=2 * LEAF + 1)
    content.arrived(2 * LEAF, 2 * LEAF + 1)
    assert content.lacks(2 * LEAF, 2 * LEAF + 1) is None and content.missing == 2


def test_read_ahead_grows_for_sequential_readers_and_not_for_random_ones():
    ahead = ReadAhead()
    size = 1 << 30
    assert ahead.advance(0, 4096, size) is None
    first = ahead.advance(4096, 8192, size)
    assert first == (8192, 8192 + SMALL_AHEAD)
    asked = []
    for offset in range(8192, 64 * MIB, 128 * 1024):
        window = ahead.advance(offset, offset + 128 * 1024, size)
        if window:
            asked.append(window)
    assert all(a[1] == b[0] for a, b in zip([first, *asked], asked))
    assert asked[-1][1] - asked[-1][0] > 16 * MIB
    assert ahead.advance(900 * MIB, 900 * MIB + 4096, size) is None
    assert ahead.advance(900 * MIB, 900 * MIB + 4096, size) is None
    assert ahead.advance(100 * MIB, 100 * MIB + 4096, size) is None


@pytest.mark.parametrize(("rate", "least", "most"), [(1 * MIB, 8, 10), (4 * MIB, 32, 40), (1 << 30, 128, 128)])
def test_no_more_is_asked_for_than_comes_in_a_few_seconds(monkeypatch, rate, least, most):
    """All that is in the air shares the link: the next bytes would come as late as the last ones."""
    now, ahead, size, asked = 1000.0, ReadAhead(), 4 << 30, []
    monkeypatch.setattr("tierfs.inflow.time.monotonic", lambda: now)
    for offset in range(0, 512 * MIB, MIB):
        window = ahead.advance(offset, offset + MIB, size)
        now += MIB / rate
        if window and offset > 64 * MIB:
            asked.append((window[1] - window[0]) // MIB)
    assert least <= min(asked) and max(asked) <= most, asked


def test_a_large_read_at_the_beginning_starts_read_ahead_at_once_and_a_sniff_does_not():
    assert ReadAhead().advance(0, MIB, 1 << 30) == (MIB, MIB + FIRST_AHEAD)
    assert ReadAhead().advance(0, 4096, 1 << 30) is None


def test_who_waits_for_a_large_file_waits_as_long_as_content_arrives(monkeypatch):
    now = 1000.0
    monkeypatch.setattr("tierfs.inflow.time.monotonic", lambda: now)
    _, inflow, content = start()
    reader = blocked(inflow.need, 5, 0, content.size)
    writer = blocked(inflow.need_settled, 5)
    now += 50
    inflow.filled(wire.Filled(5, 0, LEAF))
    inflow.expire(now + 50)
    assert not reader.done and not writer.done
    inflow.expire(now + 61)
    assert reader.errno == writer.errno == errno.EIO
    assert not content.timed


def test_a_truncation_that_was_interrupted_leaves_no_writer_waiting_for_nothing():
    peer, inflow, _ = start()
    writer = blocked(inflow.need_settled, 5)
    woken = []
    writer.add(lambda: woken.append(1))
    (whole,) = peer.take(wire.Fetch)
    truncation = blocked(inflow.need_idle, 5)
    truncation.add(woken.clear)
    truncation.discard(woken.clear)  # interrupted
    inflow.ended(wire.FetchEnd(whole.id, 5, errno.ECANCELED))
    inflow.expire(0.0)
    (again,) = peer.take(wire.Fetch)
    assert again.whole and not writer.done


def test_a_fetch_that_could_not_be_sent_is_not_taken_for_one_under_way():
    def full(_message, _fds):
        raise OSError(errno.EMFILE, "Too many open files")

    inflow = Inflow(full)
    content = Content(STUB, 16 * MIB, None)
    inflow.track(5, content, 9)
    for call in (lambda: inflow.need(5, 0, LEAF), lambda: inflow.need_settled(5)):
        with pytest.raises(OSError, match="Too many"):
            call()
    assert not content.flights and not content.whole_asked


def test_who_opens_what_comes_for_another_program_asks_for_himself():
    """A scan's content comes behind that for which somebody waits."""
    peer, inflow, content = start(MIB)
    content.opened_by(10)
    blocked(inflow.need, 5, 0, MIB)
    content.opened_by(10)
    blocked(inflow.need, 5, 0, MIB)
    assert [fetch.pid for fetch in peer.take(wire.Fetch)] == [10]
    content.opened_by(20)
    blocked(inflow.need, 5, 0, MIB)
    content.opened_by(10)
    blocked(inflow.need, 5, 0, MIB)
    assert [fetch.pid for fetch in peer.take(wire.Fetch)] == [0], "of several it is not known who waits most"


def test_an_order_is_nobodys_opening():
    peer, inflow, content = start()
    content.opened_by(10)
    inflow.bring(5)
    assert [(fetch.pid, fetch.ordered) for fetch in peer.take(wire.Fetch)] == [(0, True)]
