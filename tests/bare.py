"""A mount server without supervisor and mover: the tests speak to it over its channel and its link themselves.

The server is a process of its own. Beside it a second one aborts the connection when the time is up or the test
process dies, so that nothing can hang on a mount.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tierfs import channel, ledger, wire
from tierfs.fuse import mounting
from tierfs.index import Index
from tierfs.model import Stub, new_fid, new_tag

VOLUME = "0" * 32
SECONDS = 60
_GUARD = """
import select, subprocess, sys
where, abort = sys.argv[1:]
if not select.select([0], [], [], float(%r))[0] or not sys.stdin.readline():
    # Its number is another mount's as soon as it is gone.
    if any(line.split()[4] == where for line in open("/proc/self/mountinfo")):
        try:
            with open(abort, "w") as file:
                file.write("1")
        except OSError:
            pass
    subprocess.run(["umount", "-l", where], capture_output=True)
"""


class FakeMover:
    """The mover's end of a link. Fetches are kept until the test answers them."""

    def __init__(self, sock: socket.socket) -> None:
        self._link = wire.Link(sock, server=False)
        self._lock = threading.Condition()
        self._fetches: list[wire.Fetch] = []
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        with contextlib.suppress(OSError):
            while (received := self._link.receive()) is not None:
                message, fds = received
                for fd in fds:
                    os.close(fd)
                if isinstance(message, wire.Fetch):
                    with self._lock:
                        self._fetches.append(message)
                        self._lock.notify_all()

    def fetch(self) -> wire.Fetch:
        """The next request for content."""
        with self._lock:
            assert self._lock.wait_for(lambda: bool(self._fetches), 10), "no fetch was asked for"
            return self._fetches.pop(0)

    def deliver(self, fetch: wire.Fetch, path: Path, content: bytes) -> None:
        """Fill a whole stub by its backing file, and settle it."""
        with path.open("r+b") as file:
            file.write(content)
        os.removexattr(path, "trusted.tierfs")
        self.send(wire.Filled(fetch.ino, 0, len(content)))
        self.send(wire.FetchEnd(fetch.id, fetch.ino, 0))
        self.send(wire.Settled(fetch.ino))

    def send(self, message: wire.Message) -> None:
        self._link.send(message)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._link.sock.shutdown(socket.SHUT_RDWR)


class Bare:
    """One mounted state directory."""

    def __init__(self, base: Path, connections: Path) -> None:
        self.base, self.state, self.mountpoint = base, base / "state", base / "mnt"
        self.tree = self.state / "tree"
        for directory in (self.tree, self.state / "index", self.state / "marks", self.mountpoint):
            directory.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(Index.open(str(self.state / "index"))) as index:
            epoch = index.begin_session("a boot").epoch
        where = str(self.mountpoint)
        ours, theirs = channel.make_pair()
        table = ledger.make()
        with theirs:
            arguments = {"state": self.state, "volume": VOLUME, "channel-fd": theirs.fileno(), "epoch": epoch}
            arguments |= {"ledger-fd": table, "takeover": 0}
            command = [sys.executable, "-m", "tierfsd.mount_server"]
            for key, value in arguments.items():
                command += [f"--{key}", str(value)]
            self.log_path = base / "server.log"
            with self.log_path.open("ab") as log:
                passed = [theirs.fileno(), table]
                self.server = subprocess.Popen(command, pass_fds=passed, stderr=log, cwd="/")
        os.close(table)
        ours.settimeout(SECONDS / 2)
        self._channel = channel.Channel(ours, server=False)
        self._said(channel.Prepared)
        fd = mounting.mount(where, VOLUME)
        device = mounting.device_of(where)
        assert device is not None
        self.abort_path = connections / device.split(":")[1] / "abort"
        self._guard = subprocess.Popen(
            [sys.executable, "-c", _GUARD % SECONDS, where, str(self.abort_path)], stdin=subprocess.PIPE
        )
        self._channel.send(channel.Mounted(), [fd])
        os.close(fd)
        self.ready = self._said(channel.Ready)

    def _said(self, kind: type) -> wire.Message:
        while True:
            received = self._channel.receive()
            assert received is not None, self.log_path.read_text()
            for fd in received[1]:  # what a supervisor would keep for the next server
                os.close(fd)
            if not isinstance(received[0], channel.Keep | channel.LetGo):
                break
        assert isinstance(received[0], kind), received[0]
        return received[0]

    def mover(self) -> FakeMover:
        """Connect a mover."""
        server, mover = wire.make_pair()
        with server:
            self._channel.send(channel.NewMover(), [server.fileno()])
        return FakeMover(mover)

    def stub(self, name: str, size: int) -> Path:
        """A stub of this size, made beneath the mount; the path through the mount."""
        path = self.tree / name
        path.touch()
        os.truncate(path, size)
        stub = Stub(new_fid(), 1, new_tag(), bytes(32))
        os.setxattr(path, "trusted.tierfs", stub.pack())
        return self.mountpoint / name

    def stopped(self) -> bool:
        """Wait for the server's end; whether it was clean."""
        message = self._said(channel.Stopped)
        assert self.server.wait(SECONDS / 2) == 0
        return bool(getattr(message, "clean", False))

    def umount(self) -> bool:
        """Unmount in order; whether custody is unbroken."""
        mounting.unmount(str(self.mountpoint))
        return self.stopped()

    def close(self) -> None:
        """End whatever is left."""
        with contextlib.suppress(OSError):
            mounting.unmount(str(self.mountpoint), lazy=True)
        try:
            self.server.wait(5)
        except subprocess.TimeoutExpired:
            self.server.kill()  # the last that has the device open: its end aborts the connection
            self.server.wait()
        self._channel.close()
        with contextlib.suppress(OSError):
            self._guard.communicate(b"done\n", timeout=10)


def until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@contextlib.contextmanager
def bare(base: Path, connections: Path) -> Iterator[Bare]:
    made = Bare(base, connections)
    try:
        yield made
    finally:
        made.close()
