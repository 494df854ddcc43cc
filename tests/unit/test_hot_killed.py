"""A server of the compiled form is killed between any two changes of state; its successor answers once."""

import os
from itertools import count

import pytest
from hotside import build
from test_gate import FakeBacking
from test_takeover import (
    OPERATIONS,
    REQUEST,
    answered_again,
    comparable,
    furnish,
    needs_root,
    seen,
    worlds,  # noqa: F401
)

from tierfs.fuse import compiled, hot
from tierfs.fuse import protocol as p
from tierfs.vfs import ROOT, Caller

CREATE = p.CREATE_IN.pack(os.O_RDWR, 0o640, 0o22, 0)
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
    "removexattr": lambda nodes: (p.Op.REMOVEXATTR, nodes["g"], b"user.old\0", 0),
}  # fmt: skip
LEAST = {"attributes": 5, "truncate what is open": 3, "set xattr": 3}  # points, where these are few


def setattr_in(valid):
    at = 4 * 10**9
    return p.SETATTR_IN.pack(valid, 0, 0, 77, 0, at, -1, 0, 0, 10**9 - 5, 0, 0o640, 0, 7, 8, 0)


def prepare(world, nodes, files):
    """What the compiled form would have met."""
    world.vfs.gate.backing = FakeBacking()
    world.vfs.gate.appearance.plain.update(os.stat(world.path / name).st_ino for name in "fg")
    world.vfs.release(files["f"])
    files["f"] = world.vfs.open(nodes["f"], os.O_RDWR, Caller(0, 0))[0]  # in passthrough


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """The compiled part, built to end at its points."""
    return build(tmp_path_factory.mktemp("points"), "-DTIERFS_POINTS")


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
            told = lambda *what: refused.append(what)  # noqa: E731
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
    operation = OPERATIONS[what]
    if what == "mkdir":
        monkeypatch.setitem(OPERATIONS, what, lambda vfs, nodes, files: plain_mkdir(vfs, nodes))
        operation = OPERATIONS[what]
    reference = worlds()
    nodes, files = furnish(reference)
    prepare(reference, nodes, files)
    expected = comparable(reference.vfs, operation(reference.vfs, nodes, files))
    looks = seen(reference.path)
    for point in count():
        world = worlds()
        nodes, files = furnish(world)
        prepare(world, nodes, files)
        ended = run_until(point, world, BODIES[what](nodes), monkeypatch, ending)
        vfs, answer = answered_again(world, what, nodes, files)
        assert comparable(vfs, answer) == expected, f"killed at point {point}"
        assert seen(world.path) == looks, f"killed at point {point}"
        assert vfs.read(files["d/x"], 0, 3) == b"d/x"
        world.close()
        worlds.made.remove(world)
        if ended:
            break
    assert point >= LEAST.get(what, 6)


def plain_mkdir(vfs, nodes):
    return vfs.mkdir(nodes["d"], b"made", 0o755, Caller(1000, 1000))
