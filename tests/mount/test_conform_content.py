"""Content, in each state that a file may be in: here, away, or in part; and on the filesystem beneath."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from acting import fails
from places import Place

SIZE = 300_000
CONTENT = (bytes(range(251)) * (SIZE // 251 + 1))[:SIZE]  # no two blocks of 4 KiB are alike
BLOCK = 4096
GIB = 1 << 30
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO, INSERT, UNSHARE = 1, 2, 8, 16, 32, 64
libc = ctypes.CDLL(None, use_errno=True)
Open = Callable[..., int]
Locker = Callable[[Path, str], bool]


@pytest.fixture
def file(settled: Place) -> Path:
    path = settled / "file"
    path.write_bytes(CONTENT)
    settled.settle(path)
    return path


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
        raise OSError(ctypes.get_errno(), "fallocate")


def elsewhere(script: str, *args: object) -> str:
    """Run a script in another process: a page fault that hangs must not hold this interpreter's lock."""
    argv = [sys.executable, "-c", script, *(str(arg) for arg in args)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("size", [0, 1, BLOCK, 70_000, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE])
def test_truncate(file: Path, size: int) -> None:
    os.truncate(file, size)
    assert file.stat().st_size == size
    assert file.read_bytes() == CONTENT[:size].ljust(size, b"\0")


def test_append(file: Path, opened: Open) -> None:
    fd = opened(file, os.O_RDWR | os.O_APPEND)
    os.write(fd, b"first")
    os.lseek(fd, 0, os.SEEK_SET)
    os.write(fd, b"second")
    assert os.lseek(fd, 0, os.SEEK_CUR) == SIZE + 11
    assert os.fstat(fd).st_size == SIZE + 11
    assert file.read_bytes() == CONTENT + b"firstsecond"


@pytest.mark.parametrize("at", [0, 100_000, SIZE - 3, SIZE, SIZE + 50_000])
def test_overwrite(file: Path, opened: Open, at: int) -> None:
    os.pwrite(opened(file, os.O_WRONLY), b"middle", at)
    assert file.read_bytes() == CONTENT[:at].ljust(at, b"\0") + b"middle" + CONTENT[at + 6 :]


FALLOCATE = {
    "allocate": (0, 100, 2 * SIZE, lambda c: c.ljust(2 * SIZE + 100, b"\0")),
    "keep size": (KEEP_SIZE, SIZE, SIZE, lambda c: c),
    "punch": (PUNCH_HOLE | KEEP_SIZE, 5000, 100_000, lambda c: c[:5000] + bytes(100_000) + c[105_000:]),
    "zero": (ZERO, 70_001, 100_000, lambda c: c[:70_001] + bytes(100_000) + c[170_001:]),
    "zero past the end": (ZERO, SIZE - 10, 1000, lambda c: c[:-10] + bytes(1000)),
    "zero and keep size": (ZERO | KEEP_SIZE, SIZE - 10, 1000, lambda c: c[:-10] + bytes(10)),
    "collapse": (COLLAPSE, 2 * BLOCK, 3 * BLOCK, lambda c: c[: 2 * BLOCK] + c[5 * BLOCK :]),
    "insert": (INSERT, 2 * BLOCK, 3 * BLOCK, lambda c: c[: 2 * BLOCK] + bytes(3 * BLOCK) + c[2 * BLOCK :]),
}
REFUSED = {
    "punch without keep size": (PUNCH_HOLE, 0, BLOCK, errno.EOPNOTSUPP),
    "collapse of half a block": (COLLAPSE, 100, BLOCK, errno.EINVAL),
    "collapse to the end": (COLLAPSE, 0, 1 << 20, errno.EINVAL),
    "no length": (0, 0, 0, errno.EINVAL),
    "before the beginning": (0, -5, 10, errno.EINVAL),
    "beyond every size": (0, (1 << 63) - 10, 5, errno.EFBIG),
}


@pytest.mark.parametrize("what", FALLOCATE)
def test_fallocate(settled: Place, file: Path, opened: Open, what: str) -> None:
    mode, offset, length, expected = FALLOCATE[what]
    fd = opened(file, os.O_RDWR)
    try:
        fallocate(fd, mode, offset, length)
    except OSError as error:
        # libfuse 2 passes on whatever the kernel lets through: FUSE itself knows no collapsing and inserting.
        assert error.errno == errno.EOPNOTSUPP
        assert mode in (COLLAPSE, INSERT)
        assert settled.binding != "plain"
        assert file.read_bytes() == CONTENT
        return
    assert os.fstat(fd).st_size == len(expected(CONTENT))
    assert file.read_bytes() == expected(CONTENT)


@pytest.mark.parametrize("what", REFUSED)
def test_fallocate_refuses(settled: Place, file: Path, opened: Open, what: str) -> None:
    mode, offset, length, number = REFUSED[what]
    if settled.binding != "plain" and mode == COLLAPSE:
        number = errno.EOPNOTSUPP
    fails(number, fallocate, opened(file, os.O_RDWR), mode, offset, length)
    fails(errno.EBADF, fallocate, opened(file, os.O_RDONLY), 0, 0, 10)
    assert file.read_bytes() == CONTENT


@pytest.fixture
def sparse(settled: Place) -> Path:
    """Data in the second MiB of four."""
    path = settled / "sparse"
    with open(path, "wb") as out:
        out.truncate(4 << 20)
        out.seek(1 << 20)
        out.write(b"x" * (1 << 20))
    settled.settle(path)
    return path


def test_seek(settled: Place, sparse: Path, opened: Open) -> None:
    settled.needs("SEEK_HOLE")
    fd = opened(sparse, os.O_RDONLY)
    mib = 1 << 20
    assert os.lseek(fd, 0, os.SEEK_DATA) == mib
    assert os.lseek(fd, mib + 5, os.SEEK_DATA) == mib + 5
    assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
    assert os.lseek(fd, mib, os.SEEK_HOLE) == 2 * mib
    assert os.lseek(fd, -1, os.SEEK_END) == 4 * mib - 1
    fails(errno.ENXIO, os.lseek, fd, 2 * mib, os.SEEK_DATA)
    fails(errno.ENXIO, os.lseek, fd, 4 * mib, os.SEEK_HOLE)
    fails(errno.ENXIO, os.lseek, fd, -1, os.SEEK_DATA)
    fails(errno.ENXIO, os.lseek, fd, -1, os.SEEK_HOLE)
    fails(errno.EINVAL, os.lseek, fd, -1, os.SEEK_SET)


def test_holes_are_zeros_and_take_no_room(sparse: Path) -> None:
    mib = 1 << 20
    assert sparse.stat().st_blocks * 512 <= 2 * mib
    assert sparse.read_bytes() == bytes(mib) + b"x" * mib + bytes(2 * mib)


def test_past_4_gib(settled: Place, opened: Open) -> None:
    path = settled / "huge"
    fd = opened(path, os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"far away", 5 * GIB)
    os.pwrite(fd, b"begin", 0)
    os.ftruncate(fd, 6 * GIB)
    assert path.stat().st_size == 6 * GIB
    assert os.pread(fd, 10, 5 * GIB) == b"far away\0\0"
    assert os.pread(fd, 10, 6 * GIB - 3) == bytes(3)
    assert path.stat().st_blocks * 512 < 1 << 20
    fails(errno.EFBIG, os.ftruncate, fd, 1 << 62)
    fails(errno.EINVAL, os.pwrite, fd, b"x", -1)


def test_copy_file_range(settled: Place, file: Path, opened: Open) -> None:
    settled.needs("copy_file_range")
    source, target = opened(file, os.O_RDONLY), opened(settled / "copy", os.O_RDWR | os.O_CREAT)
    done = 0
    while copied := os.copy_file_range(source, target, SIZE - done, done, done):
        done += copied
    assert (settled / "copy").read_bytes() == CONTENT
    onto = opened(file, os.O_RDWR)
    copied = os.copy_file_range(target, onto, BLOCK, 0, 100_000)
    assert file.read_bytes() == CONTENT[:100_000] + CONTENT[:copied] + CONTENT[100_000 + copied :]
    fails(errno.EBADF, os.copy_file_range, source, source, 10, 0, 20)
    fails(errno.EINVAL, os.copy_file_range, onto, onto, 100, 0, 50)


def test_sendfile_and_splice(settled: Place, file: Path, opened: Open) -> None:
    source, target = opened(file, os.O_RDONLY), opened(settled / "copy", os.O_RDWR | os.O_CREAT)
    done = 0
    while sent := os.sendfile(target, source, done, SIZE - done):
        done += sent
    assert (settled / "copy").read_bytes() == CONTENT
    reading, writing = os.pipe()
    try:
        assert os.splice(source, writing, 5000, offset_src=100_000) == 5000
        assert os.read(reading, 5000) == CONTENT[100_000:105_000]
        os.write(writing, b"spliced")
        assert os.splice(reading, opened(file, os.O_WRONLY), 7, offset_dst=50_000) == 7
    finally:
        os.close(reading)
        os.close(writing)
    assert file.read_bytes() == CONTENT[:50_000] + b"spliced" + CONTENT[50_007:]


def test_o_direct(file: Path, opened: Open) -> None:
    buffer = mmap.mmap(-1, 2 * BLOCK)
    fd = opened(file, os.O_RDWR | os.O_DIRECT)
    assert os.preadv(fd, [buffer], 20 * BLOCK) == 2 * BLOCK
    assert buffer[:] == CONTENT[20 * BLOCK : 22 * BLOCK]
    buffer[:] = b"D" * 2 * BLOCK
    assert os.pwritev(fd, [buffer], 0) == 2 * BLOCK
    assert file.read_bytes() == b"D" * 2 * BLOCK + CONTENT[2 * BLOCK :]


_MAPPED = """if True:
    import mmap, os, sys
    fd = os.open(sys.argv[1], os.O_RDWR)
    size = os.fstat(fd).st_size
    view = mmap.mmap(fd, 0, flags=getattr(mmap, sys.argv[2]))
    before = view[:]
    view[200000:200006] = b"mapped"
    if sys.argv[2] == "MAP_SHARED":
        assert os.pread(fd, 6, 200000) == b"mapped"
        os.pwrite(fd, b"written", 100000)
        assert view[100000:100007] == b"written"
        view.flush()
    view.close()
    assert len(before) == size
    """


@pytest.mark.parametrize("kind", ["MAP_SHARED", "MAP_PRIVATE"])
def test_mmap(file: Path, kind: str) -> None:
    elsewhere(_MAPPED, file, kind)
    changed = CONTENT[:100_000] + b"written" + CONTENT[100_007:200_000] + b"mapped" + CONTENT[200_006:]
    assert file.read_bytes() == (changed if kind == "MAP_SHARED" else CONTENT)


def test_what_one_writes_another_sees_at_once(file: Path, opened: Open) -> None:
    """Size, times and bytes, through other descriptors and by name."""
    writer, reader = opened(file, os.O_RDWR), opened(file, os.O_RDONLY)
    for number in range(10):
        at = number * 34_000
        before = file.stat().st_mtime_ns
        os.pwrite(writer, b"now", at)
        assert os.pread(reader, 3, at) == b"now"
        assert os.fstat(reader).st_size == file.stat().st_size == max(SIZE, at + 3)
        assert file.stat().st_mtime_ns >= before
    os.ftruncate(writer, 10)
    assert (os.fstat(reader).st_size, os.pread(reader, 100, 5)) == (10, file.read_bytes()[5:])


def test_a_mapped_write_shows_as_soon_as_the_file_is_shut(file: Path) -> None:
    """Although the kernel was told its times just before; stat(1) asks for nothing else."""
    script = """if True:
        import mmap, os, subprocess, sys, time
        times = lambda: subprocess.check_output(["stat", "-c", "%.9Y %.9Z", sys.argv[1]]).split()
        before = times()
        time.sleep(0.02)
        fd = os.open(sys.argv[1], os.O_RDWR)
        with mmap.mmap(fd, 0) as view:
            view[5] ^= 1
        os.close(fd)
        after = times()
        assert float(after[0]) > float(before[0])
        assert float(after[1]) > float(before[1])
        """
    elsewhere(script, file)


def test_a_mapped_write_shows_in_the_attributes(settled: Place, file: Path) -> None:
    script = """if True:
        import ctypes, mmap, os, sys, time
        fd = os.open(sys.argv[1], os.O_RDWR)
        view = mmap.mmap(fd, 0)
        view[0]
        before = os.stat(sys.argv[1]).st_mtime_ns
        time.sleep(0.02)
        view[5] = 7
        view.flush()
        until = time.monotonic() + 10
        while os.stat(sys.argv[1]).st_mtime_ns == before:
            assert time.monotonic() < until, "the time does not move"
        """
    elsewhere(script, file)


def test_exec(settled: Place) -> None:
    program, script = settled / "program", settled / "script"
    program.write_bytes(Path("/bin/bash").read_bytes())
    script.write_text("#!/bin/sh\necho from a script\n")
    for path in (program, script):
        path.chmod(0o755)
    settled.settle(program, script)
    assert subprocess.run([program, "-c", "echo ran"], check=True, capture_output=True).stdout == b"ran\n"
    assert subprocess.run([script], check=True, capture_output=True).stdout == b"from a script\n"


def test_a_running_program_is_not_written(settled: Place) -> None:
    program = settled / "program"
    program.write_bytes(Path("/bin/bash").read_bytes())
    program.chmod(0o755)
    settled.settle(program)
    running = subprocess.Popen([program, "-c", "read line"], stdin=subprocess.PIPE)
    try:
        fails(errno.ETXTBSY, os.open, program, os.O_WRONLY)
    finally:
        running.kill()
        running.communicate()


def test_attributes_without_content(settled: Place, file: Path) -> None:
    """None of it fetches anything, and all of it stays when the content comes back."""
    before = file.stat()
    file.chmod(0o640)
    os.chown(file, 7, 8) if os.geteuid() == 0 else None
    os.setxattr(file, "user.colour", b"blue")
    os.utime(file, ns=(1, 2))
    os.link(file, settled / "other")
    os.rename(file, settled / "moved")
    if settled.state == "demoted":
        assert settled.volume is not None
        assert settled.volume.tier(settled / "moved") == "stub"
    assert (settled / "other").read_bytes() == CONTENT
    found = (settled / "moved").stat()
    assert (found.st_ino, found.st_nlink, found.st_size) == (before.st_ino, 2, SIZE)
    assert (found.st_mode & 0o777, found.st_mtime_ns) == (0o640, 2)
    assert found.st_blocks * 512 >= SIZE // 2
    assert os.getxattr(settled / "moved", "user.colour") == b"blue"


@pytest.fixture
def locker() -> Locker:
    """Tries a lock of the whole file in another process; whether it was to be had."""

    def tried(path: Path, kind: str) -> bool:
        script = f"""if True:
            import fcntl, os, struct, sys
            fd = os.open(sys.argv[1], os.O_RDWR)
            try:
                if sys.argv[2] == "flock":
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                else:
                    what = {{"posix": {fcntl.F_SETLK}, "ofd": {fcntl.F_OFD_SETLK}}}[sys.argv[2]]
                    fcntl.fcntl(fd, what, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
            except OSError:
                print("no")
            """
        return elsewhere(script, path, kind) == ""

    return tried


@pytest.mark.parametrize("kind", ["posix", "ofd", "flock"])
def test_locks_between_processes(file: Path, opened: Open, locker: Locker, kind: str) -> None:
    fd = opened(file, os.O_RDWR)
    if kind == "flock":
        fcntl.flock(fd, fcntl.LOCK_EX)
    else:
        what = fcntl.F_SETLK if kind == "posix" else fcntl.F_OFD_SETLK
        fcntl.fcntl(fd, what, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 100, 0))
    assert not locker(file, kind)
    assert locker(file, "flock" if kind != "flock" else "posix"), "the two kinds know nothing of each other"
    if kind == "flock":
        fcntl.flock(fd, fcntl.LOCK_UN)
    else:
        fcntl.fcntl(fd, what, struct.pack("hhqqi4x", fcntl.F_UNLCK, 0, 0, 0, 0))
    assert locker(file, kind)


def test_open_flags(settled: Place, file: Path, opened: Open) -> None:
    fails(errno.EEXIST, os.open, file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    fails(errno.EBADF, os.write, opened(file, os.O_RDONLY), b"x")
    fails(errno.EBADF, os.read, opened(file, os.O_WRONLY), 1)
    assert os.read(opened(file, os.O_RDONLY | os.O_NOATIME), 3) == CONTENT[:3]
    path = opened(file, os.O_PATH)
    fails(errno.EBADF, os.read, path, 1)
    assert os.fstat(path).st_size == SIZE
    synced = opened(file, os.O_WRONLY | os.O_SYNC)
    assert os.pwrite(synced, b"sync", 0) == 4
    cut = opened(file, os.O_RDWR | os.O_TRUNC | os.O_APPEND)
    assert os.fstat(cut).st_size == 0
    os.write(cut, b"new")
    assert file.read_bytes() == b"new"
