"""The table that outlives a mount server."""

import fcntl
import os
import struct
import sys
import tracemalloc
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierfs import ledger as ledgers
from tierfs.intents import STAT_SIZE, Doing
from tierfs.ledger import Incompatible, Kind, Ledger
from tierfs.nodes import NodeTable


def test_an_intent_outlives_several_servers():
    fd = ledgers.make()
    found = os.stat("/")
    first = Ledger(fd)
    first.request = 10
    first.intend(Doing.RENAME, found, None, b"handle")
    second = Ledger(fd)
    second.load_intents()
    second.request = 12
    second.intend(Doing.UNLINK, found)
    third = Ledger(fd)
    third.load_intents()
    assert third.pending(10).handle == b"handle" and third.pending(10).first.st_ino == found.st_ino
    assert third.pending(12).doing is Doing.UNLINK and third.pending(12).second is None
    third.settle_all_but([12])
    assert third.pending(10) is None and Ledger(fd).pending(10) is None
    fourth = Ledger(fd)
    fourth.load_intents()
    assert fourth.pending(10) is None and fourth.pending(12) is not None
    os.close(fd)


def test_a_table_of_another_form_is_refused():
    fd = ledgers.make()
    Ledger(fd)
    os.pwrite(fd, (ledgers.FORMAT + 1).to_bytes(4, sys.byteorder), 8)
    with pytest.raises(Incompatible, match=f"form {ledgers.FORMAT + 1}"):
        Ledger(fd)
    os.close(fd)


def test_a_slot_that_was_used_billions_of_times_begins_anew():
    table = Ledger()
    number = table.new_node()
    last = (1 << 32) - 1 << 32 | number
    table.node(last, 7, 1, 1, b"last")
    table.drop_node(last)
    assert table.new_node() == number
    table.node(number, 8, 1, 1, b"new")
    table.drop_node(number)
    assert table.new_node() == 1 << 32 | number


def test_long_names_come_and_go():
    fd = ledgers.make()
    table = Ledger(fd)
    names = {}
    for _ in range(3):
        for index in range(20):
            number = table.new_node()
            names[number] = bytes([65 + index]) * (index * 12 + 1)
            table.node(number, number, 1, 1, names[number])
        for number in list(names)[::2]:
            table.drop_node(number)
            del names[number]
        for number in list(names)[::3]:
            names[number] = b"short" if len(names[number]) > 40 else b"l" * 200
            table.node(number, number, 1, 1, names[number])
        assert {number: table.name(number) for number in names} == names
    later = Ledger(fd)
    kept = {number: kind for number, _, kind in later.load_nodes()}
    assert {number: later.content(number) for number in kept} == names
    assert set(kept.values()) == {Kind.NAME}
    fresh = Ledger(fd)
    assert len(list(fresh.load_nodes())) == len(names)
    assert {number: fresh.name(number) for number in names} == names
    os.close(fd)


def units(table, names):
    """Every unit of each long name's place, and of each free one."""
    form = table.form()
    free = [(place, units) for units, places in enumerate(form.free_longs) for place in places]
    taken = [table._place(number & 0xFFFFFFFF) for number in names]
    return [place + unit for place, units in (*taken, *free) for unit in range(units)]


CHANGES = st.lists(
    st.tuples(st.sampled_from(["new", "rename", "drop", "take over"]), st.integers(0, 99), st.integers(1, 255)),
    max_size=60,
)


@given(CHANGES)
def test_no_two_long_names_share_a_place_and_none_is_lost(changes):
    fd = ledgers.make()
    table, names = Ledger(fd), {}
    for serial, (change, which, length) in enumerate(changes):
        name = (b"%d " % serial * 255)[:length]
        number = list(names)[which % len(names)] if names else None
        if change == "new":
            number = table.new_node()
            table.node(number, 5, 1, 1, name)
            names[number] = name
        elif change == "take over":
            table = Ledger(fd)
            assert {number for number, _, _ in table.load_nodes()} == set(names)
        elif number is not None and change == "rename":
            table.node(number, 5, 1, 1, name)
            names[number] = name
        elif number is not None:
            table.drop_node(number)
            del names[number]
        assert {number: table.name(number) for number in names} == names
        assert sorted(units(table, names)) == list(range(table._words[9]))
    os.close(fd)


def test_a_long_name_takes_no_more_memory_than_it_needs():
    """Whole homes have them: mail, pictures."""
    table = Ledger()
    for _ in range(1000):
        table.node(table.new_node(), 5, 1, 1, b"1700000000.M123456P1234.host,S=12345,W=12500:2,S")
    assert table._words[9] == 2 * 1000


class Killed(Exception):
    """In the place of a signal: nothing more is done."""


def kill_at(line, work):
    """Do it up to this line of the ledger's; whether it was at its end before."""
    left = line

    def trace(frame, event, _argument):
        nonlocal left
        if frame.f_code.co_filename != ledgers.__file__:
            return None
        left -= event == "line"
        if left < 0:
            raise Killed
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except Killed:
        return False
    finally:
        sys.settrace(before)
    return True


SHORT = [(b"short", Kind.NAME), (b"s" * 34, Kind.NAME), (b"h" * 20, Kind.HANDLE)]
LONGER = [
    (b"l" * 35, Kind.NAME), (b"m" * 64, Kind.NAME), (b"n" * 255, Kind.NAME),
    (b"k" * 65, Kind.HANDLE), (b"g" * STAT_SIZE, Kind.GONE),
]  # fmt: skip


@pytest.mark.parametrize("after", LONGER + SHORT)
@pytest.mark.parametrize("before", [None, *LONGER, *SHORT])
def test_long_content_comes_and_goes_at_once(before, after):
    """A server may be killed at any line; of two short ones a torn one may be left."""
    if before in SHORT and after in SHORT:
        return
    ended, line = False, 0
    while not ended:
        fd = ledgers.make()
        table = Ledger(fd)
        other = table.new_node()
        table.node(other, 6, 1, 1, b"other" * 20)
        old = table.new_node()  # of which its slot has something left
        table.node(old, 4, 1, 1, b"o" * 200, Kind.GONE)
        table.drop_node(old)
        number = table.new_node()
        if before is not None:
            table.node(number, 5, 1, 1, *before)
        ended = kill_at(line, lambda: table.node(number, 5, 1, 1, *after))  # noqa: B023
        table = Ledger(fd)
        kinds = {number: kind for number, _, kind in table.load_nodes()}
        found = (table.content(number), kinds[number]) if number in kinds else None
        assert found in ((after,) if ended else (before, after)), f"killed at line {line}"
        assert table.content(other) == b"other" * 20
        assert sorted(units(table, kinds)) == list(range(table._words[9]))
        os.close(fd)
        line += 1
    assert line > 10


def test_what_is_known_of_an_inode_is_the_former_or_the_new_at_each_line():
    """Between them it is never forgotten: a registration would stay until the mount ends, and a stub whose
    content is coming in would show the times that this has left."""
    before, after = (7, None), (0, (1, 2, 3))
    ended, line, seen = False, 0, set()
    while not ended:
        fd = ledgers.make()
        table = Ledger(fd)
        other = table.inode(0, 6, 8)
        slot = table.inode(0, 5, *before)
        ended = kill_at(line, lambda: table.inode(slot, 5, *after))  # noqa: B023
        table = Ledger(fd)
        left = list(table.load_inodes())
        kept = {(each.backing_id, each.shown) for each in left if each.ino == 5}
        assert kept and kept <= {before, after}, f"killed at line {line}"
        seen |= {frozenset(kept)}
        assert not ended or kept == {after}
        assert [each[:3] for each in left if each.ino == 6] == [(other, 6, 8)]
        os.close(fd)
        line += 1
    assert {frozenset({before}), frozenset({after})} <= seen


def test_rewriting_what_is_known_of_an_inode_takes_no_more_places():
    table = Ledger()
    slots = [table.inode(0, ino, ino) for ino in (5, 6)]
    for turn in range(100):
        slots = [table.inode(slot, ino, 0, (turn, 2, 3)) for slot, ino in zip(slots, (5, 6), strict=True)]
    assert table._words[6] <= 4 and len(set(slots)) == 2
    assert {kept.slot: kept.ino for kept in table.load_inodes()} == dict(zip(slots, (5, 6), strict=True))


def test_a_record_that_cannot_be_written_leaves_the_one_before():
    """It is never empty in between, and its number used again."""
    table = Ledger()
    number = table.new_node()
    table.node(number, 5, 1, 1, b"name")
    with pytest.raises(struct.error):
        table.node(number, 1 << 64, 1, 1, b"other")
    assert table.lookups(number) == 1 and table.name(number) == b"name"


def unsized(fd, lengths):
    """What the version before would have left, whose places are all of 256 bytes: the names, by their nodes."""
    table, names = Ledger(fd), {}
    words, (_, nodes, size, _), longs = table._words, table.form().parts[0], table.form().longs[1]
    for place, length in enumerate(lengths):
        number = table.new_node()
        names[number] = name = bytes([65 + place]) * length
        table.node(number, number, 1, 1, b"name")
        at, start = nodes + number * size, longs + place * 256
        table._map[at + 29] = length
        table._map[at + 30 : at + 34] = place.to_bytes(4, sys.byteorder)
        table._map[start : start + 256] = name.ljust(255, b"\0") + bytes([length])
    words[7], words[9] = len(lengths), 0
    os.pwrite(fd, (1).to_bytes(4, sys.byteorder), 8)
    return names


def test_the_long_names_of_the_version_before_are_taken_over():
    fd = ledgers.make()
    names = unsized(fd, range(35, 256, 20))
    Ledger(fd).close()  # to look whether it could be taken over changes nothing
    assert os.pread(fd, 4, 8) == (1).to_bytes(4, sys.byteorder)
    for _ in range(2):
        table = Ledger(fd)
        assert {number for number, _, _ in table.load_nodes()} == set(names)
        assert {number: table.name(number) for number in names} == names
    for number in list(names)[::3]:
        table.drop_node(number)
        del names[number]
    for number in list(names)[::2]:
        names[number] = b"%d " % number * 20
        table.node(number, number, 1, 1, names[number])
    assert sorted(units(table, names)) == list(range(table._words[9]))
    assert {number: table.name(number) for number in names} == names
    os.close(fd)


def test_a_torn_long_name_of_the_version_before_is_no_place():
    """Else it would be given back, and a name be written there: beyond the memory."""
    fd = ledgers.make()
    names = unsized(fd, [40, 50, 60])
    torn = list(names)[1]
    table = Ledger(fd)
    at = table.form().parts[0][1] + torn * table.form().parts[0][2] + 30
    table._map[at : at + 4] = b"name"
    assert [number for number, _, _ in table.load_nodes()] == [number for number in names if number != torn]
    again = table.new_node()
    assert again & 0xFFFFFFFF == torn and again != torn
    names[again] = b"long" * 20
    del names[torn]
    table.node(again, 9, 1, 1, names[again])
    assert {number: table.name(number) for number in names} == names
    assert sorted(units(table, names)) == list(range(table._words[9]))
    os.close(fd)


def test_what_is_not_reached_by_a_name_has_none():
    table = Ledger()
    number = table.new_node()
    table.node(number, 5, 1, 1, b"n" * 100)
    table.node(number, 5, 1, 1, b"a handle", Kind.HANDLE)
    assert table.name(number) == b""
    table.node(number, 5, 1, 1, b"name")
    assert table.name(number) == b"name"


def test_lookups_are_counted_and_given_back():
    table = Ledger()
    number, other = table.new_node(), table.new_node()
    for each in (number, other):
        table.node(each, 5, 1, 1, b"name")
    table.looked_up(number)
    table.looked_up(number)
    assert (table.lookups(number), table.lookups(other)) == (3, 1)
    assert table.given_back(number, 2) == 1 == table.lookups(number)
    assert table.given_back(number, 1) == 0
    assert table.given_back(other, 7) == 0


def test_a_node_looked_up_more_often_than_can_be_counted_is_never_forgotten():
    """The kernel may still hold it, and would get ESTALE for an open directory or the working directory."""
    table = Ledger()
    number = table.new_node()
    table.node(number, 5, 1, (1 << 31) - 2, b"name")
    for _ in range(5):
        table.looked_up(number)
    for _ in range(3):
        assert table.given_back(number, (1 << 31) - 1) > 0


FAR = dict.fromkeys(("st_atime_ns", "st_mtime_ns", "st_ctime_ns"), 1 << 70) | {"st_blocks": 0, "st_rdev": 0}


def test_times_beyond_what_a_field_holds_are_no_error():
    fd = ledgers.make()
    table = Ledger(fd)
    far = os.stat_result((0o100644, 1, 1, 1, 0, 0, 0, 1, 1, 1), FAR)
    table.request = 2
    table.intend(Doing.UNLINK, far)
    assert table.inode(0, 5, 1, (1 << 70, -(1 << 70), 8))
    fresh = Ledger(fd)
    assert next(iter(fresh.load_inodes())).shown == (2**63 - 1, -(2**63), 8)
    os.close(fd)


def test_the_memory_is_not_inherited_by_chance():
    fd = ledgers.make()
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(fd)


def test_a_takeover_makes_nothing_of_a_node_but_the_node():
    """All requests wait for it, and there may be a million nodes."""
    fd = ledgers.make()
    tree = SimpleNamespace(root_ino=2, device=1, rootfd=-1, privileged=True)
    table = Ledger(fd)
    nodes = NodeTable(tree, table)
    above, parents, count = nodes.root, {}, 20_000
    for ino in range(1000, 1000 + count):
        node = nodes._enter(ino, above, b"name %d" % ino)
        parents[ino] = node.parent_ino
        above = node if ino % 50 == 0 else above
    table.serve(passthrough=True)
    later = NodeTable(tree, Ledger(fd))
    tracemalloc.start()
    later.restore({})
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 180 * count
    assert {node.ino: node.parent_ino for node in later.all() if node is not later.root} == parents
    assert all(later.name(later.known(ino)) == b"name %d" % ino for ino in parents)
    os.close(fd)
