"""Days of work leave nothing in the processes that serve: no memory, no descriptor, no state of what is gone.

`python test_churn.py DIRECTORY SECONDS` is the work, for a look by hand.
"""

from __future__ import annotations

import itertools
import mmap
import os
import random
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Volume

pytestmark = pytest.mark.usefixtures("tiers", "needs_root")
KIB = 1 << 10
FILES = 40  # of one round, in each of two directories
KEPT = 30  # files that stay, and are demoted and read
MIB = 1 << 20
# Bytes. What takes marks in holds a batch of them for a while, and its highest batch counts for good.
GROWTH = {"mover": 8 * MIB}
LITTLE = 1 * MIB


def one_file(draw: random.Random, path: Path, number: int) -> None:
    """What programs do with a file, by its number."""
    content = draw.randbytes(draw.choice((100, 5_000, 70_000)))
    path.write_bytes(content)
    with open(path, "r+b") as file:
        if number % 4 == 0:
            with mmap.mmap(file.fileno(), 0) as view:
                view[:4] = b"word"
        file.seek(0, os.SEEK_END)
        file.write(b"more")
    if number % 4 == 1:
        os.setxattr(path, "user.note", b"x" * 20)
        os.chmod(path, 0o600)
    if number % 4 == 2:
        os.link(path, f"{path}.link")
        os.unlink(path)
        os.rename(f"{path}.link", path)
    if number % 4 == 3:
        os.symlink(path.name, f"{path}.to")
        os.utime(path, (number, number))
    assert len(path.read_bytes()) == len(content) + 4


def one_round(top: Path, number: int) -> None:
    """Work in two directories that are new and gone afterwards."""
    draw = random.Random(number)
    places = [top / f"round{number}{which}" for which in "ab"]
    for place in places:
        place.mkdir()
        for each in range(FILES):
            one_file(draw, place / f"file{each}", each)
        assert sum(1 for entry in os.scandir(place) if entry.stat()) >= FILES
    for each in range(0, FILES, 2):
        os.replace(places[0] / f"file{each}", places[1] / f"file{each + 1}")
    with open(places[1] / "file0", "rb") as file:
        for place in places:
            shutil.rmtree(place)
        assert file.read(1)


def kept(top: Path) -> dict[Path, bytes]:
    """Files that stay, and what is in them."""
    place = top / "kept"
    place.mkdir()
    found = {place / f"file{number}": random.Random(number).randbytes(90_000) for number in range(KEPT)}
    for path, content in found.items():
        path.write_bytes(content)
    return found


def processes(mounted: Volume) -> dict[str, int]:
    """All that serve the volume."""
    pids: dict[str, int] = mounted.status()["pids"]
    children = Path(f"/proc/{pids['server']}/task/{pids['server']}/children").read_text().split()
    return {**pids, **{f"child {number} of the server": int(pid) for number, pid in enumerate(children)}}


def footprint(pids: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Of each process, the bytes of memory that are its own and the number of its descriptors."""
    found = {}
    for name, pid in pids.items():
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        own = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * KIB
        found[name] = own, len(os.listdir(f"/proc/{pid}/fd"))
    return found


def held(mounted: Volume) -> str:
    """What the server says it holds, once registrations that nobody uses have ended."""
    time.sleep(7)
    before = mounted.log().count("holds ")
    os.kill(mounted.status()["pids"]["server"], signal.SIGUSR1)
    for _ in range(100):
        if mounted.log().count("holds ") > before:
            break
        time.sleep(0.1)
    return mounted.log().rsplit("holds ", 1)[1].splitlines()[0]


def churn(mounted: Volume, more: Callable[[int], bool], demoted_every: int) -> list[dict[str, tuple[int, int]]]:
    """Rounds of work for as long as `more` says; the footprint after each."""
    stays, pids, prints = kept(mounted.mountpoint), processes(mounted), []
    for number in itertools.count():
        if not more(number):
            return prints
        one_round(mounted.mountpoint, number)
        if number % demoted_every == 0:
            mounted.cli("demote", "--wait", mounted.mountpoint / "kept")
            assert all(path.read_bytes() == content for path, content in stays.items())
        prints.append(footprint(pids))
    raise AssertionError


def assert_level(prints: list[dict[str, tuple[int, int]]]) -> None:
    """What the last quarter of the rounds takes is what the second quarter took."""
    quarter = len(prints) // 4
    early, late = prints[quarter : 2 * quarter], prints[3 * quarter :]
    for name in prints[0]:
        before, after = (statistics.median(each[name][0] for each in part) for part in (early, late))
        assert after - before <= GROWTH.get(name, LITTLE), (
            f"{name}: from {before / KIB:,.0f} to {after / KIB:,.0f} KiB"
        )
        before, after = (min(each[name][1] for each in part) for part in (early, late))
        assert after <= before + 2, f"{name}: from {before} to {after} descriptors"


def test_a_little_work_leaves_nothing(volume: Callable[..., Volume]) -> None:
    mounted = volume()
    mounted.configure(quiet="0s", min_age="0s")
    assert_level(churn(mounted, lambda number: number < 16, 8))


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_days_of_work_leave_nothing(volume: Callable[..., Volume]) -> None:
    seconds = float(os.environ.get("TIERFS_CHURN", "1200"))
    mounted = volume(limit=seconds + 600)
    mounted.configure(quiet="0s", min_age="0s")
    churn(mounted, lambda number: number < 20, 5)
    shutil.rmtree(mounted.mountpoint / "kept")
    before, until = held(mounted), time.monotonic() + seconds
    prints = churn(mounted, lambda number: time.monotonic() < until, 20)
    shutil.rmtree(mounted.mountpoint / "kept")
    every = max(len(prints) // 10, 1)
    print(f"{len(prints)} rounds", *prints[::every], sep="\n")
    assert_level(prints)
    assert held(mounted) == before


if __name__ == "__main__":
    end = time.monotonic() + float(sys.argv[2])
    for round_number in itertools.count():
        one_round(Path(sys.argv[1]), round_number)
        if time.monotonic() > end:
            break
