"""Messages that only a newer version at the other end knows, as after an upgrade in place, do no harm."""

from __future__ import annotations

import os
import socket
import threading
from types import SimpleNamespace

import msgspec
import pytest
from tierfsd import mount_server
from tierfsd.serverchannel import ServerChannel

from tierfs import channel, wire
from tierfs.moverlink import MoverLink
from tierfs.serverlink import ServerLink

NEW = msgspec.msgpack.encode(["Newest", 7, "of a later version"])
UNREADABLE = (b"\xc1", b"\x07", *map(msgspec.msgpack.encode, ([7], [], ["Stuck", "no number", 3])))


@pytest.fixture
def opened():
    """Descriptors to send along, and how many are open at the end."""
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(2)]
    before = len(os.listdir("/proc/self/fd"))
    yield fds
    assert len(os.listdir("/proc/self/fd")) == before
    for fd in fds:
        os.close(fd)


def test_a_server_hears_a_newer_mover_on(opened, caplog):
    """It lost the mover at the first such message, and each that followed."""
    ours, theirs = wire.make_pair()
    ours.setblocking(False)
    heard = []
    server = MoverLink.__new__(MoverLink)
    server._outbox = SimpleNamespace(link=wire.Link(ours, server=True))
    server._vigil = SimpleNamespace(heard=lambda: None)
    server._inflow = SimpleNamespace(limit=heard.append)
    with theirs, ours:
        for _ in range(3):
            wire.send(theirs, NEW, opened)
        wire.Link(theirs, server=False).send(wire.Limits(60.0, 1))
        server.on_readable()
    assert heard == [60.0] and caplog.text.count("Newest message") == 1


def test_a_mover_hears_a_newer_server_on(opened):
    ours, theirs = wire.make_pair()
    poked, lost = threading.Event(), threading.Event()
    listener = SimpleNamespace(on_poke=lambda message: poked.set(), on_lost=lost.set)
    with ours:
        ServerLink(wire.Link(theirs, server=False)).start(listener)
        wire.send(ours, NEW, opened)
        wire.Link(ours, server=True).send(wire.Poke(1))
        assert poked.wait(20) and not lost.is_set()
    assert lost.wait(20)
    theirs.close()


@pytest.mark.parametrize("data", [NEW, *UNREADABLE])
def test_a_supervisor_hears_a_newer_server_on(opened, data):
    """It ended itself, and the mount with it."""
    called = []
    events = SimpleNamespace(watch=lambda *_: None, unwatch=lambda *_: None)
    ours = ServerChannel(events, SimpleNamespace(), lambda: called.append("suspect"), called.append)
    with ours.open() as sock:
        wire.send(sock, data, opened)
        channel.Channel(sock, server=True).send(channel.Stuck(7, "sleeps"))
        ours.hear_all()
        assert called == [channel.Stuck(7, "sleeps")] and ours.is_open
    ours.drop()


def test_a_server_that_begins_passes_over_what_it_does_not_know(opened):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        wire.send(ours, NEW, opened)
        channel.Channel(ours, server=False).send(channel.Mounted(), opened[:1])
        fd = mount_server._await_mount(channel.Channel(theirs, server=True), {})
    assert fd is not None
    os.close(fd)


@pytest.mark.parametrize("data", UNREADABLE)
def test_what_cannot_be_read_is_an_error_and_leaves_nothing_open(opened, data):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        wire.send(ours, data, opened)
        with pytest.raises(msgspec.DecodeError):
            channel.Channel(theirs, server=False).receive()
