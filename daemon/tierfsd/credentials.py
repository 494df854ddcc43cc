"""Acting with another user's rights in one thread, so that the kernel judges what that user may reach."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import socket
from collections.abc import Iterator
from typing import NamedTuple

from tierfs import control
from tierfs.errors import NotPermittedError

_SO_PEERGROUPS = 59
_GROUPS_LIMIT = 65536
# glibc's setgroups changes all threads of a process; the bare system call changes the calling one.
_SYS_SETGROUPS = {"x86_64": 116, "aarch64": 159, "riscv64": 159, "ppc64le": 81, "s390x": 206}.get(
    platform.machine()
)
_libc = ctypes.CDLL(None, use_errno=True)


class Peer(NamedTuple):
    """Who is at the other end of a connection."""

    uid: int
    gid: int
    groups: tuple[int, ...]

    @property
    def trusted(self) -> bool:
        """Root, and the user whose daemon this is, may do everything."""
        return self.uid in (0, os.geteuid())


def peer_of(sock: socket.socket) -> Peer:
    """The user at the other end, as the kernel noted it when the connection was made. Raises OSError."""
    _, uid, gid = control.peer_credentials(sock)
    # Python's own getsockopt takes no more than 1024 bytes, which is 256 groups.
    array = (ctypes.c_uint32 * _GROUPS_LIMIT)()
    length = ctypes.c_uint32(ctypes.sizeof(array))
    if _libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, array, ctypes.byref(length)) != 0:
        raise _last_error()
    return Peer(uid, gid, tuple(array[: length.value // 4]))


@contextlib.contextmanager
def acting_as(peer: Peer) -> Iterator[None]:
    """File system calls of this thread have the peer's rights and no more. Raises NotPermittedError."""
    if peer.trusted:
        yield
        return
    if os.geteuid() != 0 or _SYS_SETGROUPS is None:
        raise NotPermittedError("the volume belongs to another user: act as that user or as root")
    own_groups = tuple(os.getgroups())
    _set_groups(peer.groups)
    try:
        _libc.setfsgid(peer.gid)
        _libc.setfsuid(peer.uid)
        if _libc.setfsuid(-1) != peer.uid or _libc.setfsgid(-1) != peer.gid:
            raise NotPermittedError("the rights of another user cannot be taken on")
        yield
    finally:
        _libc.setfsuid(os.geteuid())
        _libc.setfsgid(os.getegid())
        _set_groups(own_groups)


def _set_groups(groups: tuple[int, ...]) -> None:
    array = (ctypes.c_uint32 * len(groups))(*groups)
    if _libc.syscall(_SYS_SETGROUPS, ctypes.c_size_t(len(groups)), array) != 0:
        raise _last_error()


def _last_error() -> OSError:
    error = ctypes.get_errno()
    return OSError(error, os.strerror(error))
