"""A volume that is just being mounted, perhaps anew: its daemon is there, and no mount table has it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from itertools import pairwise

from tierfs import control, locate

_LOOK_SECONDS = 0.02
_CONNECT_SECONDS = 1.0


def await_mount(mountpoint: str, seconds: float) -> None:
    """Return when a volume is mounted there, or nobody is about to do that: at once where no daemon of this
    user is for that place, else when it has ended, and after so many seconds at the latest."""
    daemon = None if _is_mounted(mountpoint) else _daemon_for(mountpoint)
    if daemon is None:
        return
    deadline = time.monotonic() + seconds
    try:
        while not _is_mounted(mountpoint) and time.monotonic() < deadline:
            if select.select([daemon], [], [], _LOOK_SECONDS)[0]:
                return
    finally:
        os.close(daemon)


def _is_mounted(mountpoint: str) -> bool:
    """Also beneath something else."""
    return any(mount.volume and mount.mountpoint == mountpoint for mount in locate.read_mounts())


def _daemon_for(mountpoint: str) -> int | None:
    """A descriptor that becomes readable when that daemon has ended. Nothing is asked of it: its mover, which
    would answer, may be starting too."""
    directory = control.runtime_directory(os.geteuid())
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".sock"))
    except OSError:
        return None  # this user has none
    for name in names:
        with contextlib.suppress(OSError):  # what is left of one that was killed
            pid = _listener(os.path.join(directory, name))
            daemon = os.pidfd_open(pid)
            if _is_for(pid, mountpoint):
                return daemon
            os.close(daemon)
    return None


def _listener(path: str) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(_CONNECT_SECONDS)
        sock.connect(path)
        pid, _, _ = control.peer_credentials(sock)
    return pid


def _is_for(pid: int, mountpoint: str) -> bool:
    """By its command line, as `daemon_arguments` and a restart make it."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
    except OSError:
        return False  # it has ended
    return (b"--mountpoint", os.fsencode(mountpoint)) in pairwise(words)
