"""The mount server's process for the portable binding: libfuse's threads serve, one of ours hears the others.

Started by the supervisor like `mount_server`, but it mounts by itself, since libfuse wants to.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from typing import Any

from tierfs import channel, wire
from tierfs.errors import TierError, UsageError
from tierfs.fuse import mounting, portable
from tierfs.gate import Gate
from tierfs.index import Index
from tierfs.locate import SOURCE_PREFIX
from tierfs.marks import MarkWriter
from tierfs.tree import open_tree
from tierfs.vfs import Vfs
from tierfsd import logs
from tierfsd.mount_server import Evictable, HeatReader

log = logging.getLogger("server")

_TICK_SECONDS = 0.25
_KNOWN_TO_LIBFUSE = ("ro", "noexec", "sync", "dirsync", "noatime")


class Ears:
    """Hears supervisor and mover in a thread, and gives the gate its turns; always under the binding's lock."""

    def __init__(self, gate: Gate, lock: threading.RLock, supervisor: channel.Channel, mountpoint: str) -> None:
        self._gate = gate
        gate.mover.on_stuck = lambda pid, reason: self.tell(channel.Stuck(pid, reason))
        self._lock = lock
        self._supervisor = supervisor
        self._mountpoint = mountpoint
        self.told_to_end = False
        self._stop_fd = _stop_signal()
        self._poll = select.epoll()
        self._poll.register(supervisor.fileno(), select.EPOLLIN)
        self._poll.register(self._stop_fd, select.EPOLLIN)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="ears", daemon=True)

    def ready(self) -> None:
        """libfuse has mounted: tell the supervisor, and begin to listen."""
        self.tell(channel.Ready(passthrough=False, lasting=False))
        self._thread.start()

    def close(self) -> None:
        """Stop listening, after a last turn of the gate."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            self._gate.tick(time.monotonic())
            self._gate.mover.connect(None)

    def tell(self, message: wire.Message) -> None:
        """Send the supervisor a message, if it is still there."""
        try:
            self._supervisor.send(message)
        except OSError as error:
            log.warning("the supervisor does not listen: %s", error)

    def _listen(self) -> None:
        try:
            self._hear_all()
        except Exception:
            # libfuse would go on to take requests that wait for ever: another server is made at once.
            log.critical("a turn of the gate failed: the server ends", exc_info=True)
            os._exit(1)

    def _hear_all(self) -> None:
        while not self._done.is_set():
            for fd, _ in self._poll.poll(_TICK_SECONDS):
                if fd == self._supervisor.fileno():
                    self._hear_supervisor()
                elif fd == self._stop_fd:
                    self._stop()
                else:
                    with self._lock:
                        self._gate.mover.on_readable()
            with self._lock:
                self._gate.tick(time.monotonic())

    def _hear_supervisor(self) -> None:
        try:
            received = self._supervisor.receive()
        except OSError as error:
            log.error("lost the supervisor: %s", error)
            received = None
        if received is None:
            log.error("the supervisor is gone: serving on until the unmount; a dead mover is not replaced")
            self._poll.unregister(self._supervisor.fileno())
            return
        message, fds = received
        if isinstance(message, channel.NewMover) and len(fds) == 1:
            with self._lock:
                self._gate.mover.connect(wire.Link(socket.socket(fileno=fds[0]), server=True))
            self._poll.register(fds[0], select.EPOLLIN)
        elif isinstance(message, channel.Stop):
            self._stop()

    def _stop(self) -> None:
        """libfuse's loop ends when its mount does."""
        self.told_to_end = True
        self._poll.unregister(self._stop_fd)
        try:
            mounting.unmount(self._mountpoint, lazy=True)
        except OSError as error:
            log.info("not unmounted: %s", error)


def _stop_signal() -> int:
    """A descriptor that becomes readable on SIGTERM: the main thread is in libfuse and runs no handler."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    return reading


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tierfsd.portable_server")
    for name in ("--state", "--mountpoint", "--volume"):
        parser.add_argument(name, required=True)
    parser.add_argument("--options", default="")
    for name in ("--channel-fd", "--epoch"):
        parser.add_argument(name, type=int, required=True)
    return parser.parse_args(argv)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """libfuse's options. Raises UsageError for what it cannot.

    It refuses all that it does not know by name. Of ours that is what only a mount table regards (`nofail`) and
    what says when atime moves, which the mount of the backing tree decides in any case.
    """
    asked = mounting.parse_options(name for name in arguments.options.split(",") if name)
    if asked.has("nosymfollow"):
        raise UsageError("-o nosymfollow: libfuse 2 cannot: use --binding kernel")
    options: dict[str, Any] = {"fsname": f"{SOURCE_PREFIX}{arguments.volume}", "subtype": "tierfs"}
    options["default_permissions"] = True
    if os.geteuid() == 0 or asked.allow_other:
        options["allow_other"] = True
    for name in ("suid", "dev"):
        options[f"no{name}" if asked.has(f"no{name}") else name] = True
    for name in _KNOWN_TO_LIBFUSE:
        if asked.has(name):
            options[name] = True
    return options


def _serve(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    tree = open_tree(os.path.join(arguments.state, "tree"))
    stack.callback(tree.close)
    index = Index.open(os.path.join(arguments.state, "index"), readonly=True)
    stack.callback(index.close)
    marks_fd = os.open(os.path.join(arguments.state, "marks"), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, marks_fd)
    marks = MarkWriter(marks_fd, index.log_position() or 0)
    stack.callback(marks.close)
    gate = Gate(tree, index, marks, arguments.epoch)
    vfs = Vfs(tree, gate, Evictable(index), HeatReader(os.path.join(arguments.state, "heat")))
    stack.callback(vfs.close)
    lock = threading.RLock()
    mounting.check_device()
    supervisor = channel.Channel(socket.socket(fileno=arguments.channel_fd), server=True)
    ears = Ears(gate, lock, supervisor, arguments.mountpoint)
    try:
        portable.serve(vfs, lock, arguments.mountpoint, _options(arguments), ears.ready)
    finally:
        ears.close()
    ears.tell(channel.Stopped(clean=not ears.told_to_end))


def main(argv: list[str]) -> int:
    """Serve one mount; 0 when it has ended."""
    arguments = _arguments(argv)
    logs.setup()
    try:
        with contextlib.ExitStack() as stack:
            _serve(arguments, stack)
    except (TierError, OSError, RuntimeError) as error:
        log.critical("%s: libfuse cannot serve it: %s", arguments.mountpoint, error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
