"""The portable binding: fusepy (libfuse 2, or macFUSE) over the same vfs.

What libfuse 2's high level cannot express is missing here: passthrough, invalidation, rename flags, O_TMPFILE,
SEEK_HOLE, copy_file_range, ACLs, interrupts, the groups of a creating process. It knows a file by its path:
each hard link is an inode of its own to the kernel, so attributes are never cached, and a file that is removed
while it is open gets a hidden name until it is closed, so that it can still be asked for its attributes.

Each call runs in a thread of libfuse's; one lock makes vfs and gate single-threaded, and is let go while a call
waits for content or for a slow local system call.

libfuse hands over whole paths as text. Names are bytes: latin-1 maps each byte to one character and back.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import fuse

from tierfs.errors import TierError
from tierfs.making import Caller
from tierfs.nodes import ROOT
from tierfs.vfs import NOW, Vfs
from tierfs.waits import Blocked, Slow, Wait

log = logging.getLogger("fusepy")

ENCODING = "latin-1"
_ACL = "system.posix_acl_"
_SHOWN = (
    "st_ino", "st_size", "st_blocks", "st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_blksize",
)  # fmt: skip
_UTIME_NOW, _UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2  # nanoseconds, with no seconds: see utimensat(2)


class _Table(ctypes.Structure):
    """libfuse 2.9's table of operations: fusepy's ends before the last ones."""

    _fields_ = (
        *fuse.fuse_operations._fields_,
        ("poll", ctypes.c_void_p),
        ("write_buf", ctypes.c_void_p),
        ("read_buf", ctypes.c_void_p),
        ("flock", ctypes.c_void_p),
        ("fallocate", ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64,
            ctypes.POINTER(fuse.fuse_file_info),
        )),
    )  # fmt: skip


class _Mount(fuse.FUSE):  # type: ignore[misc]
    """fusepy's dispatcher, with the operation that it lacks."""

    def fallocate(self, path: bytes | None, mode: int, offset: int, length: int, fip: Any) -> int:
        self.operations("fallocate", None, mode, offset, length, fip.contents)
        return 0


class Portable(fuse.Operations):  # type: ignore[misc]
    """libfuse's operations. Paths are latin-1 text; every method may raise OSError only."""

    use_ns = True
    flag_nullpath_ok = 1  # operations on an open file come without a path
    flag_utime_omit_ok = 1

    def __init__(self, vfs: Vfs, lock: threading.RLock, on_init: Callable[[], None]) -> None:
        """`lock` is shared with whoever else calls into the gate (messages of the mover, ticks)."""
        self._vfs = vfs
        self._lock = lock
        self._on_init = on_init
        self._nodes: dict[int, int] = {}  # file handle -> nodeid that it keeps known

    # --- running an operation -----------------------------------------------------------------------------

    def __call__(self, op: str, *args: Any) -> Any:
        """Run one operation to its end: again after each wait, slow system calls without the lock."""
        method = getattr(self, op)
        while True:
            try:
                with self._lock:
                    result = method(*args)
                return result.run() if isinstance(result, Slow) else result
            except Blocked as blocked:
                self._await(blocked.wait)
            except TierError as error:
                log.error("%s: %s", op, error)
                raise OSError(error.errno, os.strerror(error.errno)) from error
            except OSError:
                raise
            except Exception as error:
                # One broken operation must not end everybody's mount.
                log.exception("%s failed unexpectedly", op)
                raise OSError(errno.EIO, os.strerror(errno.EIO)) from error

    def _await(self, wait: Wait) -> None:
        """Wait until it fires, without the lock. libfuse 2 gives a high-level filesystem no interrupts."""
        fired = threading.Event()
        with self._lock:
            wait.add(fired.set)
        fired.wait()
        if wait.errno:
            raise OSError(wait.errno, wait.reason or os.strerror(wait.errno))

    @staticmethod
    def _caller() -> Caller:
        uid, gid, pid = fuse.fuse_get_context()
        return Caller(uid, gid, pid, 0, None)  # libfuse has applied the umask already

    @contextmanager
    def _node(self, path: str) -> Iterator[int]:
        """The nodeid of a path, known for as long as the block runs."""
        nodes: list[int] = []
        try:
            node = ROOT
            for name in path.encode(ENCODING).split(b"/"):
                if name:
                    node, _ = self._vfs.lookup(node, name)
                    nodes.append(node)
            yield node
        finally:
            for known in nodes:
                self._vfs.forget(known, 1)

    @contextmanager
    def _parent(self, path: str) -> Iterator[tuple[int, bytes]]:
        """The directory of a path, and its last name."""
        head, _, name = path.rpartition("/")
        with self._node(head) as node:
            yield node, name.encode(ENCODING)

    def _keep(self, fh: int, node: int) -> None:
        """An open file keeps its node known, whatever happens to its name."""
        self._nodes[fh] = node

    # --- attributes ---------------------------------------------------------------------------------------

    def init(self, path: str) -> None:
        self._on_init()

    def getattr(self, path: str | None, fh: Any = None) -> dict[str, int]:
        if fh is not None:
            return _attributes(self._vfs.getattr(self._nodes[fh.fh], fh.fh))
        assert path is not None
        with self._node(path) as node:
            return _attributes(self._vfs.getattr(node, None))

    def _setattr(self, path: str | None, fh: Any = None, **changes: Any) -> int:
        if fh is not None:
            self._vfs.setattr(self._nodes[fh.fh], fh.fh, caller=self._caller(), **changes)
        else:
            assert path is not None
            with self._node(path) as node:
                self._vfs.setattr(node, None, caller=self._caller(), **changes)
        return 0

    def chmod(self, path: str, mode: int) -> int:
        return self._setattr(path, mode=stat.S_IMODE(mode))

    def chown(self, path: str, uid: int, gid: int) -> int:
        return self._setattr(path, uid=None if uid == -1 else uid, gid=None if gid == -1 else gid)

    def truncate(self, path: str | None, length: int, fh: Any = None) -> int:
        return self._setattr(path, fh, size=length)

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        atime, mtime = (_moment(t) for t in times) if times is not None else (NOW, NOW)
        return self._setattr(path, atime_ns=atime, mtime_ns=mtime)

    def statfs(self, path: str) -> dict[str, int]:
        found = self._vfs.statfs()
        return {
            "f_bsize": found.bsize, "f_frsize": found.frsize, "f_blocks": found.blocks,
            "f_bfree": found.bfree, "f_bavail": found.bavail, "f_files": found.files,
            "f_ffree": found.ffree, "f_namemax": found.namelen,
        }  # fmt: skip

    # --- names --------------------------------------------------------------------------------------------

    def readlink(self, path: str) -> str:
        with self._node(path) as node:
            return self._vfs.readlink(node).decode(ENCODING)

    def _made(self, made: tuple[int, Any]) -> int:
        self._vfs.forget(made[0], 1)
        return 0

    def symlink(self, target: str, source: str) -> int:
        with self._parent(target) as (parent, name):
            return self._made(self._vfs.symlink(parent, name, source.encode(ENCODING), self._caller()))

    def mknod(self, path: str, mode: int, dev: int) -> int:
        with self._parent(path) as (parent, name):
            return self._made(self._vfs.mknod(parent, name, mode, dev, self._caller()))

    def mkdir(self, path: str, mode: int) -> int:
        with self._parent(path) as (parent, name):
            return self._made(self._vfs.mkdir(parent, name, mode, self._caller()))

    def unlink(self, path: str) -> int:
        with self._parent(path) as (parent, name):
            self._vfs.unlink(parent, name)
        return 0

    def rmdir(self, path: str) -> int:
        with self._parent(path) as (parent, name):
            self._vfs.rmdir(parent, name)
        return 0

    def rename(self, old: str, new: str) -> int:
        with self._parent(old) as (parent, name), self._parent(new) as (new_parent, new_name):
            self._vfs.rename(parent, name, new_parent, new_name, 0)
        return 0

    def link(self, target: str, source: str) -> int:
        with self._node(source) as node, self._parent(target) as (parent, name):
            return self._made(self._vfs.link(node, parent, name))

    # --- open files ---------------------------------------------------------------------------------------

    def open(self, path: str, fi: Any) -> int:
        with self._parent(path) as (parent, name):
            node, _ = self._vfs.lookup(parent, name)  # which the open file keeps
        try:
            fi.fh, _ = self._vfs.open(node, fi.flags, self._caller(), looks=not fi.flags)
        except BaseException:
            self._vfs.forget(node, 1)
            raise
        self._keep(fi.fh, node)
        return 0

    def create(self, path: str, mode: int, fi: Any) -> int:
        with self._parent(path) as (parent, name):
            node, _, fi.fh, _ = self._vfs.create(parent, name, fi.flags, mode, self._caller())
        self._keep(fi.fh, node)
        return 0

    def read(self, path: str | None, size: int, offset: int, fh: Any) -> bytes:
        return self._vfs.read(fh.fh, offset, size)

    def write(self, path: str | None, data: bytes, offset: int, fh: Any) -> Any:
        return self._vfs.write(fh.fh, offset, data, flags=fh.flags)

    def flush(self, path: str | None, fh: Any) -> int:
        self._vfs.flush(fh.fh)
        return 0

    def release(self, path: str | None, fh: Any) -> int:
        try:
            self._vfs.release(fh.fh)
        finally:
            self._vfs.forget(self._nodes.pop(fh.fh), 1)
        return 0

    def fallocate(self, path: str | None, mode: int, offset: int, length: int, fh: Any) -> Any:
        return self._vfs.fallocate(fh.fh, mode, offset, length, self._caller())

    def fsync(self, path: str | None, datasync: int, fh: Any) -> Any:
        return self._vfs.fsync(fh.fh, bool(datasync))

    # --- directories --------------------------------------------------------------------------------------

    def opendir(self, path: str) -> int:
        with self._node(path) as node:
            return self._vfs.opendir(node)

    def readdir(self, path: str | None, fh: int) -> list[tuple[str, dict[str, int], int]]:
        # Offset 0 makes libfuse keep the listing; it then serves seeks from what it kept.
        return [
            (name.decode(ENCODING), {"st_ino": ino, "st_mode": kind << 12}, 0)
            for _, name, ino, kind in self._vfs.readdir(fh, 0)
        ]

    def releasedir(self, path: str | None, fh: int) -> int:
        self._vfs.releasedir(fh)
        return 0

    def fsyncdir(self, path: str | None, datasync: int, fh: int) -> Any:
        return self._vfs.fsyncdir(fh, bool(datasync))

    # --- extended attributes ------------------------------------------------------------------------------

    @staticmethod
    def _refuse_acl(name: str) -> None:
        """Nobody would keep them: this kernel looks at modes only, and an ACL's mask stands in the group's."""
        if name.startswith(_ACL):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
        self._refuse_acl(name)
        with self._node(path) as node:
            return self._vfs.getxattr(node, name.encode(ENCODING))

    def setxattr(self, path: str, name: str, value: bytes, options: int, position: int = 0) -> int:
        self._refuse_acl(name)
        with self._node(path) as node:
            self._vfs.setxattr(node, name.encode(ENCODING), value, options, self._caller())
        return 0

    def listxattr(self, path: str) -> list[str]:
        with self._node(path) as node:
            names = [n.decode(ENCODING) for n in self._vfs.listxattr(node).split(b"\0") if n]
        return [name for name in names if not name.startswith(_ACL)]

    def removexattr(self, path: str, name: str) -> int:
        self._refuse_acl(name)
        with self._node(path) as node:
            self._vfs.removexattr(node, name.encode(ENCODING), self._caller())
        return 0


def _moment(t: int) -> int | None:
    """A timespec in nanoseconds with its two special values (utimensat(2))."""
    if t == _UTIME_NOW:
        return NOW
    return None if t == _UTIME_OMIT else t


def _attributes(st: Any) -> dict[str, int]:
    shown = {name: int(getattr(st, name)) for name in _SHOWN}
    return shown | {"st_atime": st.st_atime_ns, "st_mtime": st.st_mtime_ns, "st_ctime": st.st_ctime_ns}


def serve(
    vfs: Vfs, lock: threading.RLock, mountpoint: str, options: dict[str, Any], ready: Callable[[], None]
) -> None:
    """Mount and serve until unmounted. Raises RuntimeError where libfuse cannot mount."""
    operations = Portable(vfs, lock, ready)
    if sys.platform == "linux":
        fuse.fuse_operations = _Table
    _Mount(
        operations, mountpoint, raw_fi=True, encoding=ENCODING, foreground=True, use_ino=True,
        attr_timeout=0, entry_timeout=1, **options,
    )  # fmt: skip
