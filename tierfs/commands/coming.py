"""A volume that is just being mounted, perhaps anew: its daemon is there, and no mount table has it."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from itertools import pairwise

from tierfs import control, locate

ANEW_SECONDS = 60.0  # until a volume that is being mounted anew is there again, or has ended
_LOOK_SECONDS = 0.02
_CONNECT_SECONDS = 1.0


def await_mount(mountpoint: str) -> None:
    """Return when a volume is mounted there, or nobody is about to do that: at once where no daemon is for that
    place, else when it has ended, and after a minute at the latest."""
    daemon = None if _is_mounted(mountpoint) else _daemon_for(mountpoint)
    if daemon is None:
        return
    deadline = time.monotonic() + ANEW_SECONDS
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
    for uid in _may_be_whose(mountpoint):
        for path in _sockets_of(uid):
            with contextlib.suppress(OSError):  # what is left of one that was killed
                pid = _listener(path, uid)
                daemon = os.pidfd_open(pid)
                if _is_for(pid, mountpoint):
                    return daemon
                os.close(daemon)
    return None


def _may_be_whose(mountpoint: str) -> set[int]:
    """Root and this user; root, who may end others' too, looks for that of the directory's owner: nobody else
    shall have root wait."""
    users = {0, os.geteuid()}
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            users.add(os.lstat(mountpoint).st_uid)
    return users


def _sockets_of(uid: int) -> list[str]:
    found: list[str] = []
    for directory in control.runtime_directories(uid):
        with contextlib.suppress(OSError):  # this user has none
            found += (os.path.join(directory, name) for name in os.listdir(directory) if name.endswith(".sock"))
    return sorted(found)


def _listener(path: str, uid: int) -> int:
    """Its process. Raises OSError, also where that is somebody else's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(_CONNECT_SECONDS)
        sock.connect(path)
        pid, owner, _ = control.peer_credentials(sock)
    if owner != uid:
        raise PermissionError(errno.EPERM, "belongs to another user", path)
    return pid


def _is_for(pid: int, mountpoint: str) -> bool:
    """By its command line, as `daemon_arguments` and a restart make it."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
    except OSError:
        return False  # it has ended
    return (b"--mountpoint", os.fsencode(mountpoint)) in pairwise(words)
