"""A server of the compiled form is killed between any two changes of state; its successor answers once."""

import os
from itertools import count

import pytest
from hotside import build, load
from hottwins import listed_of
from test_gate import FakeBacking
from test_takeover import (
    ME,
    OPERATIONS,
    REQUEST,
    answered_again,
    comparable,
    furnish,
    needs_root,
    rename,
    seen,
    worlds,  # noqa: F401
)

from tierfs.fuse import compiled, hot
from tierfs.fuse import protocol as p
from tierfs.fuse.operations import Operations
from tierfs.vfs import ROOT, Caller

CREATE = p.CREATE_IN.pack(os.O_RDWR, 0o640, 0o22, 0)
LIST = p.READ_IN.pack(0, 0, 4096, 0, 0, 0, 0)
LONG = b"n" * 200  # the ledger keeps it elsewhere than beside its node
TWO = b"t" * 100


def rename_of(old, above, new):
    return lambda nodes: (p.Op.RENAME, ROOT, p.U64.pack(nodes[above]) + old + b"\0" + new + b"\0", 0)


BODIES = {
    "unlink": lambda nodes: (p.Op.UNLINK, ROOT, b"g\0", 0),
    "rmdir": lambda nodes: (p.Op.RMDIR, ROOT, b"e\0", 0),
    "rename": lambda nodes: (p.Op.RENAME, ROOT, p.U64.pack(nodes["d"]) + b"g\0new\0", 0),
    "mkdir": lambda nodes: (p.Op.MKDIR, nodes["d"], p.MKDIR_IN.pack(0o755, 0o22) + b"made\0", 1000),
    "create": lambda nodes: (p.Op.CREATE, nodes["d"], CREATE + b"c\0", 1000),
    "attributes": lambda nodes: (
        p.Op.SETATTR, nodes["g"], setattr_in(p.SET_MODE | p.SET_UID | p.SET_GID | p.SET_ATIME | p.SET_MTIME), 0,
    ),
    "truncate what is open": lambda nodes: (p.Op.SETATTR, nodes["f"], setattr_in(p.SET_SIZE), 0),
    "set xattr": lambda nodes: (p.Op.SETXATTR, nodes["g"], p.SETXATTR_IN.pack(1, 0, 0, 0) + b"user.new\0v", 0),
    "list": lambda nodes: (p.Op.READDIRPLUS, ROOT, LIST, 0),
    "removexattr": lambda nodes: (p.Op.REMOVEXATTR, nodes["g"], b"user.old\0", 0),
    "unlink one of two names": lambda nodes: (p.Op.UNLINK, ROOT, b"f2\0", 0),
    "unlink what is open": lambda nodes: (p.Op.UNLINK, nodes["d"], b"x\0", 0),
    "unlink the name of two that is known": lambda nodes: (p.Op.UNLINK, ROOT, b"h2\0", 0),
    "unlink the name of two that is not known": lambda nodes: (p.Op.UNLINK, ROOT, b"h\0", 0),
    "rename over": rename_of(b"g", "d", b"y"),
    "rename over what is open": rename_of(b"g", "d", b"x"),
    "rename over one of two names": rename_of(b"g", "", b"f2"),
    "rename over the name of two that is known": rename_of(b"g", "", b"h2"),
    "rename a directory over another": rename_of(b"e", "d", b"sub"),
    "rename what is open": lambda nodes: (p.Op.RENAME, nodes["d"], p.U64.pack(ROOT) + b"x\0moved\0", 0),
    "rename what is above": rename_of(b"d", "e", b"moved"),
    "rename to a long name": rename_of(b"g", "d", LONG),
    "rename from a long name": rename_of(LONG, "d", b"new"),
    "rename from a long name to another": rename_of(LONG, "", LONG[1:] + b"o"),
    "unlink a long name": lambda nodes: (p.Op.UNLINK, ROOT, LONG + b"\0", 0),
    "unlink the long name of two that is known": lambda nodes: (p.Op.UNLINK, ROOT, TWO + b"\0", 0),
    "look up another name than the long one": lambda nodes: (p.Op.LOOKUP, ROOT, b"two\0", 0),
    "create under a long name": lambda nodes: (p.Op.CREATE, nodes["d"], CREATE + LONG + b"\0", 1000),
    "truncating open": lambda nodes: (p.Op.OPEN, nodes["g"], p.OPEN_IN.pack(os.O_RDWR | os.O_TRUNC, 0), 0),
    "open for writing": lambda nodes: (p.Op.OPEN, nodes["g"], p.OPEN_IN.pack(os.O_WRONLY, 0), 0),
    "link": lambda nodes: (p.Op.LINK, nodes["d"], p.U64.pack(nodes["g"]) + b"linked\0", 0),
    "look up another name": lambda nodes: (p.Op.LOOKUP, ROOT, b"h\0", 0),
    "copy": lambda nodes: (
        p.Op.COPY_FILE_RANGE_64, nodes["d/x"],
        p.COPY_IN.pack(nodes["open d/x"], 0, nodes["f"], nodes["open f"], 3, 1 << 62, 0), 0,
    ),
    "symlink": lambda nodes: (p.Op.SYMLINK, nodes["d"], b"s\0target\0", 1000),
}  # fmt: skip
def listing(vfs):
    """The names, and whether each is reached by its node."""
    data = Operations(vfs).readdirplus(bytes(p.IN) + LIST, ROOT)
    found = [(name, ino, entry[0][0]) for _, name, ino, _, entry in listed_of(data, True)]
    return sorted((name, nodeid and vfs.getattr(nodeid).st_ino == ino) for name, ino, nodeid in found)


# Those of which the other form is not tested, or by another caller.
OTHERS = {
    "list": lambda vfs, nodes, files: listing(vfs),
    "mkdir": lambda vfs, nodes, files: vfs.mkdir(nodes["d"], b"made", 0o755, Caller(1000, 1000)),
    "symlink": lambda vfs, nodes, files: vfs.symlink(nodes["d"], b"s", b"target", Caller(1000, 1000)),
    "look up another name": lambda vfs, nodes, files: vfs.lookup(ROOT, b"h"),
    "open for writing": lambda vfs, nodes, files: vfs.open(nodes["g"], os.O_WRONLY, ME)[1].writable,
    "unlink the name of two that is known": lambda vfs, nodes, files: vfs.unlink(ROOT, b"h2"),
    "unlink the name of two that is not known": lambda vfs, nodes, files: vfs.unlink(ROOT, b"h"),
    "rename over the name of two that is known": rename("", "h2"),
    "rename to a long name": rename("d", LONG.decode()),
    "rename from a long name": rename("d", "new", old=LONG.decode()),
    "rename from a long name to another": rename("", LONG[1:].decode() + "o", old=LONG.decode()),
    "unlink a long name": lambda vfs, nodes, files: vfs.unlink(ROOT, LONG),
    "unlink the long name of two that is known": lambda vfs, nodes, files: vfs.unlink(ROOT, TWO),
    "look up another name than the long one": lambda vfs, nodes, files: vfs.lookup(ROOT, b"two"),
    "create under a long name": lambda vfs, nodes, files: vfs.create(
        nodes["d"], LONG, os.O_RDWR, 0o640, Caller(1000, 1000)
    )[:2],
}
# Points, where these are few.
LEAST = {"attributes": 5, "truncate what is open": 3, "set xattr": 3, "look up another name": 2, "copy": 1,
         "look up another name than the long one": 2}  # fmt: skip


def setattr_in(valid):
    at = 4 * 10**9
    return p.SETATTR_IN.pack(valid, 0, 0, 77, 0, at, -1, 0, 0, 10**9 - 5, 0, 0o640, 0, 7, 8, 0)


def prepare(world, nodes, files):
    """What the compiled form would have met."""
    world.vfs.gate.states.backing = FakeBacking()
    world.vfs.gate.appearance.plain.update(
        os.stat(world.path / name).st_ino for name in ("f", "g", "h", "two", os.fsdecode(LONG))
    )
    for name in ("f", "d/x"):
        world.vfs.release(files[name])
        files[name] = world.vfs.open(nodes[name], os.O_RDWR, Caller(0, 0))[0]  # in passthrough
        nodes["open " + name] = files[name]


def reached_by(vfs, nodes):
    """What the kernel sees of each node that it knows."""
    found = {}
    for name, node in nodes.items():
        if name.startswith("open "):
            continue
        st = vfs.getattr(node)
        found[name] = st.st_mode, st.st_nlink
    return found


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """The compiled part, built to end at its points."""
    return load(build(tmp_path_factory.mktemp("points") / "_hot.so", "-DTIERFS_POINTS"))


def furnish_more(world):
    """As `furnish`, and files of two names that are not open, and one of a long name."""
    for name in ("h", "two", os.fsdecode(LONG)):
        (world.path / name).write_bytes(b"content")
    os.link(world.path / "h", world.path / "h2")
    os.link(world.path / "two", world.path / os.fsdecode(TWO))
    nodes, files = furnish(world)
    for name in (b"h", b"h2", LONG, b"two", TWO):
        nodes[name.decode()], _ = world.vfs.lookup(ROOT, name)
    return nodes, files


def run_until(point, world, request, monkeypatch, module):
    """Serve the request in another process that ends at this point; whether it had been answered before."""
    opcode, nodeid, body, user = request
    head = p.HEAD.pack(p.IN + len(body), opcode, REQUEST, nodeid) + p.CALLER.pack(user, user, 0, 0) + bytes(2)
    reading, writing = os.pipe()
    os.write(writing, head + body)
    os.close(writing)
    child = os.fork()
    if not child:
        try:
            os.environ["TIERFS_POINT"] = str(point)
            monkeypatch.setattr(compiled, "find", lambda: (module, ""))
            refused = []
            told = lambda unique, _: unique and refused.append(unique)  # noqa: E731
            receiver = hot.receiver(reading, bytearray(p.BUFFER), world.vfs, told, print)
            receiver.receive(1, 0.0)
            # The pipe cannot be written to: that is how it shows that it would have answered.
            os._exit(1 if receiver.answered == len(refused) == 1 else 2)
        finally:
            os._exit(3)
    os.close(reading)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 1), "it was left to Python, or failed"
    return code == 1


@needs_root
@pytest.mark.parametrize("what", BODIES)
def test_a_server_killed_at_any_point_is_answered_for(worlds, what, ending, monkeypatch):  # noqa: F811
    operation = OTHERS.get(what) or OPERATIONS[what]
    monkeypatch.setitem(OPERATIONS, what, operation)
    reference = worlds()
    nodes, files = furnish_more(reference)
    prepare(reference, nodes, files)
    expected = comparable(reference.vfs, operation(reference.vfs, nodes, files))
    looks = seen(reference.path)
    reached = reached_by(reference.vfs, nodes)
    for point in count():
        world = worlds()
        nodes, files = furnish_more(world)
        prepare(world, nodes, files)
        ended = run_until(point, world, BODIES[what](nodes), monkeypatch, ending)
        vfs, answer = answered_again(world, what, nodes, files)
        assert comparable(vfs, answer) == expected, f"killed at point {point}"
        assert seen(world.path) == looks, f"killed at point {point}"
        assert reached_by(vfs, nodes) == reached, f"killed at point {point}"
        assert vfs.read(files["d/x"], 0, 3) == b"d/x"
        world.close()
        worlds.made.remove(world)
        if ended:
            break
    assert point >= LEAST.get(what, 6)
