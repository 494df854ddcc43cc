"""The local disk gives up bit by bit, and then altogether: what had reached the store comes back."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import workload
from harness import Scratch, Volume

pytestmark = pytest.mark.usefixtures("tiers", "needs_root")
Make = Callable[..., Volume]


class Disk:
    """A filesystem of its own, of which parts can be made unreadable while it is not mounted."""

    def __init__(self, base: Path) -> None:
        self.image, self.place = base / "dying.img", base / "dying"
        with open(self.image, "wb") as out:
            out.truncate(96 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", self.image], check=True)
        self.place.mkdir(exist_ok=True)

    def mount(self) -> bool:
        command = ["mount", "-o", "loop", self.image, self.place]
        return not subprocess.run(command, capture_output=True).returncode

    def umount(self) -> None:
        subprocess.run(["umount", self.place], check=True)

    def ask(self, what: str) -> str:
        command = ["debugfs", "-R", what, self.image]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def spoil_directory(self, ino: int) -> None:
        """Its blocks are noise: their checksums tell, and reading it fails."""
        found = re.search(r"Block size:\s+(\d+)", self.ask("stats"))
        assert found
        size = int(found[1])
        with open(self.image, "r+b") as opened:
            for block in self.ask(f"blocks <{ino}>").split():
                opened.seek(int(block) * size)
                opened.write(os.urandom(size))


@pytest.fixture
def disk(area: Scratch) -> Iterator[Disk]:
    if not shutil.which("mkfs.ext4") or not shutil.which("debugfs"):
        pytest.skip("the tools of ext4 are not installed")
    made = Disk(area.path)
    if not made.mount():
        pytest.skip("loop devices are not to be had here")
    yield made
    made.umount()
    made.image.unlink()


def settled(machine: Volume) -> None:
    """Wait until the journal knows of everything."""
    deadline = time.monotonic() + 40
    while machine.status()["journal_behind_seconds"]:
        assert time.monotonic() < deadline, machine.log()
        time.sleep(0.1)


def all_else_goes_on(machine: Volume, new: bool) -> None:
    """Orders and checks name what cannot be read, and do their work on the rest."""
    files = machine.status()["files"]
    for argv in (["check", "--json"], ["check", "--repair", "--read-data", "--json"]):
        done = machine.cli(*argv, machine.mountpoint, check=False)
        found = json.loads(done.stdout)
        left = [finding for finding in found["findings"] if not finding["repaired"]]
        assert done.returncode == 1 and found["left"] == len(left), done.stdout
        assert [(finding["path"], finding["what"]) for finding in left if finding["path"]] == [
            ("odds", "cannot be read: Bad message")
        ]
        assert new or len(left) == 1, "with a new index objects wait for what refers to them to be seen"
    assert machine.status()["files"] == files, "what cannot be seen is not taken for gone"
    for verb, tier in (("demote", "stub"), ("fetch", "resident")):
        done = machine.cli(verb, "--wait", machine.mountpoint, check=False)
        assert done.returncode == 1 and f"{machine.mountpoint}/odds: Bad message" in done.stderr, done.stderr
        assert machine.tier(machine.mountpoint / "beside") == tier


@pytest.mark.parametrize("lost", ["index", "nothing"])
def test_what_is_in_a_directory_that_cannot_be_read_any_more_is_restored(
    disk: Disk, volume: Make, lost: str
) -> None:
    first, second = volume(mount=False), volume(mount=False)
    (first.base / "store").mkdir()
    first.store = second.store = f"file://{first.base}/store"
    first.state = disk.place / "state"
    first.mount()
    first.configure(journal="0.2s")
    workload.odds(first.mountpoint / "odds")
    settled(first)
    (first.mountpoint / "beside").write_bytes(b"beside")
    before = workload.survey(first.mountpoint)
    number = os.stat(first.backing(first.mountpoint / "odds")).st_ino
    first.umount("--wait")
    meta = first.base / "store" / "meta"
    if lost == "index":
        shutil.rmtree(first.state / "index")
    disk.umount()
    disk.spoil_directory(number)
    assert disk.mount()
    snapshots = len(list(meta.glob("*.snapshot-*")))
    for path in meta.glob("*.segment.*") if lost == "nothing" else ():
        path.unlink()  # the journal is not whole any more: the tree is walked
    first.mount()
    with pytest.raises(OSError, match=r"."):
        os.listdir(first.mountpoint / "odds")
    deadline = time.monotonic() + 40
    while len(list(meta.glob("*.snapshot-*"))) == snapshots:
        assert time.monotonic() < deadline, first.log()
        time.sleep(0.1)
    settled(first)
    assert any("directory 'odds' cannot be read" in error["what"] for error in first.status()["errors"])
    all_else_goes_on(first, lost == "index")
    first.umount()

    argv = ["restore", "--json", "--store", second.store, "--state", second.state, second.mountpoint]
    done = second.cli(*argv)
    second.watch()
    report = json.loads(done.stdout)
    assert (report["lost"], report["older"], report["refused"]) == ([], [], [])
    after = workload.survey(second.mountpoint)
    assert after.keys() == before.keys()
    for name, entry in before.items():
        told = after[name]
        assert told._replace(inode=entry.inode, times=entry.times) == entry, name
