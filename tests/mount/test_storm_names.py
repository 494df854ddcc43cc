"""Processes that share directories and files: names that come and go, appends, renames above open files.

Where the other storm has a file belong to one process, here all work on the same ones, while the volume is
demoted and fetched. Afterwards the mount server holds no more descriptors, nodes or open files than before.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Volume

pytestmark = pytest.mark.usefixtures("tiers", "needs_root")
WORKERS = 4
NAMES = [f"n{number}" for number in range(8)]
RECORD = struct.Struct("<II")  # writer, number
BODY = 4096  # bytes of a record: it spans pages unless it is written whole
# What may happen to a name that others use too; everything else is an error of the filesystem.
EXPECTED = {errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP}


def pause(number: int) -> None:
    """Leave the files shut for a moment, so that they can be demoted, now and then a longer one."""
    time.sleep(0.1 if number % 16 == 0 else 0.002)


class Names:
    """Makes, links, renames and removes the same few names in the same few directories."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.draw, self.done = place, random.Random(seed), 0

    def path(self) -> Path:
        return self.place / self.draw.choice("abc") / self.draw.choice(NAMES)

    def step(self) -> None:
        call, *args = self.draw.choice([
            (self.write, self.path()), (self.write, self.path()), (self.read, self.path()),
            (os.unlink, self.path()), (os.link, self.path(), self.path()),
            (os.rename, self.path(), self.path()), (os.rename, self.path().parent, self.path().parent),
            (os.mkdir, self.path()), (os.rmdir, self.path()), (os.symlink, "n1", self.path()),
            (os.mkdir, self.path().parent), (os.listdir, self.path().parent), (os.stat, self.path()),
            (os.truncate, self.path(), 10), (os.chmod, self.path(), 0o600),
        ])  # fmt: skip
        try:
            call(*args)
        except OSError as error:
            # A name that is a directory has only one.
            directory = call is os.link and error.errno == errno.EPERM
            if error.errno not in EXPECTED and not directory:
                raise
        self.done += 1
        pause(self.done)

    def write(self, path: Path) -> None:
        """Every file holds one letter, whoever writes it."""
        with open(path, "wb", buffering=0) as file:
            file.write(b"A" * self.draw.randrange(200_000))

    def read(self, path: Path) -> None:
        with open(path, "rb") as file:
            while data := file.read(65536):
                # Truncated upwards or written over meanwhile it may hold zeros, but nothing else.
                assert not data.strip(b"A\0"), f"{path}: foreign bytes"


class Appends:
    """Several writers append records to one file; none may be lost, torn or doubled."""

    def __init__(self, place: Path, seed: int) -> None:
        self.path, self.seed, self.done = place / "log", seed, 0

    def step(self) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for _ in range(5):
            record = RECORD.pack(self.seed, self.done).ljust(BODY, b"%d" % (self.seed % 10))
            assert os.write(fd, record) == BODY
            self.done += 1
        os.close(fd)
        pause(self.done // 5)


class Counts:
    """A counter in a file that each raises under a lock: no rise may be lost."""

    def __init__(self, place: Path, seed: int) -> None:
        self.path, self.kind, self.done = place / "counter", seed % 2, 0

    def step(self) -> None:
        fd = os.open(self.path, os.O_RDWR)
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
        fcntl.fcntl(fd, (fcntl.F_SETLKW, fcntl.F_OFD_SETLKW)[self.kind], lock)
        value = int(os.pread(fd, 20, 0))
        os.pwrite(fd, b"%020d" % (value + 1), 0)
        os.close(fd)
        self.done += 1
        pause(self.done)


class Moves:
    """Renames directories above a file that stays open, and writes through the descriptor all the time."""

    def __init__(self, place: Path, seed: int) -> None:
        self.top = place / f"top-{seed}"
        (self.top / "x" / "y").mkdir(parents=True)
        self.fd = os.open(self.top / "x" / "y" / "file", os.O_RDWR | os.O_CREAT)
        self.name, self.done = "x", 0

    def step(self) -> None:
        new = "x" if self.name == "z" else "z"
        os.rename(self.top / self.name, self.top / new)
        self.name = new
        os.pwrite(self.fd, b"%08d" % self.done, 8 * self.done)
        self.done += 1
        found = (self.top / new / "y" / "file").stat()
        assert (found.st_ino, found.st_size) == (os.fstat(self.fd).st_ino, 8 * self.done)


ROLES = {"names": Names, "appends": Appends, "counts": Counts, "moves": Moves}


def work(place: Path, role: str, seed: int, seconds: float) -> None:
    """One process: does its role until the time is up, and says how often."""
    worker = ROLES[role](place, seed)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        worker.step()
    print(worker.done)


def counters(mounted: Volume) -> dict[str, int]:
    """What the server says it holds, and its descriptors."""
    server = mounted.status()["pids"]["server"]
    before = mounted.log().count("holds ")
    os.kill(server, signal.SIGUSR1)
    until = time.monotonic() + 20
    while mounted.log().count("holds ") == before:
        assert time.monotonic() < until, "the server does not say what it holds"
        time.sleep(0.02)
    line = [line for line in mounted.log().splitlines() if "holds " in line][-1]
    found = {name: int(number) for number, name in re.findall(r"(\d+) (\w+)", line.split("holds ")[1])}
    return {**found, "fds": len(os.listdir(f"/proc/{server}/fd"))}


def settled(mounted: Volume, most: dict[str, int]) -> dict[str, int]:
    """The counters once they have come down to these, or what they stay at."""
    until = time.monotonic() + 60
    while True:
        # The kernel forgets what nobody has in its caches.
        Path("/proc/sys/vm/drop_caches").write_text("2")
        found = counters(mounted)
        if all(found[name] <= most[name] for name in most) or time.monotonic() > until:
            return found
        time.sleep(0.2)


def storm(mounted: Volume, seconds: float, seed: int) -> None:
    place = mounted.mountpoint / "shared"
    for name in ("a", "b", "c"):
        (place / name).mkdir(parents=True)
    (place / "counter").write_text("0" * 20)
    before = counters(mounted)
    argv = [sys.executable, __file__, str(place), str(seconds)]
    workers = {
        (role, number): subprocess.Popen(
            [*argv, role, str(seed + number)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        for role in ROLES for number in range(WORKERS if role == "names" else 2)
    }  # fmt: skip
    stop = threading.Event()
    moving = threading.Thread(target=_move, args=(mounted, stop))
    moving.start()
    try:
        ends = {key: worker.communicate(timeout=seconds + 60) for key, worker in workers.items()}
    finally:
        stop.set()
        for worker in workers.values():
            worker.kill()
            worker.wait()
        moving.join()
    failed = {key: ends[key][1][-2000:] for key, worker in workers.items() if worker.returncode}
    assert not failed, f"{failed}\n{mounted.log()[-4000:]}"
    _check_log(place / "log", {seed + n: int(ends["appends", n][0]) for n in range(2)})
    assert int((place / "counter").read_text()) == sum(int(ends["counts", n][0]) for n in range(2))
    for number in range(2):
        done = int(ends["moves", number][0])
        (found,) = (place / f"top-{seed + number}").glob("*/y/file")
        assert found.read_bytes() == b"".join(b"%08d" % each for each in range(done))
    assert not mounted.status()["errors"], mounted.status()["errors"]
    assert mounted.objects(), "nothing was copied out while files were in use"
    # Locks are given up and files closed: nothing may be left but what the kernel still caches.
    most = {"files": before["files"], "inodes": before["inodes"] + 2, "fds": before["fds"] + 24}
    after = settled(mounted, most)
    assert all(after[name] <= most[name] for name in most), f"left behind: {before} became {after}"
    mounted.demote()
    assert (place / "log").stat().st_size % BODY == 0


def _move(mounted: Volume, stop: threading.Event) -> None:
    turn, place = 0, mounted.mountpoint / "shared"
    while not stop.is_set():
        own = [path for path in (place / "log", place / "counter") if path.exists()]
        turn += 1
        mounted.order("fetch" if turn % 8 == 0 else "demote", *(own if turn % 4 else ()))


def _check_log(path: Path, written: dict[int, int]) -> None:
    data = path.read_bytes()
    assert len(data) == BODY * sum(written.values()), "records are lost or doubled"
    nexts = dict.fromkeys(written, 0)
    for at in range(0, len(data), BODY):
        writer, number = RECORD.unpack_from(data, at)
        assert number == nexts[writer], f"record {number} of {writer} at {at} for {nexts[writer]}"
        assert data[at : at + BODY] == RECORD.pack(writer, number).ljust(BODY, b"%d" % (writer % 10))
        nexts[writer] += 1


def test_a_short_storm_on_shared_names(volume: Callable[..., Volume]) -> None:
    mounted = volume()
    mounted.configure(quiet="0s", min_age="0s", min_size="0", chunk_size="64K")
    storm(mounted, 4, 1)
    mounted.remount()
    assert mounted.cli("check", "--read-data", mounted.mountpoint).returncode == 0


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [10, 20, 30])
def test_a_long_storm_on_shared_names(volume: Callable[..., Volume], seed: int) -> None:
    mounted = volume(limit=1800)
    mounted.configure(quiet="0s", min_age="0s", min_size="0", chunk_size="64K")
    storm(mounted, 240, seed)
    mounted.remount()
    assert mounted.cli("check", "--read-data", mounted.mountpoint, timeout=600).returncode == 0


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[3], int(sys.argv[4]), float(sys.argv[2]))
