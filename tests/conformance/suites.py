"""The public suites, each run in one directory: what it said, as counts and the names of what failed."""

from __future__ import annotations

import grp
import os
import pwd
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

CARGO = Path.home() / ".cargo" / "bin"
CRATES = {"pjdfstest": "0.2.2", "fsx": "0.3.2"}
NAPTIME = 0.05  # seconds; more than a tick of the clock that files get their times from
WINDOW = 60_000  # microseconds for 2 MiB that fsx waits before it opens its file again: an order finds it shut

_PJDFSTEST = """[features]
posix_fallocate = {{}}
rename_ctime = {{}}
utime_now = {{}}
utimensat = {{}}
[settings]
naptime = {naptime}
allow_remount = false
[dummy_auth]
entries = {entries}
"""
_FSX = """flen = {length}
[opsize]
max = {most}
[weights]
close_open = {closing}
invalidate = 1
mapread = {mapping}
mapwrite = 5
read = 10
write = 10
truncate = 3
fsync = 1
fdatasync = 1
posix_fallocate = 1
punch_hole = 2
sendfile = 3
posix_fadvise = 1
copy_file_range = 3
"""


class Unavailable(Exception):
    """The suite cannot be had on this machine; says why."""


@dataclass
class Result:
    """What a suite found. `failed` are names, comparable from one filesystem to the next."""

    passed: int = 0
    skipped: int = 0
    failed: set[str] = field(default_factory=set)
    note: str = ""


def program(name: str) -> Path:
    """The program of a crate; it is installed where cargo is. Raises Unavailable."""
    found = shutil.which(name, path=f"{CARGO}:{os.environ['PATH']}")
    if found is None:
        cargo = shutil.which("cargo", path=f"{CARGO}:{os.environ['PATH']}")
        if cargo is None:
            raise Unavailable(f"{name}: neither it nor cargo is here")
        argv = [cargo, "install", "--quiet", "--locked", name, "--version", CRATES[name]]
        if subprocess.run(argv, check=False).returncode:
            raise Unavailable(f"{name}: cargo cannot install it")
        found = str(CARGO / name)
    return Path(found)


def _entries() -> list[list[str]]:
    """Two unprivileged users with their groups. Raises Unavailable."""
    found = []
    for name in ("nobody", "daemon", "bin", "games", "mail"):
        try:
            entry = pwd.getpwnam(name)
            found.append([name, grp.getgrgid(entry.pw_gid).gr_name])
        except KeyError:
            continue
    if os.geteuid() != 0 or len(found) < 2:
        raise Unavailable("pjdfstest: needs root, and two unprivileged users to become")
    return found[:2]


def pjdfstest(place: Path, scratch: Path, seconds: float) -> Result:
    """All cases of pjdfstest. Raises Unavailable."""
    binary = program("pjdfstest")
    config = scratch / "pjdfstest.toml"
    entries = str(_entries()).replace("'", '"')
    config.write_text(_PJDFSTEST.format(naptime=NAPTIME, entries=entries))
    argv = [binary, "-c", config, "-p", place]
    other = Path("/dev/shm")
    if other.is_dir() and other.stat().st_dev != place.stat().st_dev:
        argv += ["-s", other]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return Result(failed={f"not done within {seconds:g} s"})
    result = Result()
    for line in done.stdout.splitlines():
        found = re.match(r"(\S+::\S+)\s+(ok|skipped|FAILED|failed)\b", line)
        if found is None:
            continue
        if found[2] == "ok":
            result.passed += 1
        elif found[2] == "skipped":
            result.skipped += 1
        else:
            result.failed.add(found[1])
    if done.returncode and not result.failed:
        result.failed.add(f"ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return result


def fsx(
    place: Path, scratch: Path, operations: int, seconds: float, *,
    seed: int = 1, length: int = 256 * 1024, meanwhile: Callable[[Path], None] | None = None,
) -> Result:  # fmt: skip
    """fsx on one file; `meanwhile(path)` is called over and over while it runs. Raises Unavailable."""
    binary = program("fsx")
    config = scratch / "fsx.toml"
    # Its reads through a mapping are never unmapped, so that the file could not be demoted.
    closing, mapping = (1, 5) if meanwhile is None else (4, 0)
    most = min(length, 65536)
    config.write_text(_FSX.format(length=length, most=most, closing=closing, mapping=mapping))
    artifacts = scratch / f"fsx-{seed}"
    artifacts.mkdir(exist_ok=True)
    path = place / "fsx-file"
    options = ["-N", str(operations), "-S", str(seed), "-P", artifacts, "-f", config]
    argv: list[str | Path] = [binary, *options, path]
    if meanwhile is not None:
        if not shutil.which("strace"):
            raise Unavailable("fsx with demotion: strace, which keeps its file shut for a moment, is not here")
        inject = f"--inject=openat:delay_enter={WINDOW * (1 + (length >> 21))}"
        argv = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", path, "-e", "trace=openat", inject, *argv]
    with _running(argv) as process:
        try:
            _attend(process, path, seconds, meanwhile)
        except subprocess.TimeoutExpired:
            return Result(failed={f"not done within {seconds:g} s"})
        said = process.communicate()[0]
    if process.returncode:
        return Result(failed={f"seed {seed}"}, note=said.strip()[-2000:])
    return Result(passed=operations)


@contextmanager
def _running(argv: list[str | Path]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _attend(
    process: subprocess.Popen[str], path: Path, seconds: float, meanwhile: Callable[[Path], None] | None
) -> None:
    """Wait for its end. Raises subprocess.TimeoutExpired."""
    if meanwhile is None:
        process.wait(seconds)
        return
    until = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > until:
            raise subprocess.TimeoutExpired(process.args, seconds)
        if path.exists():
            meanwhile(path)


def command(words: list[str], place: Path, seconds: float) -> Result:
    """Another suite: a program that gets the directory as its last argument, and says by its exit code."""
    try:
        done = subprocess.run([*words, place], capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return Result(failed={f"not done within {seconds:g} s"})
    except OSError as error:
        raise Unavailable(f"{words[0]}: {error.strerror}") from error
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-2000:]
        return Result(failed={f"exit code {done.returncode}"}, note=said)
    return Result(passed=1)
