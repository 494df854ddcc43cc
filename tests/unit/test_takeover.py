"""A server is killed at each line of an operation; its successor answers the request once and correctly."""

import errno
import os
import shutil
import stat
import sys
from contextlib import contextmanager
from itertools import count, islice

import pytest

from tierfs import ledger as ledgers
from tierfs import syscalls
from tierfs.gate import Gate
from tierfs.intents import Doing
from tierfs.ledger import Ledger
from tierfs.marks import Mark, MarkReader, MarkWriter
from tierfs.tree import Tree, open_tree
from tierfs.vfs import ROOT, Caller, Vfs
from tierfs.waits import Blocked

ME = Caller(os.geteuid(), os.getegid(), os.getpid())
REQUEST = 4242
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="files are reached by handle, which takes root")
OURS = os.sep + "tierfs" + os.sep


class World:
    """A tree, what one server knows of it, and the memory that outlives that server."""

    def __init__(self, base):
        self.base = base
        base.mkdir()
        (base / "marks").mkdir()
        self.path = base / "tree"
        self.path.mkdir()
        self.marks = os.open(base / "marks", os.O_RDONLY)
        self.memory = ledgers.make()
        self.tree: Tree = open_tree(str(self.path))
        self.servers = []
        self.vfs = self.begin()
        self.vfs.ledger.serve(passthrough=False)

    def begin(self) -> Vfs:
        gate = Gate(self.tree, None, MarkWriter(self.marks), 1, ledger=Ledger(self.memory))
        self.servers.append(Vfs(self.tree, gate))
        return self.servers[-1]

    def successor(self) -> Vfs:
        """Another server takes over. What the first has open stays so, as the kernel keeps it."""
        vfs = self.begin()
        vfs.take_over(MarkReader(self.marks, None).read(), {})
        return vfs

    def close(self):
        for vfs in self.servers:
            for _, handle in vfs.files.handles.values():
                if handle.fd >= 0:
                    os.close(handle.fd)
            for inode in vfs.gate.states.inodes.values():
                os.close(inode.opath)
            vfs.close()
            vfs.ledger.close()
            vfs.gate.marking.marks.close()
        self.servers.clear()
        self.tree.close()
        os.close(self.memory)
        os.close(self.marks)
        shutil.rmtree(self.base)  # a log of marks is 8 MiB


@pytest.fixture
def worlds(tmp_path):
    made, numbers = [], count()

    def new():
        made.append(World(tmp_path / f"w{next(numbers)}"))
        return made[-1]

    new.made = made
    yield new
    for world in made:
        world.close()


def seen(path):
    """All that can be seen of a tree, but times and inode numbers."""
    found = {}
    for top, dirs, files in os.walk(path):
        for name in (*dirs, *files):
            each = os.path.join(top, name)
            st = os.lstat(each)
            content = b""
            if stat.S_ISREG(st.st_mode):
                with open(each, "rb") as file:
                    content = file.read()
            elif stat.S_ISLNK(st.st_mode):
                content = os.fsencode(os.readlink(each))
            names = os.listxattr(each, follow_symlinks=False)
            attributes = {name: os.getxattr(each, name, follow_symlinks=False) for name in names}
            place = os.path.relpath(each, path)
            found[place] = st.st_mode, st.st_nlink, st.st_uid, st.st_size, content, attributes
    return found


def told_of(world):
    """The inodes that have a name by what the marks say."""
    files, dirs = {}, set()
    for entry in MarkReader(world.marks, None).read():
        if entry.kind is Mark.WRITE:
            files[entry.ino] = entry.handle
        elif entry.kind is Mark.GONE and files.get(entry.ino) == entry.handle:
            del files[entry.ino]
        elif entry.kind is Mark.DIR:
            dirs.add(entry.ino)
        elif entry.kind is Mark.ENTRY:
            dirs.discard(entry.a)
    return files.keys() | dirs


def furnish(world):
    """Some files and directories, looked up as a kernel does; their nodes, and two open files."""
    for name in ("d", "e", "d/sub"):
        (world.path / name).mkdir()
    for name in ("f", "g", "d/x", "d/y"):
        (world.path / name).write_bytes(name.encode() * 5000)
    os.link(world.path / "f", world.path / "f2")
    os.setxattr(world.path / "g", "user.old", b"1")
    vfs, nodes = world.vfs, {"": ROOT}
    for name in ("d", "e", "f", "g", "f2", "d/sub", "d/x", "d/y"):
        parent, _, last = name.rpartition("/")
        nodes[name], _ = vfs.lookup(nodes[parent], last.encode())
    opened = {name: vfs.open(nodes[name], os.O_RDWR, ME)[0] for name in ("f", "d/x")}
    return nodes, opened


def rename(new_parent, new, flags=0, old="g"):
    return lambda vfs, nodes, files: vfs.rename(ROOT, old.encode(), nodes[new_parent], new.encode(), flags)


OPERATIONS = {
    "unlink": lambda vfs, nodes, files: vfs.unlink(ROOT, b"g"),
    "unlink one of two names": lambda vfs, nodes, files: vfs.unlink(ROOT, b"f2"),
    "unlink what is open": lambda vfs, nodes, files: vfs.unlink(nodes["d"], b"x"),
    "rmdir": lambda vfs, nodes, files: vfs.rmdir(ROOT, b"e"),
    "rename": rename("d", "new"),
    "rename over": rename("d", "y"),
    "rename over what is open": rename("d", "x"),
    "rename over one of two names": rename("", "f2"),
    "rename a directory over another": rename("d", "sub", old="e"),
    "exchange": rename("d", "y", syscalls.RENAME_EXCHANGE),
    "exchange file and directory": rename("d", "sub", syscalls.RENAME_EXCHANGE),
    "rename where nothing is": rename("d", "new", syscalls.RENAME_NOREPLACE),
    "rename what is open": lambda vfs, nodes, files: vfs.rename(nodes["d"], b"x", ROOT, b"moved"),
    "rename what is above": rename("e", "moved", old="d"),
    "exchange with what is open": rename("d", "x", syscalls.RENAME_EXCHANGE),
    "link": lambda vfs, nodes, files: vfs.link(nodes["g"], nodes["d"], b"linked"),
    "symlink": lambda vfs, nodes, files: vfs.symlink(nodes["d"], b"s", b"target", ME),
    "mkdir": lambda vfs, nodes, files: vfs.mkdir(nodes["d"], b"made", 0o2755, Caller(1000, 1000)),
    "mknod fifo": lambda vfs, nodes, files: vfs.mknod(nodes["d"], b"p", stat.S_IFIFO | 0o600, 0, ME),
    "mknod file": lambda vfs, nodes, files: vfs.mknod(nodes["d"], b"n", stat.S_IFREG | 0o640, 0, ME),
    "create": lambda vfs, nodes, files: vfs.create(nodes["d"], b"c", os.O_RDWR, 0o640, Caller(1000, 1000))[:2],
    "setxattr": lambda vfs, nodes, files: vfs.setxattr(nodes["g"], b"user.new", b"v", os.XATTR_CREATE),
    "set xattr": lambda vfs, nodes, files: vfs.setxattr(nodes["g"], b"user.new", b"v"),
    "replace xattr": lambda vfs, nodes, files: vfs.setxattr(nodes["g"], b"user.old", b"2", os.XATTR_REPLACE),
    "removexattr": lambda vfs, nodes, files: vfs.removexattr(nodes["g"], b"user.old"),
    "chmod and truncate": lambda vfs, nodes, files: vfs.setattr(nodes["g"], mode=0o600, size=77),
    "attributes": lambda vfs, nodes, files: vfs.setattr(
        nodes["g"], mode=0o640, uid=7, gid=8, atime_ns=4 * 10**18, mtime_ns=-5
    ),
    "truncate what is open": lambda vfs, nodes, files: vfs.setattr(nodes["f"], files["f"], size=77),
    "truncating open": lambda vfs, nodes, files: vfs.open(nodes["g"], os.O_RDWR | os.O_TRUNC, ME)[1].writable,
    "copy": lambda vfs, nodes, files: vfs.copy_file_range(files["d/x"], 0, files["f"], 3, 1 << 62),
    "write": lambda vfs, nodes, files: vfs.write(files["f"], 5000, b"new"),
}  # fmt: skip


def release(vfs, nodes, files):
    with suppress_bad_number():  # a server may have been killed when nothing but its answer was left
        vfs.release(files["nameless"])


# Of a file that never has a name; what is left in the end is the same as before.
NAMELESS = {
    "make": lambda vfs, nodes, files: vfs.tmpfile(nodes["d"], os.O_RDWR, 0o600, Caller(1000, 1000))[2],
    "release": release,
}


@contextmanager
def suppress_bad_number():
    try:
        yield
    except OSError as error:
        assert error.errno == errno.EBADF


def run_until(line, world, what, nodes, files):
    """Run the operation in another process that dies at this line; whether it had been at its end before."""
    child = os.fork()
    if not child:
        left = line

        def trace(frame, event, _argument):
            nonlocal left
            if OURS not in frame.f_code.co_filename:
                return None
            if event == "line":
                left -= 1
                if left < 0:
                    os._exit(0)
            return trace

        world.vfs.ledger.request = REQUEST
        sys.settrace(trace)
        try:
            (OPERATIONS | NAMELESS)[what](world.vfs, nodes, files)
        except BaseException:
            os._exit(2)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 1), f"{what} failed before line {line}"
    return code == 1


def answered_again(world, what, nodes, files):
    """The successor's answer to the request, which is sent again."""
    vfs = world.successor()
    vfs.again(REQUEST)
    vfs.ledger.request = REQUEST
    answer = (OPERATIONS | NAMELESS)[what](vfs, nodes, files)
    vfs.ledger.replayed = None
    vfs.ledger.settle(REQUEST)
    vfs.done_again(last=False)
    return vfs, answer


def comparable(vfs, answer):
    """Of what was made: how it looks; numbers may differ."""
    if hasattr(answer, "st_mode"):
        return answer.st_mode, answer.st_size
    if isinstance(answer, tuple):
        node, st = answer
        assert vfs.getattr(node).st_ino == st.st_ino
        return st.st_mode, st.st_nlink, st.st_uid, st.st_size
    return answer


def at_lines(worlds, first, step, check):
    """Have a server killed at each of these lines, in a world of its own, and `check` what is left: that says
    whether it had ended before. The last line."""
    for line in count(first, step):
        world = worlds()
        ended = check(world, line)
        world.close()
        worlds.made.remove(world)
        if ended:
            return line
    raise AssertionError("endless")


def check_all_lines(worlds, what, first, step):
    reference = worlds()
    nodes, files = furnish(reference)
    expected = comparable(reference.vfs, OPERATIONS[what](reference.vfs, nodes, files))
    looks = seen(reference.path)

    def check(world, line):
        nodes, files = furnish(world)
        directory = os.stat(world.path / "d").st_ino
        ended = run_until(line, world, what, nodes, files)
        vfs, answer = answered_again(world, what, nodes, files)
        assert comparable(vfs, answer) == expected, f"killed at line {line}"
        assert seen(world.path) == looks, f"killed at line {line}"
        # The open files are still of use, and so are the nodes that have a name.
        assert vfs.read(files["d/x"], 0, 3) == b"d/x", f"killed at line {line}"
        assert files["f"] in vfs.files.handles, f"killed at line {line}"
        assert vfs.getattr(nodes["d"]).st_ino == directory
        vfs.release(files["d/x"])
        told = told_of(world)
        there = {entry.inode() for top, *_ in os.walk(world.path) for entry in os.scandir(top)}
        assert told <= there, f"killed at line {line}: what is gone has no mark of its end"
        return ended

    return at_lines(worlds, first, step, check)


@needs_root
@pytest.mark.parametrize("what", OPERATIONS)
def test_a_killed_server_is_answered_for(worlds, what):
    # With a step that shares no factor with the usual lengths of loops; the soak takes every line.
    assert check_all_lines(worlds, what, len(what) % 17, 17) > 0


MOVES = [what for what in OPERATIONS if what.startswith(("rename what", "exchange")) or "two names" in what]


@needs_root
@pytest.mark.parametrize("what", MOVES)
def test_what_is_open_outlives_a_server_that_was_changing_its_name(worlds, what):
    """Or that of a directory above it: until the successor has been told of the name it is waited for."""
    assert check_all_lines(worlds, what, 0, 4) > 0


@needs_root
def test_what_is_open_is_waited_for_until_its_new_name_is_told(worlds):
    """Also a listing: it would seem to be at its end. And what nobody tells of is lost when all has come."""
    world = worlds()
    nodes, files = furnish(world)
    for number in range(500):
        (world.path / "d/sub" / f"file-{number:05}").touch()
    listing = world.vfs.opendir(nodes["d/sub"])
    at = next(following for following, name, *_ in world.vfs.readdir(listing, 0))
    world.vfs.ledger.request = REQUEST
    world.vfs.ledger.intend(Doing.RENAME, os.stat(world.path / "d"))
    os.rename(world.path / "d", world.path / "e/moved")
    woken = []
    for comes in (True, False):
        vfs = world.successor()
        for ask in (lambda: vfs.read(files["d/x"], 0, 3), lambda: vfs.readdir(listing, at)):  # noqa: B023
            with pytest.raises(Blocked) as blocked:
                ask()
            blocked.value.wait.add(lambda: woken.append(1))
        assert vfs.files.get(files["f"]), "it is where it was"
        if not comes:
            vfs.done_again(last=False)
            assert not woken
            vfs.done_again(last=True)
            with pytest.raises(OSError, match="Bad file"):
                vfs.read(files["d/x"], 0, 3)
            assert list(vfs.readdir(listing, at)) == []
        elif not woken:
            vfs.again(REQUEST)
            vfs.ledger.request = REQUEST
            vfs.rename(ROOT, b"d", nodes["e"], b"moved")
            vfs.ledger.replayed = None
            vfs.done_again(last=False)
            assert vfs.read(files["d/x"], 0, 3) == b"d/x"
            assert len(list(vfs.readdir(listing, at))) == 501
            os.rename(world.path / "e/moved", world.path / "away")  # now nobody tells of it
        assert len(woken) == 2
        woken.clear()


def check_nameless(worlds, what, first, step):
    """Whoever made it is answered; once it is closed, whoever has heard of it has heard of its end."""

    def check(world, line):
        nodes, files = furnish(world)
        known = told_of(world)
        if what == "release":
            files["nameless"] = world.vfs.tmpfile(nodes["d"], os.O_RDWR, 0o600, ME)[2]
        ended = run_until(line, world, what, nodes, files)
        vfs, fh = answered_again(world, what, nodes, files)
        if what == "make":
            assert vfs.write(fh, 0, b"of use") == 6
            vfs.release(fh)
        assert told_of(world) == known, f"killed at line {line}: the index would have it for ever"
        return ended

    return at_lines(worlds, first, step, check)


@needs_root
@pytest.mark.parametrize("what", NAMELESS)
def test_a_killed_server_leaves_no_file_that_never_had_a_name(worlds, what):
    assert check_nameless(worlds, what, 0, 1) > 10


@needs_root
@pytest.mark.soak
@pytest.mark.parametrize("what", OPERATIONS)
def test_a_server_killed_at_any_line_is_answered_for(worlds, what):
    assert check_all_lines(worlds, what, 0, 1) > 10


# --- what is taken over ------------------------------------------------------------------------------------


@needs_root
def test_nodes_and_their_lookups_are_taken_over(worlds):
    world = worlds()
    nodes, _ = furnish(world)
    long = b"n" * 255
    node, _ = world.vfs.mkdir(nodes["d"], long, 0o755, ME)
    for _ in range(4):
        world.vfs.lookup(nodes["d"], long)
    world.vfs.forget(nodes["d/y"])
    vfs = world.successor()
    assert vfs.getattr(node).st_ino == os.stat(world.path / "d" / os.fsdecode(long)).st_ino
    assert vfs.lookup(nodes["d"], long)[0] == node
    vfs.forget(node, 5)
    assert vfs.getattr(node).st_nlink == 2
    vfs.forget(node)
    for forgotten in (node, nodes["d/y"]):
        with pytest.raises(OSError, match="Stale"):
            vfs.getattr(forgotten)


@needs_root
def test_a_number_is_never_given_twice_across_a_takeover(worlds):
    world = worlds()
    nodes, _ = furnish(world)
    given = set(nodes.values())
    vfs = world.vfs
    for number in range(50):
        vfs.lookup(nodes["d"], b"y")
        vfs.forget(nodes["d/y"], 2)
        nodes["d/y"], _ = vfs.lookup(nodes["d"], b"y")
        assert nodes["d/y"] not in given
        given.add(nodes["d/y"])
        if number % 10 == 0:
            vfs = world.successor()


@needs_root
def test_a_file_without_a_name_is_taken_over_by_its_descriptor(worlds):
    world = worlds()
    nodes, files = furnish(world)
    kept = {}
    world.vfs.nodes.keep = lambda ino, fd: kept.__setitem__(ino, os.dup(fd))
    world.vfs.unlink(nodes["d"], b"x")
    assert list(kept) == [world.vfs.getattr(nodes["d/x"]).st_ino]
    vfs = world.begin()
    vfs.take_over([], kept)
    assert vfs.read(files["d/x"], 0, 3) == b"d/x"
    assert vfs.getattr(nodes["d/x"]).st_nlink == 0
    vfs.release(files["d/x"])
    assert vfs.getattr(nodes["d/x"]).st_nlink == 0
    for fd in kept.values():
        os.close(fd)


@needs_root
def test_a_file_that_never_had_a_name_is_gone_with_its_release_by_the_successor(worlds):
    world = worlds()
    _, attr, fh, _ = world.vfs.tmpfile(ROOT, os.O_RDWR, 0o600, ME)
    assert told_of(world) == {attr.st_ino}
    world.successor().release(fh)
    assert told_of(world) == set(), "the index would have it for ever, as one that is still to be copied"


@needs_root
def test_a_removed_file_keeps_its_last_attributes(worlds):
    world = worlds()
    nodes, _ = furnish(world)
    before = world.vfs.getattr(nodes["d/y"])
    world.vfs.unlink(nodes["d"], b"y")
    now = world.successor().getattr(nodes["d/y"])
    assert (now.st_mode, now.st_size, now.st_mtime_ns) == (before.st_mode, before.st_size, before.st_mtime_ns)
    assert now.st_nlink == 0


@needs_root
def test_a_listing_goes_on_where_it_stopped(worlds):
    world = worlds()
    furnish(world)
    for number in range(500):
        (world.path / "e" / f"file-{number:05}").touch()
    node, _ = world.vfs.lookup(ROOT, b"e")
    fh = world.vfs.opendir(node)
    names, at = [], 0
    for following, name, _, _ in world.vfs.readdir(fh, 0):
        names.append(name)
        at = following
        if len(names) == 200:
            break
    vfs = world.successor()
    rest = list(vfs.readdir(fh, at))
    names += [name for _, name, _, _ in rest]
    assert len(names) == len(set(names)) == 502
    vfs = world.successor()
    assert list(vfs.readdir(fh, rest[-1][0])) == []
    assert len(list(vfs.readdir(fh, 0))) == 502, "although its end was all that was asked for before"
    vfs.releasedir(fh)


@needs_root
def test_a_listing_of_what_nobody_has_opened_goes_on_where_it_stopped(worlds):
    world = worlds()
    nodes, _ = furnish(world)
    for number in range(500):
        (world.path / "e" / f"file-{number:05}").touch()
    first = list(islice(world.vfs.entries(nodes["e"], 0), 200))
    rest = list(world.successor().entries(nodes["e"], first[-1][0]))
    names = [name for _, name, _, _ in (*first, *rest)]
    assert len(names) == len(set(names)) == 502
    vfs = world.successor()
    assert list(vfs.entries(nodes["e"], rest[-1][0])) == []
    assert len(list(vfs.entries(nodes["e"], 0))) == 502, "although its end was all that was asked for before"


@needs_root
def test_a_removed_directory_that_is_being_listed_has_no_more_entries(worlds):
    world = worlds()
    furnish(world)
    node, _ = world.vfs.lookup(ROOT, b"e")
    fh = world.vfs.opendir(node)
    world.vfs.rmdir(ROOT, b"e")
    vfs = world.successor()
    assert list(vfs.readdir(fh, 0)) == []
    vfs.releasedir(fh)


@needs_root
def test_what_an_unanswered_open_opened_is_closed(worlds):
    world = worlds()
    nodes, _ = furnish(world)
    world.vfs.ledger.request = REQUEST
    world.vfs.open(nodes["g"], os.O_RDWR, ME)
    world.vfs.opendir(nodes["d"])
    vfs = world.successor()
    assert (vfs.holds()["files"], vfs.holds()["directories"]) == (3, 1)
    vfs.again(REQUEST)
    assert (vfs.holds()["files"], vfs.holds()["directories"]) == (2, 0)


@needs_root
def test_writers_are_still_writers(worlds):
    """No seal is given, and the next close says so: custody goes on."""
    world = worlds()
    nodes, _ = furnish(world)
    generation = world.vfs.ledger.generation
    vfs = world.successor()
    assert vfs.files.writers == 2
    fd = os.open(world.path / "f", os.O_RDONLY)
    assert vfs.gate.guarding.seal(os.fstat(fd).st_ino, fd) == 0
    os.close(fd)
    vfs.open(nodes["g"], os.O_RDWR, ME)
    assert vfs.ledger.generation > generation


@needs_root
def test_registrations_that_nobody_uses_end(worlds):
    world = worlds()
    furnish(world)
    closed = []

    class Backing:
        def open(self, fd):
            return 7

        def close(self, backing_id):
            closed.append(backing_id)

    world.vfs.gate.states.backing = Backing()
    node, _ = world.vfs.lookup(ROOT, b"g")
    fh, handle = world.vfs.open(node, os.O_RDONLY, ME)
    assert handle.backing_id == 7
    vfs = world.begin()
    vfs.gate.states.backing = Backing()
    vfs.take_over([], {})
    assert not closed and vfs.gate.states.registered(os.stat(world.path / "g").st_ino)
    vfs.release(fh)  # stays registered for a while
    again = world.begin()
    again.gate.states.backing = Backing()
    again.take_over([], {})
    assert closed == [7]


@needs_root
def test_set_id_bits_of_what_was_being_read_go_with_a_write(worlds):
    """A successor too sees who has written past it, of those who opened it later."""

    class Backing:
        def open(self, fd):
            return 7

        def close(self, backing_id):
            pass

    world = worlds()
    (world.path / "g").write_bytes(b"x")
    world.vfs.gate.states.backing = Backing()
    node, _ = world.vfs.lookup(ROOT, b"g")
    reading, _ = world.vfs.open(node, os.O_RDONLY, ME)
    world.vfs.setattr(node, mode=0o6777)
    vfs = world.begin()
    vfs.gate.states.backing = Backing()
    vfs.take_over([], {})
    fh, _ = vfs.open(node, os.O_WRONLY, Caller(7, 7))
    os.utime(world.path / "g", ns=(0, os.stat(world.path / "g").st_ctime_ns + 1))
    vfs.release(fh)
    assert os.stat(world.path / "g").st_mode & 0o6000 == 0
    vfs.release(reading)
