"""`local_limit` is honoured: local bytes come down to the low watermark, coldest first; the pinned stay."""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bare import until
from harness import BLOCK, Volume

from tierfs.commands import mount as command
from tierfs.commands.late import refuse_what_came_late
from tierfs.errors import VolumeError

# Where the mover has a processor when it wants one they take a fraction of this.
SECONDS = 600
PATIENCE = 150  # seconds without any progress
pytestmark = [pytest.mark.usefixtures("tiers"), pytest.mark.timeout(SECONDS)]
MIB = 1 << 20
LIMIT = 32 * MIB
Make = Callable[..., Volume]


def tree_bytes(mounted: Volume) -> int:
    tree = mounted.state / "tree"
    return sum(
        os.lstat(os.path.join(at, name)).st_blocks * BLOCK for at, _, names in os.walk(tree) for name in names
    )


def settled(mounted: Volume, most: int, seconds: float = PATIENCE) -> int:
    """Wait until the backing tree holds at most so many bytes, or nothing has left for so long; what it holds.

    A mover has next to no share of a processor that others want: how long all of it takes says nothing.
    """
    least, deadline = tree_bytes(mounted), time.monotonic() + seconds
    while (held := tree_bytes(mounted)) > most and time.monotonic() < deadline:
        if held < least:
            least, deadline = held, time.monotonic() + seconds
        time.sleep(0.1)
    return held


def limited(volume: Make, **more: str) -> Volume:
    mounted = volume(options=("--local-limit", str(LIMIT)), limit=SECONDS)
    mounted.configure(min_age="0s", quiet="0s", high="95%", low="90%", **more)
    return mounted


def fill(mounted: Volume, names: list[str], size: int = MIB) -> dict[Path, bytes]:
    contents = {}
    for number, name in enumerate(names):
        path = mounted.mountpoint / name
        contents[path] = random.Random(number).randbytes(size)
        path.write_bytes(contents[path])
    return contents


def test_local_bytes_come_down(volume: Make) -> None:
    mounted = limited(volume)
    contents = fill(mounted, [f"f{number:02}" for number in range(48)])
    held = settled(mounted, LIMIT * 95 // 100)
    assert held <= LIMIT * 95 // 100
    assert held >= LIMIT // 2, "no more than it takes is demoted"
    facts = mounted.status()
    assert facts["local_limit"] == LIMIT
    assert facts["local_bytes"] <= LIMIT
    assert 0 < facts["stubs"] < facts["files"] == len(contents)
    for path, content in contents.items():
        assert path.read_bytes() == content
    assert settled(mounted, LIMIT * 95 // 100) <= LIMIT * 95 // 100, "reading it all does not outgrow it either"


def test_the_coldest_leave_and_the_pinned_stay(volume: Make) -> None:
    mounted = limited(volume)
    hot = fill(mounted, ["hot"])
    kept = fill(mounted, ["kept"])
    mounted.cli("pin", *kept)
    first = fill(mounted, [f"a{number:02}" for number in range(20)])
    (hot_path,) = hot
    for _ in range(3):
        mounted.remount()  # heat is flushed, so that the touches below count apart
        assert hot_path.read_bytes() == hot[hot_path]
    second = fill(mounted, [f"b{number:02}" for number in range(20)])
    assert settled(mounted, LIMIT * 95 // 100) <= LIMIT * 95 // 100
    assert mounted.tier(next(iter(kept))) == "resident"
    assert mounted.tier(hot_path) == "resident"
    gone = [path.name for path in (*first, *second) if mounted.tier(path) == "stub"]
    assert gone


def test_min_age_protects_what_is_in_use(volume: Make) -> None:
    """Files younger than `min_age` stay even above the limit; the order to demote overrules it."""
    mounted = volume(options=("--local-limit", str(LIMIT)))
    mounted.configure(min_age="1h", quiet="0s")
    contents = fill(mounted, [f"f{number:02}" for number in range(40)])
    assert settled(mounted, LIMIT, seconds=3) > LIMIT
    assert mounted.status()["stubs"] == 0
    mounted.demote()
    assert tree_bytes(mounted) == 0
    assert all(path.read_bytes() == content for path, content in contents.items())


def test_status_says_why_a_file_stays(volume: Make) -> None:
    mounted = volume()
    mounted.configure(min_age="1h")
    fill(mounted, ["young", "pinned", "a.pid", ".profile", "gone"])
    fill(mounted, ["small"], size=100)
    (mounted.mountpoint / "empty").touch()
    mounted.cli("pin", mounted.mountpoint / "pinned")
    mounted.demote(mounted.mountpoint / "gone")
    why = {
        "young": "is younger than min_age", "small": "is smaller than min_size", "pinned": "is pinned",
        "empty": "is empty", "a.pid": "never leaves: its name matches a pattern of [never]",
        ".profile": "is kept here: its name matches a pattern of [keep]", "gone": "",
    }  # fmt: skip
    for name, reason in why.items():
        assert mounted.status(mounted.mountpoint / name)["stays"] == reason
    assert "  stays  is empty\n" in mounted.cli("status", mounted.mountpoint / "empty").stdout
    mounted.configure(min_age="0s")
    assert until(lambda: mounted.status(mounted.mountpoint / "young")["stays"] == "")


def test_an_open_file_is_never_a_victim(volume: Make) -> None:
    mounted = limited(volume)
    held = mounted.mountpoint / "held"
    held.write_bytes(b"h" * MIB)
    with open(held, "rb") as reader:
        fill(mounted, [f"f{number:02}" for number in range(40)])
        assert settled(mounted, LIMIT * 95 // 100) <= LIMIT * 95 // 100
        assert mounted.tier(held) == "resident"
        assert reader.read() == b"h" * MIB


def test_replicated_files_leave_without_an_upload(volume: Make, tmp_path: Path) -> None:
    """`replicate = "all"`: quiet files have copies long before the space is needed."""
    mounted = volume(limit=SECONDS)
    mounted.configure(replicate="all", quiet="0s", min_age="0s")
    contents = fill(mounted, [f"f{number}" for number in range(8)])
    assert until(lambda: not mounted.status()["dirty_files"], PATIENCE)
    facts = mounted.status()
    assert (facts["dirty_files"], facts["dirty_bytes"], facts["stubs"]) == (0, 0, 0)
    before = mounted.objects()
    assert len(before) == len(contents)
    mounted.demote()
    assert mounted.objects() == before
    assert all(path.read_bytes() == content for path, content in contents.items())


def test_umount_wait_leaves_nothing_uncopied(volume: Make) -> None:
    mounted = volume()
    contents = fill(mounted, [f"f{number}" for number in range(8)])
    mounted.umount("--wait")
    kept = {path.read_bytes() for path in mounted.objects()}
    assert set(contents.values()) <= kept
    mounted.mount()
    assert all(path.read_bytes() == content for path, content in contents.items())


def test_umount_wait_is_no_success_where_something_came_late(volume: Make) -> None:
    """Between the last look and the unmount a program goes on."""
    mounted = volume()
    fill(mounted, ["f0"])
    found = command.mounted_at(str(mounted.mountpoint))
    position = command.drain(found)
    fill(mounted, ["late", "later"])
    command.unmount(found)
    with pytest.raises(VolumeError, match="is unmounted, but 2 files were changed meanwhile"):
        refuse_what_came_late(str(mounted.mountpoint), str(mounted.state), position)
    mounted.mount()
    mounted.umount("--wait")


@pytest.mark.usefixtures("needs_root")
def test_umount_wait_where_the_volume_goes_on_elsewhere(volume: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is bound to another place: what comes late there is nobody's who unmounts here."""
    mounted = volume()
    fill(mounted, ["f0"])
    other = mounted.base / "other"
    other.mkdir()
    position = command.drain(command.mounted_at(str(mounted.mountpoint)))
    subprocess.run(["mount", "--bind", mounted.mountpoint, other], check=True)
    fill(mounted, ["late"])
    monkeypatch.setattr(command, "drain", lambda mount: position)
    assert command.umount.callback is not None
    command.umount.callback(True, str(other))
    assert (mounted.mountpoint / "late").exists()


def test_the_end_says_what_is_on_this_disk_only(volume: Make) -> None:
    mounted = volume()
    contents = fill(mounted, ["f0", "f1"])
    size = sum(map(len, contents.values()))
    assert until(lambda: not any("looked through" in note for note in mounted.status()["notes"]), 60)
    mounted.umount()
    assert f"2 files are not in the store, {size} bytes: on this disk only" in mounted.log()
    said = len(mounted.log())
    mounted.mount()
    mounted.umount("--wait")
    assert "not in the store" not in mounted.log()[said:]
    said = len(mounted.log())
    mounted.mount()
    fill(mounted, ["f2"])
    mounted.umount()  # before the mover can have heard of it
    assert f"1 file is not in the store, {MIB} bytes: on this disk only" in mounted.log()[said:]


def test_the_end_says_that_the_store_does_not_know_all_names(volume: Make, tmp_path: Path) -> None:
    """With the store away they are on this disk only, as content is."""
    mounted = volume(store=f"file://{tmp_path}/store")
    mounted.umount("--wait")
    assert "the store does not know of" not in mounted.log()
    mounted.mount()
    assert until(lambda: b"mounted\": true" in (tmp_path / "store" / "alive.json").read_bytes(), 60)
    os.rename(tmp_path / "store", tmp_path / "away")
    (mounted.mountpoint / "made").mkdir()
    mounted.umount()
    assert "names or attributes have changed that the store does not know of" in mounted.log()
    os.rename(tmp_path / "away", tmp_path / "store")


def test_status_and_umount_wait_name_what_is_open_with_its_real_size(volume: Make) -> None:
    """Nothing of an open file has been copied, and no mark tells its size before it is closed."""
    mounted = volume()
    fill(mounted, ["closed"])
    with open(mounted.mountpoint / "open", "wb") as out:
        out.write(b"o" * 3 * MIB)
        out.flush()
        facts = mounted.status()
        found = {file["path"]: (file["size"], file["open"]) for file in facts["waiting"]}
        assert found == {"closed": (MIB, False), "open": (3 * MIB, True)}
        assert (facts["dirty_files"], facts["dirty_bytes"]) == (2, 4 * MIB)
        assert "open: 3.0M, open, not in the store for" in mounted.cli("status", mounted.mountpoint).stdout
        refused = mounted.umount("--wait", check=False)
        assert refused.returncode == 1 and "not in the store for" in refused.stderr
        assert f"{mounted.mountpoint}/open" in refused.stderr and "closed" not in refused.stderr
        facts = mounted.status()
        assert [file["path"] for file in facts["waiting"]] == ["open"]
    mounted.umount("--wait")
    assert b"o" * 3 * MIB in {path.read_bytes() for path in mounted.objects()}


@pytest.fixture
def nas(tmp_path: Path, needs_root: None) -> Iterator[Path]:
    """A directory in which `mount --bind` shows one of another filesystem, mounted."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as there:
        place = tmp_path / "nas"
        place.mkdir()
        bind = ["mount", "--bind", there, place]
        subprocess.run(bind, check=True)
        (place / ".bind").write_text("\n".join(map(str, bind)))
        try:
            yield place
        finally:
            subprocess.run(["umount", "-l", place], check=True)


def test_a_store_that_comes_after_the_volume_is_copied_to(volume: Make, nas: Path) -> None:
    """A NAS is mounted late: its empty mountpoint, on the disk of the files, is not taken for the store."""
    bind = (nas / ".bind").read_text().split("\n")
    mounted = volume(store=f"file://{nas}")
    mounted.configure(quiet="0s")
    mounted.umount()
    subprocess.run(["umount", nas], check=True)
    mounted.mount()
    (mounted.mountpoint / "f").write_bytes(b"f" * 10_000)
    facts = mounted.status()
    assert facts["dirty_files"] == 1 and not any("no backup" in note for note in facts["notes"])
    subprocess.run(bind, check=True)
    assert until(lambda: not mounted.status()["dirty_files"], 60)
    assert [path.stat().st_size for path in (nas / "data").rglob("*-*")] == [10_000]


def test_a_store_on_the_same_filesystem_is_said_to_be_no_backup(volume: Make, tmp_path: Path) -> None:
    """It frees nothing either: a disk that runs low is no reason to copy from one place of it to another."""
    beside = volume()
    assert any("no backup" in note for note in beside.status()["notes"])
