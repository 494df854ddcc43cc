"""The FUSE protocol of the Linux kernel: numbers, layouts and packers. Knows no file system.

Layouts follow include/uapi/linux/fuse.h, version 7.45; all integers are little endian here because every
platform that offers passthrough is. Times before 1970 are signed seconds.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Any

MAJOR, MINOR = 7, 45
OLDEST_MINOR = 33  # Linux 5.13: SETXATTR_EXT and HANDLE_KILLPRIV_V2

# How long the kernel may answer from what it was told, in seconds, where edits made behind the mount are not
# seen: this bounds how long they stay unseen. Where they are: tierfs.lasting.
ENTRY_SECONDS = 1
ATTR_SECONDS = 1

MAX_PAGES = 256
MAX_WRITE = 1 << 20
BUFFER = MAX_WRITE + 4096  # a request of MAX_WRITE bytes with its headers


class Op(IntEnum):
    """Request codes."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    IOCTL = 39
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


OPS = 64  # size of a dispatch table


class Feature(IntEnum):
    """Bits of INIT's flags (from 32 on: of flags2)."""

    ASYNC_READ = 0
    ATOMIC_O_TRUNC = 3
    BIG_WRITES = 5
    DONT_MASK = 6
    AUTO_INVAL_DATA = 12  # cached pages go when size or time have changed beneath: edits behind the mount
    DO_READDIRPLUS = 13
    READDIRPLUS_AUTO = 14
    ASYNC_DIO = 15
    PARALLEL_DIROPS = 18
    POSIX_ACL = 20
    ABORT_ERROR = 21  # reading after an abort says ECONNABORTED, after an unmount ENODEV
    MAX_PAGES = 22
    CACHE_SYMLINKS = 23
    HANDLE_KILLPRIV_V2 = 28
    SETXATTR_EXT = 29
    INIT_EXT = 30
    CREATE_SUPP_GROUP = 34
    HAS_EXPIRE_ONLY = 35
    DIRECT_IO_ALLOW_MMAP = 36
    PASSTHROUGH = 37
    NO_EXPORT_SUPPORT = 38
    HAS_RESEND = 39

    @property
    def bit(self) -> int:
        """The flag as a mask."""
        return 1 << self


# HANDLE_KILLPRIV_V2 keeps passthrough writes from asking for security.capability each time.
WANTED = sum(feature.bit for feature in Feature if feature is not Feature.PASSTHROUGH)

# FOPEN_*
OPEN_KEEP_CACHE = 1 << 1  # of a directory: across opens
OPEN_CACHE_DIR = 1 << 3
OPEN_NOFLUSH = 1 << 5
OPEN_PASSTHROUGH = 1 << 7

GETATTR_FH = 1
FSYNC_DATA = 1
WRITE_KILL_SUIDGID = 4
OPEN_KILL_SUIDGID = 1
SETXATTR_ACL_KILL_SGID = 1
EXT_GROUPS = 32

SET_MODE, SET_UID, SET_GID, SET_SIZE = 1 << 0, 1 << 1, 1 << 2, 1 << 3
SET_ATIME, SET_MTIME, SET_FH = 1 << 4, 1 << 5, 1 << 6
SET_ATIME_NOW, SET_MTIME_NOW, SET_KILL_SUIDGID = 1 << 7, 1 << 8, 1 << 11

BACKING_OPEN = 0x4010E501
BACKING_CLOSE = 0x4004E502

# --- requests --------------------------------------------------------------------------------------------

IN = 40  # size of a request's header
HEAD = struct.Struct("<IIQQ")  # length, opcode, unique, nodeid
CALLER = struct.Struct("<IIIH")  # at 24: uid, gid, pid, length of extensions / 8
CALLER_AT = 24

INIT_IN = struct.Struct("<IIIII")  # major, minor, max_readahead, flags, flags2
INIT_IN_OLD = struct.Struct("<IIII")
U64 = struct.Struct("<Q")
FORGET_ONE = struct.Struct("<QQ")  # nodeid, lookups
COUNT_IN = struct.Struct("<II")  # count, padding
GETATTR_IN = struct.Struct("<IIQ")  # flags, padding, fh
SETATTR_IN = struct.Struct("<IIQQQqqqIIIIIIII")
MKNOD_IN = struct.Struct("<IIII")  # mode, rdev, umask, padding
MKDIR_IN = struct.Struct("<II")  # mode, umask
RENAME2_IN = struct.Struct("<QII")  # new parent, flags, padding
OPEN_IN = struct.Struct("<II")  # flags, open_flags
CREATE_IN = struct.Struct("<IIII")  # flags, mode, umask, open_flags
READ_IN = struct.Struct("<QQIIQII")  # fh, offset, size, read_flags, lock_owner, flags, padding
RELEASE_IN = struct.Struct("<QIIQ")  # fh, flags, release_flags, lock_owner
FSYNC_IN = struct.Struct("<QII")  # fh, flags, padding
SETXATTR_IN = struct.Struct("<IIII")  # size, flags, setxattr_flags, padding
GETXATTR_IN = struct.Struct("<II")  # size, padding
FALLOCATE_IN = struct.Struct("<QQQII")  # fh, offset, length, mode, padding
LSEEK_IN = struct.Struct("<QqII")  # fh, offset, whence, padding
COPY_IN = struct.Struct("<QQQQQQQ")  # fh_in, off_in, nodeid_out, fh_out, off_out, length, flags
STATX_IN = struct.Struct("<IIQII")  # getattr_flags, reserved, fh, sx_flags, sx_mask

# --- replies ---------------------------------------------------------------------------------------------

OUT_SIZE = 16
OUT = struct.Struct("<IiQ")  # length, -errno, unique
# In the place of the errno, with unique 0.
NOTIFY_INVAL_INODE, NOTIFY_INVAL_ENTRY, NOTIFY_RESEND = 2, 3, 7
INVAL_INODE_OUT = struct.Struct("<Qqq")  # nodeid, offset (< 0: attributes alone), length
INVAL_ENTRY_OUT = struct.Struct("<QII")  # parent, name length, flags; the name and a zero byte follow
EXPIRE_ONLY = 1  # the name is to be looked up anew, and stays what it is where it still is that
INIT_OUT = struct.Struct("<IIIIHHIIHHIII20x")
_ATTR = "QQQqqqIIIIIIIIII"
ENTRY_OUT = struct.Struct("<QQQQII" + _ATTR)
ATTR_OUT = struct.Struct("<QII" + _ATTR)
OPEN_OUT = struct.Struct("<QIi")  # fh, open_flags, backing_id
WRITE_OUT = struct.Struct("<II")
SIZE_OUT = struct.Struct("<II")  # getxattr without room
STATFS_OUT = struct.Struct("<QQQQQIIII24x")
STATX_OUT = struct.Struct("<QIIQQ" + "IIQIIIHHQQQQ" + "qIi" * 4 + "IIII112x")
DIRENT = struct.Struct("<QQII")  # ino, offset, name length, type
DIRENT_PLUS_SIZE = ENTRY_OUT.size + DIRENT.size  # without the name, which is padded to 8 bytes
BACKING_MAP = struct.Struct("<iIQ")  # fd, flags, padding

_NO_ENTRY = bytes(ENTRY_OUT.size)
_SECOND = 1_000_000_000
_STATX_BASIC, _STATX_BTIME = 0x7FF, 0x800

_pack_entry = ENTRY_OUT.pack
_pack_attr = ATTR_OUT.pack
_pack_dirent = DIRENT.pack


def entry(nodeid: int, st: Any, attr_seconds: int, entry_seconds: int = ENTRY_SECONDS) -> bytes:
    """A fuse_entry_out. `st` is a stat result or like one."""
    atime, atime_ns = divmod(st.st_atime_ns, _SECOND)
    mtime, mtime_ns = divmod(st.st_mtime_ns, _SECOND)
    ctime, ctime_ns = divmod(st.st_ctime_ns, _SECOND)
    return _pack_entry(
        nodeid, 0, entry_seconds, attr_seconds, 0, 0,
        st.st_ino, st.st_size, st.st_blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
        st.st_mode, st.st_nlink, st.st_uid, st.st_gid, st.st_rdev, st.st_blksize, 0,
    )  # fmt: skip


# Instead of an entry, where ENOENT would have the kernel ask again at once.
ABSENT = _pack_entry(0, 0, ENTRY_SECONDS, *(0,) * 19)


def attributes(st: Any, attr_seconds: int) -> bytes:
    """A fuse_attr_out."""
    atime, atime_ns = divmod(st.st_atime_ns, _SECOND)
    mtime, mtime_ns = divmod(st.st_mtime_ns, _SECOND)
    ctime, ctime_ns = divmod(st.st_ctime_ns, _SECOND)
    return _pack_attr(
        attr_seconds, 0, 0,
        st.st_ino, st.st_size, st.st_blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
        st.st_mode, st.st_nlink, st.st_uid, st.st_gid, st.st_rdev, st.st_blksize, 0,
    )  # fmt: skip


def statx(st: Any, birth_ns: int | None, attr_seconds: int) -> bytes:
    """A fuse_statx_out; `birth_ns` None: not known."""
    times = [(*divmod(t, _SECOND), 0) for t in (st.st_atime_ns, birth_ns or 0, st.st_ctime_ns, st.st_mtime_ns)]
    mask = _STATX_BASIC | (_STATX_BTIME if birth_ns is not None else 0)
    rdev = st.st_rdev
    # rdev as in the 32-bit form of attr_out: 12 bits of major in the middle of the minor.
    major, minor = rdev >> 8 & 0xFFF, rdev & 0xFF | rdev >> 12 & 0xFFF00
    return STATX_OUT.pack(
        attr_seconds, 0, 0, 0, 0,
        mask, st.st_blksize, 0, st.st_nlink, st.st_uid, st.st_gid, st.st_mode, 0,
        st.st_ino, st.st_size, st.st_blocks, 0,
        *times[0], *times[1], *times[2], *times[3], major, minor, 0, 0,
    )  # fmt: skip


def dirent(ino: int, following: int, kind: int, name: bytes) -> bytes:
    """A fuse_dirent; `following` is the offset behind it."""
    length = len(name)
    return _pack_dirent(ino, following, length, kind) + name + bytes(-length % 8)


def dirent_plus(packed_entry: bytes | None, ino: int, following: int, kind: int, name: bytes) -> bytes:
    """A fuse_direntplus; None: the kernel learns no node from it."""
    length = len(name)
    return (packed_entry or _NO_ENTRY) + _pack_dirent(ino, following, length, kind) + name + bytes(-length % 8)


def inval_attributes(nodeid: int) -> bytes:
    """Have the kernel ask anew for the attributes of a node."""
    body = INVAL_INODE_OUT.pack(nodeid, -1, 0)
    return OUT.pack(OUT_SIZE + len(body), NOTIFY_INVAL_INODE, 0) + body


def inval_name(parent: int, name: bytes, flags: int) -> bytes:
    """Have the kernel look up a name anew."""
    body = INVAL_ENTRY_OUT.pack(parent, len(name), flags) + name + b"\0"
    return OUT.pack(OUT_SIZE + len(body), NOTIFY_INVAL_ENTRY, 0) + body


def groups(message: bytes, extensions: int) -> tuple[int, ...] | None:
    """The groups that a creating request carries in its last `extensions` bytes; None: none are told."""
    at, end = len(message) - extensions, len(message)
    while 0 <= at <= end - 8:
        size, kind = COUNT_IN.unpack_from(message, at)
        if kind == EXT_GROUPS and at + 12 <= end:
            (count,) = struct.unpack_from("<I", message, at + 8)
            return struct.unpack_from(f"<{count}I", message, at + 12) if count <= (end - at - 12) // 4 else None
        if size < 8:
            return None
        at += size
    return None


def init_reply(
    minor: int, readahead: int, offered: int, passthrough: bool, stack_depth: int
) -> tuple[bytes, int]:
    """The answer to INIT, and the features agreed on."""
    agreed = offered & (WANTED | (Feature.PASSTHROUGH.bit if passthrough else 0))
    max_write = MAX_WRITE if agreed & Feature.MAX_PAGES.bit else 1 << 17
    reply = INIT_OUT.pack(
        MAJOR, min(minor, MINOR), readahead, agreed & 0xFFFFFFFF, 64, 48, max_write, 1,
        MAX_PAGES, 0, agreed >> 32, stack_depth if agreed & Feature.PASSTHROUGH.bit else 0, 0,
    )  # fmt: skip
    return reply, agreed
