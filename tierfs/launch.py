"""Starting the daemon of a volume from the command line."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Sequence

from tierfs.errors import UsageError, VolumeError

_READY_SECONDS = 120.0
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
