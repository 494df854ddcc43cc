"""A full disk: an honest ENOSPC, nothing lost, and room again as soon as something may leave."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Scratch, Volume

pytestmark = pytest.mark.usefixtures("tiers", "needs_root")
MIB = 1 << 20
Make = Callable[..., Volume]


@pytest.fixture
def disk(area: Scratch) -> Iterator[Path]:
    """A filesystem of 192 MiB of its own."""
    if not shutil.which("mkfs.ext4"):
        pytest.skip("mkfs.ext4 is not installed")
    image, place = area.path / "disk.img", area.path / "disk"
    with open(image, "wb") as out:
        out.truncate(192 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    place.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-o", "loop", image, place], capture_output=True).returncode:
        pytest.skip("loop devices are not to be had here")
    yield place
    subprocess.run(["umount", place], check=True)
    image.unlink()


@pytest.fixture
def small(disk: Path, volume: Make) -> Volume:
    """A volume on that filesystem, its store elsewhere."""
    made = volume(mount=False)
    (made.base / "store").mkdir()
    made.store, made.state = f"file://{made.base}/store", disk / "state"
    made.mount()
    made.configure(min_age="0s", quiet="0s", replicate="all")
    return made


def content(number: int) -> bytes:
    return random.Random(number).randbytes(MIB)


def fill(path: Path) -> int:
    """Write until nothing more fits, and say what that error was."""
    with open(path, "wb", buffering=0) as out:
        try:
            for _ in range(400):
                out.write(bytes(MIB))
                os.fsync(out.fileno())
        except OSError as exc:
            return exc.errno or -1
    return 0


def test_full_of_what_cannot_leave(small: Volume) -> None:
    stubs = {small.mountpoint / f"stub{number}": content(number) for number in range(30)}
    for path, data in stubs.items():
        path.write_bytes(data)
    small.demote(*stubs)
    with open(small.mountpoint / "kept", "wb") as held:
        held.write(content(99))
        held.flush()
        assert fill(small.mountpoint / "filler") == errno.ENOSPC
        assert (small.mountpoint / "kept").read_bytes() == content(99)
    for path, data in stubs.items():
        assert path.read_bytes() == data, "a cold read needs no room of its own"
    assert small.status()["files"] >= 32
    (small.mountpoint / "filler").unlink()
    for path, data in stubs.items():
        assert path.read_bytes() == data
    (small.mountpoint / "after").write_bytes(content(7))
    assert (small.mountpoint / "after").read_bytes() == content(7)


def test_full_of_what_can_leave(small: Volume) -> None:
    """Twice the disk's size goes in, one file after another: older ones make room."""
    files = {small.mountpoint / f"f{number:03}": content(number) for number in range(300)}
    for path, data in files.items():
        path.write_bytes(data)
    assert small.status()["stubs"] >= 120
    for number, (path, data) in enumerate(files.items()):
        if number % 10 == 0:
            assert path.read_bytes() == data
