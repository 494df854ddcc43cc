"""The backing tree: stub and pin attributes, file handles, leases, extents, times; the only punch.

A descriptor given here may be O_PATH unless it says otherwise: such ones are reached through /proc/self/fd.
Nothing here decides anything; see tier.py for what may be destroyed, gate.py for who may open what.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tierfs import syscalls
from tierfs.errors import ForeignStubError
from tierfs.lent import Lent
from tierfs.model import Stub

_ABSENT = frozenset({errno.ENODATA, errno.EOPNOTSUPP})
_CAPABILITY = "security.capability"
# Bytes written at once. ext4 takes folios as large as the write, and beyond 1 MiB those are memory that a
# virtual machine has given back to its host: to get it again costs four times what copying does.
_PIECE = 1 << 20
_CAP_SYS_ADMIN = 21
_ATTEMPTS = 10
_NO_HANDLE = struct.Struct("<iQq")  # type, inode number, time of birth
_NO_HANDLE_TYPE = struct.pack("<i", -1)
_WHOLE_UID_MAP = [0, 0, 0xFFFFFFFF]


def fd_path(fd: int) -> str:
    """A path that means the descriptor's own inode, O_PATH or a symlink's included."""
    return f"/proc/self/fd/{fd}"


def drop_set_id(opath: int, is_member: Callable[[int], bool] = lambda gid: True) -> None:
    """Take set-user-id and set-group-id from a file that somebody changes.

    The latter stays where the group may not execute, if whoever changes it is a member of the group.
    """
    st = os.fstat(opath)
    mode = st.st_mode
    drop = mode & stat.S_ISUID
    if mode & stat.S_ISGID and (mode & stat.S_IXGRP or not is_member(st.st_gid)):
        drop |= stat.S_ISGID
    if drop:
        os.chmod(fd_path(opath), stat.S_IMODE(mode) & ~drop)


@dataclass(frozen=True, slots=True)
class Space:
    """Room on the backing filesystem in bytes. `available`: without the superuser's reserve."""

    total: int
    free: int
    available: int


class Tree:
    """An open backing tree. Its descriptors are close-on-exec; safe to use from several threads."""

    def __init__(self, path: str) -> None:
        """Raises OSError where `path` is no directory that can be read."""
        self.path = path
        # Not O_PATH: open_by_handle_at and syncfs need a real one.
        self.rootfd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        st = os.fstat(self.rootfd)
        self.root_ino = st.st_ino
        self.device = st.st_dev
        self.privileged = self._is_privileged()
        self._allocates = True
        # Unprivileged, only user.* can be set; a longer name would spill the stub out of its inode.
        self.namespace = "trusted" if self.privileged else "user"
        self.stub_name = f"{self.namespace}.tierfs"
        self.pin_name = f"{self.namespace}.tierfs_pin"
        self.lent = Lent(f"{path}.lent", self.handle_of)

    def close(self) -> None:
        """Close the root."""
        os.close(self.rootfd)

    def _is_privileged(self) -> bool:
        """May set trusted.* and open by handle: root in the initial user namespace."""
        if os.geteuid() != 0:
            return False
        with open("/proc/self/uid_map", encoding="ascii") as file:
            if [int(field) for field in file.read().split()] != _WHOLE_UID_MAP:
                return False
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            effective = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
        if not effective >> _CAP_SYS_ADMIN & 1:
            return False
        try:
            os.close(self.open_handle(self.handle_of(self.rootfd), os.O_PATH))
        except OSError:
            return False  # a filesystem without file handles: hints of parent and name must do
        return True

    # --- identity and opening -----------------------------------------------------------------------------

    def handle_of(self, fd: int) -> bytes:
        """The kernel's file handle: type (4 bytes, little endian) and bytes. It ends with the inode.

        On a filesystem that has none (overlayfs mostly): type -1, inode number and time of birth.
        """
        return self.handle_at(fd, b"")

    def handle_at(self, dirfd: int, name: bytes) -> bytes:
        """The file handle of a name in a directory, symlinks not followed."""
        try:
            return syscalls.name_to_handle(dirfd, name)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
        st = os.stat(name, dir_fd=dirfd, follow_symlinks=False) if name else os.fstat(dirfd)
        return _NO_HANDLE.pack(-1, st.st_ino, syscalls.birth_time(dirfd, name) or 0)

    def open_handle(self, handle: bytes, flags: int) -> int:
        """Open by file handle. Raises OSError: ESTALE when it is gone, EPERM where none can be."""
        if handle.startswith(_NO_HANDLE_TYPE):
            raise PermissionError(errno.EPERM, "this filesystem opens nothing by handle")
        return syscalls.open_by_handle(self.rootfd, handle, flags)

    def open_at(self, path: bytes, handle: bytes, flags: int, above: int = -1) -> int:
        """Open by its path beneath the root (b"": that), or another directory, what has this file handle.

        Raises OSError: ESTALE where something else is there."""
        fd = os.open(path or b".", flags | os.O_CLOEXEC, dir_fd=self.rootfd if above < 0 else above)
        try:
            if self.handle_of(fd) != handle:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        except OSError:
            os.close(fd)
            raise
        return fd

    def reopen(self, fd: int, flags: int) -> int:
        """Another descriptor of the same inode. Raises OSError."""
        return os.open(fd_path(fd), flags | os.O_CLOEXEC)

    # --- stub and pin attributes --------------------------------------------------------------------------

    def read_stub(self, fd: int) -> Stub | None:
        """What the stub attribute says; None without one. Raises ForeignStubError for an unknown format."""
        raw = self._xattr(fd, self.stub_name)
        if raw is None:
            return None
        try:
            return Stub.unpack(raw)
        except ValueError as exc:
            raise ForeignStubError(f"inode {os.fstat(fd).st_ino}: {exc}") from exc

    @contextmanager
    def lending(self, fd: int, bits: int) -> Iterator[None]:
        """Let an owner without privileges do what the file's mode refuses him. Moves ctime where it had to.

        Raises OSError."""
        if self.privileged or os.fstat(fd).st_mode & bits == bits:
            yield
            return
        with self.lent.lending(fd, fd_path(fd), bits):
            yield

    def write_stub(self, fd: int, stub: Stub) -> None:
        """Set the stub attribute (not synced). Raises OSError."""
        os.setxattr(fd_path(fd), self.stub_name, stub.pack())

    def clear_stub(self, fd: int) -> None:
        """Remove the stub attribute if there is one (not synced: fsync, since fdatasync does not commit it)."""
        self._remove(fd, self.stub_name)

    def set_pin(self, fd: int, on: bool) -> None:
        """Mark a file or directory as pinned itself, or not. Raises OSError."""
        if on:
            os.setxattr(fd_path(fd), self.pin_name, b"1")
        else:
            self._remove(fd, self.pin_name)

    def is_pinned(self, fd: int) -> bool:
        """The file or directory is pinned itself, whatever its ancestors are."""
        return self.has_xattr(fd, self.pin_name)

    def has_xattr(self, fd: int, name: str) -> bool:
        """The inode has this extended attribute."""
        return self._xattr(fd, name) is not None

    def _xattr(self, fd: int, name: str) -> bytes | None:
        with suppress(PermissionError):
            return self._present(fd_path(fd), name)
        # user.* asks for the right to read, which even the owner may lack. Others who do this may end first.
        for _ in range(_ATTEMPTS):
            with self.lending(fd, stat.S_IRUSR), suppress(PermissionError):
                return self._present(fd_path(fd), name)
        return self._present(fd_path(fd), name)

    def _present(self, place: str | int, name: str) -> bytes | None:
        try:
            return os.getxattr(place, name)
        except OSError as error:
            # user.* on a special file is refused altogether.
            if error.errno in _ABSENT or error.errno == errno.EPERM:
                return None
            raise

    def _remove(self, fd: int, name: str) -> None:
        try:
            os.removexattr(fd_path(fd), name)
        except OSError as error:
            if error.errno not in _ABSENT:
                raise

    # --- blocks and times ---------------------------------------------------------------------------------

    def punch(self, fd: int, st: os.stat_result) -> None:
        """Free every block of the file, size kept. `fd` is writable, `st` its fresh stat. Raises OSError.

        Preallocated blocks behind the end of file go too (custody rule 7). Moves mtime and ctime.
        """
        if st.st_blocks == 0:
            return
        unit = max(st.st_blksize, os.sysconf("SC_PAGESIZE"))
        length = -(-(st.st_size + st.st_blocks * 512) // unit) * unit
        mode = syscalls.FALLOC_PUNCH_HOLE | syscalls.FALLOC_KEEP_SIZE
        with self.keeping_privileges(fd):
            syscalls.fallocate(fd, mode, 0, length)
            # ext4 punches up to the page of the size only; cutting at the size frees what lies behind it.
            # What is left in an ordinary file is a block of extended attributes.
            if os.fstat(fd).st_blocks:
                os.ftruncate(fd, st.st_size)

    def allocate(self, fd: int, start: int, length: int) -> None:
        """Get blocks for what is about to be written, where the filesystem can. Page by page, as it is written,
        ext4 takes half as long for that as for the copying. Moves mtime and ctime. Raises OSError."""
        if not self._allocates:
            return
        try:
            syscalls.fallocate(fd, syscalls.FALLOC_KEEP_SIZE, start, length)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._allocates = False

    @contextmanager
    def keeping_privileges(self, fd: int) -> Iterator[None]:
        """Set-id bits and file capabilities, which the kernel takes from a file that is written, come back.

        For our own writes of content that the file already had. Raises OSError.
        """
        mode = os.fstat(fd).st_mode
        # By the descriptor: to look its name up in /proc would take as long as all else around the write.
        capability = self._present(fd, _CAPABILITY)
        try:
            yield
        finally:
            now = os.fstat(fd).st_mode
            lost = mode & ~now & (stat.S_ISUID | stat.S_ISGID)
            if lost:  # and nothing else: its owner may have changed the mode meanwhile
                os.chmod(fd_path(fd), stat.S_IMODE(now) | lost)
            if capability is not None and self._present(fd, _CAPABILITY) is None:
                os.setxattr(fd_path(fd), _CAPABILITY, capability)

    def set_mtime(self, fd: int, mtime_ns: int) -> None:
        """Set the modification time of an open file and leave the other to whoever uses it. Raises OSError."""
        times = (0, syscalls.UTIME_OMIT, *divmod(mtime_ns, 1_000_000_000))
        syscalls.futimens(fd, times)

    def set_times(self, fd: int, atime_ns: int, mtime_ns: int) -> None:
        """Set both times; ctime moves. Raises OSError."""
        os.utime(fd_path(fd), ns=(atime_ns, mtime_ns))

    def extents(self, fd: int, size: int) -> list[tuple[int, int]]:
        """The data ranges [start, end) of a file open for reading, below `size`; moves its position."""
        found: list[tuple[int, int]] = []
        at = 0
        while at < size:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
                if start >= size:
                    break
                # Beyond the end too, where somebody truncates the file meanwhile.
                at = min(os.lseek(fd, start, os.SEEK_HOLE), size)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break
                raise
            found.append((start, at))
        return found

    def read_anew(self, fd: int) -> None:
        """Let go of what memory holds of the file and the disk should: what is read next is what is there. Of a
        write that failed the pages stay in memory and look written, and before blocks that were never written
        zeros that were read count as data (`extents`). Raises OSError."""
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def space(self) -> Space:
        """Room on the backing filesystem."""
        fs = os.fstatvfs(self.rootfd)
        return Space(fs.f_blocks * fs.f_frsize, fs.f_bfree * fs.f_frsize, fs.f_bavail * fs.f_frsize)

    def sync(self) -> None:
        """Make the whole backing filesystem durable. Raises OSError."""
        syscalls.syncfs(self.rootfd)

    # --- leases -------------------------------------------------------------------------------------------

    def try_lease(self, fd: int, kind: int) -> bool:
        """Take F_RDLCK (nobody writes) or F_WRLCK (nobody has it open or mapped); False where that is not so.

        `fd` is not O_PATH. Raises OSError where leases are not to be had at all.
        """
        # The default signal of a broken lease, SIGIO, would end the process; SIGURG is ignored.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, kind)
        except BlockingIOError:
            return False
        return True

    def lease_kind(self, fd: int) -> int:
        """F_RDLCK, F_WRLCK or F_UNLCK; during a break what the lease is being broken to."""
        return fcntl.fcntl(fd, fcntl.F_GETLEASE)

    def unlease(self, fd: int) -> None:
        """Give the lease back. Raises OSError."""
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def open_tree(path: str) -> Tree:
    """Open the backing tree at `path`. Raises OSError."""
    return Tree(path)


def pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`. Raises OSError, also where the disk fills up on the way."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view[:_PIECE], offset)
        view = view[written:]
        offset += written
