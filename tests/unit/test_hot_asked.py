"""The compiled form tells the kernel that an answer on its way is out of date only where there may be one.

And of a file that it has just made it knows what the kernel asks before the first write.
"""

import errno
import itertools
import os
from types import SimpleNamespace

import pytest
from hotside import Side, build, load

from tierfs.fuse import protocol as p
from tierfs.fuse.kernel import _Parked
from tierfs.vfs import ROOT

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # version 2: net_bind_service
ONE, OTHER = 1234, 1235  # threads


@pytest.fixture
def side(tmp_path, monkeypatch, built):
    """A session of the compiled form that sees edits behind the mount."""
    (tmp_path / "tree" / "dir").mkdir(parents=True)
    made = Side(tmp_path / "side", "compiled", monkeypatch, built, watched=True)
    yield made
    made.close()


@pytest.fixture
def told_of():
    """Of which nodes a change by this thread has the kernel told."""
    names = itertools.count()

    def of(side):
        def change(thread, node=ROOT):
            side.thread = thread
            side.outdated.clear()
            number, _ = side.ask(p.Op.MKDIR, node, p.MKDIR_IN.pack(0o755, 0) + b"%d\0" % next(names))
            assert not number
            return list(side.outdated)

        return change

    return of


@pytest.fixture
def told(side, told_of):
    return told_of(side)


def asked(side, thread, opcode, node, body=b""):
    """This thread's request, answered without an error."""
    side.thread = thread
    number, found = side.ask(opcode, node, body)
    assert not number
    return found


def test_who_alone_has_asked_has_taken_in_what_it_was_told(side, told):
    assert told(ONE) == [ROOT]  # whoever was there before
    assert told(ONE) == []
    asked(side, ONE, p.Op.GETATTR, ROOT, p.GETATTR_IN.pack(0, 0, 0))
    assert told(ONE) == []


def test_another_may_have_yet_to_take_it_in(side, told):
    told(ONE)
    asked(side, OTHER, p.Op.GETATTR, ROOT, p.GETATTR_IN.pack(0, 0, 0))
    assert told(ONE) == [ROOT]
    assert told(ONE) == []
    assert told(OTHER) == [ROOT]
    assert told(OTHER) == []


def test_so_may_who_has_looked_it_up_or_listed_it(side, told):
    node = side.lookup(ROOT, b"dir")[0]
    told(ONE, node)
    asked(side, ONE, p.Op.LOOKUP, ROOT, b"dir\0")
    assert told(ONE, node) == []
    asked(side, OTHER, p.Op.LOOKUP, ROOT, b"dir\0")
    assert told(ONE, node) == [node]
    asked(side, OTHER, p.Op.READDIRPLUS, ROOT, p.READ_IN.pack(0, 0, 4096, 0, 0, 0, 0))
    assert told(ONE, node) == [node]


def test_so_may_whom_python_answers(side, told):
    told(ONE)
    asked(side, OTHER, p.Op.STATFS, ROOT)
    assert told(ONE) == [ROOT]


def test_threads_of_another_namespace_are_not_told_apart(side, told):
    assert told(0) == told(0) == [ROOT]


def made_dirs(side, thread, count):
    """New directories that this thread has made: their nodes."""
    how = p.MKDIR_IN.pack(0o755, 0)
    made = [asked(side, thread, p.Op.MKDIR, ROOT, how + b"d%d\0" % number) for number in range(count)]
    return [p.ENTRY_OUT.unpack(entry)[0] for entry in made]


def test_nodes_that_share_a_slot_are_told_apart(tmp_path, monkeypatch, built, told_of):
    (tmp_path / "tree").mkdir()
    few = load(build(tmp_path / "_hot.so", "-DASKED=64"))
    side = Side(tmp_path / "side", "compiled", monkeypatch, few, watched=True)
    told = told_of(side)
    nodes = made_dirs(side, 0, 65)
    one, other = next((a, b) for a in nodes for b in nodes if a < b and a % 64 == b % 64)
    for node in (one, other, one, other):
        assert told(ONE, node) == [node]
    assert told(ONE, other) == []
    side.close()


def test_what_is_new_nobody_else_has_been_told_of(side, told):
    (node,) = made_dirs(side, ONE, 1)
    assert told(ONE, node) == []
    assert told(OTHER, node) == [node]
    node = p.ENTRY_OUT.unpack(asked(side, OTHER, p.Op.LOOKUP, ROOT, b"dir\0"))[0]
    assert told(OTHER, node) == []
    asked(side, ONE, p.Op.LOOKUP, ROOT, b"dir\0")  # it is not new any more
    assert told(ONE, node) == [node]


def test_what_is_new_to_a_thread_of_another_namespace_may_be_told_to_others_of_it(side, told):
    (node,) = made_dirs(side, 0, 1)
    assert told(ONE, node) == [node]


def looked_up_by_both(side):
    """A directory that ONE has made, and that OTHER has looked up since."""
    (node,) = made_dirs(side, ONE, 1)
    asked(side, ONE, p.Op.GETATTR, ROOT, p.GETATTR_IN.pack(0, 0, 0))
    asked(side, OTHER, p.Op.LOOKUP, ROOT, b"d0\0")
    return node


def test_who_has_asked_again_has_taken_in_what_it_was_told(side, told):
    node = looked_up_by_both(side)
    asked(side, OTHER, p.Op.GETATTR, ROOT, p.GETATTR_IN.pack(0, 0, 0))
    assert told(ONE, node) == []


def test_who_has_not_may_have_yet_to_take_it_in(side, told):
    node = looked_up_by_both(side)
    assert told(ONE, node) == [node]


def test_two_may_have_yet_to_take_it_in(side, told):
    (node,) = made_dirs(side, ONE, 1)
    asked(side, OTHER, p.Op.LOOKUP, ROOT, b"d0\0")  # ONE has not asked since
    asked(side, OTHER, p.Op.GETATTR, ROOT, p.GETATTR_IN.pack(0, 0, 0))
    assert told(OTHER, node) == [node]


def test_what_a_thread_need_not_wait_for_says_nothing_of_what_it_has_taken_in(side, told):
    node = looked_up_by_both(side)
    side.thread = OTHER
    assert side.ask(p.Op.IOCTL, node, bytes(32))[0] == errno.ENOTTY  # as what reads ahead, or closes
    assert told(ONE, node) == [node]


def test_a_thread_of_which_nothing_is_known_any_more_may_have_yet_to_take_it_in(side, told):
    node = looked_up_by_both(side)
    for thread in (OTHER, OTHER + 1024):  # they share a place
        asked(side, thread, p.Op.GETATTR, ROOT, p.GETATTR_IN.pack(0, 0, 0))
    assert told(ONE, node) == [node]


def test_whom_python_answers_may_be_told_of_what_is_new(side, told):
    (node,) = made_dirs(side, ONE, 1)
    asked(side, OTHER, p.Op.STATFS, ROOT)
    assert told(ONE, node) == [node]


def test_so_may_who_has_waited_for_his_answer(side, told):
    session, (node,) = side.session, made_dirs(side, ONE, 1)
    late = _Parked(lambda *_: b"", bytes(p.IN), 99, ROOT, SimpleNamespace(errno=0), session._runnable)
    session._parked[99] = late
    late.wake()
    session.run_ready()
    assert p.OUT.unpack(side.sock.recv(100)) == (p.OUT_SIZE, 0, 99)
    assert told(ONE, node) == [node]


def new_file(side, name):
    """A file that is made now: its node."""
    made = asked(side, ONE, p.Op.CREATE, ROOT, p.CREATE_IN.pack(os.O_RDWR, 0o100644, 0, 0) + name + b"\0")
    return p.ENTRY_OUT.unpack(made[: p.ENTRY_OUT.size])[0]


def capability(side, node):
    """Its value, or an errno."""
    number, value = side.ask(p.Op.GETXATTR, node, p.GETXATTR_IN.pack(100, 0) + b"security.capability\0")
    return number or value


def test_a_new_file_has_no_capability_and_is_not_looked_at(side):
    node = new_file(side, b"file")
    os.setxattr(side.path / "file", "security.capability", CAPABILITY)
    assert capability(side, node) == errno.ENODATA  # as it was made
    assert capability(side, node) == CAPABILITY


@pytest.mark.parametrize("name", [b"security.capability", b"user.other"])
def test_unless_somebody_has_set_an_attribute(side, name):
    node = new_file(side, b"file")
    asked(side, OTHER, p.Op.SETXATTR, node, p.SETXATTR_IN.pack(20, 0, 0, 0) + name + b"\0" + CAPABILITY)
    os.setxattr(side.path / "file", "security.capability", CAPABILITY)
    assert capability(side, node) == CAPABILITY


def test_or_python_has_done_something_that_this_does_not_know(side):
    node = new_file(side, b"file")
    os.setxattr(side.path / "file", "security.capability", CAPABILITY)
    asked(side, OTHER, p.Op.STATFS, ROOT)
    assert capability(side, node) == CAPABILITY
