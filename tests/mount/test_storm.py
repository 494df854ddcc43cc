"""Processes that use files in every way while all of them are demoted over and over: no byte may be lost."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Volume

pytestmark = pytest.mark.usefixtures("tiers", "needs_root")
FILES = 12
WORKERS = 3
MOST = 6 << 20  # larger than a chunk, so that large files are fetched in parts


class Worker:
    """Owns some files and knows what each must contain."""

    def __init__(self, place: Path, seed: int) -> None:
        self.draw = random.Random(seed)
        self.place = place / str(seed)
        self.place.mkdir()
        self.content: dict[str, bytearray] = {}
        self.done = 0

    def run(self, seconds: float) -> None:
        """Do random things until time is up, then look at everything once more."""
        for number in range(FILES):
            self.rewrite(f"f{number}")
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            name = self.draw.choice(sorted(self.content))
            self.draw.choice([
                self.rewrite, self.append, self.overwrite, self.truncate, self.rename, self.mapped,
                self.replace, self.look, self.look, self.look_at_a_part,
            ])(name)  # fmt: skip
            self.done += 1
        for name in self.content:
            self.look(name)

    def bytes(self, most: int = MOST) -> bytes:
        size = self.draw.choice([0, 1, 4095, 65536, 100_000, self.draw.randrange(most)])
        return self.draw.randbytes(min(size, most))

    def rewrite(self, name: str) -> None:
        data = self.bytes()
        (self.place / name).write_bytes(data)
        self.content[name] = bytearray(data)

    def replace(self, name: str) -> None:
        """As editors save: a new file takes the name."""
        data = self.bytes()
        (self.place / "new").write_bytes(data)
        os.replace(self.place / "new", self.place / name)
        self.content[name] = bytearray(data)

    def append(self, name: str) -> None:
        data = self.bytes(200_000)
        with open(self.place / name, "ab") as file:
            file.write(data)
        self.content[name] += data

    def overwrite(self, name: str) -> None:
        data, content = self.bytes(200_000), self.content[name]
        at = self.draw.randrange(len(content) + 1)
        with open(self.place / name, "r+b") as file:
            file.seek(at)
            file.write(data)
        content[at : at + len(data)] = data

    def truncate(self, name: str) -> None:
        content = self.content[name]
        size = self.draw.randrange(2 * len(content) + 1) % MOST
        os.truncate(self.place / name, size)
        self.content[name] = content[:size] + bytes(max(0, size - len(content)))

    def rename(self, name: str) -> None:
        self.done += 1
        os.rename(self.place / name, self.place / f"{name[:2]}-{self.done}")
        self.content[f"{name[:2]}-{self.done}"] = self.content.pop(name)

    def mapped(self, name: str) -> None:
        """A shared mapping that outlives its descriptor."""
        content = self.content[name]
        if not content:
            return
        with open(self.place / name, "r+b") as file:
            view = mmap.mmap(file.fileno(), len(content))
        at = self.draw.randrange(len(content))
        data = self.bytes(min(len(content) - at, 5000))
        view[at : at + len(data)] = data
        content[at : at + len(data)] = data
        view.close()

    def look(self, name: str) -> None:
        found, content = (self.place / name).read_bytes(), self.content[name]
        if found != content:
            differing = (i for i, (a, b) in enumerate(zip(found, content)) if a != b)
            at = next(differing, min(len(found), len(content)))
            raise AssertionError(f"{name}: {len(found)} bytes for {len(content)}; they differ at {at}")
        if os.stat(self.place / name).st_size != len(content):
            raise AssertionError(f"{name}: stat shows another size")

    def look_at_a_part(self, name: str) -> None:
        content = self.content[name]
        at = self.draw.randrange(len(content) + 1)
        with open(self.place / name, "rb") as file:
            found = os.pread(file.fileno(), 4096, at)
        if found != content[at : at + 4096]:
            raise AssertionError(f"{name}: other bytes at {at}")


def storm(mounted: Volume, seconds: float, seed: int) -> None:
    """Let the workers run while the whole volume is ordered out again and again."""
    argv = [sys.executable, __file__, str(mounted.mountpoint), str(seconds)]
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    more["env"] = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    workers = [subprocess.Popen([*argv, str(seed + n)], **more) for n in range(WORKERS)]
    try:
        while any(worker.poll() is None for worker in workers):
            mounted.cli("demote", "--wait", mounted.mountpoint, check=False)
        ends = [worker.communicate(timeout=60) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0] * WORKERS, f"{ends}\n{mounted.log()[-6000:]}"
    assert len(mounted.objects()) > FILES, "nothing was copied out while files were in use"
    assert not mounted.status()["errors"], mounted.status()["errors"]


def test_nothing_is_lost_in_a_short_storm(volume: Callable[..., Volume]) -> None:
    mounted = volume()
    mounted.configure(quiet="0s", min_age="0s")
    storm(mounted, 8, 1)
    mounted.remount()
    assert mounted.cli("check", "--read-data", mounted.mountpoint).returncode == 0


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(10, 16))
def test_nothing_is_lost_in_a_long_storm(volume: Callable[..., Volume], seed: int) -> None:
    mounted = volume(limit=1800)
    mounted.configure(quiet="0s", min_age="0s")
    storm(mounted, 300, seed)
    mounted.remount()
    assert mounted.cli("check", "--read-data", mounted.mountpoint, timeout=600).returncode == 0


if __name__ == "__main__":
    Worker(Path(sys.argv[1]), int(sys.argv[3])).run(float(sys.argv[2]))
