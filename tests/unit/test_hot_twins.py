"""The compiled form leaves the server in the very state that the pure one does, whatever it is asked."""

import errno
import itertools
import os
import stat
import struct
import subprocess
import time
from pathlib import Path

import pytest
from hotside import build, load
from hottwins import Both, listed_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tierfs import idle
from tierfs.fuse import protocol as p
from tierfs.handles import Inode, ShownTimes
from tierfs.intents import STAT_SIZE
from tierfs.marks import SEGMENT, Mark, MarkReader
from tierfs.model import Stub
from tierfs.tree import Tree
from tierfs.vfs import ROOT

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # version 2: net_bind_service


@pytest.fixture
def both(tmp_path, monkeypatch, built):
    made = Both(tmp_path, monkeypatch, built)
    yield made
    made.close()


def write(content):
    return lambda path: [(path / name).write_bytes(content) for name in ("a", "b", "c", "d", "e")]


def left(both, *ops):
    """The requests of these kinds that the compiled form leaves to Python, as they come."""
    asked = []
    table = both.sides[1].session._table
    for op in ops:
        table[op] = lambda *request, op=op, run=table[op]: (asked.append(op), run(*request))[1]
    return asked


def test_reading_what_is_resident_is_left_to_nobody(both):
    both.behind(write(b"content"))
    asked = left(both, p.Op.OPEN, p.Op.RELEASE, p.Op.FORGET, p.Op.LOOKUP)
    for name in (b"a", b"b", b"c", b"d", b"e"):  # more than stay registered
        node = both.lookup(ROOT, name)
        both.opened(node, os.O_RDONLY)
        both.opened(node, os.O_RDONLY)
        both.release(0)
        both.release(0)
        both.opened(node, os.O_RDONLY)
        both.release(0)
    for node in both.nodes[1:]:
        both.ask(p.Op.FORGET, node, p.U64.pack(1))
    assert asked == [] and len(both.sides[1].vfs.nodes) == 1
    for side in both.sides:
        assert side.gate.heat.count(os.stat(side.path / "a").st_ino) == 3
        assert len(side.backing.live) == len(side.gate.states.idle) == 3
        assert not list(side.vfs.ledger.load_files())


def test_what_stays_registered_gives_way_to_what_is_open(both):
    both.behind(write(b"content"))
    asked = left(both, p.Op.OPEN, p.Op.RELEASE, p.Op.CREATE)
    for side in both.sides:
        side.gate.states.idle.most, side.gate.states.idle.room = 10, 3
    nodes = [both.lookup(ROOT, name) for name in (b"a", b"b", b"c", b"d", b"e")]
    kept = []
    for node in nodes[:3]:
        both.opened(node, os.O_RDONLY)
        both.release(0)
        kept.append(len(both.sides[1].gate.states.idle))
    for node in nodes[3:]:
        both.opened(node, os.O_RDONLY)
        kept.append(len(both.sides[1].gate.states.idle))
    both.made(p.Op.CREATE, ROOT, b"new", 0o644)
    kept.append(len(both.sides[1].gate.states.idle))
    both.opened(nodes[0], os.O_RDONLY)
    assert len(both.sides[1].backing.live) == 4  # as many as are open
    both.release(0)
    kept.append(len(both.sides[1].gate.states.idle))
    both.release(0)
    kept.append(len(both.sides[1].gate.states.idle))
    assert kept == [1, 2, 3, 2, 1, 0, 0, 1] and asked == []


WRITE = [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_APPEND]


def test_writing_what_is_resident_is_left_to_nobody(both):
    both.behind(write(b"content"))
    asked = left(both, p.Op.OPEN, p.Op.RELEASE)
    for name in (b"a", b"b", b"c", b"d", b"e"):  # more than stay registered
        node = both.lookup(ROOT, name)
        for flags in (*WRITE, *WRITE[::-1]):
            both.opened(node, flags)
            both.opened(node, os.O_RDONLY)
            both.opened(node, flags)
            both.release(1)
            both.release(1)
            both.release(0)
    assert asked == []
    for side in both.sides:
        assert not any(os.path.getsize(side.path / name) for name in "abcde")
        assert side.gate.heat.count(os.stat(side.path / "a").st_ino) == 24


WHY_NOT = itertools.product(
    ["sealed", "full", "many marks", "set-id", "renamed behind", "running"],
    [os.O_WRONLY, os.O_RDWR | os.O_TRUNC],
    [True, False],
)
# That it is running is found out when it has been registered, which the other form does last: ids differ.
EQUAL = [each for each in WHY_NOT if each != ("running", os.O_RDWR | os.O_TRUNC, False)]


@pytest.mark.parametrize(("why", "flags", "registered"), EQUAL)
def test_what_cannot_be_written_at_once_is_left_to_python(both, why, flags, registered):
    both.behind(write(b"content"))
    node = both.lookup(ROOT, b"a")
    both.opened(node, os.O_RDONLY)
    if not registered:
        both.release(0)
        for side in both.sides:
            side.gate.states.idle.drop_all()
    asked, running = left(both, p.Op.OPEN), []
    for side in both.sides:
        if why == "sealed":
            side.gate.marking.seals.add(os.stat(side.path / "a").st_ino)
        elif why == "full":
            side.session._receiver.low = 1 << 62
        elif why == "many marks":
            side.gate.marking.marks.position = side.gate.marking.marks.start + SEGMENT - 4096
        elif why == "set-id":
            (side.path / "a").chmod(0o4755)
        elif why == "renamed behind":
            os.rename(side.path / "a", side.path / "b")
        else:
            (side.path / "a").write_bytes(Path("/bin/sh").read_bytes())
            (side.path / "a").chmod(0o755)
            running.append(subprocess.Popen([side.path / "a", "-c", "read line"], stdin=subprocess.PIPE))
    both.opened(node, flags)
    plain = why == "running" or (registered and why in ("set-id", "renamed behind"))
    assert asked == ([] if plain and not flags & os.O_TRUNC else [p.Op.OPEN])
    while both.open:
        both.release(-1)
    for each in running:
        each.kill()
        each.communicate()


@pytest.mark.parametrize("how", ["stub", "set-id", "guard", "directory", "fifo", "anchored", "unprivileged"])
def test_what_is_not_plain_is_left_to_python(both, how):
    both.behind(write(b"content"))
    both.behind(lambda path: (path / "dir").mkdir())
    both.behind(lambda path: os.mkfifo(path / "fifo"))
    node = both.lookup(ROOT, {"directory": b"dir", "fifo": b"fifo"}.get(how, b"a"))
    asked = left(both, p.Op.OPEN)
    for side in both.sides:
        if how == "stub":
            fd = os.open(side.path / "a", os.O_RDWR)
            side.tree.write_stub(fd, Stub(b"f" * 16, 7, b"t" * 8, b"d" * 32))
            os.close(fd)
        elif how == "set-id":
            (side.path / "a").chmod(0o4755)
        elif how == "guard":
            assert side.gate.guarding.guard(os.stat(side.path / "a").st_ino, 0)
        elif how == "unprivileged":
            side.gate.states.backing = None
        elif how == "anchored":
            os.link(side.path / "a", side.path / "f")
            assert side.ask(p.Op.UNLINK, ROOT, b"a\0") == (0, b"")
    both.opened(node, os.O_RDONLY)
    assert asked == [p.Op.OPEN]
    for side in both.sides:
        for inode in list(side.gate.states.inodes.values()):
            side.gate.guarding.end(inode)


def test_an_older_kernel_is_asked_for_attributes_by_a_path(tmp_path, monkeypatch):
    older = load(build(tmp_path / "_hot.so", "-DGETXATTRAT=9999"))  # a system call that no kernel has
    both = Both(tmp_path, monkeypatch, older)
    both.behind(write(b"content"))
    for side in both.sides:
        fd = os.open(side.path / "a", os.O_RDWR)
        side.tree.write_stub(fd, Stub(b"f" * 16, 7, b"t" * 8, b"d" * 32))
        os.close(fd)
    asked = left(both, p.Op.OPEN)
    for name in (b"b", b"a"):
        both.opened(both.lookup(ROOT, name), os.O_RDONLY)
    assert asked == [p.Op.OPEN] and len(both.sides[1].backing.live) == 1
    both.close()


def test_an_older_kernel_is_asked_for_attributes_of_what_is_guarded(tmp_path, monkeypatch):
    older = load(build(tmp_path / "_hot.so", "-DGETXATTRAT=9999", "-DLISTXATTRAT=9999"))
    both = Both(tmp_path, monkeypatch, older)
    both.behind(write(b"content"))
    both.behind(lambda path: os.setxattr(path / "a", "user.x", b"1"))
    node = both.lookup(ROOT, b"a")
    for side in both.sides:
        assert side.gate.guarding.guard(os.stat(side.path / "a").st_ino, 0)
    assert both.ask(p.Op.GETXATTR, node, p.GETXATTR_IN.pack(100, 0) + b"user.x\0") == (0, b"1")
    assert both.ask(p.Op.LISTXATTR, node, p.GETXATTR_IN.pack(100, 0)) == (0, b"user.x\0")
    for side in both.sides:
        for inode in list(side.gate.states.inodes.values()):
            side.gate.guarding.end(inode)
    both.close()


def test_room_is_not_taken_for_granted_once_more_is_wanted(both):
    asked = left(both, p.Op.CREATE)
    for name in (b"a", b"b"):
        both.made(p.Op.CREATE, ROOT, name, 0o644)
    assert asked == []
    for side in both.sides:
        side.session._receiver.low = 1 << 62
    both.made(p.Op.CREATE, ROOT, b"c", 0o644)
    assert asked == [p.Op.CREATE]


def test_an_executable_with_capabilities_is_not_opened_in_passthrough(both):
    both.behind(write(b"content"))
    for side in both.sides:
        (side.path / "a").chmod(0o755)
        (side.path / "b").chmod(0o755)
        os.setxattr(side.path / "a", "security.capability", CAPABILITY)
    for name, passed in ((b"a", 0), (b"b", 1)):
        both.opened(both.lookup(ROOT, name), os.O_RDONLY)
        assert len(both.sides[1].backing.live) == passed


def test_a_registration_that_cannot_be_ended_fails_its_request_only(both, caplog):
    both.behind(write(b"content"))
    for name in (b"a", b"b", b"c"):
        both.opened(both.lookup(ROOT, name), os.O_RDONLY)
        both.release(0)
    for side in both.sides:
        def refuse(number, side=side):
            side.backing.live.pop(number)
            raise OSError(errno.EIO, "refused")
        side.backing.close = refuse  # fmt: skip
    node = both.lookup(ROOT, b"d")
    fh = both.opened(node, os.O_RDONLY)
    answers = [side.answer(p.Op.RELEASE, node, p.RELEASE_IN.pack(fh, 0, 0, 0)) for side in both.sides]
    assert answers == [(-errno.EIO, b"")] * 2
    for side in both.sides:
        del side.backing.close
        assert not side.vfs.files.handles and not side.vfs.nodes._opens
        assert not list(side.vfs.ledger.load_files())


def test_a_batch_of_nodes_is_forgotten_one_by_one(both):
    both.behind(write(b"content"))
    both.behind(lambda path: (path / ("n" * 40)).touch())
    found = [both.lookup(ROOT, name) for name in (b"a", b"b", b"a", b"n" * 40)]
    batch = [(found[0], 1), (found[1], 1), (77, 3), (found[3], 9)]
    both.ask(p.Op.BATCH_FORGET, 0, p.COUNT_IN.pack(4, 0) + b"".join(p.FORGET_ONE.pack(*each) for each in batch))
    assert [node and node.id for node in both.sides[1].vfs.nodes._by_slot][1:] == [ROOT, found[0], None, None]
    both.ask(p.Op.BATCH_FORGET, 0, p.COUNT_IN.pack(1 << 31, 0) + p.FORGET_ONE.pack(found[0], 1))


MASKED = [(0o666, 0o22), (0o777, 0), (0o1777, 0o77), (0o4755, 0o22), (0o2755, 2)]
CHANGES = (p.Op.CREATE, p.Op.RELEASE, p.Op.MKDIR, p.Op.RENAME, p.Op.UNLINK, p.Op.RMDIR, p.Op.FORGET)


@pytest.mark.parametrize("caller", [(0, 0), (1000, 1001)])
def test_names_that_come_and_go_are_left_to_nobody(both, caller):
    for side in both.sides:
        side.caller = caller
    asked = left(both, *CHANGES)
    above = both.made(p.Op.MKDIR, ROOT, b"above", 0o777, 0o27)
    for name in (b"a", b"b", b"c", b"d", b"e"):
        both.made(p.Op.CREATE, above, name, 0o666, 0o27)
        both.hold()
        both.release(0)
        assert both.renamed(above, name, ROOT, b"new" + name) == 0
        assert both.ask(p.Op.UNLINK, ROOT, b"new" + name + b"\0") == (0, b"")
        both.ask(p.Op.FORGET, both.nodes.pop(), p.U64.pack(1))
    both.made(p.Op.MKDIR, above, b"dir", 0o777)
    assert both.renamed(above, b"dir", ROOT, b"moved") == 0
    assert both.ask(p.Op.RMDIR, ROOT, b"moved\0") == (0, b"")
    assert asked == [] and not any(os.listdir(side.path / "above") for side in both.sides)
    assert len(both.sides[1].backing.live) == 0


def test_a_directory_without_a_descriptor_is_opened_from_the_nearest_that_has_one(tmp_path, monkeypatch, built):
    both = Both(tmp_path, monkeypatch, built, directory_fds=3)
    both.behind(lambda path: os.makedirs(path / "a/b/c/d"))
    both.behind(lambda path: [(path / f"e{number}").mkdir() for number in range(4)])
    asked = left(both, *CHANGES, p.Op.LOOKUP, p.Op.GETATTR)
    deep = [ROOT]
    for name in (b"a", b"b", b"c", b"d"):
        deep.append(both.lookup(deep[-1], name))
    others = [both.lookup(ROOT, b"e%d" % number) for number in range(4)]
    for below in (deep[4], deep[2], others[0], others[1], others[2], deep[4], deep[3], others[3]):
        assert both.lookup(below, b"absent") == errno.ENOENT
        both.made(p.Op.MKDIR, below, b"new%d" % len(both.nodes), 0o755)
        assert list(both.sides[0].vfs.nodes._dirs)[-1] == below
    assert asked == []
    orders = [list(side.vfs.nodes._dirs) for side in both.sides]
    assert orders[0] == orders[1] and len(orders[0]) == 3
    for path in ("a/b/c/d", "a/b", "e0"):
        both.behind(lambda top, path=path: os.rename(top / path, top / "elsewhere"))
        both.behind(lambda top, path=path: (top / path).mkdir())
        both.behind(lambda top, path=path: os.rename(top / "elsewhere", top / f"{len(path)}"))
    for below in (others[1], others[2], others[3], deep[4], deep[2], deep[3], others[0]):
        found = both.lookup(below, b"absent")
        assert found == (errno.ENOENT if below in others[1:] else errno.ESTALE)
    both.close()


def test_where_edits_behind_the_mount_are_not_seen_a_directory_is_asked_by_its_name(both):
    both.behind(lambda path: (path / "dir").mkdir())
    node = both.lookup(ROOT, b"dir")
    assert both.lookup(node, b"absent") == errno.ENOENT
    both.behind(lambda path: os.rename(path / "dir", path / "moved"))
    assert both.ask(p.Op.GETATTR, node, p.GETATTR_IN.pack(0, 0, 0)) == (-errno.ESTALE, b"")


LONG = b"n" * 200  # the ledger keeps it elsewhere than beside its node
LINKS = (p.Op.LINK, p.Op.SYMLINK, p.Op.READLINK)


def test_long_names_are_left_to_nobody(both):
    asked = left(both, *CHANGES, *LINKS, p.Op.LOOKUP, p.Op.GETATTR, p.Op.OPEN)
    above = both.made(p.Op.MKDIR, ROOT, b"d" + LONG, 0o755)
    both.lookup(above, b"absent")
    asked.clear()
    for name in (b"a", b"b", b"c"):
        node = both.made(p.Op.CREATE, above, name + LONG, 0o644)
        place = os.path.join(os.fsdecode(b"d" + LONG), os.fsdecode(name + LONG))
        both.behind(lambda path, place=place: (path / place).write_bytes(b"x"))
        both.release(0)
        for new in (b"short", name + LONG[:-1], b"other" + LONG):  # into its place, within it, and out of it
            assert both.renamed(above, name + LONG, above, new) == 0
            assert both.renamed(above, new, above, name + LONG) == 0
        both.ask(p.Op.GETATTR, node, p.GETATTR_IN.pack(0, 0, 0))
        assert both.lookup(above, name + LONG) == node
        assert both.linked(node, ROOT, b"link" + LONG) == 0
        assert both.ask(p.Op.UNLINK, above, name + LONG + b"\0") == (0, b"")
        both.opened(node, os.O_RDONLY)
        both.release(0)
        assert both.ask(p.Op.UNLINK, ROOT, b"link" + LONG + b"\0") == (0, b"")
        both.ask(p.Op.FORGET, node, p.U64.pack(4))
    assert asked == []
    assert both.ask(p.Op.RMDIR, ROOT, b"d" + LONG + b"\0") == (0, b"")
    for side in both.sides:
        free = side.vfs.ledger.form().free_longs
        units = sum(size * len(places) for size, places in enumerate(free))
        assert units == side.vfs.ledger._words[9] - -(-STAT_SIZE // 32)  # the directory's attributes


@pytest.mark.parametrize("caller", [(0, 0), (1000, 1001)])
def test_links_are_left_to_nobody(both, caller):
    both.behind(write(b"content"))
    both.behind(lambda path: (path / "dir").mkdir())
    above = both.lookup(ROOT, b"dir")
    both.lookup(above, b"absent")
    asked = left(both, *CHANGES, *LINKS, p.Op.LOOKUP)
    for side in both.sides:
        side.caller = caller
    node, other = both.lookup(ROOT, b"a"), both.lookup(ROOT, b"b")
    both.hold()
    both.opened(node, os.O_RDONLY)
    both.release(0)
    assert both.linked(node, above, b"second") == 0  # which is the name that is known from now on
    assert both.ask(p.Op.UNLINK, ROOT, b"a\0") == (0, b"")
    assert both.linked(node, ROOT, b"third") == 0
    assert both.ask(p.Op.UNLINK, ROOT, b"third\0") == (0, b"")  # now it is reached by handle
    assert both.ask(p.Op.UNLINK, ROOT, b"b\0") == (0, b"")
    made = both.symlinked(above, b"link", b"to/where\xff")
    assert both.ask(p.Op.READLINK, made, b"") == (0, b"to/where\xff")
    assert both.ask(p.Op.UNLINK, above, b"link\0") == (0, b"")
    assert both.lookup(above, b"second") == node  # and by this name again
    assert asked == []
    assert both.ask(p.Op.READLINK, other, b"")[0] == -errno.ENOENT
    assert both.ask(p.Op.READLINK, above, b"")[0] == -errno.EINVAL
    assert both.lookup(above, b"second") == node
    owners = [os.lstat(side.path / "dir" / "second").st_nlink for side in both.sides]
    assert owners == [1, 1]


@pytest.mark.parametrize("how", ["file", "linked", "linked and known", "open", "symlink", "directory", "fifo"])
def test_what_is_replaced_is_left_to_nobody(both, how):
    both.behind(write(b"content"))
    both.behind(lambda path: os.link(path / "b", path / "linked"))
    both.behind(lambda path: (path / "symlink").symlink_to("target"))
    both.behind(lambda path: [(path / name).mkdir() for name in ("directory", "other")])
    both.behind(lambda path: os.mkfifo(path / "fifo"))
    asked = left(both, *CHANGES)
    source = both.lookup(ROOT, b"other" if how == "directory" else b"a")
    name = {"file": b"c", "open": b"c", "linked and known": b"linked"}.get(how, how.encode())
    node = both.lookup(ROOT, name) if how != "linked" else None
    if how == "open":
        both.opened(node, os.O_RDWR)
    asked.clear()
    assert both.renamed(ROOT, b"other" if how == "directory" else b"a", ROOT, name) == 0
    assert asked == []
    assert both.lookup(ROOT, name) == source
    if node is not None:
        both.ask(p.Op.GETATTR, node, p.GETATTR_IN.pack(0, 0, 0))
    if how == "open":
        both.release(0)
        both.ask(p.Op.GETATTR, node, p.GETATTR_IN.pack(0, 0, 0))


@pytest.mark.parametrize("how", ["free", "made behind", "made", "linked", "renamed"])
def test_a_name_that_was_not_there_a_moment_ago_is_not_replaced_unseen(both, how):
    both.behind(write(b"content"))
    node = both.lookup(ROOT, b"a")
    both.lookup(ROOT, b"b")
    assert both.lookup(ROOT, b"new") == errno.ENOENT
    asked = left(both, p.Op.RENAME)
    if how == "made behind":
        both.behind(lambda path: (path / "new").touch())
    elif how == "made":
        both.made(p.Op.CREATE, ROOT, b"new", 0o644)
    elif how == "linked":
        assert both.linked(node, ROOT, b"new") == 0
    elif how == "renamed":
        assert both.renamed(ROOT, b"a", ROOT, b"new") == 0
    assert both.renamed(ROOT, b"b", ROOT, b"new") == 0
    assert asked == ([p.Op.RENAME] if how == "made behind" else [])
    for side in both.sides:
        told = [entry.kind for entry in MarkReader(side._marks_fd, 0).read()]
        assert (Mark.GONE in told) == (how in ("made behind", "made", "renamed"))


def test_the_mark_of_an_end_names_the_file_that_was_there(both):
    both.behind(write(b"content"))
    for name, flags in ((b"a", os.O_RDONLY), (b"b", os.O_WRONLY), (b"c", None)):
        if flags is not None:  # it stays registered; of what was written the gate knows the handle
            both.opened(both.lookup(ROOT, name), flags)
            both.release(0)
        handles = [side.tree.handle_at(side.tree.rootfd, name) for side in both.sides]
        assert both.ask(p.Op.UNLINK, ROOT, name + b"\0") == (0, b"")
        for side, handle in zip(both.sides, handles):
            told = [entry.handle for entry in MarkReader(side._marks_fd, 0).read() if entry.kind is Mark.GONE]
            _, intent = side.vfs.ledger._read_intent(side.vfs.ledger.form().intents)
            assert told[-1] == intent.handle == handle


def test_what_is_open_is_unlinked_without_python_asked_for_all(both):
    both.behind(write(b"content"))
    both.behind(lambda path: os.link(path / "b", path / "f"))
    kept = []
    for side in both.sides:
        side.vfs.nodes.keep = lambda ino, fd: kept.append(os.fstat(fd).st_ino == ino)
    for name in (b"a", b"b"):
        both.opened(both.lookup(ROOT, name), os.O_RDWR)
    asked = left(both, p.Op.UNLINK)
    for name in (b"a", b"b"):
        assert both.ask(p.Op.UNLINK, ROOT, name + b"\0") == (0, b"")
    assert asked == [] and kept == [True] * 4
    for node, _ in list(both.open):
        both.ask(p.Op.GETATTR, node, p.GETATTR_IN.pack(0, 0, 0))
        both.release(0)
    assert both.lookup(ROOT, b"f") == both.nodes[2]


@pytest.mark.parametrize("why", ["guard", "shown", "many marks", "no room in the ledger", "there"])
@pytest.mark.parametrize("op", [p.Op.LINK, p.Op.UNLINK, p.Op.RENAME])
def test_links_that_are_not_plain_are_left_to_python(both, why, op):
    both.behind(write(b"content"))
    both.behind(lambda path: os.link(path / "a", path / "f"))
    node = both.lookup(ROOT, b"f")
    asked = left(both, op)
    for side in both.sides:
        ino = os.stat(side.path / "a").st_ino
        if why in ("guard", "shown"):
            assert side.gate.guarding.guard(ino, 0)
            side.gate.states.inodes[ino].shown = ShownTimes(1, 2, 3)
        if why == "shown":
            side.gate.states.inodes[ino].guard = None
        elif why == "many marks":
            side.gate.marking.marks.position = side.gate.marking.marks.start + SEGMENT - 4096
        elif why == "no room in the ledger":
            side.vfs.ledger._words[9] = side.vfs.ledger.form().longs[3]
    link = p.U64.pack(node) + (b"b" if why == "there" else b"new") + b"\0"
    body = {p.Op.LINK: link, p.Op.UNLINK: b"f\0", p.Op.RENAME: p.U64.pack(ROOT) + b"b\0f\0"}[op]
    answered = both.ask(op, ROOT, body)
    assert (answered is None) == (why == "guard")
    assert asked == ([] if why == "there" and op != p.Op.LINK else [op])
    for side in both.sides:
        for inode in side.gate.states.inodes.values():
            inode.guard = None
        side.gate.states.inodes.clear()


def test_who_may_not_open_by_handle_leaves_links_to_python(tmp_path, monkeypatch, built):
    monkeypatch.setattr(Tree, "_is_privileged", lambda tree: False)
    both = Both(tmp_path, monkeypatch, built)
    both.behind(write(b"content"))
    asked = left(both, p.Op.LINK, p.Op.UNLINK)
    node = both.lookup(ROOT, b"a")
    assert both.linked(node, ROOT, b"f") == 0
    assert both.ask(p.Op.UNLINK, ROOT, b"f\0") == (0, b"")
    assert asked == [p.Op.LINK, p.Op.UNLINK]
    both.close()


def test_whose_what_is_made_becomes_and_what_mode_it_gets(both):
    for side in both.sides:
        (side.path / "group").mkdir()
        os.chown(side.path / "group", 0, 77)
        (side.path / "group").chmod(0o2777)
    group = both.lookup(ROOT, b"group")
    both.lookup(group, b"absent")
    for caller, above in itertools.product([(0, 0), (0, 5), (1000, 1001)], [ROOT, group]):
        for side in both.sides:
            side.caller = caller
        for number, (mode, umask) in enumerate(MASKED):
            name = b"%d-%d-%d" % (caller[0], caller[1], number)
            both.made(p.Op.CREATE, above, b"f" + name, mode, umask)
            both.made(p.Op.MKDIR, above, b"d" + name, mode, umask)
    for path, _, names in os.walk(both.sides[0].path):
        for name in names:
            one = os.lstat(os.path.join(path, name))
            other = os.lstat(both.sides[1].path / os.path.relpath(os.path.join(path, name), both.sides[0].path))
            assert (one.st_mode, one.st_uid, one.st_gid) == (other.st_mode, other.st_uid, other.st_gid)


def value(both, node, name, size=100):
    """(errno, value) of an extended attribute."""
    number, found = both.ask(p.Op.GETXATTR, node, p.GETXATTR_IN.pack(size, 0) + name + b"\0")
    return -number, found


@pytest.mark.parametrize("opened", [True, False])
def test_which_attributes_a_file_has_is_left_to_nobody(both, opened):
    asked = left(both, p.Op.GETXATTR, p.Op.LISTXATTR)
    node = both.made(p.Op.CREATE, ROOT, b"a", 0o755)
    if not opened:
        both.release(0)
    none = errno.ENODATA, b""
    for name in (b"security.capability", b"system.posix_acl_access", b"user.none", b"security.selinux"):
        assert value(both, node, name) == none
    assert both.ask(p.Op.LISTXATTR, node, p.GETXATTR_IN.pack(100, 0)) == (0, b"")
    assert both.ask(p.Op.LISTXATTR, node, p.GETXATTR_IN.pack(0, 0)) == (0, p.SIZE_OUT.pack(0, 0))
    for side in both.sides:
        os.setxattr(side.path / "a", "security.capability", CAPABILITY)
        os.setxattr(side.path / "a", "user.empty", b"")
        os.setxattr(side.path / "a", "trusted.tierfs_pin", b"1")
    assert value(both, node, b"security.capability") == (0, CAPABILITY)
    assert value(both, node, b"security.capability", 0) == (0, p.SIZE_OUT.pack(len(CAPABILITY), 0))
    assert value(both, node, b"user.empty") == (0, b"")
    names = both.ask(p.Op.LISTXATTR, node, p.GETXATTR_IN.pack(100, 0))[1]
    assert set(names.split(b"\0")) == {b"security.capability", b"user.empty", b""}
    assert both.ask(p.Op.LISTXATTR, node, p.GETXATTR_IN.pack(0, 0)) == (0, p.SIZE_OUT.pack(len(names), 0))
    assert asked == []


def test_what_is_asked_of_attributes_and_is_not_plain_is_left_to_python(both):
    both.behind(write(b"content"))
    for side in both.sides:
        os.setxattr(side.path / "a", "user.long", b"v" * 1025)
        for number in range(30):
            os.setxattr(side.path / "b", f"user.{number:040}", b"")
        os.setxattr(side.path / "c", "user.tierfs_pin", b"1")
        os.setxattr(side.path / "d", "trusted.tierfs", b"")
    a, b, c, d = (both.lookup(ROOT, name) for name in (b"a", b"b", b"c", b"d"))
    asked = left(both, p.Op.GETXATTR, p.Op.LISTXATTR)
    assert value(both, a, b"user.long", 2000) == (0, b"v" * 1025)
    assert value(both, a, b"user.long", 9) == (errno.ERANGE, b"")
    assert value(both, a, b"user.tierfs.tier") == (0, b"resident")
    assert value(both, d, b"trusted.tierfs") == (errno.ENODATA, b"")
    assert value(both, ROOT, b"user.none") == (errno.ENODATA, b"")
    assert value(both, 77, b"user.none") == (errno.ESTALE, b"")
    for room in (0, 2000, 10):
        both.ask(p.Op.LISTXATTR, b, p.GETXATTR_IN.pack(room, 0))
    assert both.ask(p.Op.LISTXATTR, c, p.GETXATTR_IN.pack(50, 0)) == (0, b"user.tierfs_pin\0")
    assert asked == [p.Op.GETXATTR] * 6 + [p.Op.LISTXATTR] * 4
    both.behind(lambda path: os.rename(path / "b", path / "a"))
    assert value(both, a, b"user.none") == (errno.ESTALE, b"")


def put(both, node, name, content, flags=0, more=0):
    """SETXATTR; the errno."""
    head = p.SETXATTR_IN.pack(len(content), flags, more, 0)
    found = both.ask(p.Op.SETXATTR, node, head + name + b"\0" + content)
    return found and -found[0]


def take(both, node, name):
    """REMOVEXATTR; the errno."""
    found = both.ask(p.Op.REMOVEXATTR, node, name + b"\0")
    return found and -found[0]


ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHi", tag, mode, who)
    for tag, mode, who in ((1, 7, -1), (2, 5, 77), (4, 5, -1), (16, 5, -1), (32, 0, -1))
)


@pytest.mark.parametrize("what", ["open", "closed", "idle", "directory"])
def test_attributes_that_are_extended_are_left_to_nobody(both, what):
    if what == "closed":
        both.behind(write(b"content"))
        node = both.lookup(ROOT, b"a")
    else:
        node = both.made(p.Op.MKDIR if what == "directory" else p.Op.CREATE, ROOT, b"a", 0o750)
    if what == "idle":
        both.release(0)
    asked = left(both, p.Op.SETXATTR, p.Op.REMOVEXATTR)
    for name, content in ((b"user.x", b"value"), (b"user.x", b""), (b"system.posix_acl_access", ACL)):
        assert put(both, node, name, content) == 0
        assert value(both, node, name) == (0, content)
    assert all(st.st_mode & 0o777 == 0o750 for st in stats(both, "a"))
    assert take(both, node, b"user.x") == 0
    assert take(both, node, b"user.x") == errno.ENODATA
    assert value(both, node, b"user.x") == (errno.ENODATA, b"")
    assert asked == []


def test_what_is_extended_and_is_not_plain_is_left_to_python(both):
    both.behind(write(b"content"))
    both.behind(lambda path: [(path / "dir").mkdir(), (path / "dir").chmod(0o2755)])
    both.behind(lambda path: (path / "link").symlink_to("a"))
    a, b, c, d, above, link = (both.lookup(ROOT, n) for n in (b"a", b"b", b"c", b"d", b"dir", b"link"))
    for side in both.sides:
        (side.path / "b").chmod(0o4755)
        side.gate.appearance.late[os.stat(side.path / "c").st_ino] = ShownTimes(1, 2, 3), 1e12
        assert side.gate.guarding.guard(os.stat(side.path / "d").st_ino, 0)
    asked = left(both, p.Op.SETXATTR, p.Op.REMOVEXATTR)
    assert put(both, a, b"user.x", b"1", os.XATTR_REPLACE) == errno.ENODATA
    assert put(both, a, b"user.x", b"1", os.XATTR_CREATE) == 0
    for name, content, wanted in (
        (b"user.tierfs.tier", b"stub", errno.EPERM), (b"trusted.tierfs", b"x", errno.EPERM),
        (b"user.tierfs.pin", b"maybe", errno.EINVAL), (b"nowhere.x", b"1", errno.EOPNOTSUPP),
    ):  # fmt: skip
        assert put(both, a, name, content) == wanted
    assert put(both, above, b"system.posix_acl_access", ACL, more=p.SETXATTR_ACL_KILL_SGID) == 0
    for node, wanted in ((b, 0), (c, 0), (ROOT, 0), (77, errno.ESTALE), (link, errno.EPERM)):
        assert put(both, node, b"user.x", b"1") == wanted
    refused = (b"user.tierfs.pin", errno.ENODATA), (b"trusted.tierfs", errno.EPERM), (b"no.x", errno.EOPNOTSUPP)
    for name, wanted in refused:
        assert take(both, a, name) == wanted
    both.behind(lambda path: os.rename(path / "e", path / "a"))
    for request in (put(both, a, b"user.x", b"1"), take(both, a, b"user.x")):
        assert request == errno.ESTALE
    assert put(both, d, b"user.x", b"1") is None  # it waits
    both_ways = [p.Op.SETXATTR, p.Op.REMOVEXATTR]
    assert asked == [p.Op.SETXATTR] * 12 + [p.Op.REMOVEXATTR] * 3 + both_ways + [p.Op.SETXATTR]
    for side in both.sides:
        for inode in list(side.gate.states.inodes.values()):
            side.gate.guarding.end(inode)


@pytest.mark.parametrize("what", ["unlink", "rename", "link", "open"])
def test_what_changes_shows_its_own_times_to_a_successor_as_well(both, what):
    """Until now it has shown what it showed before some of its content came."""
    both.behind(write(b"content"))
    node = both.lookup(ROOT, b"a")
    for side in both.sides:
        ino, appearance, ledger = os.stat(side.path / "a").st_ino, side.gate.appearance, side.gate.ledger
        appearance.late[ino] = ShownTimes(1, 2, 3), 1e12
        appearance._slots[ino] = ledger.inode(0, ino, 0, (1, 2, 3))
    asked = left(both, p.Op.UNLINK, p.Op.RENAME2, p.Op.LINK, p.Op.OPEN)
    match what:
        case "unlink":
            both.ask(p.Op.UNLINK, ROOT, b"a\0")
        case "rename":
            both.renamed(ROOT, b"a", ROOT, b"new")
        case "link":
            both.linked(node, ROOT, b"new")
        case "open":
            both.opened(node, os.O_WRONLY)
    assert asked == ([p.Op.OPEN] if what == "open" else [])  # what is kept of it is given on
    both.compare()
    for side in both.sides:
        assert not side.gate.appearance.late and not side.gate.appearance._slots


COPIES = (p.Op.COPY_FILE_RANGE, p.Op.COPY_FILE_RANGE_64)


def copied(both, op, fh_in, fh_out, offset_in=0, offset_out=0, length=1 << 62, flags=0):
    body = p.COPY_IN.pack(fh_in, offset_in, both.nodes[-1], fh_out, offset_out, length, flags)
    number, found = both.ask(op, both.nodes[-1], body)
    return -number, int.from_bytes(found, "little")


@pytest.mark.parametrize("op", COPIES)
def test_copies_of_little_are_left_to_nobody(both, op):
    both.behind(write(b"content" * 1000))
    asked = left(both, op)
    source = both.opened(both.lookup(ROOT, b"a"), os.O_RDONLY)
    both.made(p.Op.CREATE, ROOT, b"new", 0o644)
    target = both.open[-1][1]
    for offset_in, offset_out, length, wanted in (
        (0, 0, 1 << 62, 7000), (6999, 1, 10, 1), (5, 10_000, 4, 4),
        (7000, 0, 9, 0), (1 << 40, 0, 9, 0), (0, 0, 0, 0),
    ):  # fmt: skip
        assert copied(both, op, source, target, offset_in, offset_out, length) == (0, wanted)
    for side in both.sides:
        content = b"c" + b"t" + (b"content" * 1000)[2:] + bytes(3000) + b"ntco"
        assert (side.path / "new").read_bytes() == content
    assert copied(both, op, target, target, 0, 100, 50) == (0, 50)
    assert asked == []


def test_copies_that_are_not_plain_are_left_to_python(both):
    both.behind(write(b"content"))
    both.behind(lambda path: os.truncate(path / "b", (1 << 20) + 1))
    both.behind(lambda path: (path / "c").chmod(0o4755))
    asked = left(both, COPIES[1])
    a, b, c, d = (both.opened(both.lookup(ROOT, n), os.O_RDWR) for n in (b"a", b"b", b"c", b"d"))
    for side in both.sides:
        side.gate.states.inodes[os.stat(side.path / "d").st_ino].marked = False
    for source, target, more, wanted in (
        (a, 99, {}, errno.EBADF), (99, a, {}, errno.EBADF), (a, b, {"flags": 1}, errno.EINVAL), (a, c, {}, 0),
        (c, a, {}, 0), (a, a, {"length": 5, "offset_out": 1}, errno.EINVAL), (a, d, {}, 0),
    ):  # fmt: skip
        assert copied(both, COPIES[1], source, target, **more)[0] == wanted
    assert len(asked) == 7
    assert copied(both, COPIES[1], a, d) == (0, 7)  # it is marked by now
    assert len(asked) == 7


def test_no_file_is_a_terminal(both):
    asked = left(both, p.Op.IOCTL)
    node = both.made(p.Op.CREATE, ROOT, b"a", 0o644)
    for nodeid in (node, ROOT, 77):
        assert both.ask(p.Op.IOCTL, nodeid, bytes(32)) == (-errno.ENOTTY, b"")
    assert asked == []


# --- attributes that are set -------------------------------------------------------------------------------

OWNER = p.SET_UID | p.SET_GID
TIMES = p.SET_ATIME | p.SET_MTIME
NOW = TIMES | p.SET_ATIME_NOW | p.SET_MTIME_NOW


def stats(both, name):
    return [os.lstat(side.path / name) for side in both.sides]


def times_of(both, name):
    """Of access and modification."""
    return {(st.st_atime_ns, st.st_mtime_ns) for st in stats(both, name)}


@pytest.mark.parametrize("caller", [(0, 0), (1000, 1001)])
@pytest.mark.parametrize("what", ["open", "closed", "idle", "directory", "symlink"])
def test_attributes_that_are_set_are_left_to_nobody(both, what, caller):
    for side in both.sides:
        side.caller = caller
        (side.path / "a").symlink_to("nowhere") if what == "symlink" else None
        (side.path / "a").write_bytes(b"content") if what == "closed" else None
    if what in ("open", "idle"):
        node = both.made(p.Op.CREATE, ROOT, b"a", 0o644)
    elif what == "directory":
        node = both.made(p.Op.MKDIR, ROOT, b"a", 0o755)
    else:
        node = both.lookup(ROOT, b"a")
    if what in ("open", "idle"):
        both.behind(lambda path: (path / "a").write_bytes(b"content"))
    if what == "idle":
        both.release(0)
    asked = left(both, p.Op.SETATTR)
    assert both.set(node, OWNER, uid=5, gid=6) == 0
    assert both.set(node, p.SET_GID, uid=9, gid=7) == 0
    assert all((st.st_uid, st.st_gid) == (5, 7) for st in stats(both, "a"))
    far = 4_000_000_000_000_000_001  # no look at it comes later than that
    assert both.set(node, TIMES, times=(far, -1_500_000_000)) == 0
    assert times_of(both, "a") == {(far, -1_500_000_000)}
    assert both.set(node, p.SET_MTIME | p.SET_ATIME_NOW, times=(1, 3_000_000_001)) == 0
    assert times_of(both, "a") == {(far, 3_000_000_001)}
    before = time.time_ns()
    assert both.set(node, NOW) == 0
    assert all(min(st.st_atime_ns, st.st_mtime_ns) > before - 10**9 for st in stats(both, "a"))
    if what != "symlink":
        assert both.set(node, p.SET_MODE, mode=stat.S_IFREG | 0o1604) == 0
        assert both.set(node, p.SET_MODE | OWNER | TIMES, mode=0o640, uid=1, gid=2, times=(far, 4)) == 0
        assert all(stat.S_IMODE(st.st_mode) == 0o640 for st in stats(both, "a"))
        assert all((st.st_uid, st.st_gid) == (1, 2) for st in stats(both, "a"))
        assert times_of(both, "a") == {(far, 4)}
    if what == "directory":
        assert both.set(node, p.SET_MODE, mode=0o2755) == 0
        assert both.set(node, OWNER, uid=5, gid=6) == 0
    assert asked == []


@pytest.mark.parametrize("what", ["renamed", "mode", "owner", "times", "set-id", "to be run", "attribute"])
def test_a_closed_file_stays_registered_while_it_is_fit_for_passthrough(both, what):
    node = both.made(p.Op.CREATE, ROOT, b"a", 0o644)
    both.release(0)
    match what:
        case "renamed":
            assert both.renamed(ROOT, b"a", ROOT, b"b") == 0
        case "mode":
            assert both.set(node, p.SET_MODE, mode=0o600) == 0
        case "owner":
            assert both.set(node, OWNER, uid=5, gid=6) == 0
        case "times":
            assert both.set(node, TIMES, times=(1, 2)) == 0
        case "set-id":
            assert both.set(node, p.SET_MODE, mode=0o4755) == 0
        case "to be run":
            assert both.set(node, p.SET_MODE, mode=0o700) == 0
        case "attribute":
            assert put(both, node, b"security.capability", CAPABILITY) == 0
    stays = what in ("renamed", "mode", "owner", "times")
    assert all(len(side.backing.live) == len(side.gate.states.idle) == int(stays) for side in both.sides)
    name = b"b" if what == "renamed" else b"a"
    names = [inode.name for side in both.sides for inode in side.gate.states.inodes.values()]
    assert names == [name, name][: 2 * stays]
    assert both.lookup(ROOT, name) == node


def test_a_closed_file_stays_registered_until_the_name_goes_that_it_is_known_by(both):
    """As git makes its objects: under one name, then linked to another, and the first removed."""
    asked = left(both, *CHANGES, *LINKS)
    node = both.made(p.Op.CREATE, ROOT, b"a", 0o644)
    both.behind(lambda path: (path / "a").write_bytes(b"content"))
    both.release(0)

    def known_by():
        assert all(len(side.backing.live) == len(side.gate.states.idle) for side in both.sides)
        one, other = ([inode.name for inode in side.gate.states.inodes.values()] for side in both.sides)
        assert one == other
        return one

    assert both.linked(node, ROOT, b"b") == 0 and known_by() == [b"b"]
    assert both.ask(p.Op.UNLINK, ROOT, b"a\0") == (0, b"") and known_by() == [b"b"]
    assert both.linked(node, ROOT, b"c") == 0 and known_by() == [b"c"]
    assert both.ask(p.Op.UNLINK, ROOT, b"c\0") == (0, b"") and known_by() == []
    assert asked == []


@pytest.mark.parametrize("serving", [True, False])
def test_registrations_whose_time_is_over_end_alike_also_when_nobody_serves_any_more(both, serving):
    for name in (b"a", b"b"):
        both.made(p.Op.CREATE, ROOT, name, 0o644)
        both.release(0)
    for side in both.sides:
        assert len(side.backing.live) == 2
        if not serving:
            side.session._receiver.close()
        side.gate.states.idle.expire(time.monotonic() + idle.SECONDS + 1)
        assert not side.backing.live and not side.gate.states.inodes
    both.compare()


def test_a_file_that_is_being_written_gets_another_size(both):
    asked = left(both, p.Op.SETATTR)
    node = both.made(p.Op.CREATE, ROOT, b"a", 0o644)
    fh = both.open[0][1]
    for valid in (p.SET_SIZE, p.SET_SIZE | p.SET_FH, p.SET_SIZE | p.SET_FH | p.SET_KILL_SUIDGID):
        both.behind(lambda path: (path / "a").write_bytes(b"content"))
        for size in (7, 5, 5, 9):  # where it stays, time goes on as well
            both.behind(lambda path: os.utime(path / "a", ns=(1, 1)))
            assert both.set(node, valid, fh, size=size) == 0
            assert all(st.st_size == size and st.st_mtime_ns > 1 for st in stats(both, "a"))
    assert asked == []
    for size in (0, 9):  # nothing of it is there: perhaps it is a stub
        assert both.set(node, p.SET_SIZE, size=size) == 0
        assert all(st.st_size == size for st in stats(both, "a"))


def test_what_an_open_file_looks_like_is_left_to_nobody(both):
    asked = left(both, p.Op.GETATTR)
    node = both.made(p.Op.CREATE, ROOT, b"a", 0o644)
    both.behind(lambda path: (path / "a").write_bytes(b"content"))
    fh = both.open[0][1]
    for number in (fh, 99):  # 99: of a directory, say
        assert both.ask(p.Op.GETATTR, node, p.GETATTR_IN.pack(p.GETATTR_FH, 0, number))[0] == 0
    both.behind(lambda path: os.rename(path / "a", path / "b"))
    assert both.ask(p.Op.GETATTR, node, p.GETATTR_IN.pack(p.GETATTR_FH, 0, fh))[0] == 0
    assert asked == []


NOT_PLAIN = {
    "unknown": (p.SET_MODE, {}),
    "root": (p.SET_MODE, {"mode": 0o755}),
    "set-id": (OWNER, {"uid": 5, "gid": 6}),
    "to be set-id": (p.SET_MODE, {"mode": 0o4755}),
    "no owner": (p.SET_UID, {"uid": 0xFFFFFFFF}),
    "replaced": (p.SET_MODE, {"mode": 0o600}),
    "removed": (p.SET_MODE, {"mode": 0o600}),
    "moved, by an open file": (p.SET_MODE | p.SET_FH, {"mode": 0o600}),
    "late": (p.SET_MODE, {"mode": 0o600}),
    "shown": (p.SET_MODE, {"mode": 0o600}),
    "guard": (p.SET_MODE, {"mode": 0o600}),
    "many marks": (p.SET_MODE, {"mode": 0o600}),
    "size, closed": (p.SET_SIZE, {"size": 3}),
    "size, idle": (p.SET_SIZE, {"size": 3}),
    "size, read": (p.SET_SIZE, {"size": 0}),
    "size, of a directory": (p.SET_SIZE, {"size": 0}),
    "mode, of a symlink": (p.SET_MODE, {"mode": 0o600}),
}


@pytest.mark.parametrize("how", NOT_PLAIN)
def test_attributes_that_are_not_plainly_set_are_left_to_python(both, how):
    both.behind(write(b"content"))
    both.behind(lambda path: (path / "dir").mkdir())
    both.behind(lambda path: (path / "link").symlink_to("a"))
    name = b"dir" if "directory" in how else b"link" if "symlink" in how else b"a"
    node, more = both.lookup(ROOT, name), {}
    if how in ("size, idle", "size, read", "moved, by an open file"):
        more["fh"] = both.opened(node, os.O_RDONLY)
    if how == "size, idle":
        both.release(0)
    for side in both.sides:
        ino = os.stat(side.path / "a").st_ino
        match how:
            case "set-id":
                (side.path / "a").chmod(0o2644)
            case "replaced":
                os.rename(side.path / "b", side.path / "a")
            case "removed":
                assert side.ask(p.Op.UNLINK, ROOT, b"a\0") == (0, b"")
            case "moved, by an open file":
                assert side.ask(p.Op.UNLINK, ROOT, b"a\0") == (0, b"")
            case "late":
                side.gate.appearance.late[ino] = ShownTimes(1, 2, 3), 1e12
            case "shown":
                side.gate.states.inodes[ino] = inode = Inode(ino, ROOT, b"a")
                inode.shown = ShownTimes(1, 2, 3)
            case "guard":
                assert side.gate.guarding.guard(ino, 0)
            case "many marks":
                side.gate.marking.marks.position = side.gate.marking.marks.start + SEGMENT - 4096
    asked = left(both, p.Op.SETATTR)
    valid, given = NOT_PLAIN[how]
    both.set({"unknown": 77, "root": ROOT}.get(how, node), valid, **given, **more)
    assert asked == [p.Op.SETATTR]
    for side in both.sides:
        for inode in list(side.gate.states.inodes.values()):
            side.gate.guarding.end(inode)


def test_a_name_that_is_anothers_by_now_changes_nothing_of_either(both):
    """Also where somebody has the file open that had it."""
    for name in (b"a", b"b"):
        both.made(p.Op.CREATE, ROOT, name, 0o644)
    both.behind(lambda path: os.link(path / "a", path / "c"))
    both.behind(lambda path: os.rename(path / "b", path / "a"))
    assert both.set(both.nodes[1], p.SET_MODE, mode=0o600) == errno.ESTALE
    assert {st.st_mode & 0o777 for name in ("a", "c") for st in stats(both, name)} == {0o644}


@pytest.mark.parametrize("op", [p.Op.CREATE, p.Op.MKDIR])
def test_what_gets_the_number_of_something_known_is_left_to_python(both, op):
    asked, side = left(both, op), both.sides[1]
    (side.path / "x").touch() if op == p.Op.CREATE else (side.path / "x").mkdir()
    known = os.stat(side.path / "x").st_ino
    node = side.lookup(ROOT, b"x")[0]
    (side.path / "x").unlink() if op == p.Op.CREATE else (side.path / "x").rmdir()
    how = p.MKDIR_IN.pack(0o755, 0) if op == p.Op.MKDIR else p.CREATE_IN.pack(os.O_WRONLY, 0o644, 0, 0)
    assert side.answer(op, ROOT, how + b"new\0")[0] == 0
    if os.stat(side.path / "new").st_ino != known:
        pytest.skip("this filesystem does not use a number again at once")
    assert asked == [op] and side.getattr(node)[13] == 0


@pytest.mark.parametrize("why", ["", "there", "full", "many marks", "unregistered"])
def test_what_cannot_be_made_at_once_is_left_to_python(both, why):
    both.behind(write(b"content"))
    asked = left(both, p.Op.CREATE)
    for side in both.sides:
        if why == "full":
            side.session._receiver.low = 1 << 62
        elif why == "many marks":
            side.gate.marking.marks.position = side.gate.marking.marks.start + SEGMENT - 4096
        elif why == "unregistered":
            side.gate.states.backing = None
    both.made(p.Op.CREATE, ROOT, b"a" if why == "there" else b"new", 0o644)
    assert asked == ([p.Op.CREATE] if why else [])


@pytest.mark.parametrize("op", [p.Op.READDIR, p.Op.READDIRPLUS])
def test_a_directory_that_nobody_has_opened_is_listed_by_nobody_else(both, op):
    both.behind(write(b"content"))
    both.behind(lambda path: [(path / f"file-{number}").touch() for number in range(300)])
    both.behind(lambda path: (path / ("n" * 200)).touch())
    for side in both.sides:  # Python says what it shows
        side.gate.appearance.late[os.stat(side.path / "a").st_ino] = ShownTimes(1, 2, 3), 1e12
    both.behind(lambda path: [os.link(path / name, path / f"{name}-second") for name in ("a", "b")])
    both.behind(lambda path: os.makedirs(path / "dir" / "below"))
    node = both.lookup(ROOT, b"dir")
    asked = left(both, op)
    wanted = {os.fsencode(name) for name in (".", "..", *os.listdir(both.sides[0].path))}
    for room in (500, 4096, 32768, 1 << 20):
        listed = both.listed(op, ROOT, room)
        assert len(listed) == len(wanted) and {name for name, *_ in listed} == wanted
        assert sorted(name for name, *_ in both.listed(op, node, room)) == [b".", b"..", b"below"]
    for side in both.sides:  # a descriptor of which the end is all that is asked first
        os.close(side.vfs.nodes._dirs.pop(node))
        end = p.READ_IN.pack(0, side.offset, 4096, 0, 0, 0, 0)
        assert side.answer(op, node, end)[1] == []
    assert len(both.listed(op, node, 4096)) == 3
    assert both.listed(op, ROOT, 1000, pieces=2) and both.listed(op, node, 1000)
    both.behind(lambda path: [(path / f"file-{number}").unlink() for number in range(300)])
    rest = both.listed(op, ROOT, 1000)
    assert rest and both.listed(op, ROOT, 4096) and asked == []
    counted = [side.vfs.ledger.lookups(node) for side in both.sides]
    assert counted[0] == counted[1] and counted[0] > 4 * (op == p.Op.READDIRPLUS)


def test_a_listing_that_python_gives_goes_on_where_the_compiled_form_stopped(both):
    both.behind(lambda path: [(path / f"file-{number}").touch() for number in range(300)])
    listed = both.listed(p.Op.READDIRPLUS, ROOT, 4096, pieces=2)
    asked = left(both, p.Op.READDIRPLUS)
    side, where = both.sides[1], both.reading[ROOT, 0]
    for _ in range(2):
        body = p.READ_IN.pack(0, where[1], 4096, 0, 0, 0, 0)
        unique = side.send(p.Op.READDIRPLUS, ROOT, body, flag=1 << 63)  # sent again: it is Python's
        side.session.serve(1)
        data = side.sock.recv(1 << 16)
        assert p.OUT.unpack_from(data)[1:] == (0, unique)
        more = listed_of(data[p.OUT_SIZE :], True)
        where[1] = more[-1][0]
        listed += [each[1:] for each in more]
    assert asked == [p.Op.READDIRPLUS] * 2
    number, rest = side.answer(p.Op.READDIRPLUS, ROOT, p.READ_IN.pack(0, where[1], 1 << 16, 0, 0, 0, 0))
    names = [name for name, *_ in (*listed, *rest)]
    assert number == 0 and len(names) == len(set(names)) == 302 and len(asked) == 2


@pytest.mark.parametrize("how", ["stale", "gone", "number", "descriptor", "exception"])
def test_what_cannot_be_listed_is_said_by_python(both, how, monkeypatch):
    both.behind(lambda path: os.makedirs(path / "dir" / ("below" * 9)))
    node = both.lookup(ROOT, b"dir")
    asked = left(both, p.Op.READDIRPLUS)
    if how == "stale":
        both.behind(lambda path: os.rename(path / "dir", path / "away"))
    elif how == "gone":
        both.behind(lambda path: (path / "dir" / ("below" * 9)).rmdir())
        assert both.ask(p.Op.RMDIR, ROOT, b"dir\0") == (0, b"")
    elif how == "descriptor":
        both.lookup(node, b"absent")
        for side in both.sides:
            fd = os.open(side.path / "dir", os.O_PATH)
            os.dup2(fd, side.vfs.nodes._dirs[node], inheritable=False)
            os.close(fd)
    elif how == "exception":
        both.behind(lambda path: (path / "dir" / "late").write_bytes(b"content"))
        for side in both.sides:
            shown = ShownTimes(1, 2, 3), 1e9
            side.gate.appearance.late[os.stat(side.path / "dir" / "late").st_ino] = shown
            monkeypatch.setattr(side.vfs, "lookup", lambda *_, **__: 1 / 0)
    found = both.listed(p.Op.READDIRPLUS, node, 4096, fh=77 if how == "number" else 0)
    if how == "descriptor":
        assert len(found) == 3
    else:
        errors = {"stale": errno.ESTALE, "gone": errno.ENOENT, "number": errno.EBADF, "exception": errno.EIO}
        assert found == errors[how]
    assert asked == [] if how == "exception" else asked == [p.Op.READDIRPLUS]


def test_a_removed_file_keeps_its_last_attributes(both):
    both.behind(write(b"content"))
    both.behind(lambda path: os.utime(path / "a", ns=(-1, -1_500_000_000)))
    node = both.lookup(ROOT, b"a")
    before = [os.lstat(side.path / "a") for side in both.sides]
    assert both.ask(p.Op.UNLINK, ROOT, b"a\0") == (0, b"")
    for side, was in zip(both.sides, before):
        _, intent = side.vfs.ledger._read_intent(side.vfs.ledger.form().intents)
        gone = side.getattr(node)
        for name in ("mode", "ino", "dev", "nlink", "uid", "gid", "size", "blocks", "rdev"):
            assert getattr(intent.first, f"st_{name}") == getattr(was, f"st_{name}"), name
        for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
            assert getattr(intent.first, name) == getattr(was, name), name
        assert (gone[7] * 10**9 + gone[10], gone[13]) == (was.st_mtime_ns, 0)


# --- whatever comes ----------------------------------------------------------------------------------------

NAMES = [b"a", b"b", b"c", b"n" * 40]
NODES = st.integers(0, 9)
FLAG = st.integers(0, 1)
MODES = [0o755, 0o640, 0o2755, 0o1777]
SETS = [
    p.SET_MODE, OWNER, TIMES, NOW, p.SET_SIZE, p.SET_SIZE | p.SET_FH | p.SET_KILL_SUIDGID,
    p.SET_MODE | OWNER | TIMES, p.SET_MODE | p.SET_SIZE, OWNER | p.SET_KILL_SUIDGID, p.SET_FH | TIMES,
]  # fmt: skip
FLAGS = [os.O_RDONLY, os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_TRUNC]
STEPS = st.one_of(
    st.tuples(st.just("lookup"), NODES, st.sampled_from([*NAMES, b"d"])),
    st.tuples(st.just("open"), NODES, st.sampled_from(FLAGS)),
    st.tuples(st.just("release"), st.integers(0, 9)),
    st.tuples(st.just("forget"), NODES, st.integers(1, 3)),
    st.tuples(st.sampled_from(["getattr", "retire", "listxattr", "take"]), NODES),
    st.tuples(st.just("set"), NODES, st.sampled_from(SETS), st.sampled_from(MODES), st.integers(0, 9)),
    st.tuples(st.just("put"), NODES, st.integers(0, 3), FLAG),
    st.tuples(st.just("getxattr"), NODES, st.sampled_from([b"security.capability", b"user.x"])),
    st.tuples(st.sampled_from(["file", "dir", "remove", "chmod"]), st.sampled_from(NAMES)),
    st.tuples(st.just("link"), st.sampled_from(NAMES)),
    st.tuples(st.just("linked"), NODES, NODES, st.sampled_from(NAMES)),
    st.tuples(st.just("symlink"), NODES, st.sampled_from(NAMES)),
    st.tuples(st.just("readlink"), NODES),
    st.tuples(st.sampled_from(["unlink", "rmdir"]), NODES, st.sampled_from(NAMES)),
    st.tuples(st.sampled_from(["mkdir", "create"]), NODES, st.sampled_from(NAMES), st.sampled_from(MODES)),
    st.tuples(st.just("list"), NODES, FLAG, st.sampled_from([200, 400, 1 << 16]), st.integers(1, 4)),
    st.tuples(st.just("rename"), NODES, st.sampled_from(NAMES), NODES, st.sampled_from(NAMES), FLAG),
)


def step_of(both, step):
    both.hold()
    action, *more = step
    nodeid = both.nodes[more[0] % len(both.nodes)] if isinstance(more[0], int) else ROOT
    match action:
        case "lookup":
            both.lookup(nodeid, more[1])
        case "mkdir" | "create":
            for side in both.sides:
                side.caller = (0, 0) if more[2] & 1 else (1000, 1001)
            both.made(p.Op[action.upper()], nodeid, more[1], more[2])
        case "open":
            both.opened(nodeid, more[1])
        case "release":
            if both.open:
                both.release(more[0])
        case "forget":
            # The kernel forgets nothing that is open.
            if nodeid not in [node for node, _ in both.open]:
                both.ask(p.Op.FORGET, nodeid, p.U64.pack(more[1]))
        case "getattr":
            both.ask(p.Op.GETATTR, nodeid, p.GETATTR_IN.pack(0, 0, 0))
        case "set":
            fh = both.open[more[3] % len(both.open)][1] if both.open else 0
            both.set(nodeid, more[1], fh, more[3], (-5, 10**9 + 7), more[2], 5, 6)
        case "put":
            put(both, nodeid, b"user.x", b"v" * more[1], more[2])
        case "take":
            take(both, nodeid, b"user.x")
        case "listxattr":
            both.ask(p.Op.LISTXATTR, nodeid, p.GETXATTR_IN.pack(100, 0))
        case "getxattr":
            value(both, nodeid, more[1])
        case "retire":
            for side in both.sides:
                for ino in itertools.islice(list(side.gate.states.idle.inodes), 1):
                    side.gate.states.idle.drop(ino)
        case "unlink" | "rmdir":
            both.ask(p.Op[action.upper()], nodeid, more[1] + b"\0")
        case "linked":
            both.linked(nodeid, both.nodes[more[1] % len(both.nodes)], more[2])
        case "symlink":
            both.symlinked(nodeid, more[1], b"target")
        case "readlink":
            both.ask(p.Op.READLINK, nodeid, b"")
        case "list":
            both.listed(p.Op.READDIRPLUS if more[1] else p.Op.READDIR, nodeid, more[2], pieces=more[3])
        case "rename":
            both.renamed(nodeid, more[1], both.nodes[more[2] % len(both.nodes)], more[3], more[4])
        case _:
            both.behind(lambda path: behind(path, action, os.fsdecode(more[0])))


def behind(path, action, name):
    match action:
        case "file":
            (path / name).write_bytes(b"content")
        case "dir":
            (path / name).mkdir()
        case "remove":
            (path / name).rmdir() if (path / name).is_dir() else (path / name).unlink()
        case "chmod":
            (path / name).chmod(0o4755 if (path / name).stat().st_mode & 0o111 == 0 else 0o644)
        case "link":
            os.link(path / "a", path / name)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=50))
def test_both_forms_leave_the_same_behind(tmp_path_factory, monkeypatch, built, steps):
    both = Both(tmp_path_factory.mktemp("twins"), monkeypatch, built)
    try:
        both.behind(lambda path: [(path / os.fsdecode(name)).write_bytes(b"content") for name in NAMES[:2]])
        for step in steps:
            step_of(both, step)
    finally:
        both.close()
