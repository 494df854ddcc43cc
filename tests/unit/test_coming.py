"""Waiting for a volume that is just being mounted, perhaps anew: whose daemon is looked for, and how long."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
import time

import pytest

from tierfs import control, locate
from tierfs.commands import coming

OTHER = 12345
LISTEN = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.bind(sys.argv[2])
os.setuid(int(sys.argv[1]))
sock.listen(4)  # from here on it is that user's
print("listens", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A mountpoint with nothing mounted there, and nobody's daemon anywhere."""
    monkeypatch.setattr(locate, "read_mounts", list)
    monkeypatch.setattr(control, "runtime_directories", lambda uid: [str(tmp_path / f"run-{uid}")])
    path = tmp_path / "mnt"
    path.mkdir()
    return str(path)


@pytest.fixture
def daemon(tmp_path):
    """Start what listens as this user does, for that place."""
    started = []

    def start(uid, mountpoint, whose=None):
        directory = tmp_path / f"run-{uid if whose is None else whose}"
        directory.mkdir(exist_ok=True)
        argv = [sys.executable, "-c", LISTEN, str(uid), str(directory / f"{len(started)}.sock")]
        argv += ["--mountpoint", mountpoint]
        started.append(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert started[-1].stdout.readline() == b"listens\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def waits(place):
    """Whether it is waited for the end of a daemon; then it has ended, or the test has had it end."""
    thread = threading.Thread(target=coming.await_mount, args=(place,), daemon=True)
    thread.start()
    thread.join(0.5)
    return thread if thread.is_alive() else None


def test_nobody_is_waited_for_where_there_is_no_daemon(place, daemon):
    daemon(os.geteuid(), place + "-other")
    assert not waits(place)


def test_it_is_waited_for_until_the_daemon_has_ended(place, daemon):
    process = daemon(os.geteuid(), place)
    waiting = waits(place)
    assert waiting
    process.kill()
    waiting.join(5)
    assert not waiting.is_alive()


def test_it_is_waited_for_until_it_is_mounted(place, daemon, monkeypatch):
    daemon(os.geteuid(), place)
    waiting = waits(place)
    assert waiting
    mount = locate.Mount(place, locate.FSTYPE, f"{locate.SOURCE_PREFIX}{'ab' * 16}", 0)
    monkeypatch.setattr(locate, "read_mounts", lambda: [mount])
    waiting.join(5)
    assert not waiting.is_alive()


def test_not_for_ever(place, daemon, monkeypatch):
    monkeypatch.setattr(coming, "ANEW_SECONDS", 0.2)
    daemon(os.geteuid(), place)
    before = time.monotonic()
    coming.await_mount(place)
    assert 0.2 <= time.monotonic() - before < 5


@pytest.mark.usefixtures("needs_root")
def test_root_waits_for_the_daemon_of_the_directorys_owner(place, daemon):
    os.chown(place, OTHER, -1)
    process = daemon(OTHER, place)
    waiting = waits(place)
    assert waiting
    process.kill()
    waiting.join(5)
    assert not waiting.is_alive()


@pytest.mark.usefixtures("needs_root")
def test_root_waits_for_nobody_who_only_says_so(place, daemon):
    daemon(OTHER, place)  # the directory is not theirs
    daemon(OTHER + 1, place, whose=0)  # nor is that socket root's
    assert not waits(place)


@pytest.mark.usefixtures("needs_root")
def test_a_user_waits_for_roots_daemon(place, daemon, monkeypatch):
    """To be told, then, that only root may end it."""
    monkeypatch.setattr(coming.os, "geteuid", lambda: OTHER)
    daemon(0, place)
    found = coming._daemon_for(place)
    assert found is not None
    assert not select.select([found], [], [], 0)[0]
    os.close(found)


def test_a_silent_socket_is_no_daemon(place, tmp_path):
    directory = tmp_path / f"run-{os.geteuid()}"
    directory.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(directory / "killed.sock"))
        assert not waits(place)
