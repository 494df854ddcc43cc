"""Starting the daemon of a volume, and having it replaced by another version, from the command line."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import msgspec

from tierfs import volume
from tierfs.errors import UsageError, VolumeError

_READY_SECONDS = 120.0
_RESTART_SECONDS = 120.0
_ASKING = "restart.json"
READY = b"ready\n"


def command(arguments: Sequence[str]) -> list[str]:
    """The command that runs the daemon. -P: what lies in the working directory must not be imported."""
    return [sys.executable, "-P", "-m", "tierfsd.main", *arguments]


def launch(arguments: Sequence[str], mountpoint: str) -> None:
    """Start the daemon in the background; return when its mount answers. Raises VolumeError, UsageError."""
    reading, writing = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, reading)
        try:
            process = subprocess.Popen(
                command([*arguments, "--ready-fd", str(writing)]),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[writing],
                cwd="/",
                start_new_session=True,
            )
        finally:
            os.close(writing)
        try:
            answer = _read_answer(reading, mountpoint)
        except BaseException:
            process.terminate()
            raise
    if answer == READY:
        return
    reason = answer.decode(errors="backslashreplace").strip()
    if process.wait() == 2:
        raise UsageError(reason)
    raise VolumeError(reason or f"{mountpoint}: the daemon died at once: `--foreground` shows why")


def _read_answer(fd: int, mountpoint: str) -> bytes:
    """What the daemon says before it closes the pipe: READY, or why it failed."""
    answer = b""
    while not answer.endswith(b"\n"):
        if not select.select([fd], [], [], _READY_SECONDS)[0]:
            raise VolumeError(f"{mountpoint}: the daemon did not start within {_READY_SECONDS:.0f} s")
        part = os.read(fd, 65536)
        if not part:
            break
        answer += part
    return answer


class Asked(msgspec.Struct, frozen=True):
    """A restart that is asked for: with which interpreter, and a token for the answer."""

    token: str
    python: str


def restart(state: str, supervisor: int, mountpoint: str) -> None:
    """Have the daemon go on as the version of this interpreter; return when it serves.

    `supervisor`: a descriptor of its process. Raises VolumeError, OSError.
    """
    if "restart" not in volume.read_runtime(state):
        raise VolumeError(
            f"{mountpoint}: the running version cannot be restarted: unmount, then mount it again"
        )
    asked = Asked(secrets.token_hex(8), sys.executable)
    volume.write_json(os.path.join(state, _ASKING), msgspec.to_builtins(asked), sync=False)
    signal.pidfd_send_signal(supervisor, signal.SIGUSR2)
    deadline = time.monotonic() + _RESTART_SECONDS
    while time.monotonic() < deadline:
        answer = volume.read_runtime(state).get("restart", {})
        if answer.get("token") == asked.token:
            if answer.get("error"):
                raise VolumeError(f"{mountpoint}: not restarted, all goes on as before: {answer['error']}")
            return
        if select.select([supervisor], [], [], 0.05)[0]:
            raise VolumeError(f"{mountpoint}: its daemon has ended: see {state}/log/tierfs.log")
    raise VolumeError(
        f"{mountpoint}: not restarted within {_RESTART_SECONDS:.0f} s: see {state}/log/tierfs.log"
    )


def take_asked(state: str) -> Asked:
    """The restart that was asked for, once. Raises VolumeError."""
    path = os.path.join(state, _ASKING)
    try:
        with open(path, "rb") as file:
            asked = msgspec.json.decode(file.read(), type=Asked)
        os.unlink(path)
    except (OSError, msgspec.MsgspecError) as exc:
        raise VolumeError(f"{path}: says nothing that can be done: use `tierfs restart`") from exc
    return asked
