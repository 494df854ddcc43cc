"""Mounting, unmounting and the kernel's switches of one mount. Never touches what is mounted.

As root by mount(2), otherwise through fusermount3, which is set-user-id. The mount table then shows the source
`tierfs#<volume id>` and the type `fuse.tierfs`; the command line finds volumes by these.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import logging
import os
import re
import select
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tierfs import locate
from tierfs.errors import UsageError, VolumeError
from tierfs.locate import FSTYPE, SOURCE_PREFIX

log = logging.getLogger("mount")

READ_AHEAD_KB = 1024  # the kernel's default of 128 is too little for a file that is on its way in
_DEVICE = "/dev/fuse"
_TOOL = "fusermount3"
_TOOL_SECONDS = 30.0
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8

_MS_NOSUID, _MS_NODEV = 2, 4
_SETS = {
    "ro": 1, "nosuid": _MS_NOSUID, "nodev": _MS_NODEV, "noexec": 8, "sync": 16, "dirsync": 128, "noatime": 1024,
    "nodiratime": 2048, "relatime": 1 << 21, "strictatime": 1 << 24, "nosymfollow": 256,
}  # fmt: skip
_CLEARS = {
    "rw": 1, "suid": _MS_NOSUID, "dev": _MS_NODEV, "exec": 8, "async": 16, "atime": 1024, "diratime": 2048,
    "norelatime": 1 << 21, "nostrictatime": 1 << 24, "symfollow": 256,
}  # fmt: skip
_IMPLIED = frozenset({"default_permissions", "defaults", "auto", "noauto", "user", "nofail", "_netdev"})

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Options:
    """Parsed `-o` options. `flags` are those of mount(2)."""

    flags: int
    allow_other: bool
    names: tuple[str, ...]

    def has(self, name: str) -> bool:
        """Whether an option that sets something holds, such as `nosuid`."""
        return bool(self.flags & _SETS[name])


def parse_options(options: Iterable[str]) -> Options:
    """nosuid and nodev hold unless suid, dev are given. Raises UsageError for an unknown option."""
    flags, allow_other, names = _MS_NOSUID | _MS_NODEV, False, []
    for name in options:
        if name in _SETS:
            flags |= _SETS[name]
        elif name in _CLEARS:
            flags &= ~_CLEARS[name]
        elif name == "allow_other":
            allow_other = True
            continue
        elif name in _IMPLIED or name.startswith("x-"):
            continue
        else:
            known = ", ".join(sorted({*_SETS, *_CLEARS}))
            raise UsageError(f"-o {name}: unknown mount option: use {known} or allow_other")
        if name in ("suid", "dev") and os.geteuid() != 0:
            raise UsageError(f"-o {name}: only root may mount so: leave it out")
        names.append(name)
    return Options(flags, allow_other, tuple(names))


def mount(mountpoint: str, volume: str, options: Iterable[str] = ()) -> int:
    """Mount a volume's session at an absolute path; the descriptor to serve. Raises VolumeError, UsageError.

    Nothing that touches the mountpoint returns before the descriptor is served.
    """
    parsed = parse_options(options)
    fd = _mount_as_root(mountpoint, volume, parsed) if os.geteuid() == 0 else _mount_by_tool(
        mountpoint, volume, parsed
    )  # fmt: skip
    _raise_read_ahead(mountpoint)
    return fd


def check_device() -> None:
    """Raises VolumeError where Linux has no FUSE device, or not for us: libfuse would name a number."""
    if sys.platform == "linux":
        os.close(_open_device())


def _open_device() -> int:
    try:
        return os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            raise VolumeError(f"{_DEVICE} is missing: install fuse3, or run `modprobe fuse` as root") from exc
        raise VolumeError(f"{_DEVICE}: {exc.strerror}: this machine or container does not permit FUSE") from exc


def _mount_as_root(mountpoint: str, volume: str, options: Options) -> int:
    fd = _open_device()
    try:
        kind = stat.S_IFMT(os.stat(mountpoint).st_mode)
        data = f"fd={fd},rootmode={kind:o},user_id=0,group_id=0,allow_other,default_permissions"
        source = f"{SOURCE_PREFIX}{volume}"
        arguments = (source.encode(), os.fsencode(mountpoint), FSTYPE.encode())
        if _libc.mount(*arguments, ctypes.c_ulong(options.flags), data.encode()) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    except OSError as exc:
        os.close(fd)
        if exc.errno == errno.EPERM:
            raise VolumeError(f"{mountpoint}: mounting is not permitted here: CAP_SYS_ADMIN is needed") from exc
        if exc.errno == errno.ENODEV:
            raise VolumeError("the kernel has no FUSE: install fuse3, or run `modprobe fuse`") from exc
        raise VolumeError(f"{mountpoint}: cannot be mounted: {exc.strerror}") from exc
    return fd


def _mount_by_tool(mountpoint: str, volume: str, options: Options) -> int:
    tool = _tool()
    os.close(_open_device())
    given = [f"fsname={SOURCE_PREFIX}{volume}", "subtype=tierfs", "default_permissions", *options.names]
    if options.allow_other:
        given.append("allow_other")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        done = subprocess.run(
            [tool, "-o", ",".join(given), "--", mountpoint],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TOOL_SECONDS,
        )
        if done.returncode:
            raise VolumeError(f"{mountpoint}: cannot be mounted: {_said(done)}{_hint(mountpoint)}")
        ours.setblocking(False)
        return _received(ours, mountpoint)


def _received(sock: socket.socket, mountpoint: str) -> int:
    try:
        _, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(4))
    except BlockingIOError as exc:
        raise VolumeError(f"{mountpoint}: {_TOOL} sent no descriptor: is it that of fuse3?") from exc
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fd = array.array("i", payload[:4])[0]
            os.set_inheritable(fd, False)
            return fd
    raise VolumeError(f"{mountpoint}: {_TOOL} sent no descriptor: is it that of fuse3?")


def _tool() -> str:
    found = shutil.which(_TOOL)
    if found is None:
        raise VolumeError(f"{_TOOL} is missing: install fuse3")
    return found


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    """The tool's complaint on one line, without its own name."""
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    said = lines[-1] if lines else "failed without a word"
    return re.sub(rf"^(\S*/)?{_TOOL}: ", "", said)


def _hint(mountpoint: str) -> str:
    """The kernel keeps the tool, as any other user, out of a mount of FUSE that is its user's alone."""
    inside = [mount for mount in locate.read_mounts() if locate.is_under(mountpoint, mount.mountpoint)]
    above = max(inside, key=lambda mount: len(mount.mountpoint), default=None)
    if above is None or not above.fstype.startswith("fuse"):
        return ""
    return f": it lies in {above.mountpoint}, a mount in which only root can mount others: choose another place"


def unmount(mountpoint: str, lazy: bool = False) -> None:
    """Unmount; `lazy`: out of the tree at once, in earnest when nothing is open. Raises OSError: EBUSY."""
    if os.geteuid() == 0:
        flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
        if _libc.umount2(os.fsencode(mountpoint), flags) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), mountpoint)
        return
    command = [_tool(), "-u", *(["-z"] if lazy else []), "--", mountpoint]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TOOL_SECONDS)
    if done.returncode:
        said = _said(done)
        number = errno.EBUSY if "busy" in said.lower() else errno.EINVAL
        raise OSError(number, said, mountpoint)


# --- the kernel's tables and switches ----------------------------------------------------------------------


def _mountinfo() -> Iterator[tuple[str, str, str, str]]:
    """(mountpoint, major:minor, type, source) of each mount, as the table spells them."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.split(" ")
            kind, source = fields[(end := fields.index("-", 6)) + 1 : end + 3]
            yield fields[4], fields[2], kind, source


def _spelt(text: str, special: str = " \t\n\\") -> str:
    return "".join(f"\\{ord(c):03o}" if c in special else c for c in text)


def filesystem_of(device: int) -> str:
    """The type of the filesystem with this st_dev; "" where the mount table does not tell (btrfs)."""
    number = f"{os.major(device)}:{os.minor(device)}"
    return next((kind for _, found, kind, _ in _mountinfo() if found == number), "")


def device_of(mountpoint: str) -> str | None:
    """The major:minor of the topmost mount at an absolute path, read without touching it."""
    spelt = _spelt(mountpoint)
    found = None
    for where, number, _, _ in _mountinfo():
        if where == spelt:
            found = number
    return found


def _raise_read_ahead(mountpoint: str) -> None:
    number = device_of(mountpoint)
    if number is None or os.geteuid() != 0:
        return
    try:
        with open(f"/sys/class/bdi/{number}/read_ahead_kb", "w", encoding="ascii") as file:
            file.write(str(READ_AHEAD_KB))
    except OSError as error:
        # Only slower: a container may have /sys read-only.
        log.info("%s: read-ahead stays as it is: %s", mountpoint, error)


def devices_of(volume: str) -> set[str]:
    """The major:minor of this volume's mounts, read without touching them."""
    source = _spelt(f"{SOURCE_PREFIX}{volume}", "#")
    return {device for _, device, kind, said in _mountinfo() if (kind, said) == (FSTYPE, source)}


def abort_volume(volume: str) -> None:
    """Abort the connection of this volume's mount. Raises OSError."""
    for device in devices_of(volume):
        abort(device)


def is_connected(fuse_fd: int) -> bool:
    """Whether the kernel still has the filesystem: until then its number is no other's."""
    poll = select.poll()
    poll.register(fuse_fd, 0)
    return not poll.poll(0)


def abort(device: str) -> None:
    """Abort the FUSE connection of this major:minor: who waits for its server gets ENOTCONN. Raises OSError."""
    minor = device.partition(":")[2]
    standard = f"/sys/fs/fuse/connections/{minor}/abort"
    with contextlib.ExitStack() as stack:
        path = standard if os.path.exists(standard) else f"{_private_fusectl(stack)}/{minor}/abort"
        with open(path, "w", encoding="ascii") as file:
            file.write("1")


def _private_fusectl(stack: contextlib.ExitStack) -> str:
    where = stack.enter_context(tempfile.TemporaryDirectory(prefix="tierfs-fusectl-"))
    if _libc.mount(b"none", os.fsencode(where), b"fusectl", ctypes.c_ulong(0), None) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), where)
    stack.callback(_libc.umount2, os.fsencode(where), _MNT_DETACH)
    return where
