"""The namespace journal of a mounted volume: what the store tells is what the mount shows."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Volume
from journals import as_it_is, as_told

from tierfs.namespace import Chronicle
from tierfs.store.directory import DirectoryStore

Make = Callable[..., Volume]
pytestmark = pytest.mark.usefixtures("tiers")


@pytest.fixture
def home(volume: Make, tmp_path: Path) -> Volume:
    made = volume(store=f"file://{tmp_path}/store")
    made.configure(journal="0.2s", quiet="0.5s")
    return made


def told(tmp_path: Path) -> dict[bytes, tuple[object, ...]]:
    chronicle = Chronicle(DirectoryStore(str(tmp_path / "store")))
    found = as_told(chronicle.read())
    assert not chronicle.missing and not chronicle.troubles
    return found


def caught_up(home: Volume, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while home.status()["journal_behind_seconds"]:
        assert time.monotonic() < deadline, f"the journal does not catch up\n{home.log()[-3000:]}"
        time.sleep(0.1)


def storm(root: Path, seed: int, turns: int) -> None:
    """Names come, go and change."""
    rng = random.Random(seed)
    root = root / f"storm{seed}"
    root.mkdir()
    directories = [root]
    for turn in range(turns):
        here = rng.choice(directories)
        path = here / f"n{rng.randrange(12)}"
        match rng.randrange(9):
            case 0 if len(directories) < 20:
                path = here / f"d{turn}"
                path.mkdir()
                directories.append(path)
            case 1 | 2:
                path.write_bytes(rng.randbytes(rng.randrange(5000)))
            case 3 if path.exists():
                path.rename(rng.choice(directories) / f"n{rng.randrange(12)}")
            case 4 if path.exists():
                path.unlink()
            case 5 if path.exists():
                os.chmod(path, 0o600 + rng.randrange(64))
            case 6 if path.exists():
                os.setxattr(path, "user.turn", str(turn).encode())
            case 7 if path.exists():
                os.link(path, here / f"l{turn}")
            case 8:
                (here / f"s{turn}").symlink_to("anywhere")


def test_the_mover_is_killed_in_a_storm(home: Volume, tmp_path: Path) -> None:
    for seed in range(4):
        storm(home.mountpoint, seed, 120)
        if seed % 2:
            os.kill(home.mover(), signal.SIGKILL)
    caught_up(home)
    home.cli("demote", "--wait", home.mountpoint)
    caught_up(home)
    assert told(tmp_path) == as_it_is(home.mountpoint)
    storm(home.mountpoint, 99, 100)
    there = as_it_is(home.mountpoint)
    home.umount("--wait")
    assert told(tmp_path) == there, "umount --wait waits for the journal too"
    home.mount()
    storm(home.mountpoint, 77, 100)
    there = as_it_is(home.mountpoint)
    home.umount()
    home.mount()
    caught_up(home)
    assert told(tmp_path) == there, "what an umount leaves is written by the next mount"


def test_a_killed_server_loses_no_change(home: Volume, tmp_path: Path) -> None:
    caught_up(home)
    storm(home.mountpoint, 5, 100)
    server = home.status()["pids"]["server"]
    os.kill(int(server), signal.SIGKILL)
    deadline = time.monotonic() + 30
    while not _is_replaced(home, server):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    storm(home.mountpoint, 6, 50)
    caught_up(home)
    assert told(tmp_path) == as_it_is(home.mountpoint)


def _is_replaced(home: Volume, server: int) -> bool:
    done = home.cli("status", "--json", home.mountpoint, check=False)
    return done.returncode == 0 and json.loads(done.stdout)["pids"]["server"] != server


def test_a_store_that_is_away(home: Volume, tmp_path: Path) -> None:
    caught_up(home)
    (tmp_path / "store").rename(tmp_path / "away")
    storm(home.mountpoint, 1, 100)
    deadline = time.monotonic() + 30
    while home.status()["journal_behind_seconds"] < 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(home.mover(), signal.SIGKILL)
    storm(home.mountpoint, 2, 50)
    (tmp_path / "away").rename(tmp_path / "store")
    caught_up(home)
    assert told(tmp_path) == as_it_is(home.mountpoint)


def test_what_is_made_behind_the_mount_is_told_by_the_next_snapshot(home: Volume, tmp_path: Path) -> None:
    (home.mountpoint / "d").mkdir()
    (home.mountpoint / "d" / "before").write_bytes(b"x")
    caught_up(home)
    Path(home.backing(home.mountpoint / "d" / "behind")).write_bytes(b"y")
    os.rename(home.backing(home.mountpoint / "d" / "before"), home.backing(home.mountpoint / "d" / "moved"))
    (home.mountpoint / "d" / "after").write_bytes(b"z")
    home.umount("--wait")
    assert {b"d/before", b"d/after"} <= told(tmp_path).keys()
    assert not {b"d/behind", b"d/moved"} & told(tmp_path).keys()
    for path in (tmp_path / "store" / "meta").glob("*.snapshot-*"):
        path.unlink()  # the next mount takes another one
    home.mount()
    until = time.monotonic() + 60
    while not list((tmp_path / "store" / "meta").glob("*.snapshot-*")):
        assert time.monotonic() < until, home.log()
        time.sleep(0.1)
    caught_up(home)
    assert {b"d/behind", b"d/moved", b"d/after"} <= told(tmp_path).keys()
    assert b"d/before" not in told(tmp_path)


def test_an_adopted_directory_is_told(volume: Make, tmp_path: Path) -> None:
    made = volume(mount=False)
    directory = made.base / "mnt"
    directory.mkdir()
    storm(directory, 3, 200)
    there = as_it_is(directory)
    made.state = made.base / ".tierfs-adopted"
    made.cli("adopt", "--store", f"file://{tmp_path}/store", "--state", made.state, directory)
    made.watch()
    caught_up(made)
    assert told(tmp_path) == there
    made.umount()
    shutil.rmtree(tmp_path / "store" / "meta")
