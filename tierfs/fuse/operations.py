"""Requests of the kernel as calls of the vfs: unpack, call, pack. No policy, no state, no input or output.

An operation gets a whole request and the node's number. It returns the body of the reply, or a Stretch of a
file that is it, or Slow whose result is it, or None where no reply is expected; it raises what the vfs raises.
A request may be run several times.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from tierfs.dirs import Entry
from tierfs.fuse import protocol as p
from tierfs.fuse.protocol import IN, Op
from tierfs.fuse.splicing import LEAST
from tierfs.handles import Handle
from tierfs.told import LEFT
from tierfs.vfs import NOW, Caller, Vfs
from tierfs.waits import Slow, Stretch

Message = bytes | memoryview
Answer = bytes | Stretch | Slow | None
Operation = Callable[[Any, int], Answer]

_DOTS = frozenset({b".", b".."})
_SECOND = 1_000_000_000
_DONE = b""


def _name(message: bytes, at: int) -> bytes:
    """The name that begins at `at`, up to its zero byte."""
    return message[at : message.index(0, at)]


def _two_names(message: bytes, at: int) -> tuple[bytes, bytes]:
    first = _name(message, at)
    return first, _name(message, at + len(first) + 1)


def _caller(message: bytes, umask: int = 0) -> Caller:
    uid, gid, pid, extensions = p.CALLER.unpack_from(message, p.CALLER_AT)
    groups = p.groups(message, extensions * 8) if extensions else None
    return Caller(uid, gid, pid, umask, groups)


def _then(result: Slow | Any, pack: Callable[[Any], bytes]) -> bytes | Slow:
    """Pack a result now, or when it is there."""
    if isinstance(result, Slow):
        return Slow(lambda: pack(result.run()))
    return pack(result)


def _nothing(_result: object) -> bytes:
    return _DONE


def _written(count: int) -> bytes:
    return p.WRITE_OUT.pack(count, 0)


def _opened(handle: Handle) -> tuple[int, int]:
    """Flags and backing id for the reply to an open."""
    if handle.backing_id:
        return p.OPEN_PASSTHROUGH | p.OPEN_NOFLUSH, handle.backing_id
    # FLUSH only writes back what a cached writer has mapped. Without KEEP_CACHE an open drops cached pages.
    return (0 if handle.writable else p.OPEN_NOFLUSH), 0


def _seconds(vfs: Vfs, st: Any) -> int:
    """For how long the kernel may believe attributes."""
    # A mapped passthrough write changes them without a request.
    if vfs.gate.writers_open(st.st_ino):
        return 0
    return vfs.gate.lasting.of_attributes(st, p.ATTR_SECONDS, time.time())


def _entry(vfs: Vfs, nodeid: int, st: Any, seconds: int | None = None) -> bytes:
    """A packed entry, whose attributes may be believed for so long; None: as they are found now."""
    name_seconds = vfs.gate.lasting.of_name(st, p.ENTRY_SECONDS)
    if seconds is None:
        seconds = _seconds(vfs, st)
    vfs.told.note(nodeid, min(seconds, name_seconds))
    return p.entry(nodeid, st, seconds, name_seconds)


def listed_entry(vfs: Vfs, nodeid: int, name: bytes) -> bytes | None:
    """The packed entry of a name in a listing, counted.

    None where it is gone meanwhile, or not to be shown: asked for by name, it says why.
    """
    try:
        known, st = vfs.lookup(nodeid, name, listed=True)
    except OSError:
        return None
    try:
        return _entry(vfs, known, st)
    except BaseException:
        vfs.forget(known)
        raise


class Operations:
    """One method an opcode; `table` maps opcodes to them."""

    def __init__(
        self,
        vfs: Vfs,
        quick: Callable[[int, bytes], bytes | None] = lambda nodeid, name: None,
        outdated: Callable[[int], None] = lambda nodeid: None,
        *,
        opendir: bool = True,
    ) -> None:
        """`quick`: another way to a name's packed entry, counted, that may not know (tierfs.fuse.hot).

        `outdated` is told of a node whose attributes the kernel is to ask for anew. `opendir`: directories are
        opened before they are read (tierfs.dirs).
        """
        self._vfs = vfs
        self._opendir = opendir
        self._quick = quick
        self._outdated = outdated
        self._writers_open = vfs.gate.writers_open
        self.table: list[Operation | None] = [None] * p.OPS
        for op in Op:
            method = getattr(self, op.name.lower(), None)
            if method is not None:
                self.table[op] = method

    # --- nodes and attributes -----------------------------------------------------------------------------

    def _short(self, st: Any) -> int:
        """Where the kernel takes them for the newest, whatever it has been told since it asked."""
        return 0 if self._writers_open(st.st_ino) else p.ATTR_SECONDS

    def _entry(self, found: tuple[int, Any], seconds: int | None = None) -> bytes:
        return _entry(self._vfs, *found, seconds)

    def _attributes(self, nodeid: int, st: Any, seconds: int) -> bytes:
        if seconds < LEFT:
            self._vfs.told.note(nodeid, 0)
        return p.attributes(st, seconds)

    def _changed(self, *nodeids: int) -> None:
        """A request has changed what these show, which the kernel takes for outdated when it has its answer.

        But not what it was told before and has yet to take in: that would last. It does once it is told so.
        """
        if self._vfs.gate.lasting.watched:
            for nodeid in nodeids:
                self._outdated(nodeid)

    def _made(self, nodeid: int, made: tuple[int, Any]) -> bytes:
        """Something is new in the node. Others may know it, and change it, before its maker has this answer."""
        self._changed(nodeid)
        return self._entry(made, self._short(made[1]))

    def lookup(self, message: bytes, nodeid: int) -> bytes:
        try:
            found = self._vfs.lookup(nodeid, message[IN:-1])
        except FileNotFoundError:
            return p.ABSENT  # for a moment; who makes it through the mount has the kernel know at once
        return self._entry(found)

    def forget(self, message: bytes, nodeid: int) -> None:
        (count,) = p.U64.unpack_from(message, IN)
        self._vfs.forget(nodeid, count)

    def batch_forget(self, message: bytes, _nodeid: int) -> None:
        (count, _) = p.COUNT_IN.unpack_from(message, IN)
        at = IN + p.COUNT_IN.size
        for nodeid, lookups in p.FORGET_ONE.iter_unpack(message[at : at + count * p.FORGET_ONE.size]):
            self._vfs.forget(nodeid, lookups)

    def getattr(self, message: bytes, nodeid: int) -> bytes:
        flags, _, fh = p.GETATTR_IN.unpack_from(message, IN)
        if flags & p.GETATTR_FH:  # of an open file: nobody has proven that it is at rest
            st = self._vfs.getattr(nodeid, fh)
            return self._attributes(nodeid, st, self._short(st))
        st = self._vfs.getattr(nodeid)
        return self._attributes(nodeid, st, _seconds(self._vfs, st))

    def statx(self, message: bytes, nodeid: int) -> bytes:
        flags, _, fh, _, _ = p.STATX_IN.unpack_from(message, IN)
        st = self._vfs.getattr(nodeid, fh if flags & p.GETATTR_FH else None)
        seconds = self._short(st) if flags & p.GETATTR_FH else _seconds(self._vfs, st)
        try:
            birth = self._vfs.birth_time(nodeid)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            birth = None  # without a name it cannot be asked any more
        return p.statx(st, birth, seconds)

    def setattr(self, message: bytes, nodeid: int) -> bytes:
        (
            valid, _, fh, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _,
        ) = p.SETATTR_IN.unpack_from(message, IN)  # fmt: skip
        st = self._vfs.setattr(
            nodeid,
            fh if valid & p.SET_FH else None,
            mode=mode if valid & p.SET_MODE else None,
            uid=uid if valid & p.SET_UID else None,
            gid=gid if valid & p.SET_GID else None,
            size=size if valid & p.SET_SIZE else None,
            atime_ns=_moment(valid, p.SET_ATIME, p.SET_ATIME_NOW, atime, atime_ns),
            mtime_ns=_moment(valid, p.SET_MTIME, p.SET_MTIME_NOW, mtime, mtime_ns),
            kill_suidgid=bool(valid & p.SET_KILL_SUIDGID),
            caller=_caller(message),
        )
        return self._attributes(nodeid, st, self._short(st))

    def statfs(self, _message: bytes, _nodeid: int) -> bytes:
        fs = self._vfs.statfs()
        return p.STATFS_OUT.pack(
            fs.blocks, fs.bfree, fs.bavail, fs.files, fs.ffree, fs.bsize, fs.namelen, fs.frsize, 0
        )

    # --- names --------------------------------------------------------------------------------------------

    def readlink(self, _message: bytes, nodeid: int) -> bytes:
        return self._vfs.readlink(nodeid)

    def symlink(self, message: bytes, nodeid: int) -> bytes:
        name, target = _two_names(message, IN)
        return self._made(nodeid, self._vfs.symlink(nodeid, name, target, _caller(message)))

    def mknod(self, message: bytes, nodeid: int) -> bytes:
        mode, rdev, umask, _ = p.MKNOD_IN.unpack_from(message, IN)
        name = _name(message, IN + p.MKNOD_IN.size)
        return self._made(nodeid, self._vfs.mknod(nodeid, name, mode, rdev, _caller(message, umask)))

    def mkdir(self, message: bytes, nodeid: int) -> bytes:
        mode, umask = p.MKDIR_IN.unpack_from(message, IN)
        name = _name(message, IN + p.MKDIR_IN.size)
        return self._made(nodeid, self._vfs.mkdir(nodeid, name, mode, _caller(message, umask)))

    def unlink(self, message: bytes, nodeid: int) -> bytes:
        self._vfs.unlink(nodeid, message[IN:-1])
        self._changed(nodeid)
        return _DONE

    def rmdir(self, message: bytes, nodeid: int) -> bytes:
        self._vfs.rmdir(nodeid, message[IN:-1])
        self._changed(nodeid)
        return _DONE

    def rename(self, message: bytes, nodeid: int) -> bytes:
        (new_parent,) = p.U64.unpack_from(message, IN)
        old, new = _two_names(message, IN + p.U64.size)
        return self._renamed(nodeid, old, new_parent, new, 0)

    def rename2(self, message: bytes, nodeid: int) -> bytes:
        new_parent, flags, _ = p.RENAME2_IN.unpack_from(message, IN)
        old, new = _two_names(message, IN + p.RENAME2_IN.size)
        return self._renamed(nodeid, old, new_parent, new, flags)

    def _renamed(self, nodeid: int, old: bytes, new_parent: int, new: bytes, flags: int) -> bytes:
        moved = self._vfs.rename(nodeid, old, new_parent, new, flags)
        others = () if new_parent == nodeid else (new_parent,)
        self._changed(*others, *moved, nodeid)
        for each in moved:
            self._vfs.told.note(each, 0)  # the kernel asks for its attributes again
        return _DONE

    def link(self, message: bytes, nodeid: int) -> bytes:
        (linked,) = p.U64.unpack_from(message, IN)
        made, st = self._vfs.link(linked, nodeid, _name(message, IN + p.U64.size))
        return self._made(nodeid, (made, st))

    # --- open files ---------------------------------------------------------------------------------------

    def open(self, message: bytes, nodeid: int) -> bytes:
        # Without any flag the kernel opens by itself, for FS_IOC_GETFLAGS (lsattr, backups), and reads nothing:
        # a program's open has O_LARGEFILE at least.
        flags, open_flags = p.OPEN_IN.unpack_from(message, IN)
        kill = bool(open_flags & p.OPEN_KILL_SUIDGID)
        fh, handle = self._vfs.open(nodeid, flags, _caller(message), kill, looks=not flags)
        # What it was told before holds for a second, and knows nothing of a write through a mapping, nor of
        # set-id bits that a write takes away.
        if handle.writable:
            self._outdated(nodeid)
        return p.OPEN_OUT.pack(fh, *_opened(handle))

    def create(self, message: bytes, nodeid: int) -> bytes:
        flags, mode, umask, _ = p.CREATE_IN.unpack_from(message, IN)
        name = _name(message, IN + p.CREATE_IN.size)
        made, st, fh, handle = self._vfs.create(nodeid, name, flags, mode, _caller(message, umask))
        # Although it is open for writing: nothing is mapped yet, and a write or change of size says so itself.
        self._changed(nodeid)
        return self._entry((made, st), p.ATTR_SECONDS) + p.OPEN_OUT.pack(fh, *_opened(handle))

    def tmpfile(self, message: bytes, nodeid: int) -> bytes:
        flags, mode, umask, _ = p.CREATE_IN.unpack_from(message, IN)
        made, st, fh, handle = self._vfs.tmpfile(nodeid, flags, mode, _caller(message, umask))
        return self._entry((made, st)) + p.OPEN_OUT.pack(fh, *_opened(handle))

    def read(self, message: bytes, _nodeid: int) -> bytes | Stretch:
        fh, offset, size, *_ = p.READ_IN.unpack_from(message, IN)
        if size >= LEAST:
            stretch = self._vfs.stretch(fh, offset, size)
            if stretch is not None:
                return stretch
        return self._vfs.read(fh, offset, size)

    def write(self, message: Message, _nodeid: int) -> bytes | Slow:
        fh, offset, size, write_flags, _, flags, _ = p.READ_IN.unpack_from(message, IN)
        at = IN + p.READ_IN.size
        kill = bool(write_flags & p.WRITE_KILL_SUIDGID)
        caller = _caller(bytes(message[:IN])) if kill else None
        written = self._vfs.write(fh, offset, message[at : at + size], kill, caller, flags)
        return _then(written, _written)

    def release(self, message: bytes, _nodeid: int) -> bytes:
        fh, *_ = p.RELEASE_IN.unpack_from(message, IN)
        self._vfs.release(fh)
        return _DONE

    def flush(self, message: bytes, _nodeid: int) -> bytes:
        fh, *_ = p.RELEASE_IN.unpack_from(message, IN)
        self._vfs.flush(fh)
        return _DONE

    def fsync(self, message: bytes, _nodeid: int) -> bytes | Slow:
        fh, flags, _ = p.FSYNC_IN.unpack_from(message, IN)
        return _then(self._vfs.fsync(fh, bool(flags & p.FSYNC_DATA)), _nothing)

    def fallocate(self, message: bytes, _nodeid: int) -> bytes | Slow:
        fh, offset, length, mode, _ = p.FALLOCATE_IN.unpack_from(message, IN)
        return _then(self._vfs.fallocate(fh, mode, offset, length, _caller(message)), _nothing)

    def lseek(self, message: bytes, _nodeid: int) -> bytes:
        fh, offset, whence, _ = p.LSEEK_IN.unpack_from(message, IN)
        return p.U64.pack(self._vfs.lseek(fh, offset, whence))

    def _copy(self, message: bytes) -> Slow | int:
        fh, offset, _, fh_out, offset_out, length, flags = p.COPY_IN.unpack_from(message, IN)
        return self._vfs.copy_file_range(fh, offset, fh_out, offset_out, length, flags, _caller(message))

    def copy_file_range(self, message: bytes, _nodeid: int) -> bytes | Slow:
        return _then(self._copy(message), lambda copied: p.WRITE_OUT.pack(copied, 0))

    def copy_file_range_64(self, message: bytes, _nodeid: int) -> bytes | Slow:
        return _then(self._copy(message), p.U64.pack)

    def ioctl(self, _message: bytes, _nodeid: int) -> bytes:
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    # --- directories --------------------------------------------------------------------------------------

    def opendir(self, _message: bytes, nodeid: int) -> bytes:
        if not self._opendir:
            # The kernel does not ask again, nor for a release; it reads and syncs by node, with 0 for a number.
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        # The kernel keeps the listing, and drops it when it changes the directory itself or sees another mtime.
        return p.OPEN_OUT.pack(self._vfs.opendir(nodeid), p.OPEN_KEEP_CACHE | p.OPEN_CACHE_DIR, 0)

    def _entries_from(self, nodeid: int, fh: int, offset: int) -> Iterator[Entry]:
        return self._vfs.readdir(fh, offset) if fh else self._vfs.entries(nodeid, offset)

    def readdir(self, message: bytes, nodeid: int) -> bytes:
        fh, offset, room, *_ = p.READ_IN.unpack_from(message, IN)
        entries = []
        for following, name, ino, kind in self._entries_from(nodeid, fh, offset):
            packed = p.dirent(ino, following, kind, name)
            room -= len(packed)
            if room < 0:
                break
            entries.append(packed)
        return b"".join(entries)

    def readdirplus(self, message: bytes, nodeid: int) -> bytes:
        fh, offset, room, *_ = p.READ_IN.unpack_from(message, IN)
        entries: list[bytes] = []
        counted: list[int] = []
        try:
            self._listed_with_attributes(nodeid, fh, offset, room, entries, counted)
        except BaseException:
            for each in counted:
                self._vfs.forget(each)
            raise
        return b"".join(entries)

    def _listed_with_attributes(
        self, nodeid: int, fh: int, offset: int, room: int, entries: list[bytes], counted: list[int]
    ) -> None:
        """Append to `entries` what fits, and to `counted` the nodes of which that counts a lookup."""
        quick, vfs = self._quick, self._vfs
        for following, name, ino, kind in self._entries_from(nodeid, fh, offset):
            # Room first: each entry that is packed counts a lookup.
            room -= p.DIRENT_PLUS_SIZE + (len(name) + 7 & ~7)
            if room < 0:
                break
            found = None
            if name not in _DOTS and not vfs.told_lately(nodeid, name, ino):
                found = quick(nodeid, name) or listed_entry(vfs, nodeid, name)
                if found is not None:
                    counted.append(p.U64.unpack_from(found)[0])
            entries.append(p.dirent_plus(found, ino, following, kind, name))

    def releasedir(self, message: bytes, _nodeid: int) -> bytes:
        fh, *_ = p.RELEASE_IN.unpack_from(message, IN)
        self._vfs.releasedir(fh)
        return _DONE

    def fsyncdir(self, message: bytes, nodeid: int) -> bytes | Slow:
        fh, flags, _ = p.FSYNC_IN.unpack_from(message, IN)
        datasync = bool(flags & p.FSYNC_DATA)
        return _then(self._vfs.fsyncdir(fh, datasync) if fh else self._vfs.syncdir(nodeid, datasync), _nothing)

    # --- extended attributes ------------------------------------------------------------------------------

    def getxattr(self, message: bytes, nodeid: int) -> bytes:
        size, _ = p.GETXATTR_IN.unpack_from(message, IN)
        return _sized(self._vfs.getxattr(nodeid, _name(message, IN + p.GETXATTR_IN.size)), size)

    def listxattr(self, message: bytes, nodeid: int) -> bytes:
        size, _ = p.GETXATTR_IN.unpack_from(message, IN)
        return _sized(self._vfs.listxattr(nodeid), size)

    def setxattr(self, message: bytes, nodeid: int) -> bytes:
        size, flags, more, _ = p.SETXATTR_IN.unpack_from(message, IN)
        name = _name(message, IN + p.SETXATTR_IN.size)
        at = IN + p.SETXATTR_IN.size + len(name) + 1
        kill = bool(more & p.SETXATTR_ACL_KILL_SGID)
        self._vfs.setxattr(nodeid, name, message[at : at + size], flags, kill_sgid=kill)
        self._changed(nodeid)
        return _DONE

    def removexattr(self, message: bytes, nodeid: int) -> bytes:
        self._vfs.removexattr(nodeid, message[IN:-1])
        self._changed(nodeid)
        return _DONE


def _moment(valid: int, given: int, now: int, seconds: int, nanoseconds: int) -> int | None:
    if not valid & given:
        return None
    return NOW if valid & now else seconds * _SECOND + nanoseconds


def _sized(value: bytes, size: int) -> bytes:
    """A value for a buffer of `size` bytes; 0 asks how large it has to be."""
    if size == 0:
        return p.SIZE_OUT.pack(len(value), 0)
    if len(value) > size:
        raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
    return value
