"""The compiled form finds no memory at any one place: the request fails, and nothing is left open by it."""

import errno
import os
from collections import Counter

import pytest
from hotside import Side

from tierfs.fuse import protocol as p
from tierfs.vfs import ROOT

memory = pytest.importorskip("_testcapi")
PLACES = 40  # where memory is asked for, and more
CREATE = p.CREATE_IN.pack(os.O_RDWR | os.O_CREAT, 0o640, 0o22, 0)


@pytest.fixture
def side(tmp_path, monkeypatch, built):
    (tmp_path / "tree").mkdir()
    for each in range(PLACES):
        (tmp_path / "tree" / f"f{each}").write_bytes(b"content")
    one = Side(tmp_path / "side", "compiled", monkeypatch, built)
    yield one
    one.close()


def asked(side, place, opcode, nodeid, body):
    """The errno, where the memory that is asked for at this place, counted from 0, is not to be had; None: the
    session itself has found none, and would end."""
    unique = side.send(opcode, nodeid, body)
    memory.set_nomemory(place, place + 1)
    try:
        served = side.session.serve(1)
    except MemoryError:
        served = 0
    finally:
        memory.remove_mem_hooks()
    if not served:
        side.session.serve(1)  # it has not been read, as a rule
    answers = {p.OUT.unpack_from(data)[2]: -p.OUT.unpack_from(data)[1] for data in said(side)}
    return answers.get(unique) if served else None


def said(side):
    side.sock.setblocking(False)
    try:
        while True:
            yield side.sock.recv(1 << 16)
    except BlockingIOError:
        side.sock.settimeout(10)


def kept_files(form):
    """The numbers of open files that a successor would take over."""
    _, at, size, _ = form.parts[1]
    numbers = (int.from_bytes(form.memory[at + slot * size :][:8], "little") for slot in range(2 * PLACES))
    return sorted(filter(None, numbers))


def check(side):
    """Whatever is open is known to all who count it, and nothing else is."""
    files, states = side.vfs.files.handles, side.gate.states.inodes
    assert kept_files(side.vfs.ledger.form()) == sorted(files)
    handles = Counter(handle.inode.ino for _, handle in files.values())
    assert {ino: state.opens for ino, state in states.items() if state.opens} == handles
    writers = Counter(handle.inode.ino for _, handle in files.values() if handle.writable)
    assert {ino: state.writers for ino, state in states.items() if state.writers} == writers
    assert all(state.opens or ino in side.gate.states.idle.inodes for ino, state in states.items())
    assert sorted(state.backing_id for state in states.values()) == sorted(side.backing.live)


@pytest.mark.parametrize("what", ["create", "open", "open what is idle"])
def test_what_was_not_opened_for_want_of_memory_is_not_open(side, what):
    descriptors, failed = len(os.listdir("/proc/self/fd")), 0
    for place in range(PLACES):
        node = side.lookup(ROOT, b"f%d" % place)[0]
        if what == "create":
            number = asked(side, place, p.Op.CREATE, ROOT, CREATE + b"new%d\0" % place)
        else:
            if what == "open what is idle":
                _, body = side.ask(p.Op.OPEN, node, p.OPEN_IN.pack(os.O_RDONLY, 0))
                side.ask(p.Op.RELEASE, node, p.RELEASE_IN.pack(p.OPEN_OUT.unpack(body)[0], 0, 0, 0))
            number = asked(side, place, p.Op.OPEN, node, p.OPEN_IN.pack(os.O_RDWR, 0))
        assert number in (None, 0, errno.ENOMEM)
        failed += number == errno.ENOMEM
        check(side)
    assert failed  # from Python 3.14 on in few places: it keeps numbers to be used again
    assert len(os.listdir("/proc/self/fd")) == descriptors + len(side.gate.states.inodes)
