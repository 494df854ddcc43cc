"""Pins: kept local, inherited by what is in a directory, carried along by renames."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Volume, kill, wait_gone

BINDINGS = ("kernel", "fusepy")
pytestmark = pytest.mark.usefixtures("tiers")
CONTENT = os.urandom(20_000)


def pinned(shared: Volume, work: Path) -> set[str]:
    """What `tierfs pins` lists below `work`, relative to it."""
    listed = (item["path"] for item in shared.json("pins", "--json", shared.mountpoint))
    return {os.path.relpath(path, work) for path in listed if path.startswith(f"{work}/") or path == str(work)}


def stays(shared: Volume, path: Path) -> bool:
    """Whether an order to demote leaves this file alone."""
    done = shared.cli("demote", "--wait", path, check=False)
    if shared.tier(path) == "stub":
        assert done.returncode == 0
        return False
    assert done.returncode == 1
    assert "pin" in done.stderr
    return True


def test_a_pinned_file_stays(shared: Volume, work: Path) -> None:
    path = work / "file"
    path.write_bytes(CONTENT)
    shared.cli("pin", path)
    assert pinned(shared, work) == {"file"}
    assert stays(shared, path)
    assert shared.status(path)["pinned"] is True
    assert os.getxattr(path, "user.tierfs.pin") == b"1"
    shared.cli("unpin", path)
    assert pinned(shared, work) == set()
    assert shared.status(path)["pinned"] is False
    assert not stays(shared, path)


def test_a_stub_is_fetched_when_it_is_pinned(shared: Volume, work: Path) -> None:
    path = work / "file"
    path.write_bytes(CONTENT)
    shared.demote(path)
    shared.cli("pin", path)
    assert shared.tier(path) == "resident"
    assert path.read_bytes() == CONTENT


def test_what_is_pinned_comes_though_nobody_waits_any_more(volume: Callable[..., Volume]) -> None:
    mounted = volume()
    path, store = mounted.mountpoint / "file", mounted.state / "store"
    path.write_bytes(CONTENT)
    mounted.demote(path)
    store.rename(mounted.base / "away")
    command = subprocess.Popen([*mounted.program, "pin", path], env=mounted.environment, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 20
        while not mounted.status(path)["pinned"]:
            assert time.monotonic() < deadline
        assert command.poll() is None, "it waits"
        command.send_signal(signal.SIGINT)
        command.communicate(timeout=20)
    finally:
        command.kill()
        command.communicate()
        (mounted.base / "away").rename(store)
    assert command.returncode == 130
    assert mounted.tier_becomes(path, "resident", seconds=60)
    assert path.read_bytes() == CONTENT


def test_a_directory_with_all_that_is_in_it(shared: Volume, work: Path) -> None:
    deep = work / "pinned" / "a" / "b"
    deep.mkdir(parents=True)
    old, other = deep / "old", work / "other"
    old.write_bytes(CONTENT)
    other.write_bytes(CONTENT)
    shared.demote(old, other)
    shared.cli("pin", work / "pinned")
    assert shared.tier(old) == "resident"
    assert shared.tier(other) == "stub"
    new = deep / "new"
    new.write_bytes(CONTENT)
    assert stays(shared, new), "inherited by new children"
    assert shared.status(new)["pinned"] is True
    done = shared.cli("demote", "--wait", work, check=False)
    assert shared.tier(old) == shared.tier(new) == "resident", done.stderr
    shared.cli("unpin", work / "pinned")
    assert not stays(shared, new)


def test_renames_carry_pins(shared: Volume, work: Path) -> None:
    path = work / "file"
    path.write_bytes(CONTENT)
    shared.cli("pin", path)
    (work / "d").mkdir()
    os.rename(path, work / "d" / "moved")
    os.rename(work / "d", work / "e")
    moved = work / "e" / "moved"
    assert pinned(shared, work) == {"e/moved"}
    assert stays(shared, moved)


def test_what_is_moved_into_a_pinned_directory_comes(shared: Volume, work: Path) -> None:
    for name in ("kept/sub", "other/deep"):
        (work / name).mkdir(parents=True)
    files = [work / "other/deep/file", work / "other/file"]
    for path in files:
        path.write_bytes(CONTENT)
    shared.demote(*files)
    shared.cli("pin", work / "kept")
    assert {shared.tier(path) for path in files} == {"stub"}
    files[0].parent.rename(work / "kept/deep")
    files[1].rename(work / "kept/sub/file")
    for path in (work / "kept/deep/file", work / "kept/sub/file"):
        assert shared.tier_becomes(path, "resident"), shared.log()[-2000:]
        assert path.read_bytes() == CONTENT


def test_moving_out_of_a_pinned_directory_ends_an_inherited_pin(shared: Volume, work: Path) -> None:
    (work / "pinned").mkdir()
    path = work / "pinned" / "file"
    path.write_bytes(CONTENT)
    shared.cli("pin", work / "pinned")
    assert stays(shared, path)
    os.rename(path, work / "file")
    assert not stays(shared, work / "file")
    os.rename(work / "file", path)
    assert shared.status(path)["pinned"] is True


def test_pins_by_attribute(shared: Volume, work: Path) -> None:
    path = work / "file"
    path.write_bytes(CONTENT)
    os.setxattr(path, "user.tierfs.pin", b"1")
    assert pinned(shared, work) == {"file"}
    assert stays(shared, path)
    assert "user.tierfs.pin" not in os.listxattr(path)
    os.setxattr(path, "user.tierfs.pin", b"0")
    assert not stays(shared, path)


def test_removed_files_leave_the_list(shared: Volume, work: Path) -> None:
    path = work / "file"
    path.write_bytes(CONTENT)
    shared.cli("pin", path)
    path.unlink()
    path.write_bytes(CONTENT)
    assert pinned(shared, work) == set()
    assert not stays(shared, path)


def test_pins_survive_a_remount(volume: Callable[..., Volume]) -> None:
    mounted = volume()
    path = mounted.mountpoint / "d" / "file"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    mounted.cli("pin", path.parent)
    mounted.remount()
    assert pinned(mounted, mounted.mountpoint) == {"d"}
    assert stays(mounted, path)


def test_a_volume_that_does_not_answer_hides_no_other(volume: Callable[..., Volume]) -> None:
    dead, alive = volume(), volume()
    path = alive.mountpoint / "file"
    path.write_bytes(CONTENT)
    alive.cli("pin", path)
    pids = dead.pids()
    os.kill(dead.status()["pids"]["supervisor"], signal.SIGKILL)  # first: it would start the others again
    for pid in pids:
        kill(pid)
    assert not wait_gone(pids, 20)
    done = alive.cli("pins", "--json")
    assert str(path) in {item["path"] for item in json.loads(done.stdout)}
    assert f"{dead.mountpoint}: its daemon does not answer" in done.stderr
    named = alive.cli("pins", dead.mountpoint, check=False)
    assert named.returncode == 1
    assert "its daemon does not answer" in named.stderr
