"""Who may do what, as on the filesystem beneath: permissions, sticky and set-id bits, groups, umask, ACLs."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import subprocess
from pathlib import Path

import pytest
from acting import ALICE, BOB, STAFF, act_as, denied, fails
from places import Place

pytestmark = pytest.mark.usefixtures("needs_root")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def touch(path: Path, flags: int = os.O_WRONLY, bits: int = 0o666) -> None:
    os.close(os.open(path, os.O_CREAT | flags, bits))


@pytest.fixture
def file(place: Place) -> Path:
    """Alice's file, in a directory of hers."""
    os.chown(place.path, ALICE, ALICE)
    path = place / "file"
    path.write_bytes(b"content")
    os.chown(path, ALICE, ALICE)
    path.chmod(0o640)
    return path


def test_open_asks_for_permission(file: Path) -> None:
    denied(BOB, errno.EACCES, os.open, file, os.O_RDONLY)
    denied(BOB, errno.EACCES, os.open, file, os.O_WRONLY)
    os.close(act_as(BOB, os.open, file, os.O_RDONLY, gid=ALICE))
    denied(BOB, errno.EACCES, os.open, file, os.O_RDWR, gid=ALICE)
    denied(BOB, errno.EACCES, os.truncate, file, 0, gid=ALICE)
    file.chmod(0o040)
    denied(ALICE, errno.EACCES, os.open, file, os.O_RDONLY)
    file.chmod(0o200)
    os.close(act_as(ALICE, os.open, file, os.O_WRONLY))
    denied(ALICE, errno.EACCES, os.open, file, os.O_RDWR)


def test_a_supplementary_group_opens_a_file(place: Place, file: Path) -> None:
    os.chown(file, -1, STAFF)
    os.close(act_as(BOB, os.open, file, os.O_RDONLY, groups=(1, STAFF)))
    denied(BOB, errno.EACCES, os.open, file, os.O_RDONLY, groups=(1,))


def test_directories_ask_for_permission(place: Place, file: Path) -> None:
    denied(BOB, errno.EACCES, touch, place / "new")
    denied(BOB, errno.EACCES, os.mkdir, place / "new")
    denied(BOB, errno.EACCES, os.symlink, "x", place / "new")
    denied(BOB, errno.EACCES, os.mkfifo, place / "new")
    denied(BOB, errno.EACCES, os.unlink, file)
    denied(BOB, errno.EACCES, os.rename, file, place / "new")
    place.path.chmod(0o711)
    denied(BOB, errno.EACCES, os.listdir, place.path)
    assert act_as(BOB, os.stat, file).st_size == 7
    place.path.chmod(0o744)
    denied(BOB, errno.EACCES, os.stat, file)


@pytest.mark.parametrize("who", [ALICE, BOB, 0])
def test_the_sticky_bit(place: Place, file: Path, who: int) -> None:
    """Removed or renamed by the owner of the file, of the directory, or root."""
    os.chown(place.path, 0, 0)
    place.path.chmod(0o1777)
    act_as(BOB, touch, place / "bobs")
    (place / "d").mkdir()
    os.chown(place / "d", ALICE, ALICE)
    if who == BOB:
        denied(BOB, errno.EPERM, os.unlink, file)
        denied(BOB, errno.EPERM, os.rename, file, place / "mine")
        denied(BOB, errno.EPERM, os.rename, place / "bobs", file)
        denied(BOB, errno.EPERM, os.rmdir, place / "d")
        return
    act_as(who, os.rename, file, place / "renamed")
    act_as(who, os.unlink, place / "renamed")
    act_as(who, os.rmdir, place / "d")


def test_only_the_owner_changes_attributes(file: Path) -> None:
    denied(BOB, errno.EPERM, os.chmod, file, 0o777)
    denied(BOB, errno.EPERM, os.chown, file, BOB, -1)
    denied(BOB, errno.EPERM, os.utime, file, ns=(1, 2))
    denied(BOB, errno.EACCES, os.utime, file)
    denied(ALICE, errno.EPERM, os.chown, file, BOB, -1)
    denied(ALICE, errno.EPERM, os.chown, file, -1, STAFF)
    act_as(ALICE, os.chown, file, -1, STAFF, groups=(STAFF,))
    assert file.stat().st_gid == STAFF
    file.chmod(0o666)
    act_as(BOB, os.utime, file)


@pytest.mark.parametrize("bits", [0o4755, 0o2755, 0o6755, 0o2745, 0o6777])
def test_chown_takes_set_id_bits_away(file: Path, bits: int) -> None:
    os.chown(file, ALICE, STAFF)
    file.chmod(bits)
    act_as(ALICE, os.chown, file, -1, ALICE)
    assert mode(file) == bits & 0o777


def test_chown_by_a_member_of_the_group_keeps_a_bit_that_runs_nothing(file: Path) -> None:
    os.chown(file, ALICE, STAFF)
    file.chmod(0o2745)
    act_as(ALICE, os.chown, file, -1, ALICE, groups=(STAFF,))
    assert mode(file) == 0o2745


def test_chown_by_root_keeps_a_bit_that_runs_nothing(file: Path) -> None:
    os.chown(file, ALICE, STAFF)
    file.chmod(0o6644)
    os.chown(file, BOB, -1)
    assert mode(file) == 0o2644


def test_chown_of_a_directory_keeps_its_bits(place: Place) -> None:
    (place / "d").mkdir()
    (place / "d").chmod(0o2775)
    os.chown(place / "d", ALICE, STAFF)
    assert mode(place / "d") == 0o2775


def test_chmod_by_a_stranger_to_the_group_drops_set_group_id(file: Path) -> None:
    os.chown(file, ALICE, STAFF)
    act_as(ALICE, os.chmod, file, 0o2755)
    assert mode(file) == 0o755
    act_as(ALICE, os.chmod, file, 0o2755, groups=(STAFF,))
    assert mode(file) == 0o2755


@pytest.mark.parametrize("how", ["write", "truncate", "ftruncate", "O_TRUNC", "fallocate"])
def test_changing_content_takes_set_id_bits_away(place: Place, file: Path, how: str) -> None:
    file.chmod(0o6777)
    if how == "truncate":
        act_as(BOB, os.truncate, file, 3)
    elif how == "O_TRUNC":
        os.close(act_as(BOB, os.open, file, os.O_WRONLY | os.O_TRUNC))
    else:
        fd = act_as(BOB, os.open, file, os.O_WRONLY)
        try:
            call, *args = {
                "write": (os.pwrite, fd, b"x", 0),
                "ftruncate": (os.ftruncate, fd, 3),
                "fallocate": (os.posix_fallocate, fd, 0, 100),
            }[how]
            act_as(BOB, call, *args)
        finally:
            os.close(fd)
    assert mode(file) == 0o777
    file.chmod(0o6777)
    os.truncate(file, 2)
    assert mode(file) == 0o6777, "not where root does it"


@pytest.mark.parametrize("flag", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_a_mode_without_its_set_id_bits_shows_at_once(file: Path, flag: int) -> None:
    """stat(1) asks for the mode alone, which the kernel does not take for changed by a write."""
    file.chmod(0o6777)
    fd = act_as(BOB, os.open, file, os.O_WRONLY | flag)
    with mmap.mmap(-1, 4096) as page:
        act_as(BOB, os.pwrite, fd, page, 0)
    os.close(fd)
    assert subprocess.check_output(["stat", "-c", "%a", file]) == b"777\n"


@pytest.mark.parametrize("how", ["write", "truncate", "O_TRUNC", "fallocate"])
def test_a_set_group_id_bit_that_runs_nothing_stays_for_members_only(
    place: Place, file: Path, how: str
) -> None:
    if place.binding == "fusepy":
        pytest.skip("the kernel leaves it for everybody, and says nothing of who writes")
    for groups, left in (((STAFF,), 0o2666), ((), 0o666)):
        os.chown(file, ALICE, STAFF)
        file.chmod(0o2666)
        if how == "truncate":
            act_as(BOB, os.truncate, file, 3, groups=groups)
        else:
            fd = act_as(BOB, os.open, file, os.O_WRONLY | (how == "O_TRUNC" and os.O_TRUNC), groups=groups)
            if how == "write":
                act_as(BOB, os.pwrite, fd, b"x", 0, groups=groups)
            elif how == "fallocate":
                act_as(BOB, os.posix_fallocate, fd, 0, 100, groups=groups)
            os.close(fd)
        assert mode(file) == left


def test_new_files_in_a_set_group_id_directory(place: Place) -> None:
    os.chown(place.path, 0, STAFF)
    place.path.chmod(0o2777)
    act_as(ALICE, touch, place / "f")
    act_as(ALICE, os.mkdir, place / "d")
    act_as(ALICE, os.symlink, "x", place / "l")
    act_as(ALICE, os.mkfifo, place / "p")
    for name in "fdlp":
        found = (place / name).lstat()
        assert (found.st_uid, found.st_gid) == (ALICE, STAFF), name
    assert mode(place / "d") & stat.S_ISGID
    assert not mode(place / "f") & stat.S_ISGID


def test_umask(place: Place) -> None:
    before = os.umask(0o027)
    try:
        touch(place / "f")
        (place / "d").mkdir(0o777)
        os.mkfifo(place / "p", 0o666)
    finally:
        os.umask(before)
    assert [mode(place / name) for name in "fdp"] == [0o640, 0o750, 0o640]


def test_a_default_acl_replaces_the_umask(place: Place) -> None:
    place.needs("default ACL")
    done = subprocess.run(["setfacl", "-d", "-m", f"u:{BOB}:rw,g::r,o::-", place.path], capture_output=True)
    assert not done.returncode, done.stderr
    before = os.umask(0o077)
    try:
        touch(place / "f")
        (place / "d").mkdir(0o777)
    finally:
        os.umask(before)
    told = subprocess.run(["getfacl", "-cn", place / "f"], capture_output=True, text=True, check=True).stdout
    assert f"user:{BOB}:rw-" in told
    assert "other::---" in told
    assert mode(place / "f") == 0o660
    os.close(act_as(BOB, os.open, place / "f", os.O_RDWR))
    denied(ALICE, errno.EACCES, os.open, place / "f", os.O_RDONLY)


def test_access_acl_and_mode_are_one(place: Place, file: Path) -> None:
    place.needs("default ACL")
    subprocess.run(["setfacl", "-m", f"u:{BOB}:rw", file], check=True)
    assert mode(file) == 0o660
    os.close(act_as(BOB, os.open, file, os.O_RDWR))
    file.chmod(0o600)
    denied(BOB, errno.EACCES, os.open, file, os.O_RDONLY)
    file.chmod(0o640)
    os.close(act_as(BOB, os.open, file, os.O_RDONLY))
    denied(BOB, errno.EACCES, os.open, file, os.O_WRONLY)


def test_acls_are_refused_where_they_would_not_be_kept(place: Place, file: Path) -> None:
    if place.binding != "fusepy":
        pytest.skip("they are kept here")
    done = subprocess.run(["setfacl", "-m", f"u:{BOB}:rw", file], capture_output=True, text=True, check=False)
    assert done.returncode
    assert "not supported" in done.stderr
    assert mode(file) == 0o640
    assert not [name for name in os.listxattr(file) if "acl" in name]


def test_execution_asks_for_permission(place: Place) -> None:
    program = place / "program"
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o644)
    fails(errno.EACCES, subprocess.run, [program], check=False)
    program.chmod(0o755)
    assert subprocess.run([program], check=False).returncode == 0
