"""Names: what each operation refuses and how, renames in all their cases, links, long and deep paths."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from acting import fails
from places import Place

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
libc = ctypes.CDLL(None, use_errno=True)
LONG = "n" * 256
Call = Callable[[Path], Any]


def touch(path: Path, flags: int = 0) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | flags, 0o644))


def rename2(old: Path, new: Path, flags: int) -> None:
    if libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags):
        raise OSError(ctypes.get_errno(), "renameat2")


def bind(path: Path) -> None:
    """Make a socket. Its path must be short: through the directory's descriptor."""
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{fd}/{path.name}")
    finally:
        os.close(fd)


MAKES: dict[str, Call] = {
    "file": touch,
    "directory": os.mkdir,
    "symlink": lambda path: os.symlink("target", path),
    "fifo": os.mkfifo,
    "socket": bind,
}
# Each operation on a path whose other arguments are good.
OPERATIONS: dict[str, Call] = {
    "open": lambda path: os.close(os.open(path, os.O_RDONLY)),
    "stat": os.stat,
    "lstat": os.lstat,
    "chmod": lambda path: os.chmod(path, 0o600),
    "chown": lambda path: os.chown(path, -1, -1),
    "utime": os.utime,
    "truncate": lambda path: os.truncate(path, 0),
    "readlink": os.readlink,
    "listdir": os.listdir,
    "unlink": os.unlink,
    "rmdir": os.rmdir,
    "rename": lambda path: os.rename(path, path.parent / "other"),
    "link": lambda path: os.link(path, path.parent / "other"),
    "getxattr": lambda path: os.getxattr(path, "user.a"),
    "setxattr": lambda path: os.setxattr(path, "user.a", b"b"),
    "statvfs": os.statvfs,
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_not_there(place: Place, operation: str) -> None:
    fails(errno.ENOENT, OPERATIONS[operation], place / "nothing")
    fails(errno.ENOENT, OPERATIONS[operation], place / "nothing" / "below")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_file_is_no_directory(place: Place, operation: str) -> None:
    touch(place / "file")
    fails(errno.ENOTDIR, OPERATIONS[operation], place / "file" / "below")


@pytest.mark.parametrize("operation", {**OPERATIONS, **MAKES})
def test_names_that_are_too_long(place: Place, operation: str) -> None:
    call = {**OPERATIONS, **MAKES}[operation]
    if operation != "socket":
        fails(errno.ENAMETOOLONG, call, place / LONG)
        fails(errno.ENAMETOOLONG, call, Path(f"{place.path}/{'d/' * 2100}x"))
    fails(errno.ENAMETOOLONG, os.rename, place.path, place / LONG)


@pytest.mark.parametrize("operation", sorted(OPERATIONS.keys() - {"lstat", "unlink", "rename", "link"}))
def test_symlinks_in_a_circle(place: Place, operation: str) -> None:
    os.symlink("b", place / "a")
    os.symlink("a", place / "b")
    follows = operation not in ("readlink", "rmdir")
    if follows:
        fails(errno.ELOOP, OPERATIONS[operation], place / "a")
    fails(errno.ELOOP, OPERATIONS[operation], place / "a" / "below")


@pytest.mark.parametrize("there", MAKES)
@pytest.mark.parametrize("make", MAKES)
def test_nothing_is_made_over_a_name(place: Place, there: str, make: str) -> None:
    MAKES[there](place / "name")
    before = (place / "name").lstat()
    number = errno.EADDRINUSE if make == "socket" else errno.EEXIST
    call = (lambda path: touch(path, os.O_EXCL)) if make == "file" else MAKES[make]
    fails(number, call, place / "name")
    touch(place / "other")
    fails(errno.EEXIST, os.link, place / "other", place / "name")
    assert (place / "name").lstat().st_ino == before.st_ino


def test_a_255_byte_name_goes_through_everything(place: Place) -> None:
    old, new = place / ("a" * 255), place / ("ü" * 127 + "b")
    touch(old)
    os.rename(old, new)
    os.link(new, old)
    os.unlink(new)
    (place / ("d" * 255)).mkdir()
    os.rename(old, place / ("d" * 255) / ("a" * 255))
    assert os.listdir(place / ("d" * 255)) == ["a" * 255]


def test_paths_deeper_than_path_max(place: Place) -> None:
    """By relative steps: a whole path of them could not be passed."""
    name, depth = "d" * 200, 40
    fds = [os.open(place.path, os.O_RDONLY)]
    try:
        for _ in range(depth):
            os.mkdir(name, dir_fd=fds[-1])
            fds.append(os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fds[-1]))
        fd = os.open("file", os.O_RDWR | os.O_CREAT, dir_fd=fds[-1])
        os.write(fd, b"deep")
        os.close(fd)
        assert os.stat("file", dir_fd=fds[-1]).st_size == 4
        os.rename("file", "moved", src_dir_fd=fds[-1], dst_dir_fd=fds[1])
        os.unlink("moved", dir_fd=fds[1])
        assert os.listdir(fds[-1]) == []
    finally:
        while len(fds) > 1:
            os.close(fds.pop())
            os.rmdir(name, dir_fd=fds[-1])
        os.close(fds.pop())


def test_link_counts(place: Place) -> None:
    (place / "d").mkdir()
    assert (place / "d").stat().st_nlink == 2
    (place / "d" / "below").mkdir()
    (place / "e").mkdir()
    assert ((place / "d").stat().st_nlink, place.path.stat().st_nlink) == (3, 4)
    os.rename(place / "d" / "below", place / "e" / "below")
    assert [(place / name).stat().st_nlink for name in "de"] == [2, 3]
    (place / "e" / "below").rmdir()
    assert (place / "e").stat().st_nlink == 2
    touch(place / "f")
    os.link(place / "f", place / "g")
    os.link(place / "g", place / "d" / "h")
    assert (place / "f").stat().st_nlink == 3
    touch(place / "over")
    os.rename(place / "over", place / "g")
    assert (place / "f").stat().st_nlink == 2
    os.unlink(place / "f")
    assert (place / "d" / "h").stat().st_nlink == 1


def test_directories_are_not_linked_and_files_not_removed_as_such(place: Place) -> None:
    (place / "d").mkdir()
    touch(place / "f")
    fails(errno.EPERM, os.link, place / "d", place / "e")
    fails(errno.EISDIR, os.unlink, place / "d")
    fails(errno.ENOTDIR, os.rmdir, place / "f")
    fails(errno.EISDIR, os.open, place / "d", os.O_WRONLY)
    fails(errno.EISDIR, os.truncate, place / "d", 0)
    fails(errno.EINVAL, os.readlink, place / "f")
    fails(errno.EINVAL, os.truncate, place / "f", -1)
    fails(errno.ENOTDIR, os.open, place / "f", os.O_RDONLY | os.O_DIRECTORY)
    (place / "d" / "x").mkdir()
    fails(errno.ENOTEMPTY, os.rmdir, place / "d")
    fails(errno.EINVAL, os.rmdir, f"{place.path}/d/.")
    fails(errno.ENOTEMPTY, os.rmdir, f"{place.path}/d/x/..")
    os.symlink("f", place / "l")
    fails(errno.ELOOP, os.open, place / "l", os.O_RDONLY | os.O_NOFOLLOW)
    fails(errno.EXDEV, os.rename, place / "f", "/dev/shm/tierfs-no-such-name")
    fails(errno.EXDEV, os.link, place / "f", "/dev/shm/tierfs-no-such-name")


@pytest.mark.parametrize("old", ["file", "directory", "symlink", "fifo"])
@pytest.mark.parametrize("new", [None, "file", "directory", "full", "symlink", "fifo"])
def test_rename_over(place: Place, old: str, new: str | None) -> None:
    MAKES[old](place / "old")
    if new is not None:
        MAKES["directory" if new == "full" else new](place / "new")
    if new == "full":
        touch(place / "new" / "x")
    before = (place / "old").lstat()
    directories = (old == "directory", new in ("directory", "full"))
    if new is not None and directories == (True, False):
        fails(errno.ENOTDIR, os.rename, place / "old", place / "new")
    elif directories == (False, True):
        fails(errno.EISDIR, os.rename, place / "old", place / "new")
    elif new == "full":
        fails(errno.ENOTEMPTY, os.rename, place / "old", place / "new")
    else:
        os.rename(place / "old", place / "new")
        after = (place / "new").lstat()
        assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
        assert not os.path.lexists(place / "old")
        assert os.listdir(place.path) == ["new"]
        return
    assert (place / "old").lstat().st_ino == before.st_ino


def test_rename_of_a_directory(place: Place) -> None:
    (place / "a" / "b").mkdir(parents=True)
    touch(place / "a" / "b" / "f")
    fails(errno.EINVAL, os.rename, place / "a", place / "a" / "b" / "c")
    fails(errno.EINVAL, os.rename, place / "a", place / "a" / "x")
    fails(errno.ENOTEMPTY, os.rename, place / "a" / "b", place / "a")
    os.rename(place / "a", place / "a")
    fd = os.open(place / "a" / "b" / "f", os.O_RDWR)
    try:
        (place / "to").mkdir()
        os.rename(place / "a", place / "to" / "c")
        os.write(fd, b"through a directory that moved")
        assert (place / "to" / "c" / "b" / "f").stat().st_size == 30
        os.rename(place / "to" / "c" / "b", place / "b")
        assert (place / "b" / ".." / "to" / "c").exists()
    finally:
        os.close(fd)


def test_rename_of_two_names_of_one_file_changes_nothing(place: Place) -> None:
    touch(place / "a")
    os.link(place / "a", place / "b")
    os.rename(place / "a", place / "b")
    assert sorted(os.listdir(place.path)) == ["a", "b"]


def test_rename_flags(place: Place) -> None:
    place.needs("rename flags")
    (place / "a").write_text("a")
    (place / "b").write_text("b")
    (place / "d").mkdir()
    touch(place / "d" / "x")
    fails(errno.EEXIST, rename2, place / "a", place / "b", NOREPLACE)
    fails(errno.EINVAL, rename2, place / "a", place / "b", NOREPLACE | EXCHANGE)
    fails(errno.ENOENT, rename2, place / "a", place / "none", EXCHANGE)
    fails(errno.EINVAL, rename2, place / "d", place / "d" / "x", EXCHANGE)
    rename2(place / "a", place / "b", EXCHANGE)
    assert ((place / "a").read_text(), (place / "b").read_text()) == ("b", "a")
    rename2(place / "a", place / "d", EXCHANGE)
    assert (place / "a" / "x").exists()
    assert (place / "d").read_text() == "b"
    rename2(place / "d", place / "e", NOREPLACE)
    assert sorted(os.listdir(place.path)) == ["a", "b", "e"]


def test_whiteout(place: Place, needs_root: None) -> None:
    place.needs("rename flags")
    touch(place / "a")
    rename2(place / "a", place / "b", WHITEOUT)
    found = (place / "a").lstat()
    assert stat.S_ISCHR(found.st_mode)
    assert found.st_rdev == 0


def test_unlinked_but_open(place: Place) -> None:
    for replaced in (False, True):
        path = place / "f"
        path.write_bytes(b"content")
        fd = os.open(path, os.O_RDWR)
        try:
            if replaced:
                (place / "new").write_bytes(b"new")
                os.rename(place / "new", path)
            else:
                os.unlink(path)
            os.pwrite(fd, b"more", 7)
            os.ftruncate(fd, 9)
            os.fchmod(fd, 0o600)
            os.utime(fd, ns=(1, 2))
            found = os.fstat(fd)
            assert (found.st_size, found.st_mtime_ns, found.st_mode & 0o777) == (9, 2, 0o600)
            assert os.pread(fd, 20, 0) == b"contentmo"
            assert path.exists() == replaced
        finally:
            os.close(fd)


def test_a_removed_directory_that_is_open(place: Place) -> None:
    (place / "d").mkdir()
    fd = os.open(place / "d", os.O_RDONLY)
    try:
        (place / "d").rmdir()
        fails(errno.ENOENT, os.open, "f", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
        fails(errno.ENOENT, os.mkdir, "e", dir_fd=fd)
    finally:
        os.close(fd)


def test_tmpfile(place: Place) -> None:
    place.needs("O_TMPFILE")
    fd = os.open(place.path, os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        os.write(fd, b"content")
        assert os.fstat(fd).st_nlink == 0
        assert os.listdir(place.path) == []
        follow = 0x400
        assert not libc.linkat(-100, b"/proc/self/fd/%d" % fd, -100, os.fsencode(place / "named"), follow)
        assert (place / "named").read_bytes() == b"content"
        fails(errno.EINVAL, os.open, place.path, os.O_TMPFILE & ~os.O_DIRECTORY | os.O_RDWR)
    finally:
        os.close(fd)


def test_a_listing_while_names_come_and_go(place: Place) -> None:
    kept = {f"kept-{number}" for number in range(200)}
    for name in kept:
        touch(place / name)
    seen = []
    with os.scandir(place.path) as entries:
        for number, entry in enumerate(entries):
            seen.append(entry.name)
            touch(place / f"new-{number}")
            if number % 2:
                os.unlink(place / f"new-{number}")
            if number > 300:
                break
    assert kept <= set(seen)
    assert len(seen) == len(set(seen)), "a name twice"
