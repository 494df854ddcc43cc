"""What a person sees of a demoted file: nothing but the space it leaves, and a moment at the next read."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import random
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import BLOCK, Volume

pytestmark = pytest.mark.usefixtures("tiers")
FS_IOC_GETFLAGS = 0x80086601
BINDINGS = ("kernel", "fusepy")
SMALL = random.Random(1).randbytes(40_000)
LARGE = random.Random(2).randbytes(9 << 20)  # more than two chunks
Open = Callable[..., int]
LIBC_MMAP = """if True:
    import ctypes, os, sys
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
    fd = os.open(sys.argv[1], os.O_RDWR)
    size = os.fstat(fd).st_size
    at = libc.mmap(None, size, 3, 1, fd, 0)
    os.close(fd)  # the mapping outlives it, and the kernel sends FLUSH and RELEASE
    print("mapped", flush=True)
    sys.stdin.readline()
    ctypes.memmove(at, b"changed through the mapping", 27)
    print(ctypes.string_at(at + 4096, 16).hex(), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def small(work: Path) -> Path:
    path = work / "small"
    path.write_bytes(SMALL)
    return path


@pytest.fixture
def large(work: Path) -> Path:
    path = work / "large"
    path.write_bytes(LARGE)
    return path


FACTS = ("st_ino", "st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_mtime_ns", "st_ctime_ns")


def shown(path: Path) -> dict[str, int]:
    """What `stat` says, but atime, which reading changes, and blocks, which a filesystem may lay out anew."""
    found = path.stat()
    return {name: getattr(found, name) for name in FACTS}


def backing_bytes(volume: Volume, path: Path) -> int:
    return os.stat(volume.backing(path)).st_blocks * BLOCK


@pytest.mark.parametrize("content", [b"x", SMALL, LARGE], ids=["a byte", "small", "large"])
def test_a_stub_looks_like_the_file(shared: Volume, work: Path, content: bytes) -> None:
    path = work / "file"
    path.write_bytes(content)
    subprocess.run(["sync", path], check=True)
    before, blocks = shown(path), path.stat().st_blocks
    shared.demote(path)
    assert shared.tier(path) == "stub"
    assert shown(path) == before
    assert path.stat().st_blocks == blocks
    assert backing_bytes(shared, path) == 0
    facts = shared.status(path)
    assert [facts[key] for key in ("tier", "size", "local_bytes", "dirty")] == ["stub", len(content), 0, False]
    assert path.read_bytes() == content
    assert shown(path) == before, "fetching changes no times either"
    assert shared.status(path)["local_bytes"] >= len(content)


def test_who_only_opens_a_small_stub_brings_nothing(shared: Volume, small: Path) -> None:
    """A backup that opens all files, and reads those that have changed; `lsattr -R`."""
    shared.demote(small)
    before = shown(small)
    for flag in (os.O_NOATIME, os.O_NONBLOCK):
        fd = os.open(small, os.O_RDONLY | flag | os.O_NOFOLLOW)
        try:
            assert os.fstat(fd).st_size == len(SMALL)
            with contextlib.suppress(OSError):  # as borg and lsattr ask: there are none here
                fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(4))
            assert shared.tier(small) == "stub" and backing_bytes(shared, small) == 0
        finally:
            os.close(fd)
    fd = os.open(small, os.O_RDONLY | os.O_NOATIME)
    try:
        assert os.pread(fd, 100, 30_000) == SMALL[30_000:30_100]
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as content:
            assert content[:] == SMALL
        assert small.read_bytes() == SMALL
        with open(small, "r+b", buffering=0) as writer:
            writer.write(b"written")
        assert os.pread(fd, 10, 0) == b"written" + SMALL[7:10]
    finally:
        os.close(fd)
    assert shown(small)["st_ctime_ns"] > before["st_ctime_ns"]
    assert small.read_bytes() == b"written" + SMALL[7:]


def test_touch_brings_nothing(shared: Volume, small: Path) -> None:
    small.write_bytes(SMALL + b"touched")
    shared.demote(small)
    subprocess.run(["touch", "-d", "2001-02-03 UTC", small], check=True, timeout=60)
    subprocess.run(["touch", small], check=True, timeout=60)
    assert shared.tier(small) == "stub" and backing_bytes(shared, small) == 0
    assert abs(small.stat().st_mtime - time.time()) < 60 and not shared.status(small)["dirty"]
    fd = os.open(small, os.O_WRONLY | os.O_NONBLOCK)
    try:
        assert shared.tier(small) == "stub"
        assert os.pwrite(fd, b"written", 100) == 7
        assert os.pwrite(fd, b"more", len(SMALL) + 7) == 4
    finally:
        os.close(fd)
    assert small.read_bytes() == SMALL[:100] + b"written" + SMALL[107:] + b"touchedmore"
    shared.demote(small)
    assert small.read_bytes() == SMALL[:100] + b"written" + SMALL[107:] + b"touchedmore"


def test_demoting_again_after_a_read(shared: Volume, small: Path) -> None:
    """The second time nothing is uploaded: the copy is still good."""
    content = SMALL + b"of this test alone"
    small.write_bytes(content)
    before = shown(small)
    for _ in range(3):
        shared.demote(small)
        assert backing_bytes(shared, small) == 0
        assert small.read_bytes() == content
        assert shown(small) == before
    assert [path.read_bytes() for path in shared.objects()].count(content) == 1


def test_random_reads_of_a_large_stub(shared: Volume, large: Path) -> None:
    shared.demote(large)
    places = random.Random(3)
    with open(large, "rb", buffering=0) as file:
        for _ in range(12):
            offset = places.randrange(len(LARGE))
            assert os.pread(file.fileno(), 5000, offset) == LARGE[offset : offset + 5000]
        assert os.pread(file.fileno(), 100, len(LARGE) - 10) == LARGE[-10:]
        assert os.pread(file.fileno(), 100, len(LARGE)) == b""
    assert shared.tier_becomes(large, "partial", "resident")
    assert large.read_bytes() == LARGE


def test_a_random_read_fetches_a_part(shared: Volume, work: Path) -> None:
    path = work / "file"
    path.write_bytes(LARGE * 4)
    shared.demote(path)
    with open(path, "rb", buffering=0) as file:
        assert os.pread(file.fileno(), 4096, 20 << 20) == (LARGE * 4)[20 << 20 :][:4096]
        assert 0 < backing_bytes(shared, path) <= 12 << 20
    assert shared.tier_becomes(path, "partial")
    shared.demote(path)
    assert shared.tier(path) == "stub"
    assert backing_bytes(shared, path) == 0
    assert path.read_bytes() == LARGE * 4


def test_partly_read_then_written(shared: Volume, large: Path) -> None:
    """A write to a partial file waits for the rest: nothing of it may be left a hole."""
    shared.demote(large)
    with open(large, "r+b", buffering=0) as file:
        assert os.pread(file.fileno(), 10, 5 << 20) == LARGE[5 << 20 :][:10]
        os.pwrite(file.fileno(), b"written", 1 << 20)
        assert os.pread(file.fileno(), 20, (1 << 20) - 5) == (
            LARGE[(1 << 20) - 5 : 1 << 20] + b"written" + LARGE[(1 << 20) + 7 :][:8]
        )
    expected = LARGE[: 1 << 20] + b"written" + LARGE[(1 << 20) + 7 :]
    assert large.read_bytes() == expected
    shared.demote(large)
    assert large.read_bytes() == expected


def test_o_trunc_fetches_nothing(shared: Volume, large: Path) -> None:
    shared.demote(large)
    hidden = [(path, path.with_name("." + path.name)) for path in shared.objects()]
    for path, elsewhere in hidden:
        path.rename(elsewhere)
    try:
        large.write_bytes(b"new content")
    finally:
        for path, elsewhere in hidden:
            elsewhere.rename(path)
    assert large.read_bytes() == b"new content"
    shared.demote(large)
    assert large.read_bytes() == b"new content"


@pytest.mark.parametrize("size", [1, 4096, 3 << 20, 12 << 20])
def test_truncate_a_large_stub(shared: Volume, large: Path, size: int) -> None:
    shared.demote(large)
    os.truncate(large, size)
    expected = LARGE[:size].ljust(size, b"\0")
    assert large.read_bytes() == expected
    shared.demote(large)
    assert hashlib.sha256(large.read_bytes()).digest() == hashlib.sha256(expected).digest()


def test_each_version_comes_back(shared: Volume, small: Path) -> None:
    """Rewriting makes a new copy; an old one is never mistaken for it."""
    for number in range(4):
        content = SMALL[number * 1000 :] + str(number).encode()
        small.write_bytes(content)
        shared.demote(small)
        assert small.read_bytes() == content


def test_overwriting_in_place_with_the_same_size(shared: Volume, small: Path) -> None:
    shared.demote(small)
    before = small.stat()
    with open(small, "r+b") as out:
        out.write(b"other")
    os.utime(small, ns=(before.st_atime_ns, before.st_mtime_ns))
    shared.demote(small)
    assert small.read_bytes() == b"other" + SMALL[5:]


def test_hard_links_share_a_state(shared: Volume, small: Path) -> None:
    other = small.with_name("other")
    os.link(small, other)
    shared.demote(other)
    assert (shared.tier(small), shared.tier(other)) == ("stub", "stub")
    small.unlink()
    assert other.read_bytes() == SMALL


def test_rename_while_a_stub(shared: Volume, work: Path, small: Path) -> None:
    shared.demote(small)
    (work / "d").mkdir()
    moved = work / "d" / "moved"
    os.rename(small, moved)
    assert shared.tier(moved) == "stub"
    assert moved.read_bytes() == SMALL
    shared.demote(moved)
    os.rename(work / "d", work / "e")
    assert (work / "e" / "moved").read_bytes() == SMALL


def test_an_unlinked_open_stub_stays_readable(shared: Volume, large: Path, opened: Open) -> None:
    shared.demote(large)
    fd = opened(large, os.O_RDONLY)
    large.unlink()
    assert os.pread(fd, len(LARGE), 0) == LARGE


def test_a_stub_replaced_while_open(shared: Volume, work: Path, large: Path, opened: Open) -> None:
    shared.demote(large)
    fd = opened(large, os.O_RDONLY)
    (work / "new").write_bytes(b"replacement")
    os.rename(work / "new", large)
    assert os.pread(fd, len(LARGE), 0) == LARGE
    assert large.read_bytes() == b"replacement"


def test_attributes_survive(shared: Volume, small: Path) -> None:
    os.setxattr(small, "user.note", b"kept")
    if acls := "fusepy" not in shared.options:  # which refuses them
        subprocess.run(["setfacl", "-m", "u:12345:rw", small], check=True)
    small.chmod(0o4755)
    before = shown(small)
    acl = os.getxattr(small, "system.posix_acl_access") if acls else None
    shared.demote(small)
    assert shown(small) == before
    assert os.getxattr(small, "user.note") == b"kept"
    assert small.read_bytes() == SMALL
    assert not acls or os.getxattr(small, "system.posix_acl_access") == acl
    assert stat.S_IMODE(small.stat().st_mode) == 0o4755


def test_a_file_without_write_permission(shared: Volume, small: Path) -> None:
    """As every object of git is."""
    small.chmod(0o444)
    shared.demote(small)
    assert backing_bytes(shared, small) == 0
    assert stat.S_IMODE(small.stat().st_mode) == 0o444
    assert small.read_bytes() == SMALL


def test_sparse_files_stay_sparse(shared: Volume, work: Path, opened: Open) -> None:
    path = work / "sparse"
    with open(path, "wb") as out:
        out.truncate(64 << 20)
        out.seek(20 << 20)
        out.write(SMALL)
        out.seek(50 << 20)
        out.write(LARGE)
    before = shown(path)
    shared.demote(path)
    assert shown(path) == before
    assert backing_bytes(shared, path) == 0
    fd = opened(path, os.O_RDONLY)
    if "fusepy" not in shared.options:  # libfuse 2 does not ask where data is: the kernel says everywhere
        assert os.lseek(fd, 0, os.SEEK_DATA) == 20 << 20
        assert os.lseek(fd, 50 << 20, os.SEEK_HOLE) == (50 << 20) + len(LARGE)
    copy = work / "copy"
    subprocess.run(["cp", "--sparse=auto", path, copy], check=True)
    assert os.pread(fd, len(LARGE), 50 << 20) == LARGE
    assert hashlib.sha256(copy.read_bytes()).digest() == hashlib.sha256(path.read_bytes()).digest()
    assert backing_bytes(shared, path) <= 11 << 20, "holes come back as holes"


def test_du_and_tar_of_stubs(shared: Volume, work: Path) -> None:
    for number in range(20):
        (work / f"f{number}").write_bytes(SMALL[number:])
    du = ["du", "-sk", "--apparent-size", work]
    before = subprocess.run(du, check=True, capture_output=True).stdout
    shared.demote(work)
    assert subprocess.run(du, check=True, capture_output=True).stdout == before
    assert sum(backing_bytes(shared, path) for path in work.iterdir()) == 0
    argv = ["tar", "--sparse", "-C", work, "-cf", "-", "."]
    archive = subprocess.run(argv, check=True, capture_output=True).stdout
    for number in range(20):
        assert SMALL[number:] in archive


def test_an_open_file_stays(shared: Volume, small: Path, opened: Open) -> None:
    fd = opened(small, os.O_RDONLY)
    done = shared.cli("demote", "--wait", small, check=False)
    assert done.returncode == 1
    assert "small" in done.stderr
    assert backing_bytes(shared, small) >= len(SMALL)
    assert os.pread(fd, 10, 0) == SMALL[:10]


def test_a_mapping_that_outlives_close(shared: Volume, small: Path) -> None:
    """No handle is open, yet the file must neither be copied nor punched."""
    argv = [sys.executable, "-c", LIBC_MMAP, str(small)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as mapper:
        assert mapper.stdout is not None and mapper.stdin is not None
        assert mapper.stdout.readline() == "mapped\n"
        assert shared.cli("demote", "--wait", small, check=False).returncode == 1
        assert shared.tier(small) == "resident"
        mapper.stdin.write("go\n")
        mapper.stdin.flush()
        assert mapper.stdout.readline() == SMALL[4096 : 4096 + 16].hex() + "\n"
        assert shared.cli("demote", "--wait", small, check=False).returncode == 1
        mapper.communicate("end\n", timeout=20)
    shared.demote(small)
    assert small.read_bytes() == b"changed through the mapping" + SMALL[27:]


def test_mmap_of_a_large_stub(shared: Volume, large: Path) -> None:
    shared.demote(large)
    script = """if True:
        import hashlib, mmap, sys
        with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            print(hashlib.sha256(view[:]).hexdigest())
            view[1000:1004] = b"mmap"
        """
    argv = [sys.executable, "-c", script, str(large)]
    told = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout
    assert told.strip() == hashlib.sha256(LARGE).hexdigest()
    assert large.read_bytes() == LARGE[:1000] + b"mmap" + LARGE[1004:]
    shared.demote(large)
    assert large.read_bytes() == LARGE[:1000] + b"mmap" + LARGE[1004:]


def test_fetch_command(shared: Volume, work: Path) -> None:
    paths = [work / f"f{number}" for number in range(10)]
    for path in paths:
        path.write_bytes(SMALL)
    shared.demote(work)
    assert {shared.tier(path) for path in paths} == {"stub"}
    shared.fetch(work)
    assert {shared.tier(path) for path in paths} == {"resident"}


def test_many_readers_of_one_stub(shared: Volume, large: Path) -> None:
    shared.demote(large)
    readers = [subprocess.Popen(["sha256sum", large], stdout=subprocess.PIPE) for _ in range(6)]
    expected = hashlib.sha256(LARGE).hexdigest().encode()
    for reader in readers:
        assert reader.communicate(timeout=60)[0].split()[0] == expected


def test_remount_keeps_stubs(volume: Callable[..., Volume]) -> None:
    mounted = volume()
    small, large = mounted.mountpoint / "small", mounted.mountpoint / "large"
    small.write_bytes(SMALL)
    large.write_bytes(LARGE)
    before = shown(small), shown(large)
    mounted.demote()
    mounted.remount()
    assert (mounted.tier(small), mounted.tier(large)) == ("stub", "stub")
    assert (shown(small), shown(large)) == before
    assert small.read_bytes() == SMALL
    assert large.read_bytes() == LARGE
