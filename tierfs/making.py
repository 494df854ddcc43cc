"""New files in the backing tree, owned by whoever asked for them.

The kernel has checked that the caller may create there (default_permissions) and has dropped a set-group-id
bit that he may not set. Here the umask is the process's own during the call, so that the backing filesystem
applies a default ACL instead of it where there is one. A daemon that is not root creates files of its own.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

from tierfs.tree import drop_set_id

_T = TypeVar("_T")
_SET_ID = stat.S_ISUID | stat.S_ISGID
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Caller(NamedTuple):
    """Who asks. `groups`: supplementary groups, where the kernel has told them."""

    uid: int
    gid: int
    pid: int = 0
    umask: int = 0o022
    groups: tuple[int, ...] | None = None


def in_group(caller: Caller, gid: int) -> bool:
    """Whether the caller is a member; who cannot be asked (ended, in another pid namespace) is none."""
    if caller.groups is not None or caller.gid == gid:
        return caller.gid == gid or gid in (caller.groups or ())
    try:
        with open(f"/proc/{caller.pid}/status", "rb") as file:
            groups = next((line for line in file if line.startswith(b"Groups:")), b"Groups:")
    except OSError:
        return False
    return gid in map(int, groups.split()[1:])


def changed_by(caller: Caller | None, opath: int) -> None:
    """Take the set-id bits from a file that goes when this caller changes its content."""
    if caller is None:
        drop_set_id(opath)
    else:
        drop_set_id(opath, partial(in_group, caller))


class Maker:
    """Makes one file at a time; what cannot be given to its owner is removed again. Calls raise OSError."""

    def __init__(self) -> None:
        self._uid = os.geteuid()
        self._gid = os.getegid()

    def file(self, dirfd: int, name: bytes, mode: int, caller: Caller) -> tuple[int, os.stat_result]:
        """A new regular file: a descriptor open for reading and writing, and its stat."""
        fd = self._masked(caller, lambda: os.open(name, _NEW, mode & 0o1777, dir_fd=dirfd))
        try:
            return fd, self._give(fd, dirfd, mode, caller)
        except BaseException:
            os.close(fd)
            os.unlink(name, dir_fd=dirfd)
            raise

    def nameless(self, dirfd: int, flags: int, mode: int, caller: Caller) -> tuple[int, os.stat_result]:
        """A file without a name (O_TMPFILE); with O_EXCL in `flags` it can never be given one."""
        how = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC | flags & os.O_EXCL
        fd = self._masked(caller, lambda: os.open(b".", how, mode & 0o1777, dir_fd=dirfd))
        try:
            return fd, self._give(fd, dirfd, mode, caller)
        except BaseException:
            os.close(fd)
            raise

    def _give(self, fd: int, dirfd: int, mode: int, caller: Caller) -> os.stat_result:
        st = os.fstat(fd)
        owner = self._owner(dirfd, st, caller)
        if owner is not None:
            os.fchown(fd, *owner)
        if mode & _SET_ID:
            # Last: a change of owner would take the bits away.
            os.fchmod(fd, stat.S_IMODE(st.st_mode) | mode & _SET_ID)
        return os.fstat(fd) if owner is not None or mode & _SET_ID else st

    def directory(self, dirfd: int, name: bytes, mode: int, caller: Caller) -> os.stat_result:
        """A new directory."""
        self._masked(caller, lambda: os.mkdir(name, mode & 0o1777, dir_fd=dirfd))
        return self._give_name(dirfd, name, caller, os.rmdir)

    def symlink(self, dirfd: int, name: bytes, target: bytes, caller: Caller) -> os.stat_result:
        """A new symbolic link."""
        os.symlink(target, name, dir_fd=dirfd)
        return self._give_name(dirfd, name, caller, os.unlink)

    def special(self, dirfd: int, name: bytes, mode: int, rdev: int, caller: Caller) -> os.stat_result:
        """A new fifo, socket or device node."""
        plain = mode & ~_SET_ID
        self._masked(caller, lambda: os.mknod(name, plain, rdev, dir_fd=dirfd))
        st = self._give_name(dirfd, name, caller, os.unlink)
        if mode & _SET_ID:
            os.chmod(name, stat.S_IMODE(st.st_mode) | mode & _SET_ID, dir_fd=dirfd)
            st = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
        return st

    def _give_name(self, dirfd: int, name: bytes, caller: Caller, undo: Callable[..., None]) -> os.stat_result:
        st = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
        owner = self._owner(dirfd, st, caller)
        if owner is None:
            return st
        try:
            os.chown(name, *owner, dir_fd=dirfd, follow_symlinks=False)
        except BaseException:
            undo(name, dir_fd=dirfd)
            raise
        return os.stat(name, dir_fd=dirfd, follow_symlinks=False)

    def _owner(self, dirfd: int, st: os.stat_result, caller: Caller) -> tuple[int, int] | None:
        """Whose it must become; None where it is already."""
        if self._uid != 0 or (caller.uid == 0 and caller.gid == self._gid):
            return None
        # In a set-group-id directory the backing filesystem has set the group.
        inherited = os.fstat(dirfd).st_mode & stat.S_ISGID
        gid = st.st_gid if inherited else caller.gid
        return None if (st.st_uid, st.st_gid) == (caller.uid, gid) else (caller.uid, gid)

    def _masked(self, caller: Caller, make: Callable[[], _T]) -> _T:
        before = os.umask(caller.umask)
        try:
            return make()
        finally:
            os.umask(before)
