"""A restart under open files: what a supervisor leaves to another version of itself by execve(2).

Whoever asks puts down in the state directory which interpreter is to take over, and sends SIGUSR2. That
interpreter is first asked whether it can read all that it would get, while the old version still serves. Then
the mover ends in order, the mount server is killed (its successor treats it like any other that was killed),
and the supervisor becomes the new version: the same process, so that a service manager sees no change, with the
descriptor of the mount, the ledger, the lock and the control socket.
"""

from __future__ import annotations

import importlib
import os
import subprocess
from dataclasses import dataclass

import msgspec

from tierfs import config, volume
from tierfs.errors import TierError, VolumeError
from tierfs.index import Index
from tierfs.ledger import Incompatible, Ledger

FORMAT = 1
_CHECK_SECONDS = 30.0


class Handover(msgspec.Struct, frozen=True, kw_only=True):
    """All that the next version gets. `kept`: descriptors of files without a name, by inode number."""

    format: int = FORMAT
    state: bytes
    mountpoint: bytes
    binding: tuple[str, str]
    options: list[str]
    foreground: bool
    epoch: int
    lock_fd: int
    listener_fd: int
    fuse_fd: int
    ledger_fd: int
    kept: dict[int, int]
    server_deaths: int
    mover_deaths: int
    restarts: int
    token: str

    def descriptors(self) -> list[int]:
        """All that must outlive the execve."""
        return [self.lock_fd, self.listener_fd, self.fuse_fd, self.ledger_fd, *self.kept.values()]

    def inheritable(self, yes: bool) -> None:
        """Let the descriptors outlive an execve, or no more. Raises OSError."""
        for fd in self.descriptors():
            os.set_inheritable(fd, yes)

    def pack(self) -> int:
        """A descriptor to read it from, inheritable. Raises OSError."""
        fd = os.memfd_create("tierfs-handover", 0)
        os.pwrite(fd, msgspec.msgpack.encode(self), 0)
        return fd


def read(fd: int) -> Handover:
    """What the version before has left. Raises VolumeError, OSError."""
    data = os.pread(fd, os.fstat(fd).st_size, 0)
    try:
        left = msgspec.msgpack.decode(data, type=Handover)
    except msgspec.MsgspecError as exc:
        raise VolumeError(f"the running version hands over in another form: {exc}") from exc
    if left.format != FORMAT:
        raise VolumeError(f"the running version hands over in form {left.format}, this one reads {FORMAT}")
    return left


def check(left: Handover) -> None:
    """Whether this version could go on with it; changes nothing. Raises TierError, OSError, ImportError."""
    for module in ("tierfsd.mount_server", "tierfsd.mover"):
        importlib.import_module(module)
    opened = volume.load(os.fsdecode(left.state))
    config.load(opened.path(config.FILE_NAME))
    Index.open(opened.path("index"), readonly=True).close()
    try:
        Ledger(left.ledger_fd).close()
    except Incompatible as exc:
        raise VolumeError(str(exc)) from exc


def command(python: str, left: Handover, fd: int, *more: str) -> list[str]:
    """The command by which that interpreter goes on."""
    names = ["--state", os.fsdecode(left.state), "--mountpoint", os.fsdecode(left.mountpoint)]
    return [python, "-P", "-m", "tierfsd.main", *names, "--resume", str(fd), *more]


def refuse_if_unable(python: str, left: Handover) -> None:
    """Ask the other version whether it can go on. Raises VolumeError with its reason, OSError."""
    fd = left.pack()
    try:
        done = subprocess.run(
            command(python, left, fd, "--check-only"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            pass_fds=[fd, *left.descriptors()],
            cwd="/",
            timeout=_CHECK_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise VolumeError(f"{python}: does not answer: the running version stays") from exc
    finally:
        os.close(fd)
    if done.returncode:
        said = done.stderr.decode(errors="backslashreplace").strip().splitlines()[-1:] or ["it says nothing"]
        raise VolumeError(f"{python} cannot go on with open files: {said[0].removeprefix('tierfs: ')}")


def become(python: str, left: Handover) -> None:
    """Replace this process by the other version. Returns only by an exception. Raises OSError."""
    left.inheritable(True)
    fd = left.pack()
    try:
        os.execv(python, command(python, left, fd))
    finally:
        os.close(fd)
        left.inheritable(False)


@dataclass
class Restarts:
    """How often, and what became of the last one that was asked for."""

    count: int = 0
    token: str = ""
    error: str = ""

    def published(self) -> dict[str, object]:
        """For `run.json`: whoever has asked waits for its token there."""
        return {"restarts": self.count, "restart": {"token": self.token, "error": self.error}}

    def failed(self, token: str, error: Exception) -> None:
        """It was not to be had."""
        self.token, self.error = token, one_line(error)


def one_line(error: Exception) -> str:
    """An error as one line for a person."""
    if isinstance(error, OSError) and not isinstance(error, TierError):
        named = f"{error.filename}: " if error.filename else ""
        return f"{named}{error.strerror or error}"
    return str(error).replace("\n", " ")
