"""The units for systemd: what it makes of them, and what is ordered before what."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from harness import REPO

UNITS = REPO / "daemon" / "systemd"
SYSTEM = UNITS / "tierfs@.service"


def settings(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE):
        found.setdefault(key, []).extend(value.split())
    return found


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
@pytest.mark.parametrize("unit", [SYSTEM, UNITS / "user" / "tierfs@.service"], ids=["system", "user"])
def test_systemd_understands_them(unit: Path, tmp_path: Path) -> None:
    command = "/usr/local/bin/tierfs"
    text = unit.read_text()
    assert f"ExecStart={command} mount --foreground %f\n" in text
    instance = tmp_path / "tierfs@home-ann.service"
    instance.write_text(text.replace(f"={command} ", "=/bin/true "))
    done = subprocess.run(["systemd-analyze", "verify", instance], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_home_is_there_for_as_long_as_somebody_may_be_logged_in() -> None:
    unit = settings(SYSTEM)
    assert "systemd-user-sessions.service" in unit["Before"]
    assert {"umount.target"} <= set(unit["Before"]) & set(unit["Conflicts"])
    assert unit["RequiresMountsFor"] == ["/var/lib/tierfs", "%f"], "nor made anew without its disk"
    assert "network.target" in unit["After"], "for the last names at a shutdown"
    assert "network-online.target" not in unit["After"], "a login offline waits for nothing"
