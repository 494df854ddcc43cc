"""What FUSE or TierFS cannot, and the filesystem beneath can: it is refused, or told late."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from acting import fails
from harness import Scratch, Volume
from places import Place

_FIEMAP, _GETFLAGS, _NOWAIT = 0xC020660B, 0x80086601, 8
_FREEZE = 0xC0045877
_QUOTACTL_FD, _GETFMT = 443, 0x800004 << 8  # of users
_OPEN_TREE, _CLONE = 428, 1
_MOUNT_SETATTR, _EMPTY_PATH, _IDMAP = 442, 0x1000, 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def file(place: Place) -> Path:
    path = place / "file"
    path.write_bytes(b"content")
    return path


def _ioctl(path: Path, number: int, argument: bytes) -> bytearray:
    found = bytearray(argument)
    with open(path, "rb") as opened:
        fcntl.ioctl(opened, number, found)
    return found


def _extents(path: Path) -> int:
    """How many the file has; the question reaches the filesystem, which does not have to be asked for them."""
    return int(
        struct.unpack_from("=QQLLLL", _ioctl(path, _FIEMAP, struct.pack("=QQLLLL", 0, 1 << 20, 1, 0, 0, 0)))[3]
    )


def test_extents_are_not_told(place: Place, file: Path) -> None:
    if place.volume is None:
        assert _extents(file) == 1
    else:
        fails(errno.EOPNOTSUPP, _extents, file)


def test_no_reading_without_waiting(place: Place, file: Path) -> None:
    with open(file, "rb", buffering=0) as opened:
        opened.read()
        argv = (opened.fileno(), [bytearray(7)], 0, _NOWAIT)
        if place.volume is None:
            assert os.preadv(*argv) == 7
        else:
            fails(errno.EOPNOTSUPP, os.preadv, *argv)


def test_what_is_opened_o_direct_stays_so(place: Place, file: Path, needs_root: None) -> None:
    """As `dd oflag=direct` does for its last piece. The kernel does not tell the file beneath."""
    fd = os.open(file, os.O_RDWR | os.O_DIRECT)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, 0)
        if place.binding == "kernel":
            fails(errno.EINVAL, os.pwrite, fd, b"odd", 1)
        else:
            assert os.pwrite(fd, b"odd", 1) == 3
    finally:
        os.close(fd)


def test_epoll_takes_a_file_and_tells_it_ready(place: Place, file: Path) -> None:
    with open(file, "rb") as opened, select.epoll() as poller:
        if place.volume is None:
            fails(errno.EPERM, poller.register, opened, select.EPOLLIN)
        else:
            poller.register(opened, select.EPOLLIN)
            assert poller.poll(1)[0] == (opened.fileno(), select.EPOLLIN)


def test_no_inode_flags(place: Place, file: Path) -> None:
    """chattr and lsattr: an immutable file could not be demoted, nor its stub be filled."""
    if place.volume is None:
        _ioctl(file, _GETFLAGS, bytes(8))
    else:
        fails(errno.ENOTTY, _ioctl, file, _GETFLAGS, bytes(8))


def _handle(path: Path) -> bytes:
    """A file's handle, as name_to_handle_at(2) tells it."""
    room = 128
    found, mount = ctypes.create_string_buffer(struct.pack("=Ii", room, 0), 8 + room), ctypes.c_int()
    if _libc.name_to_handle_at(-100, os.fsencode(path), found, ctypes.byref(mount), 0):
        raise OSError(ctypes.get_errno(), "name_to_handle_at")
    return found.raw


def test_no_file_handles(place: Place, file: Path) -> None:
    """They would have to outlive the mount, which knows files by numbers of its own."""
    if place.binding == "kernel":
        fails(errno.EOPNOTSUPP, _handle, file)
    else:
        assert _handle(file)


def test_a_mapping_that_outlives_its_descriptor_moves_the_times_a_second_late(place: Place, file: Path) -> None:
    """FUSE tells of the close and of no write after it: what the kernel was told before holds for a second."""
    place.needs("invalidation")  # with fusepy the kernel keeps the page itself, for half a minute
    script = """if True:
        import mmap, os, sys, time
        from ctypes import CDLL, c_char, c_long, c_void_p, POINTER, cast
        libc = CDLL(None)
        libc.mmap.restype = c_void_p
        fd = os.open(sys.argv[1], os.O_RDWR)
        view = cast(libc.mmap(None, c_long(7), 3, mmap.MAP_SHARED, fd, c_long(0)), POINTER(c_char))
        os.close(fd)
        before = os.stat(sys.argv[1]).st_mtime_ns
        time.sleep(0.02)
        view[0] = b"C"
        for _ in range(100):
            if os.stat(sys.argv[1]).st_mtime_ns > before:
                break
            time.sleep(0.02)
        else:
            raise SystemExit("the time does not move")
        """
    subprocess.run([sys.executable, "-c", script, file], timeout=60, check=True)


@pytest.fixture
def namespace() -> Iterator[int]:
    """A user namespace in which this user is root."""
    argv = ["unshare", "--user", "--map-root-user", "sh", "-c", "echo; exec sleep 60"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        fd = os.open(f"/proc/{process.pid}/ns/user", os.O_RDONLY)
        yield fd
        os.close(fd)
        process.kill()


def _mount_with_other_owners(path: Path, namespace: int) -> None:
    tree = _libc.syscall(_OPEN_TREE, -100, os.fsencode(path), _CLONE | os.O_CLOEXEC)
    assert tree >= 0
    try:
        wanted = struct.pack("=4Q", _IDMAP, 0, 0, namespace)
        if _libc.syscall(_MOUNT_SETATTR, tree, b"", _EMPTY_PATH, wanted, len(wanted)):
            raise OSError(ctypes.get_errno(), "mount_setattr")
    finally:
        os.close(tree)


def test_no_mounts_with_other_owners(place: Place, namespace: int, needs_root: None) -> None:
    """The kernel would no longer say who asks for what, but in requests that make files."""
    if place.volume is None:
        _mount_with_other_owners(place.path, namespace)
    else:
        fails(errno.EINVAL, _mount_with_other_owners, place.path, namespace)


def test_no_freezing(place: Place, file: Path, needs_root: None) -> None:
    if place.volume is not None:  # the filesystem beneath is everybody's
        fails(errno.EOPNOTSUPP, _ioctl, file, _FREEZE, bytes(4))


def _quota_format(path: Path) -> None:
    with open(path, "rb") as opened:
        if _libc.syscall(_QUOTACTL_FD, opened.fileno(), _GETFMT, 0, ctypes.create_string_buffer(4)):
            raise OSError(ctypes.get_errno(), "quotactl_fd")


def test_no_quotas(place: Place, file: Path) -> None:
    if place.volume is not None:  # whether there are any beneath is its administrator's choice
        fails(errno.ENOSYS, _quota_format, file)


def _read_moves_atime(path: Path) -> bool:
    path.write_bytes(b"content")
    os.utime(path, (1, time.time()))
    path.read_bytes()
    return path.stat().st_atime != 1


def test_attributes_of_an_open_directory_that_was_removed(place: Place) -> None:
    directory = place / "directory"
    directory.mkdir()
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        directory.rmdir()
        if place.binding == "fusepy":  # libfuse asks by the path, which is gone
            fails(errno.ENOENT, os.fstat, fd)
        else:
            assert os.fstat(fd).st_nlink == 0
    finally:
        os.close(fd)


@pytest.mark.parametrize("option", ["noatime", "strictatime"])
def test_options_about_atime_are_those_of_the_mount_beneath(
    area: Scratch, option: str, needs_root: None
) -> None:
    base = area.path / option
    base.mkdir(mode=0o755)
    volume = Volume(base, area.connections, options=("-o", option))
    volume.mount()
    try:
        assert _read_moves_atime(volume.mountpoint / "file") == _read_moves_atime(base / "file")
    finally:
        volume.discard()


def test_fusepy_mounts_with_the_options_that_libfuse_does_not_know(area: Scratch, needs_root: None) -> None:
    base = area.path / "libfuse"
    base.mkdir(mode=0o755)
    known = "defaults,nofail,x-systemd.automount,relatime,nodiratime,strictatime,ro,noexec,suid"
    volume = Volume(base, area.connections, options=("--binding", "fusepy", "-o", known))
    volume.mount()
    try:
        table = next(line for line in Path("/proc/mounts").read_text().splitlines() if str(base) in line)
        shown = set(table.split()[3].split(","))
        assert {"ro", "noexec", "nodev"} <= shown and "nosuid" not in shown
    finally:
        volume.discard()


def test_fusepy_says_that_it_cannot_keep_links_from_being_followed(area: Scratch, needs_root: None) -> None:
    base = area.path / "links"
    base.mkdir(mode=0o755)
    volume = Volume(base, area.connections, options=("--binding", "fusepy", "-o", "nosymfollow"))
    try:
        done = volume.mount(check=False)
        assert done.returncode == 1 and "nosymfollow: libfuse 2 cannot: use --binding kernel" in done.stderr
    finally:
        volume.discard()


FEW = 1024  # descriptors: fewer than a home has directories


@pytest.mark.parametrize("binding", ["kernel", "fusepy"])
def test_what_is_kept_for_speed_takes_no_descriptor_from_open_files(
    area: Scratch, needs_root: None, binding: str
) -> None:
    """As a service manager or a container may limit it: what is known of directories, and of files that were
    open, gives way."""
    base = area.path / "few"
    base.mkdir()
    limited = ("setpriv", "--bounding-set=-sys_resource", "prlimit", f"--nofile={FEW}:{FEW}")
    volume = Volume(base, area.connections, options=("--binding", binding))
    volume.program = (*limited, *volume.program)
    opened: list[int] = []
    try:
        volume.mount()
        for number in range(FEW + 100):
            directory = volume.mountpoint / f"d{number}"
            directory.mkdir()
            (directory / "file").write_bytes(b"content")
        for number in range(FEW + 100):
            assert (volume.mountpoint / f"d{number}" / "file").read_bytes() == b"content"
        most = FEW - FEW // 8 - 100 if binding == "kernel" else FEW // 4
        for number in range(most):
            opened.append(os.open(volume.mountpoint / f"d{number}" / "file", os.O_RDONLY))
        assert [os.read(fd, 100) for fd in opened] == [b"content"] * most
    finally:
        for fd in opened:
            os.close(fd)
        volume.discard()


def test_how_many_descriptors_open_files_take(place: Place) -> None:
    """One of the mount server's each, two where they have no name: so many can be open at once."""
    if place.binding != "kernel":
        pytest.skip("the limit is the mount server's, and libfuse keeps names for such files")
    assert place.volume is not None
    server = place.volume.status()["pids"]["server"]

    def held() -> int:
        """Of files in this place: a link names the backing tree's path, `(deleted)` where it has none."""
        mine = f"/{place.path.name}/"
        found = 0
        for link in Path(f"/proc/{server}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                found += mine in os.readlink(link)
        return found

    opened = [os.open(place / f"f{number}", os.O_RDWR | os.O_CREAT) for number in range(40)]
    try:
        named = held()
        for number in range(40):
            os.unlink(place / f"f{number}")
        nameless = held()
    finally:
        for fd in opened:
            os.close(fd)
    assert (named, nameless) == (40, 80)
