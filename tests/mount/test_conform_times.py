"""When times change, and which times can be set: as on the filesystem beneath."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import Place

SECOND = 1_000_000_000
COARSE = 5  # Linux's CLOCK_REALTIME_COARSE
CONTENT = b"content " * 20_000  # more than a chunk: it can be half here


def tick() -> None:
    """Wait until the clock that files get their times from has moved on."""
    before = time.clock_gettime_ns(COARSE)
    while time.clock_gettime_ns(COARSE) == before:
        time.sleep(0.001)


def moved(path: Path, call: Callable[..., Any], *args: Any) -> str:
    """Which of m(time) and c(time) of the path a call moves."""
    before = path.lstat()
    tick()
    call(*args)
    after = path.lstat()
    assert after.st_mtime_ns >= before.st_mtime_ns
    mtime = "m" if after.st_mtime_ns > before.st_mtime_ns else ""
    return mtime + ("c" if after.st_ctime_ns > before.st_ctime_ns else "")


@pytest.fixture
def file(settled: Place) -> Path:
    path = settled / "file"
    path.write_bytes(CONTENT)
    settled.settle(path)
    return path


def write(path: Path, data: bytes = b"x") -> None:
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, data, 0)
    os.close(fd)


CHANGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "write": ("mc", write),
    "write nothing": ("", lambda path: write(path, b"")),
    "truncate": ("mc", lambda path: os.truncate(path, 5)),
    "truncate to the same size": ("mc", lambda path: os.truncate(path, len(CONTENT))),
    "truncate to nothing": ("mc", lambda path: os.truncate(path, 0)),
    "O_TRUNC": ("mc", lambda path: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))),
    "open": ("", lambda path: os.close(os.open(path, os.O_RDWR))),
    "read": ("", Path.read_bytes),
    "chmod": ("c", lambda path: path.chmod(0o600)),
    "chown": ("c", lambda path: os.chown(path, 7, 8)),
    "link": ("c", lambda path: os.link(path, path.with_name("other"))),
    "setxattr": ("c", lambda path: os.setxattr(path, "user.a", b"b")),
    "rename": ("", lambda path: (os.rename(path, path.with_name("x")), os.rename(path.with_name("x"), path))),
    "fallocate": ("mc", lambda path: _with_fd(path, lambda fd: os.posix_fallocate(fd, 0, len(CONTENT) + 1))),
}  # fmt: skip


def _with_fd(path: Path, call: Callable[[int], Any]) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        call(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("change", CHANGES)
def test_times_of_a_file(file: Path, change: str, needs_root: None) -> None:
    expected, call = CHANGES[change]
    found = moved(file, call, file)
    if change == "rename":
        assert "m" not in found  # the ctime moves on ext4, on others it may not
    else:
        assert found == expected


@pytest.mark.parametrize(
    "change",
    [
        "create", "mkdir", "symlink", "mkfifo", "unlink", "rmdir", "rename", "rename over", "link", "write",
        "chmod below",
    ],
)  # fmt: skip
def test_times_of_the_directory(place: Place, change: str) -> None:
    d = place / "d"
    (d / "sub").mkdir(parents=True)
    (d / "f").write_bytes(b"1")
    (d / "g").write_bytes(b"2")
    call: tuple[Any, ...] = {
        "create": ((d / "n").touch,),
        "mkdir": (os.mkdir, d / "n"),
        "symlink": (os.symlink, "x", d / "n"),
        "mkfifo": (os.mkfifo, d / "n"),
        "unlink": (os.unlink, d / "f"),
        "rmdir": (os.rmdir, d / "sub"),
        "rename": (os.rename, d / "f", d / "n"),
        "rename over": (os.rename, d / "f", d / "g"),
        "link": (os.link, d / "f", d / "n"),
        "write": (write, d / "f"),
        "chmod below": (os.chmod, d / "f", 0o600),
    }[change]
    assert moved(d, *call) == ("" if change in ("write", "chmod below") else "mc")


def test_both_directories_of_a_rename(place: Place) -> None:
    for name in "ab":
        (place / name).mkdir()
    (place / "a" / "f").touch()
    before = [(place / name).stat().st_mtime_ns for name in "ab"]
    tick()
    os.rename(place / "a" / "f", place / "b" / "f")
    assert all((place / name).stat().st_mtime_ns > at for name, at in zip("ab", before, strict=True))


@pytest.mark.parametrize(
    "when",
    [
        0, 1, -1, -SECOND, -SECOND + 1, -2 * 10**9 * SECOND // 1, 2**31 * SECOND - 1, 2**31 * SECOND,
        2**32 * SECOND + 999_999_999, 9_000_000_000 * SECOND, 1_234_567_890_123_456_789,
    ],
)  # fmt: skip
def test_times_that_can_be_set(file: Path, when: int) -> None:
    """To the nanosecond, before 1970 and after 2038."""
    os.utime(file, ns=(when, when + 1))
    found = file.stat()
    assert (found.st_atime_ns, found.st_mtime_ns) == (when, when + 1)


@pytest.mark.parametrize("omitted", ["atime", "mtime", "both", "neither"])
def test_now_and_omit(file: Path, omitted: str) -> None:
    """utimensat's two special values."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    os.utime(file, ns=(1 * SECOND, 2 * SECOND))
    now, omit = (1 << 30) - 1, (1 << 30) - 2
    atime = omit if omitted in ("atime", "both") else now
    mtime = omit if omitted in ("mtime", "both") else now
    before = time.clock_gettime_ns(COARSE)
    values = (ctypes.c_long * 4)(0, atime, 0, mtime)
    assert libc.utimensat(-100, os.fsencode(file), values, 0) == 0
    found = file.stat()
    assert found.st_atime_ns == SECOND if atime == omit else found.st_atime_ns >= before
    assert found.st_mtime_ns == 2 * SECOND if mtime == omit else found.st_mtime_ns >= before


def test_times_of_what_is_not_a_file(place: Place) -> None:
    (place / "d").mkdir()
    os.symlink("nowhere", place / "l")
    os.mkfifo(place / "p")
    for name in "dlp":
        os.utime(place / name, ns=(-5, 7 * SECOND + 3), follow_symlinks=False)
        found = (place / name).lstat()
        assert (found.st_atime_ns, found.st_mtime_ns) == (-5, 7 * SECOND + 3), name


def test_a_new_file_has_the_present_time(place: Place) -> None:
    before = time.clock_gettime_ns(COARSE)
    (place / "f").touch()
    found = (place / "f").stat()
    assert min(found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns) >= before
    assert found.st_mtime_ns <= time.time_ns()
