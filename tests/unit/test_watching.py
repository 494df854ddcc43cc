"""For how long the kernel may believe what it is told, and how it hears of edits behind the mount."""

import contextlib
import errno
import os
import random
import select
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest
from harness import mapped
from hotside import FORMS, Side

from tierfs import lasting, syscalls
from tierfs.fuse import hot, telling, watching
from tierfs.fuse import protocol as p
from tierfs.lasting import FRESH, LONG
from tierfs.vfs import ROOT, Caller

ME = Caller(os.geteuid(), os.getegid(), os.getpid())
MODE = 12  # in a fuse_attr_out


@pytest.fixture
def alone(tmp_path, needs_root):
    """A filesystem on which nobody else works: numbers of inodes that go elsewhere are given to ours."""
    if not shutil.which("mkfs.ext4"):
        pytest.skip("mkfs.ext4 is not installed")
    image, place = tmp_path / "image", tmp_path / "tree"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, place], check=False).returncode:
        pytest.skip("no loop devices here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def made(path):
    """A file at this path."""
    path.write_bytes(b"content")
    return path


def seconds(found):
    """For how long a looked up name and its attributes hold."""
    return found[2], found[3]


def test_names_and_directories_last_and_files_when_they_have_come_to_rest(side, monkeypatch):
    (side.path / "dir").mkdir()
    made(side.path / "file")
    (side.path / "link").symlink_to("file")
    assert seconds(side.lookup(ROOT, b"dir")) == (LONG, LONG)
    assert seconds(side.lookup(ROOT, b"link")) == (LONG, LONG)
    assert side.getattr(ROOT)[0] == LONG
    for _ in range(2):
        found = side.lookup(ROOT, b"file")
        assert found[2] == LONG and FRESH - 5 <= found[3] <= FRESH  # it may not have come to the disk yet
    assert FRESH - 5 <= side.getattr(found[0])[0] <= FRESH


def wrong(side):
    """Of which nodes the kernel was told what is not so, as it is told when what it was told is proven."""
    side.session.confirm(2)
    side.session.confirm(9)
    side.sock.setblocking(False)
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(p.INVAL_INODE_OUT.unpack_from(side.sock.recv(1 << 16), p.OUT_SIZE)[0])
    side.sock.setblocking(True)
    assert not side.gate.lasting.believed
    return found


def test_what_is_looked_up_first_is_proven_when_nobody_waits(side):
    """And what turns out to be otherwise is told."""
    paths = {name: made(side.path / name) for name in ("rest", "written", "opened", "changed", "gone", "moved")}
    nodes = {}
    with paths["written"].open("ab"):
        for name in paths:
            found = side.lookup(ROOT, name.encode())
            nodes[name], lasts = found[0], found[3]
            assert lasts > FRESH // 2
        believed = {path.stat().st_ino: path.stat().st_ctime_ns for path in paths.values()}
        assert side.gate.lasting.believed == believed and not side.gate.lasting.unproven
        fh, _ = side.vfs.open(nodes["opened"], os.O_RDWR, ME)  # which the kernel was told of when it asked
        side.vfs.release(fh)
        time.sleep(0.02)  # a tick of the clock
        paths["changed"].chmod(0o600)
        paths["gone"].unlink()
        paths["moved"].rename(side.path / "elsewhere")
        assert wrong(side) == [nodes[name] for name in ("written", "changed", "gone", "moved")]
        assert side.getattr(nodes["written"])[0] == p.ATTR_SECONDS
    assert side.getattr(nodes["written"])[0] > FRESH // 2
    assert wrong(side) == []


def test_what_was_proven_is_so_until_its_ctime_moves(side):
    """Whoever only opens it has not written; whoever reads it through the mount has its atime asked for."""
    path = made(side.path / "file")
    node = side.lookup(ROOT, b"file")[0]
    assert wrong(side) == []
    with path.open("ab", buffering=0) as file:
        assert side.getattr(node)[0] > FRESH // 2
        time.sleep(0.02)  # a tick of the clock
        file.write(b"more")
        assert side.getattr(node)[0] == p.ATTR_SECONDS
    assert side.getattr(node)[0] > FRESH // 2
    st = path.stat()
    assert side.gate.lasting.proven == {st.st_ino: st.st_ctime_ns}
    fh, _ = side.vfs.open(node, os.O_RDWR, ME)
    assert side.getattr(node)[0] <= p.ATTR_SECONDS
    side.vfs.release(fh)


def test_only_so_many_are_remembered_as_proven(tmp_path, monkeypatch, built):
    for module in (lasting, hot):
        monkeypatch.setattr(module, "MOST_PROVEN", 2)
    (tmp_path / "tree").mkdir()
    for form in FORMS:
        one = Side(tmp_path / form, form, monkeypatch, built, watched=True)
        for name in (b"one", b"two", b"three"):
            made(one.path / os.fsdecode(name))
            node = one.lookup(ROOT, name)[0]
            one.gate.lasting.believed.clear()
            assert one.getattr(node)[0] > FRESH // 2
        assert list(one.gate.lasting.proven) == [(one.path / "three").stat().st_ino]
        one.close()


def test_what_the_kernel_knows_no_more_need_not_be_confirmed(side):
    made(side.path / "file")
    node = side.lookup(ROOT, b"file")[0]
    side.send(p.Op.FORGET, node, p.U64.pack(1))
    assert side.session.serve(1) == 1
    assert wrong(side) == []


def test_what_was_not_proven_in_time_is_asked_for_again(side):
    names = (b"one", b"two", b"gone")
    for name in names:
        made(side.path / os.fsdecode(name))
    nodes = [side.lookup(ROOT, name)[0] for name in names]
    side.send(p.Op.FORGET, nodes[2], p.U64.pack(1))
    assert side.session.serve(1) == 1
    side.session.disbelieve(1)
    assert len(side.gate.lasting.believed) == 2 and len(side.gate.lasting.unproven) == 1
    side.session.disbelieve(9)
    assert not side.gate.lasting.believed and len(side.gate.lasting.unproven) == 2
    told = [p.INVAL_INODE_OUT.unpack_from(side.sock.recv(1 << 16), p.OUT_SIZE)[0] for _ in range(2)]
    assert told == nodes[:2]
    assert side.getattr(nodes[0])[0] > FRESH // 2  # proven
    assert len(side.gate.lasting.unproven) == 1


@pytest.fixture
def stranger(tmp_path, needs_root):
    """A connection of the kernel's that knows no node. Nobody answers it: nobody may look at its mount."""
    place = tmp_path / "stranger"
    place.mkdir()
    fd = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0"
    argv = ["mount", "-i", "-t", "fuse", "-o", options, "none", str(place)]
    subprocess.run(argv, check=True, pass_fds=[fd], timeout=20)
    yield fd
    subprocess.run(["umount", "-l", str(place)], check=True, timeout=20)
    os.close(fd)


@pytest.mark.parametrize("verb", ["confirm", "disbelieve"])
def test_what_the_kernel_has_yet_to_take_in_is_told_later(side, stranger, verb):
    """Its answer is on its way to somebody who gets no processor: told too early, it would last."""
    (side.path / "file").touch()
    node = side.lookup(ROOT, b"file")[0]
    (side.path / "file").chmod(0o600)
    time.sleep(0.02)  # a tick of the clock
    (side.path / "file").chmod(0o640)
    os.dup2(stranger, side.session.fileno(), inheritable=False)
    assert getattr(side.session, verb)(9) == [node]


@pytest.mark.parametrize("gone", [False, True])
def test_a_name_left_behind_is_told_but_not_one_that_the_kernel_has_removed(side, gone):
    """A link makes a node known by its new name alone; git removes the old one at once."""
    made(side.path / "a")
    node = side.lookup(ROOT, b"a")[0]
    assert side.ask(p.Op.LINK, ROOT, p.U64.pack(node) + b"b\0")[0] == 0
    assert side.vfs.nodes.left == {(ROOT, b"a")}
    if gone:
        assert side.ask(p.Op.UNLINK, ROOT, b"a\0") == (0, b"")
    assert side.vfs.nodes.left == (set() if gone else {(ROOT, b"a")})


def test_what_it_did_not_know_is_handed_to_the_teller(side):
    watched = Watched(side, os.eventfd(0, os.EFD_NONBLOCK))
    watched.watch.outdated([7, 9, 7])
    assert watched.watch.busy
    watched.watch.tell()
    assert watched._told.recv(telling.MOST) == p.inval_attributes(7) + p.inval_attributes(9)


def test_only_so_many_are_believed(tmp_path, monkeypatch, built):
    for module in (lasting, hot):
        monkeypatch.setattr(module, "MOST_BELIEVED", 1)
    (tmp_path / "tree").mkdir()
    for form in FORMS:
        one = Side(tmp_path / form, form, monkeypatch, built, watched=True)
        for name in ("one", "two"):
            made(one.path / name)
        assert one.lookup(ROOT, b"one")[3] > FRESH // 2
        assert one.lookup(ROOT, b"two")[3] == p.ATTR_SECONDS
        assert one.lookup(ROOT, b"two")[3] > FRESH // 2  # proven
        one.close()


def test_a_change_puts_out_of_date_what_the_kernel_has_yet_to_take_in(side):
    """An answer that was on its way would last otherwise: the kernel does not tell it from a newer one."""
    (side.path / "one").mkdir()
    (side.path / "dir").mkdir()
    made(side.path / "one" / "file")
    one, other = side.lookup(ROOT, b"one")[0], side.lookup(ROOT, b"dir")[0]
    file = side.lookup(one, b"file")[0]
    changes = [
        (p.Op.MKDIR, one, p.MKDIR_IN.pack(0o755, 0) + b"below\0", [one]),
        (p.Op.RMDIR, one, b"below\0", [one]),
        (p.Op.SYMLINK, one, b"link\0to\0", [one]),
        (p.Op.UNLINK, one, b"link\0", [one]),
        (p.Op.MKNOD, one, p.MKNOD_IN.pack(0o010644, 0, 0, 0) + b"fifo\0", [one]),
        (p.Op.CREATE, one, p.CREATE_IN.pack(os.O_RDWR, 0o100644, 0, 0) + b"new\0", [one]),
        (p.Op.LINK, one, p.U64.pack(file) + b"second\0", [one]),
        (p.Op.UNLINK, one, b"file\0", [one]),
        (p.Op.RENAME, one, p.U64.pack(one) + b"second\0third\0", [file, one]),
        (p.Op.RENAME, one, p.U64.pack(other) + b"third\0file\0", [other, file, one]),
        (p.Op.RENAME2, other, p.RENAME2_IN.pack(one, 0, 0) + b"file\0new\0", [one, file, other]),
        (p.Op.SETXATTR, file, p.SETXATTR_IN.pack(1, 0, 0, 0) + b"user.x\0y", [file]),
        (p.Op.REMOVEXATTR, file, b"user.x\0", [file]),
        (p.Op.RMDIR, one, b"missing\0", []),
        (p.Op.GETATTR, one, p.GETATTR_IN.pack(0, 0, 0), []),
    ]  # fmt: skip
    for opcode, node, body, outdated in changes:
        side.outdated.clear()
        number, _ = side.ask(opcode, node, body)
        assert (number, side.outdated) == (errno.ENOENT if b"missing" in body else 0, outdated), opcode


def test_what_may_be_given_anew_by_another_name_does_not_last(side):
    made(side.path / "file")
    os.link(side.path / "file", side.path / "other")
    assert side.lookup(ROOT, b"file")[2] == p.ENTRY_SECONDS


def test_a_directory_is_asked_by_the_descriptor_that_is_kept_of_it(side):
    """Which is half the price of its name. Edits behind the mount are told, so nobody relies on the name."""
    (side.path / "dir").mkdir()
    node = side.lookup(ROOT, b"dir")[0]
    os.rename(side.path / "dir", side.path / "moved")
    assert side.getattr(node) == errno.ESTALE  # none is kept yet
    os.rename(side.path / "moved", side.path / "dir")
    assert side.lookup(node, b"absent") == errno.ENOENT
    os.rename(side.path / "dir", side.path / "moved")
    (side.path / "moved").chmod(0o700)
    assert side.getattr(node)[MODE] & 0o777 == 0o700
    (side.path / "moved").rmdir()
    assert side.getattr(node) == errno.ESTALE


def test_set_id_bits_do_not_last(side):
    made(side.path / "file").chmod(0o4755)
    assert side.lookup(ROOT, b"file")[3] == p.ATTR_SECONDS


def test_answers_that_the_kernel_takes_for_the_newest_do_not_last(side):
    made(side.path / "file")
    node = side.lookup(ROOT, b"file")[0]
    body = p.SETATTR_IN.pack(p.SET_MODE, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0o600, 0, 0, 0, 0)
    number, changed = side.ask(p.Op.SETATTR, node, body)
    assert not number and p.ATTR_OUT.unpack(changed)[0] == p.ATTR_SECONDS
    number, linked = side.ask(p.Op.LINK, ROOT, p.U64.pack(node) + b"other\0")
    assert not number and seconds(p.ENTRY_OUT.unpack(linked)) == (p.ENTRY_SECONDS, p.ATTR_SECONDS)


def test_what_is_new_may_be_changed_by_others_before_its_maker_has_heard_of_it(side):
    for opcode, body in (
        (p.Op.MKDIR, p.MKDIR_IN.pack(0o755, 0) + b"dir\0"),
        (p.Op.SYMLINK, b"link\0to\0"),
        (p.Op.MKNOD, p.MKNOD_IN.pack(0o010644, 0, 0, 0) + b"fifo\0"),
        (p.Op.CREATE, p.CREATE_IN.pack(os.O_RDWR, 0o100644, 0, 0) + b"file\0"),
    ):
        number, made = side.ask(opcode, ROOT, body)
        assert not number and seconds(p.ENTRY_OUT.unpack(made[: p.ENTRY_OUT.size])) == (LONG, p.ATTR_SECONDS)


def test_a_file_that_is_written_does_not_last_until_nobody_can_be_writing(side):
    path = made(side.path / "file")
    node, ino = side.lookup(ROOT, b"file")[0], path.stat().st_ino
    fh, _ = side.vfs.open(node, os.O_RDWR, ME)
    assert side.gate.lasting.unproven == {ino}
    assert side.getattr(node)[0] == 0
    with mapped(path, 4096):
        side.vfs.release(fh)
        assert side.getattr(node)[0] == p.ATTR_SECONDS
        assert seconds(side.lookup(ROOT, b"file")) == (LONG, p.ATTR_SECONDS)
    side.gate.states.idle.drop_all()
    assert side.getattr(node)[0] > p.ATTR_SECONDS
    assert not side.gate.lasting.unproven


def test_a_file_that_was_closed_just_now_is_not_proven_yet(side):
    """Its times are about to be set, or its name: that would end what a proof has bought."""
    ino = made(side.path / "file").stat().st_ino
    node = side.lookup(ROOT, b"file")[0]
    side.vfs.release(side.vfs.open(node, os.O_RDWR, ME)[0])
    for _ in range(2):
        assert side.getattr(node)[0] == p.ATTR_SECONDS
    assert side.gate.lasting.unproven == {ino}
    side.gate.states.idle.drop_all()  # nobody has done anything with it for a while
    assert side.getattr(node)[0] > p.ATTR_SECONDS


def test_a_file_that_somebody_writes_behind_the_mount_does_not_last(side):
    path = made(side.path / "file")
    with path.open("ab"):
        node = side.lookup(ROOT, b"file")[0]
        assert side.getattr(node)[0] == p.ATTR_SECONDS
    assert side.getattr(node)[0] > p.ATTR_SECONDS
    assert not side.gate.lasting.unproven


@pytest.mark.parametrize("gone", [False, True])
def test_what_the_kernel_knows_no_more_need_not_be_proven(side, gone):
    """Days of work would leave the number of each file that was ever written."""
    made(side.path / "file")
    node = side.lookup(ROOT, b"file")[0]
    fh, _ = side.vfs.open(node, os.O_RDWR, ME)
    side.vfs.release(fh)
    assert len(side.gate.lasting.unproven) == 1
    if gone:
        assert side.ask(p.Op.UNLINK, ROOT, b"file\0") == (0, b"")
    else:
        side.send(p.Op.FORGET, node, p.U64.pack(1))
        assert side.session.serve(1) == 1
    assert not side.gate.lasting.unproven


def test_nothing_lasts_where_edits_are_not_seen(tmp_path, monkeypatch):
    (tmp_path / "tree" / "dir").mkdir(parents=True)
    one = Side(tmp_path / "side", "pure", monkeypatch, None)
    try:
        assert seconds(one.lookup(ROOT, b"dir")) == (p.ENTRY_SECONDS, p.ATTR_SECONDS)
    finally:
        one.close()


# --- events -----------------------------------------------------------------------------------------------


class Watched:
    """A watch over a side's tree, and what it would have told."""

    def __init__(self, side, fd):
        self.side = side
        ours, self._told = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._told.setblocking(False)
        self.watch = watching.Watch(fd, ours, side.vfs)

    def told(self):
        """What is told now, in order."""
        self.watch.hear()
        found = []
        while True:
            self.watch.tell()
            try:
                data = self._told.recv(telling.MOST)
            except BlockingIOError:
                if not self.watch.busy:
                    return found
                continue
            while data:
                length, code, _ = p.OUT.unpack_from(data)
                body, data = data[p.OUT_SIZE : length], data[length:]
                if code == p.NOTIFY_INVAL_INODE:
                    node, offset, _ = p.INVAL_INODE_OUT.unpack(body)
                    assert offset < 0
                    found.append(node)
                else:
                    parent, size, flags = p.INVAL_ENTRY_OUT.unpack_from(body)
                    name = body[p.INVAL_ENTRY_OUT.size : -1]
                    assert code == p.NOTIFY_INVAL_ENTRY and size == len(name)
                    found.append((parent, name, flags))

    def close(self):
        self.watch.close()
        self._told.close()


@pytest.fixture
def watched(alone, tmp_path, monkeypatch):
    side = Side(tmp_path / "side", "pure", monkeypatch, None, watched=True)
    why_not = watching._why_not(side.vfs)
    if why_not:
        side.close()
        pytest.skip(why_not)
    fd = syscalls.fanotify(side.tree.rootfd, watching._WANTED)
    one = Watched(side, fd)
    yield one
    one.close()
    side.close()


def elsewhere(script, *arguments):
    """Run a few lines in another process."""
    subprocess.run([sys.executable, "-c", f"import os, sys\n{script}", *arguments], check=True, timeout=30)


def test_edits_of_others_are_told_and_ours_are_not(watched):
    side, tree = watched.side, watched.side.path
    for name in ("dir", "dir/sub", "unknown"):
        (tree / name).mkdir()
    made(tree / "dir" / "file")
    directory = side.lookup(ROOT, b"dir")[0]
    file, sub = side.lookup(directory, b"file")[0], side.lookup(directory, b"sub")[0]
    side.getattr(file)
    assert watched.told() == []  # this process is the server
    where = str(tree)
    elsewhere("os.chmod(sys.argv[1] + '/dir/file', 0o600)", where)
    assert watched.told() == [file]
    elsewhere("os.chmod(sys.argv[1] + '/dir', 0o700)", where)
    assert set(watched.told()) == {directory}
    elsewhere("open(sys.argv[1] + '/dir/file', 'ab').write(b'more')", where)
    assert watched.told() == [file]
    elsewhere("open(sys.argv[1] + '/dir/new', 'x')", where)
    assert watched.told() == [(directory, b"new", 0), directory]
    elsewhere("os.rename(sys.argv[1] + '/dir/file', sys.argv[1] + '/moved')", where)
    assert set(watched.told()) == {(directory, b"file", 0), (ROOT, b"moved", 0), directory, ROOT, file}
    elsewhere("open(sys.argv[1] + '/unknown/x', 'x'); os.unlink(sys.argv[1] + '/unknown/x')", where)
    assert watched.told() == []
    elsewhere("os.rmdir(sys.argv[1] + '/dir/sub')", where)
    assert set(watched.told()) == {(directory, b"sub", 0), directory, sub}


@pytest.mark.parametrize("form", FORMS)
def test_of_a_rename_each_place_is_told_that_is_known(watched, form, request):
    if form == "compiled":
        watched.watch._sift = request.getfixturevalue("built").foreign
    side, tree = watched.side, watched.side.path
    for name in ("dir", "dir/sub", "unknown"):
        (tree / name).mkdir()
    for name in ("dir/file", "unknown/file"):
        made(tree / name)
    directory = side.lookup(ROOT, b"dir")[0]
    file, sub = side.lookup(directory, b"file")[0], side.lookup(directory, b"sub")[0]
    exchange = """
from tierfs import syscalls
old, new = map(os.fsencode, sys.argv[1:])
syscalls.renameat2(syscalls.AT_FDCWD, old, syscalls.AT_FDCWD, new, 2)
"""
    for script, old, new, told in (
        (exchange, "dir/file", "dir/sub", {(directory, b"file", 0), (directory, b"sub", 0), file, sub}),
        (exchange, "unknown/file", "dir/sub", {(directory, b"sub", 0), file}),
        ("os.rename(*sys.argv[1:])", "dir/file", "unknown/sub", {(directory, b"file", 0), sub}),
        ("os.rename(*sys.argv[1:])", "unknown/sub", "dir/back", {(directory, b"back", 0), sub}),
    ):
        elsewhere(script, str(tree / old), str(tree / new))
        assert set(watched.told()) == {directory, *told}


def test_a_directory_that_came_back_is_only_looked_up_anew(watched):
    (watched.side.path / "dir").mkdir()
    node = watched.side.lookup(ROOT, b"dir")[0]
    elsewhere("a, b = sys.argv[1:]; os.rename(a, b); os.rename(b, a)",
              str(watched.side.path / "dir"), str(watched.side.path / "away"))  # fmt: skip
    assert set(watched.told()) == {(ROOT, b"dir", p.EXPIRE_ONLY), (ROOT, b"away", 0), ROOT, node}


def test_a_close_of_what_was_opened_through_the_mount_is_not_told(watched):
    path = made(watched.side.path / "file")
    node = watched.side.lookup(ROOT, b"file")[0]
    fh, _ = watched.side.vfs.open(node, os.O_RDWR, ME)
    elsewhere("open(sys.argv[1], 'r+b').write(b'x')", str(path))  # as by a program, in passthrough
    watched.side.vfs.release(fh)
    assert watched.told() == []
    watched.side.gate.states.idle.drop_all()
    watched.side.getattr(node)  # proven
    elsewhere("open(sys.argv[1], 'r+b').write(b'y')", str(path))
    assert watched.told() == [node]


def test_after_an_overflow_all_that_is_known_is_told(side, monkeypatch):
    monkeypatch.setattr(watching, "_SWEEP", 3)
    reading, writing = os.pipe2(os.O_NONBLOCK)
    one = Watched(side, reading)
    try:
        wanted = {ROOT}
        for number in range(8):
            (side.path / f"d{number}").mkdir()
            node = side.lookup(ROOT, b"d%d" % number)[0]
            wanted |= {node, (ROOT, b"d%d" % number, p.EXPIRE_ONLY)}
        os.write(writing, watching._EVENT.pack(watching._EVENT.size, 3, 0, watching._EVENT.size,
                                               watching._OVERFLOW, -1, 0))  # fmt: skip
        assert set(one.told()) == wanted
    finally:
        os.close(writing)
        one.close()


@pytest.fixture
def told(side):
    """What the kernel is told now, of a side in which nobody edits anything."""
    reading, writing = os.pipe2(os.O_NONBLOCK)
    one = Watched(side, reading)
    yield one.told
    os.close(writing)
    one.close()


def test_a_name_that_was_the_only_one_is_asked_for_anew_when_there_is_another(side, told):
    """Nobody could tell, later, that the kernel believes in both."""
    made(side.path / "first")
    node, *found = side.lookup(ROOT, b"first")
    assert found[1] == LONG
    assert not side.ask(p.Op.LINK, ROOT, p.U64.pack(node) + b"second\0")[0]
    assert told() == [(ROOT, b"first", p.EXPIRE_ONLY)]
    assert side.lookup(ROOT, b"second")[0] == node and told() == []
    assert side.lookup(ROOT, b"first")[0] == node
    assert told() == [(ROOT, b"second", p.EXPIRE_ONLY)]


def test_a_name_is_asked_for_anew_whose_file_is_found_by_another(side, told):
    """As where somebody has moved it behind the mount, and the event is lost."""
    (side.path / "dir").mkdir()
    (side.path / "below").mkdir()
    made(side.path / "file")
    directory, node, below = (side.lookup(ROOT, name)[0] for name in (b"dir", b"file", b"below"))
    os.rename(side.path / "file", side.path / "dir" / "moved")
    os.rename(side.path / "below", side.path / "dir" / "below")
    assert side.lookup(directory, b"moved")[0] == node
    assert told() == [(ROOT, b"file", p.EXPIRE_ONLY)]
    assert side.lookup(directory, b"below")[0] == below and told() == []  # the kernel moves directories
    assert not side.ask(p.Op.RENAME, directory, p.U64.pack(ROOT) + b"moved\0back\0")[0] and told() == []


def test_a_name_is_asked_for_anew_whose_number_a_new_file_has(side, told):
    made(side.path / "gone")
    nodes, node = side.vfs.nodes, side.lookup(ROOT, b"gone")[0]
    (side.path / "gone").unlink()
    st = made(side.path / "new").stat()
    nodes._by_ino[st.st_ino] = nodes.get(node)  # as if the filesystem had given it the number
    assert nodes.made(st, nodes.root, b"new").id != node
    assert told() == [(ROOT, b"gone", p.EXPIRE_ONLY)]


# --- telling ----------------------------------------------------------------------------------------------


def test_an_inode_that_is_not_known_yet_is_told_again_and_a_name_is_not(monkeypatch):
    """An answer that tells of the inode may be on its way."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    inode, name = p.inval_attributes(7), p.inval_name(7, b"name", 0)
    told, unknown = [], [inode, inode, name]

    def write(device, message):
        told.append(message)
        if message in unknown:
            unknown.remove(message)
            raise OSError(errno.ENOENT, "unknown")

    monkeypatch.setattr(telling.os, "write", write)
    teller = threading.Thread(target=telling.Teller(theirs, -1).run)
    teller.start()
    ours.send(inode + name)
    until = time.monotonic() + 10
    while len(told) < 4 and time.monotonic() < until:
        time.sleep(0.01)
    ours.close()
    teller.join(10)
    theirs.close()
    assert told == [inode, name, inode, inode]


def test_the_process_that_tells_ends_with_us():
    reading, writing = os.pipe()
    teller = telling.start("no volume")
    socket.send_fds(teller, [b"\0"], [writing])
    os.close(writing)
    message = p.inval_attributes(7)
    teller.send(message)
    assert os.read(reading, 1000) == message
    teller.close()
    assert select.select([reading], [], [], 10)[0] and os.read(reading, 1) == b""  # nobody has it any more
    os.close(reading)


def an_event(rng, pid, inos):
    """As the kernel writes it: of a name in a directory, and of the file itself."""
    records = b""
    for kind in rng.sample((1, 2), rng.randrange(3)):
        handle = watching._INO_GEN.pack(rng.choice(inos), 7)
        name = bytes(rng.choices(range(1, 256), k=rng.randrange(1, 256))) + b"\0" if kind == 2 else b""
        length = watching._INFO.size + len(handle) + len(name)
        padding = -length % 8
        type_ = rng.choice((1, 1, 1, 0x81))
        head = watching._INFO.pack(kind, 0, length + padding, len(handle), type_)
        records += head + handle + name + bytes(padding)
    mask = rng.choice((0x100, 0x200, 0x40000200, 0x8, 0x4, 0x4000))
    length = watching._EVENT.size + len(records)
    return watching._EVENT.pack(length, 3, 0, watching._EVENT.size, mask, -1, pid) + records


@pytest.mark.parametrize("seed", range(20))
def test_both_forms_pick_the_same_of_all_events(built, seed):
    rng, known = random.Random(seed), {ino: f"node {ino}" for ino in range(1, 40, 2)}
    events = b"".join(an_event(rng, rng.choice((1, 2)), range(1, 40)) for _ in range(300))
    buffer = bytearray(events + b"\xff" * 64)
    unproven = set(range(1, 40, 4))
    expected = list(watching.foreign(buffer, len(events), 2, known, unproven))
    assert built.foreign(buffer, len(events), 2, known, unproven) == expected
    assert {node is None for _, _, node, _ in expected} == {True, False}
    for cut in range(0, len(events), 37):  # the kernel cuts none; what is cut is not read beyond
        found = built.foreign(buffer[:cut], cut, 2, known, unproven)
        assert found == expected[: len(found)]


@pytest.mark.parametrize(("mask", "kind", "heard"), [
    (0x8, 1, False), (0x8, 2, False), (0x4, 2, False), (0x4, 1, True), (0xC, 1, True), (0x108, 2, True),
    (0x40000004, 2, True),
])  # fmt: skip
def test_a_close_of_what_is_unproven_is_no_news(built, mask, kind, heard):
    handle = watching._INO_GEN.pack(5, 7)
    tail = handle + (b"name\0\0\0\0" if kind == 2 else b"")
    record = watching._INFO.pack(kind, 0, watching._INFO.size + len(tail), len(handle), 1) + tail
    size = watching._EVENT.size + len(record)
    event = bytearray(watching._EVENT.pack(size, 3, 0, watching._EVENT.size, mask, -1, 1) + record)
    for pick in (watching.foreign, built.foreign):
        found = [(mask, kind, "node", b"name" if kind == 2 else b"")]
        assert list(pick(event, size, 2, {5: "node"}, {5})) == (found if heard else [])
        assert list(pick(event, size, 2, {5: "node"}, {6})) == (found if heard or kind == 1 else [])


def test_what_is_of_no_interest_is_looked_at_seldom(side, tmp_path):
    fd, other = os.pipe2(os.O_NONBLOCK)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    watch = watching.Watch(fd, ours, side.vfs)
    strange = watching._EVENT.pack(watching._EVENT.size, 3, 0, watching._EVENT.size, 0x100, -1, 1)
    os.write(other, strange)
    assert watch.hear() == watching.LATER
    handle = watching._INO_GEN.pack(side.tree.root_ino, 0)
    tail = handle + b"new\0\0\0\0\0"
    record = watching._INFO.pack(2, 0, watching._INFO.size + len(tail), len(handle), 1) + tail
    size = watching._EVENT.size + len(record)
    os.write(other, watching._EVENT.pack(size, 3, 0, watching._EVENT.size, 0x100, -1, 1) + record)
    assert watch.hear() == watching.SOON
    watch.close()
    os.close(other)
    theirs.close()
