"""When the mount server hears of edits behind the mount, and when it tells of them."""

import os
import select
import socket
import time
from types import SimpleNamespace

import pytest
from tierfsd.mount_server import UNHEARD, Server

from tierfs.fuse import watching


class Watch:
    """One that counts."""

    hurried = busy = False
    heard = told = 0
    nodes = ()

    def __init__(self, fd):
        self.fileno = lambda: fd

    def hear(self):
        self.heard += 1
        return watching.LATER

    def tell(self):
        self.told += 1

    def outdated(self, nodeids):
        self.nodes += tuple(nodeids)


@pytest.fixture
def heard():
    """A server that is not running, and what it hears."""
    (reading, writing), (ours, theirs) = os.pipe(), socket.socketpair()
    watch = Watch(os.eventfd(0))
    server = Server(
        SimpleNamespace(
            fileno=lambda: reading, spinner=None, confirm=lambda most: [7], disbelieve=lambda most: [9]
        ),
        SimpleNamespace(nodes=SimpleNamespace()),
        SimpleNamespace(mover=SimpleNamespace(), lasting=SimpleNamespace(believed={})),
        SimpleNamespace(sock=ours, fileno=ours.fileno),
        os.dup(reading),
        watch,
    )
    yield server, watch
    server._poll.close()
    server._others.close()
    for each in (ours, theirs):
        each.close()
    for fd in (reading, writing, server._signal_fd, watch.fileno()):
        os.close(fd)


def test_edits_are_heard_when_many_requests_have_been_served(heard):
    server, watch = heard
    before = time.monotonic()
    for _ in range(4):
        server._hear_in_time(UNHEARD // 2)
    assert (watch.heard, watch.told) == (2, 2)
    assert server._next_look >= before + watching.LATER


def test_events_wake_nobody_while_they_are_heard_in_time(heard):
    """Most of them are of our own doing, and to look for whom to wake is an eighth of what each costs."""
    server, watch = heard
    os.eventfd_write(watch.fileno(), 1)
    assert not server._others.poll(0.0)
    for _ in range(2):
        server._look_for_edits(time.monotonic())
        assert server._others.poll(0.0) == [(watch.fileno(), select.EPOLLIN)]
        server._look_for_edits(time.monotonic())
        server._hear_others()
        assert not server._others.poll(0.0)
        server._hear_in_time(UNHEARD)
        assert not server._others.poll(0.0) and server._next_look < time.monotonic() + 2 * watching.LATER
    assert watch.heard == 4


def test_what_could_not_be_told_is_soon_tried_again_in_spite_of_many_requests(heard):
    server, watch = heard
    watch.busy = True
    server._hear_in_time(UNHEARD)
    assert server._next_look <= time.monotonic() + watching.SOON


def test_what_the_kernel_has_yet_to_take_in_is_told_again_soon(heard):
    server, watch = heard
    server._gate.lasting.believed[1] = 2
    now = time.monotonic()
    for later in (0.0, 0.5, 1.0):
        server._next_look = float("inf")
        server._confirming.turn(now + later, 0)
    assert watch.nodes == (7, 9)
    assert server._next_look == 0.0
