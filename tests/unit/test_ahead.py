"""Which files of a directory are brought before they are asked for, and when none are."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierfs.policy.ahead import FIRST, LOOKED_AT, MOST, Listing, Precision, Run, natural

NUMBERED = [b"f%d" % number for number in range(200)]


def listed(names):
    """As a directory has them: in no order that a person sees."""
    mixed = list(names)
    random.Random(1).shuffle(mixed)
    return Listing(mixed)


def reader(names, first):
    return Run(first, 2.0, listing=listed(names))


def brought(run, places):
    """What comes of these places, if nothing is here yet."""
    chosen = list(places)[: run.window]
    if chosen:
        run.ahead = chosen[-1]
    return [run.listing.orders[run.order][place] for place in chosen]


def test_a_person_counts():
    assert sorted([b"f10", b"f9", b"f", b"a", b"f9b", b"10", b"9"], key=natural) == [
        b"9", b"10", b"a", b"f", b"f9", b"f9b", b"f10",
    ]  # fmt: skip


@pytest.mark.parametrize("order", range(3))
def test_the_order_of_two_files_is_gone_on_with(order):
    listing = listed(NUMBERED)
    names = listing.orders[order]
    at = next(at for at in range(10, 150) if listing.order_of(names[at], names[at + 1]) == order)
    run = reader(NUMBERED, names[at])
    assert brought(run, run.next(names[at + 1], 0.0)) == names[at + 2 : at + 2 + FIRST]


def test_more_come_each_time_the_reader_gets_to_their_end():
    run, asked, at = reader(NUMBERED, NUMBERED[0]), [], 1
    here: set[bytes] = {NUMBERED[0]}
    while at < len(NUMBERED):
        if NUMBERED[at] not in here:
            asked.append(at)
            here.update([NUMBERED[at], *brought(run, run.next(NUMBERED[at], 0.0))])
        at += 1
    assert asked == [1, 2 + FIRST, 3 + 3 * FIRST, 4 + 7 * FIRST, 5 + 11 * FIRST]
    assert run.window == MOST


def test_who_reads_what_is_on_its_way_gets_the_next_before_it_has_come():
    run = reader(NUMBERED, NUMBERED[0])
    brought(run, run.next(NUMBERED[1], 0.0))
    assert not run.next(NUMBERED[2], 0.0), "most of it is still to be read"
    assert brought(run, run.next(NUMBERED[FIRST - 2], 0.0))[0] == NUMBERED[2 + FIRST]


def test_who_goes_backwards_or_elsewhere_gets_nothing_or_little():
    run = reader(NUMBERED, NUMBERED[100])
    order = run.listing.order_of(NUMBERED[100], NUMBERED[99])
    assert order != 0
    run = reader(NUMBERED, NUMBERED[0])
    brought(run, run.next(NUMBERED[1], 0.0))
    brought(run, run.next(NUMBERED[2 + FIRST], 0.0))
    assert not run.next(NUMBERED[150], 0.0), "it has jumped"
    assert brought(run, run.next(NUMBERED[151], 0.0)) == NUMBERED[152 : 152 + FIRST], "and goes on from there"
    assert not run.next(b"not listed", 0.0)


def test_who_reads_here_and_there_gets_next_to_nothing():
    names, draw = [b"f%d" % number for number in range(5000)], random.Random(2)
    run, came = reader(names, names[0]), 0
    for _ in range(200):
        came += len(brought(run, run.next(draw.choice(names), 0.0)))
    assert came <= 5 * FIRST


@given(st.lists(st.integers(0, 60), min_size=2), st.integers(1, 61))
def test_nothing_is_looked_at_twice_and_nothing_beyond_the_end(asked, count):
    names = [b"f%d" % number for number in range(count)]
    run = Run(b"f%d" % asked[0], 2.0, listing=Listing(names))
    for number in asked[1:]:
        before, order = run.ahead, run.order
        places = run.next(b"f%d" % number, 0.0)
        assert len(places) <= LOOKED_AT * MOST
        if places:
            assert places[0] >= 0 and places[-1] < len(run.listing.orders[run.order])
            at = run.listing.place(run.order, b"f%d" % number)
            assert places[0] > at
            assert order != run.order or not at <= before or places[0] > before
            run.ahead = places[min(run.window, len(places)) - 1]


def test_where_most_is_in_vain_nothing_is_brought_for_a_while():
    precision, now = Precision(), 0.0
    for ino in range(Precision.DECIDED):
        precision.asked(ino, 100, now)
        precision.came(100)
    assert precision.is_good(now)
    precision.used(range(Precision.DECIDED // 5))
    now += Precision.SECONDS
    assert not precision.is_good(now) and not precision.is_good(now + Precision.PAUSE - 1)
    assert precision.is_good(now + Precision.PAUSE)
    assert (precision.files, precision.used_files) == (Precision.DECIDED, Precision.DECIDED // 5)
    assert (precision.bytes, precision.used_bytes) == (100 * Precision.DECIDED, 100 * (Precision.DECIDED // 5))


def test_what_is_used_is_not_in_vain_and_what_failed_counts_for_nothing():
    precision = Precision()
    for ino in range(4 * Precision.DECIDED):
        precision.asked(ino, 1, 0.0)
        if ino % 2:
            precision.failed(ino)
    assert precision.unused([0, 1, 2]) == {0, 2}
    precision.used(ino for ino in range(0, 4 * Precision.DECIDED, 4))
    assert precision.unused([0, 2]) == {2}
    assert precision.is_good(Precision.SECONDS + 1.0), "half of it was used"
