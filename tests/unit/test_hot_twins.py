"""The compiled form leaves the server in the very state that the pure one does, whatever it is asked."""

import errno
import itertools
import os

import pytest
from hotside import build
from hottwins import Both
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tierfs.fuse import protocol as p
from tierfs.model import Stub
from tierfs.vfs import ROOT

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # version 2: net_bind_service


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The compiled part."""
    return build(tmp_path_factory.mktemp("hot"))


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
        assert len(side.backing.live) == len(side.gate.idle) == 3
        assert not list(side.vfs.ledger.load_files())


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
            assert side.gate._guard(os.stat(side.path / "a").st_ino, 0)
        elif how == "unprivileged":
            side.gate.backing = None
        elif how == "anchored":
            os.link(side.path / "a", side.path / "f")
            side.vfs.unlink(ROOT, b"a")
    both.opened(node, os.O_RDONLY)
    assert asked == [p.Op.OPEN]
    for side in both.sides:
        for inode in list(side.gate._inodes.values()):
            side.gate._end_guard(inode)


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


# --- whatever comes ----------------------------------------------------------------------------------------

NAMES = [b"a", b"b", b"c", b"n" * 40]
NODES = st.integers(0, 9)
FLAGS = [os.O_RDONLY, os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_TRUNC]
STEPS = st.one_of(
    st.tuples(st.just("lookup"), NODES, st.sampled_from([*NAMES, b"d"])),
    st.tuples(st.just("open"), NODES, st.sampled_from(FLAGS)),
    st.tuples(st.just("release"), st.integers(0, 9)),
    st.tuples(st.just("forget"), NODES, st.integers(1, 3)),
    st.tuples(st.sampled_from(["getattr", "retire"]), NODES),
    st.tuples(st.sampled_from(["file", "dir", "remove", "chmod"]), st.sampled_from(NAMES)),
    st.tuples(st.sampled_from(["unlink", "rmdir", "link"]), st.sampled_from(NAMES)),
    st.tuples(st.just("rename"), st.sampled_from(NAMES), st.sampled_from(NAMES)),
)


def step_of(both, step):
    action, *more = step
    nodeid = both.nodes[more[0] % len(both.nodes)] if isinstance(more[0], int) else ROOT
    match action:
        case "lookup":
            both.lookup(nodeid, more[1])
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
        case "retire":
            for side in both.sides:
                for ino in itertools.islice(list(side.gate.idle.inodes), 1):
                    side.gate.idle.drop(ino)
        case "unlink" | "rmdir":
            both.ask(p.Op[action.upper()], ROOT, more[0] + b"\0")
        case "rename":
            both.ask(p.Op.RENAME2, ROOT, p.RENAME2_IN.pack(ROOT, 0, 0) + more[0] + b"\0" + more[1] + b"\0")
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
