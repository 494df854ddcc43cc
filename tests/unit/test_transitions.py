"""Records: what each event makes of them, and that no order of events breaks the invariants."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierfs import transitions as t
from tierfs.errors import TransitionError
from tierfs.model import Copy, Record, Residency


def copy_of(generation=5, size=100):
    return Copy(generation, b"t" * 8, b"d" * 32, size, 11, 22, 1)


def new(generation=5, size=100):
    return Record(9, b"handle", b"f" * 16, generation, size=size, blocks=8, local=4096, parent=2, name=b"n")


CLEAN = t.copied(new(), copy_of(), 100, 8, 22)
STUB = t.stubbed(CLEAN, 8, CLEAN.copy)


def test_from_dirty_to_stub_and_back():
    assert new().dirty and not CLEAN.dirty
    assert (STUB.residency, STUB.local, STUB.blocks, STUB.size) == (Residency.STUB, 0, 8, 100)
    punched = t.punched(STUB, 333, 0)
    assert (punched.left_ctime, punched.copy) == (333, CLEAN.copy)
    partial = t.arrived(punched, 4, CLEAN.copy, 444)
    assert (partial.residency, partial.local, partial.left_ctime) == (Residency.PARTIAL, 2048, 444)
    back = t.whole(partial, 8, 555)
    assert back == replace(CLEAN, left_ctime=555)
    for before, after in ((None, new()), (new(), CLEAN), (CLEAN, STUB), (STUB, partial), (partial, back)):
        t.check(before, after)


def test_a_write_makes_any_file_resident_and_dirty_and_keeps_the_hints():
    for record in (new(), CLEAN, STUB, t.arrived(STUB, 4, CLEAN.copy, 0)):
        written = t.wrote(record, 6)
        assert written.dirty and written.residency is Residency.RESIDENT
        assert (written.parent, written.name, written.copy) == (2, b"n", record.copy)
        t.check(record, written)
    assert t.wrote(new(), 6, 3, b"other").name == b"other"


def test_an_unchanged_file_takes_the_generation_of_its_copy_back():
    assert t.copied(t.wrote(CLEAN, 6), copy_of(5), 100, 8, 22) == CLEAN


def test_the_ctime_left_by_ourselves_is_kept_only_while_it_is_still_that():
    left = replace(new(), left_ctime=77)
    assert t.copied(left, copy_of(), 100, 8, 77).left_ctime == 77
    assert t.copied(left, copy_of(), 100, 8, 78).left_ctime == 0


def test_closing_tells_nothing_new_of_a_stub():
    assert t.closed(STUB, 1, 1) == STUB
    assert t.closed(new(), 7, 16) == replace(new(), size=7, blocks=16, local=8192)


@pytest.mark.parametrize(
    "move",
    [
        lambda: t.stubbed(new(), 8, copy_of(4)),
        lambda: t.stubbed(t.wrote(CLEAN, 6), 8, CLEAN.copy),
        lambda: t.punched(CLEAN, 1, 0),
        lambda: t.copied(STUB, copy_of(), 100, 8, 1),
        lambda: t.copied(new(), copy_of(size=99), 100, 8, 1),
        lambda: t.arrived(CLEAN, 4, CLEAN.copy, 1),
        lambda: t.arrived(STUB, 4, copy_of(6), 1),
        lambda: t.check(None, replace(new(), residency=Residency.STUB)),
        lambda: t.check(None, replace(CLEAN, residency=Residency.STUB, generation=6)),
        lambda: t.check(None, replace(STUB, size=99)),
        lambda: t.check(CLEAN, replace(CLEAN, residency=Residency.PARTIAL)),
    ],
)
def test_illegal_moves_raise(move):
    with pytest.raises(TransitionError, match="inode 9"):
        move()


def step(record, event, number):
    """One event with arguments that may or may not fit."""
    copy = record.copy or copy_of(record.generation, record.size)
    match event:
        case "wrote":
            return t.wrote(record, record.generation + number)
        case "closed":
            return t.closed(record, number, number)
        case "copied":
            return t.copied(record, copy_of(record.generation, number), number, 8, 1)
        case "stubbed":
            return t.stubbed(record, number, copy)
        case "punched":
            return t.punched(record, number, 0)
        case "arrived":
            return t.arrived(record, number, copy, 1)
        case _:
            return t.whole(record, number, 1)


EVENTS = ("wrote", "closed", "copied", "stubbed", "punched", "arrived", "whole")


@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(1, 3)), max_size=60))
def test_no_order_of_events_breaks_the_invariants(events):
    record = new(size=1)
    for event, number in events:
        try:
            after = step(record, event, number)
            t.check(record, after)
        except TransitionError:
            continue
        record = after
        assert record.residency is Residency.RESIDENT or not record.dirty
        assert record.residency is Residency.RESIDENT or record.copy.size == record.size
