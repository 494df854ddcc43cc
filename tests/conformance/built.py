"""Suites that somebody has built and names by a path: pjdfstest in C, and the Linux Test Project.

CONFORMANCE_PJDFSTEST: a checkout of github.com/pjd/pjdfstest in which `pjdfstest` is built. CONFORMANCE_LTP:
where the Linux Test Project is installed (`runtest` and `testcases/bin`); of its `syscalls` those about files
run, and `fs_perms_simple`. Tests that want a block device of their own do not apply.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from harness import kill, pids_with

from conformance.suites import Result, Unavailable

AT_ONCE = 8  # the cases of pjdfstest sleep most of the time
_LIMIT = 120.0  # seconds, of one test of LTP; one that needs more counts as failed everywhere
_LTP_FILES = re.compile(
    r"access|chdir|chmod|chown|copy_file_range|creat|dup|execve|faccessat|fadvise|fallocate|fchdir|fchmod|fchown|"
    r"fcntl|fdatasync|fgetxattr|flistxattr|flock|fremovexattr|fsetxattr|fstat|fsync|ftruncate|futimesat|getcwd|"
    r"getdents|getxattr|inotify|lchown|lgetxattr|link|listxattr|llistxattr|llseek|lremovexattr|lseek|lstat|mincore|"
    r"mkdir|mknod|mmap|msync|name_to_handle|nftw|open|pread|pwrite|read|realpath|removexattr|rename|rmdir|sendfile|"
    r"setxattr|splice|stat|symlink|sync|truncate|umask|unlink|utime|write"
)
_TCONF = 32  # what LTP ends with where a test does not apply
_NO_DEVICE = "/dev/no-device-for-ltp"  # a test that wants one makes a filesystem of its own on it, and names it
_TOKEN = "TIERFS_LTP_TEST"  # in the environment of all that a test starts


def pjdfstest(checkout: Path, place: Path, seconds: float) -> Result:
    """Every file of cases in a directory of its own. Raises Unavailable."""
    cases = sorted((checkout / "tests").glob("*/*.t"))
    if not cases or not (checkout / "pjdfstest").exists():
        raise Unavailable(f"{checkout}: no built checkout of pjdfstest")
    result = Result()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for case, said in zip(cases, pool.map(partial(_said, place, seconds), cases), strict=True):
            _count(f"{case.parent.name}/{case.name}", said, result)
    return result


def _said(place: Path, seconds: float, case: Path) -> str | None:
    """What a file of cases prints; None where it does not end."""
    directory = place / f"{case.parent.name}-{case.stem}"
    directory.mkdir(mode=0o755)
    argv = ["bash", case]
    try:
        return subprocess.run(
            argv, cwd=directory, capture_output=True, text=True, timeout=seconds, check=False
        ).stdout
    except subprocess.TimeoutExpired:
        return None


def _count(name: str, said: str | None, result: Result) -> None:
    """Of the Test Anything Protocol; a case that is marked TODO may fail."""
    plan = re.search(r"^1\.\.(\d+)", said or "", re.M)
    lines = re.findall(r"^(not )?ok (\d+)(.*)", said or "", re.M)
    if plan is None or len(lines) < int(plan[1]):
        result.failed.add(f"{name} does not end")
    for failed, number, note in lines:
        if failed and "TODO" not in note:
            result.failed.add(f"{name} {number}")
        else:
            result.passed += 1


def ltp(root: Path, place: Path, _seconds: float) -> Result:
    """The tests about files, one after another. Raises Unavailable."""
    if not (root / "runtest").is_dir() or not (root / "testcases" / "bin").is_dir():
        raise Unavailable(f"{root}: the Linux Test Project is not installed there")
    result = Result()
    for name, command in _tests(root):
        code = _outcome(root, place, command)
        if code == 0:
            result.passed += 1
        elif code == _TCONF:
            result.skipped += 1
        else:
            result.failed.add(name)
    return result


def _tests(root: Path) -> Iterator[tuple[str, str]]:
    """Name and shell command of each test that is there."""
    for file, wanted in (("syscalls", _LTP_FILES), ("fs_perms_simple", re.compile(""))):
        for line in (root / "runtest" / file).read_text().splitlines():
            name, *words = line.split(None, 1)[:2] or [""]
            program = words[0].split()[0] if words else ""
            if name.startswith("#") or not wanted.match(name):
                continue
            if shutil.which(program, path=root / "testcases" / "bin"):
                yield name, words[0]


def _outcome(root: Path, place: Path, command: str) -> int | None:
    """Its exit code; None where it does not end in time."""
    token = uuid.uuid4().hex
    environment = {
        **os.environ, "TMPDIR": str(place), "LTPROOT": str(root), "LTP_TIMEOUT_MUL": "3", "LTP_DEV": _NO_DEVICE,
        "PATH": f"{root}/testcases/bin:{os.environ['PATH']}", _TOKEN: token,
    }  # fmt: skip
    with tempfile.TemporaryFile() as said:  # a pipe would have to wait for what the test has left behind
        argv = ["bash", "-c", command]
        process = subprocess.Popen(
            argv, cwd=place, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )
        try:
            code = process.wait(_LIMIT)
        except subprocess.TimeoutExpired:
            return None
        finally:
            for pid in pids_with(_TOKEN, token):
                kill(pid)
            process.wait()
        said.seek(0)
        return _TCONF if _NO_DEVICE.encode() in said.read() else code


SUITES = {
    "CONFORMANCE_PJDFSTEST": ("pjdfstest in C", pjdfstest),
    "CONFORMANCE_LTP": ("LTP", ltp),
}
