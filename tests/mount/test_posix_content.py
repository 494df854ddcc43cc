"""Operations on content, each tried on a resident file and on a stub."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CONTENT = bytes(range(256)) * 64
MIB = 1 << 20
AT_FDCWD = -100
libc = ctypes.CDLL(None, use_errno=True)
Settle = Callable[..., None]


@pytest.fixture
def file(work: Path) -> Path:
    path = work / "file"
    path.write_bytes(CONTENT)
    return path


def python(script: str, *args: object) -> str:
    """Run a script elsewhere: a page fault that hangs must not hold this interpreter's lock."""
    argv = [sys.executable, "-c", script, *(str(arg) for arg in args)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("size", [0, 1, 4096, 5000, len(CONTENT), len(CONTENT) + 10_000])
def test_truncate(file: Path, settle: Settle, size: int) -> None:
    settle(file)
    before = file.stat().st_mtime_ns
    os.truncate(file, size)
    assert file.stat().st_size == size
    assert file.stat().st_mtime_ns > before
    assert file.read_bytes() == CONTENT[:size].ljust(size, b"\0")


def test_ftruncate_through_a_handle(file: Path, settle: Settle, opened: Callable[..., int]) -> None:
    settle(file)
    fd = opened(file, os.O_RDWR)
    os.ftruncate(fd, 100)
    assert os.pread(fd, 200, 0) == CONTENT[:100]
    os.ftruncate(fd, 300)
    assert os.pread(fd, 400, 0) == CONTENT[:100] + bytes(200)


def test_o_trunc(file: Path, settle: Settle, opened: Callable[..., int]) -> None:
    settle(file)
    fd = opened(file, os.O_WRONLY | os.O_TRUNC)
    assert file.stat().st_size == 0
    os.write(fd, b"new")
    assert file.read_bytes() == b"new"


def test_append(file: Path, settle: Settle, opened: Callable[..., int]) -> None:
    settle(file)
    one, two = (opened(file, os.O_WRONLY | os.O_APPEND) for _ in range(2))
    for number in range(10):
        os.write(one, f"one {number}\n".encode())
        os.write(two, f"two {number}\n".encode())
    told = "".join(f"one {n}\ntwo {n}\n" for n in range(10)).encode()
    assert file.read_bytes() == CONTENT + told


def test_write_in_the_middle(file: Path, settle: Settle) -> None:
    settle(file)
    with open(file, "r+b") as out:
        out.seek(5000)
        out.write(b"middle")
    assert file.read_bytes() == CONTENT[:5000] + b"middle" + CONTENT[5006:]
    assert file.stat().st_size == len(CONTENT)


def test_write_past_the_end(file: Path, settle: Settle, opened: Callable[..., int]) -> None:
    settle(file)
    os.pwrite(opened(file, os.O_WRONLY), b"far", 100_000)
    assert file.read_bytes() == CONTENT.ljust(100_000, b"\0") + b"far"


def test_fallocate(file: Path, settle: Settle, opened: Callable[..., int]) -> None:
    settle(file)
    os.posix_fallocate(opened(file, os.O_RDWR), 0, MIB)
    assert file.stat().st_size == MIB
    assert file.stat().st_blocks * 512 >= MIB
    assert file.read_bytes() == CONTENT.ljust(MIB, b"\0")


def test_punch_hole(file: Path, settle: Settle) -> None:
    settle(file)
    subprocess.run(["fallocate", "-p", "-o", "4096", "-l", "4096", file], check=True)
    assert file.read_bytes() == CONTENT[:4096] + bytes(4096) + CONTENT[8192:]


def test_collapse_range_is_exact_or_refused(file: Path, settle: Settle) -> None:
    settle(file)
    done = subprocess.run(["fallocate", "-c", "-o", "4096", "-l", "4096", file], capture_output=True)
    collapsed = CONTENT[:4096] + CONTENT[8192:]
    assert file.read_bytes() == (CONTENT if done.returncode else collapsed)


def test_seek_data_and_hole(work: Path, settle: Settle, opened: Callable[..., int]) -> None:
    path = work / "sparse"
    with open(path, "wb") as out:
        out.truncate(4 * MIB)
        out.seek(MIB)
        out.write(b"x" * MIB)
    settle(path)
    fd = opened(path, os.O_RDONLY)
    assert os.lseek(fd, 0, os.SEEK_DATA) == MIB
    assert os.lseek(fd, MIB, os.SEEK_HOLE) == 2 * MIB
    assert os.lseek(fd, 3 * MIB, os.SEEK_HOLE) == 3 * MIB
    with pytest.raises(OSError) as caught:
        os.lseek(fd, 3 * MIB, os.SEEK_DATA)
    assert caught.value.errno == errno.ENXIO
    assert path.read_bytes() == bytes(MIB) + b"x" * MIB + bytes(2 * MIB)


def test_copy_file_range(work: Path, file: Path, settle: Settle, opened: Callable[..., int]) -> None:
    settle(file)
    copy = opened(work / "copy", os.O_RDWR | os.O_CREAT)
    done = 0
    while done < len(CONTENT):
        done += os.copy_file_range(opened(file, os.O_RDONLY), copy, len(CONTENT) - done, done, done)
    assert (work / "copy").read_bytes() == CONTENT


def test_copy_file_range_onto(work: Path, file: Path, settle: Settle, opened: Callable[..., int]) -> None:
    source = work / "source"
    source.write_bytes(b"S" * 4096)
    settle(file)
    count = os.copy_file_range(opened(source, os.O_RDONLY), opened(file, os.O_RDWR), 4096, 0, 4096)
    assert file.read_bytes() == CONTENT[:4096] + b"S" * count + CONTENT[4096 + count :]


def test_tmpfile(work: Path, opened: Callable[..., int]) -> None:
    fd = opened(work, os.O_TMPFILE | os.O_RDWR)
    os.write(fd, CONTENT)
    assert os.fstat(fd).st_nlink == 0
    assert os.listdir(work) == []
    assert os.pread(fd, 100, 0) == CONTENT[:100]
    linked = libc.linkat(AT_FDCWD, b"/proc/self/fd/%d" % fd, AT_FDCWD, os.fsencode(work / "named"), 0x400)
    assert linked == 0, os.strerror(ctypes.get_errno())
    assert (work / "named").read_bytes() == CONTENT


def test_o_direct(file: Path, settle: Settle, opened: Callable[..., int]) -> None:
    settle(file)
    buffer = mmap.mmap(-1, 8192)
    assert os.preadv(opened(file, os.O_RDONLY | os.O_DIRECT), [buffer], 4096) == 8192
    assert buffer[:] == CONTENT[4096:12288]
    buffer[:] = b"D" * 8192
    assert os.pwritev(opened(file, os.O_RDWR | os.O_DIRECT), [buffer], 0) == 8192
    assert file.read_bytes() == b"D" * 8192 + CONTENT[8192:]


def test_mmap_shared(file: Path, settle: Settle) -> None:
    settle(file)
    script = """if True:
        import mmap, os, sys
        fd = os.open(sys.argv[1], os.O_RDWR)
        with mmap.mmap(fd, 0) as view:
            assert view[:256] == bytes(range(256))
            view[5000:5006] = b"mapped"
            view.flush()
            assert os.pread(fd, 6, 5000) == b"mapped"
        """
    python(script, file)
    assert file.read_bytes() == CONTENT[:5000] + b"mapped" + CONTENT[5006:]


def test_mmap_private(file: Path, settle: Settle) -> None:
    settle(file)
    script = """if True:
        import mmap, os, sys
        fd = os.open(sys.argv[1], os.O_RDONLY)
        with mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as view:
            assert view[:] == bytes(range(256)) * 64
            view[:5] = b"alone"
        """
    python(script, file)
    assert file.read_bytes() == CONTENT


def test_unlinked_but_open(file: Path, settle: Settle, opened: Callable[..., int]) -> None:
    settle(file)
    fd = opened(file, os.O_RDWR)
    file.unlink()
    assert os.fstat(fd).st_nlink == 0
    assert os.pread(fd, len(CONTENT), 0) == CONTENT
    os.pwrite(fd, b"still here", 0)
    os.fsync(fd)
    assert os.pread(fd, 10, 0) == b"still here"


def test_exec(work: Path, settle: Settle) -> None:
    program = work / "program"
    program.write_bytes(Path("/bin/bash").read_bytes())
    program.chmod(0o755)
    script = work / "script"
    script.write_text("#!/bin/sh\necho from a script\n")
    script.chmod(0o755)
    settle(program, script)
    assert subprocess.run([program, "-c", "echo ran"], check=True, capture_output=True).stdout == b"ran\n"
    assert subprocess.run([script], check=True, capture_output=True).stdout == b"from a script\n"


def test_no_suid_survives_a_write(file: Path, settle: Settle, needs_root: None) -> None:
    """A write by another than root clears the bit, passthrough or not."""
    file.chmod(0o6777)
    settle(file)
    assert file.stat().st_mode & 0o6000 == 0o6000
    write = "import os,sys; os.pwrite(os.open(sys.argv[1], os.O_WRONLY), b'x', 0)"
    argv = ["/usr/bin/python3", "-c", write, file]
    subprocess.run(argv, check=True, user=12345, group=12345, extra_groups=[])
    assert file.stat().st_mode & 0o6000 == 0
