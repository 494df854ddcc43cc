"""System calls that Python's os module lacks, by ctypes. Every function raises OSError on failure.

Layouts follow the kernel's uapi headers (fcntl.h, stat.h, dirent.h) on 64-bit Linux.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
from collections.abc import Callable
from typing import cast

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_EMPTY_PATH = 0x1000
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE = 1, 2
UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2

_STATX_BTIME = 0x800
_STATX_BTIME_AT = 0x50  # offset of stx_btime in struct statx
_STATX_MNT_ID_UNIQUE = 0x4000
_STATX_MNT_ID_AT = 0x90
_SYNC_FILE_RANGE_WRITE = 2
_MOST_HANDLE = 128  # MAX_HANDLE_SZ
_HANDLE_HEAD = 8
_HANDLE_SIZE = struct.Struct("=I")
_FAN_FILESYSTEM, _FAN_ADD = 0x100, 0x1
# Notifications, non-blocking, close-on-exec; handles of the directory with the name, and of the file itself.
_FAN_FLAGS = 0x2 | 0x1 | 0x400 | 0x800 | 0x200 | 0x1000
_TIMESPECS = struct.Struct("=qqqq")

_libc = ctypes.CDLL(None, use_errno=True)


def _function(name: str, *types: type, result: type = ctypes.c_int) -> Callable[..., int]:
    prototype = ctypes.CFUNCTYPE(result, *types, use_errno=True)
    return cast(Callable[..., int], prototype((name, _libc)))


_int, _char_p, _void_p, _uint = ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint
_off = ctypes.c_int64
_name_to_handle_at = _function("name_to_handle_at", _int, _char_p, _void_p, _void_p, _int)
_open_by_handle_at = _function("open_by_handle_at", _int, _char_p, _int)
_renameat2 = _function("renameat2", _int, _char_p, _int, _char_p, _uint)
_fallocate = _function("fallocate", _int, _int, _off, _off)
_futimens = _function("futimens", _int, _char_p)
_utimensat = _function("utimensat", _int, _char_p, _char_p, _int)
_statx = _function("statx", _int, _char_p, _int, _uint, _void_p)
_syncfs = _function("syncfs", _int)
_sync_file_range = _function("sync_file_range", _int, _off, _off, _uint)
_fanotify_init = _function("fanotify_init", _uint, _uint)
_fanotify_mark = _function("fanotify_mark", _int, _uint, ctypes.c_uint64, _int, _char_p)
_getdents64 = _function("getdents64", _int, _void_p, ctypes.c_size_t, result=ctypes.c_ssize_t)


class _Buffers(threading.local):
    """Memory for the kernel to write to, a thread: ctypes releases the interpreter lock during a call."""

    def __init__(self) -> None:
        self.handle = ctypes.create_string_buffer(_HANDLE_HEAD + _MOST_HANDLE)
        self.handle_at = ctypes.addressof(self.handle)
        self.mount_id = ctypes.c_int()
        self.mount_id_at = ctypes.addressof(self.mount_id)
        self.dirents = ctypes.create_string_buffer(64 * 1024)
        self.dirents_at = ctypes.addressof(self.dirents)


_buffers = _Buffers()


def _fail(name: bytes | None = None) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), name)


def name_to_handle(dirfd: int, name: bytes) -> bytes:
    """The kernel's file handle of `name` in a directory (b"": of the descriptor itself, O_PATH is fine).

    Type (4 bytes, little endian) and then the filesystem's own bytes. Symlinks are not followed.
    """
    buffers = _buffers
    _HANDLE_SIZE.pack_into(buffers.handle, 0, _MOST_HANDLE)
    flags = 0 if name else AT_EMPTY_PATH
    if _name_to_handle_at(dirfd, name, buffers.handle_at, buffers.mount_id_at, flags) < 0:
        raise _fail(name)
    (size,) = _HANDLE_SIZE.unpack_from(buffers.handle)
    return buffers.handle.raw[4 : _HANDLE_HEAD + size]


def open_by_handle(mount_fd: int, handle: bytes, flags: int) -> int:
    """Open the file that `name_to_handle` described; ESTALE when it is gone, EPERM without the privilege.

    `mount_fd` is any descriptor on that filesystem that is not O_PATH.
    """
    raw = _HANDLE_SIZE.pack(len(handle) - 4) + handle
    fd = _open_by_handle_at(mount_fd, raw, flags | os.O_CLOEXEC)
    if fd < 0:
        raise _fail()
    return fd


def renameat2(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> None:
    """rename with RENAME_NOREPLACE, RENAME_EXCHANGE or RENAME_WHITEOUT."""
    if _renameat2(old_dir, old, new_dir, new, flags) < 0:
        raise _fail(old)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Allocate, punch, zero, collapse or insert a range, as `mode` says."""
    if _fallocate(fd, mode, offset, length) < 0:
        raise _fail()


def utimensat(dirfd: int, path: bytes, times: tuple[int, int, int, int], flags: int) -> None:
    """Set times: (atime seconds, nanoseconds, mtime seconds, nanoseconds), UTIME_NOW or UTIME_OMIT as those."""
    if _utimensat(dirfd, path, _TIMESPECS.pack(*times), flags) < 0:
        raise _fail(path)


def futimens(fd: int, times: tuple[int, int, int, int]) -> None:
    """As `utimensat`, of a file that is open and not by O_PATH."""
    if _futimens(fd, _TIMESPECS.pack(*times)) < 0:
        raise _fail()


def birth_time(dirfd: int, name: bytes) -> int | None:
    """Nanoseconds since the epoch, None where the filesystem keeps none. b"": of the descriptor itself."""
    result = ctypes.create_string_buffer(256)
    flags = AT_SYMLINK_NOFOLLOW if name else AT_EMPTY_PATH
    if _statx(dirfd, name, flags, _STATX_BTIME, ctypes.addressof(result)) < 0:
        raise _fail(name)
    (mask,) = struct.unpack_from("=I", result)
    if not mask & _STATX_BTIME:
        return None
    seconds, nanoseconds = struct.unpack_from("=qI", result, _STATX_BTIME_AT)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


def mount_id(path: bytes) -> int | None:
    """The number of the mount behind a path, which no other one of this run of the machine has or had; None
    where the kernel knows no such number (before Linux 6.8)."""
    result = ctypes.create_string_buffer(256)
    if _statx(AT_FDCWD, path, 0, _STATX_MNT_ID_UNIQUE, ctypes.addressof(result)) < 0:
        raise _fail(path)
    (mask,) = struct.unpack_from("=I", result)
    return struct.unpack_from("=Q", result, _STATX_MNT_ID_AT)[0] if mask & _STATX_MNT_ID_UNIQUE else None


def begin_writing(fd: int) -> None:
    """Let all of a file that is not on the disk yet be on its way there; waits for nothing."""
    if _sync_file_range(fd, 0, 0, _SYNC_FILE_RANGE_WRITE) < 0:
        raise _fail()


def syncfs(fd: int) -> None:
    """Make everything on this filesystem durable."""
    if _syncfs(fd) < 0:
        raise _fail()


def fanotify(dirfd: int, mask: int) -> int:
    """A descriptor that events (of `mask`) of the whole filesystem of a directory can be read from."""
    fd = _fanotify_init(_FAN_FLAGS, os.O_RDONLY | os.O_CLOEXEC)
    if fd < 0:
        raise _fail()
    if _fanotify_mark(fd, _FAN_ADD | _FAN_FILESYSTEM, mask, dirfd, b".") < 0:
        error = _fail()
        os.close(fd)
        raise error
    return fd


def read_directory(fd: int) -> bytes:
    """The next records (struct linux_dirent64, at most 64 KiB) of a directory; b"" at its end."""
    buffers = _buffers
    size = _getdents64(fd, buffers.dirents_at, len(buffers.dirents))
    if size < 0:
        error = _fail()
        if error.errno == errno.ENOENT:
            return b""
        raise error
    return ctypes.string_at(buffers.dirents_at, size)


def boot_id() -> str:
    """What the kernel calls this run of the machine (random(4)). Raises OSError.

    TIERFS_BOOT_ID in its place lets a test that cuts a filesystem off say that the machine was started anew.
    """
    given = os.environ.get("TIERFS_BOOT_ID")
    if given:
        return given
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
