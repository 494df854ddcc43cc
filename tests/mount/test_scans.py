"""One `grep -r` over everything: the disk keeps its limit, and what is in use stays."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from bare import until
from harness import Volume
from test_watermark import LIMIT, MIB, fill, settled

pytestmark = pytest.mark.usefixtures("tiers")
Make = Callable[..., Volume]


def in_use(volume: Make) -> tuple[Volume, list[Path], list[Path]]:
    """A volume with a third of its limit in use, and a project and far more away; everything is young."""
    mounted = volume(options=("--local-limit", str(LIMIT)))
    mounted.configure(min_age="0s", quiet="0s")
    for name in ("work", "project", "archive"):
        (mounted.mountpoint / name).mkdir()
    project = [*fill(mounted, [f"project/p{number:03}" for number in range(200)], 4096)]
    fill(mounted, [f"archive/a{number:02}" for number in range(80)])
    mounted.demote()
    mounted.configure(min_age="1h")
    work = [*fill(mounted, [f"work/w{number}" for number in range(10)])]
    mounted.remount()  # heat is flushed: who writes and who scans are not told of in one breath
    return mounted, work, project


def scan(mounted: Volume, *names: str) -> None:
    where = [mounted.mountpoint / name for name in names]
    done = subprocess.run(["grep", "-rc", "needle", *where], capture_output=True, timeout=80)
    assert done.returncode == 1, done.stderr


def tiers_of(mounted: Volume, paths: list[Path]) -> set[str]:
    return {mounted.tier(path) for path in paths}


def test_a_scan_larger_than_the_limit_leaves_what_is_in_use(volume: Make) -> None:
    """What it brings leaves although it is younger than `min_age`, and nothing else does."""
    mounted, work, project = in_use(volume)
    subprocess.run(["cp", "-r", mounted.mountpoint / "project", mounted.base / "out"], check=True, timeout=60)
    for _ in range(2):
        scan(mounted, "archive", "work", "project")
        assert settled(mounted, LIMIT * 95 // 100) <= LIMIT * 95 // 100
        assert tiers_of(mounted, work) == {"resident"}
        assert tiers_of(mounted, project) == {"resident"}, "what somebody has opened whole stays"
    assert until(lambda: 0 < mounted.status()["lent_bytes"] < LIMIT, 30)
    assert "for scans alone" in mounted.cli("status", mounted.mountpoint).stdout


def test_what_is_used_after_a_scan_stays(volume: Make) -> None:
    """With room all stays that a scan has read; the first use by anybody else makes a file one of his."""
    mounted, _, _ = in_use(volume)
    some = [mounted.mountpoint / "archive" / f"a{number:02}" for number in range(12)]
    subprocess.run(["cat", *some], check=True, timeout=60, stdout=subprocess.DEVNULL)
    assert until(lambda: mounted.status()["lent_bytes"] == 12 * MIB, 30)
    assert tiers_of(mounted, some) == {"resident"}
    used = some[:2]
    for path in used:
        path.read_bytes()
    assert until(lambda: mounted.status()["lent_bytes"] == 10 * MIB, 30)
    scan(mounted, "archive")
    assert settled(mounted, LIMIT * 95 // 100) <= LIMIT * 95 // 100
    assert tiers_of(mounted, used) == {"resident"}


@pytest.mark.usefixtures("needs_root")
def test_what_scans_brought_is_known_to_the_next_mover(volume: Make) -> None:
    mounted, _, _ = in_use(volume)
    some = [mounted.mountpoint / "archive" / f"a{number:02}" for number in range(12)]
    subprocess.run(["cat", *some], check=True, timeout=60, stdout=subprocess.DEVNULL)
    assert until(lambda: mounted.status()["lent_bytes"] == 12 * MIB, 30)
    os.kill(mounted.mover(), 9)
    assert until(lambda: mounted.status()["lent_bytes"] == 12 * MIB, 30)
    assert tiers_of(mounted, some) == {"resident"}
