"""The table that outlives a mount server."""

import fcntl
import os
import sys

import pytest

from tierfs import ledger as ledgers
from tierfs.intents import Doing
from tierfs.ledger import Incompatible, Kind, Ledger


def test_an_intent_outlives_several_servers():
    fd = ledgers.make()
    st = os.stat("/")
    first = Ledger(fd)
    first.request = 10
    first.intend(Doing.RENAME, st, None, b"handle")
    second = Ledger(fd)
    second.load_intents()
    second.request = 12
    second.intend(Doing.UNLINK, st)
    third = Ledger(fd)
    third.load_intents()
    assert third.pending(10).handle == b"handle" and third.pending(10).first.st_ino == st.st_ino
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
    kept = {node.number: node for node in Ledger(fd).load_nodes()}
    assert {number: node.content for number, node in kept.items()} == names
    assert all(node.kind is Kind.NAME for node in kept.values())
    os.close(fd)


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
