"""A machine is lost; another one brings its home back from the store."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3servers
import workload
import zstandard
from harness import Volume
from workload import Entry

from tierfs import failpoints

Make = Callable[..., Volume]


@pytest.fixture(params=["directory", pytest.param("s3", marks=pytest.mark.s3)])
def machines(request: pytest.FixtureRequest, volume: Make, tmp_path: Path) -> Iterator[tuple[Volume, Volume]]:
    """Two with the same store; the first one is mounted."""
    options: dict[str, object] = {"store": f"file://{tmp_path}/store"}
    if request.param == "s3":
        server: s3servers.Server = request.getfixturevalue("rclone_s3")
        options = {"store": server.url_for("restore"), "env": server.env}
    first = volume(**options, limit=200)
    yield first, volume(mount=False, **options, limit=200)


def restore(machine: Volume, *args: object, check: bool = True, **more: object) -> dict[str, object]:
    argv = ["restore", "--json", "--store", machine.store, "--state", machine.state, *args, machine.mountpoint]
    done = machine.cli(*argv, check=check, **more)
    machine.watch()
    return json.loads(done.stdout)


def settled(machine: Volume) -> None:
    """Wait until the journal knows of everything."""
    deadline = time.monotonic() + 60
    while machine.status()["journal_behind_seconds"]:
        assert time.monotonic() < deadline, "the journal does not catch up"
        time.sleep(0.1)


def same(before: dict[str, Entry], after: dict[str, Entry]) -> None:
    """All but inode numbers and the ctimes of what has no record of its own."""
    assert before.keys() == after.keys()
    for name, entry in before.items():
        mtime, ctime = after[name].times
        if not stat.S_ISREG(entry.mode):
            ctime = entry.times[1]
        assert after[name]._replace(inode=entry.inode, times=(mtime, ctime)) == entry, name
    assert workload.groups(after) == workload.groups(before)


@pytest.mark.usefixtures("tiers")
def test_everything_comes_back(machines: tuple[Volume, Volume]) -> None:
    first, second = machines
    root = first.mountpoint
    workload.odds(root / "odds")
    workload.edits(root / "edits")
    (root / "large").write_bytes(os.urandom(9 << 20))
    with open(root / "sparse", "wb") as file:
        file.truncate(20 << 20)
        file.seek(7 << 20)
        file.write(b"some data")
    first.cli("pin", root / "edits" / "document1")
    (root / "edits" / "document2").rename(root / "odds" / "moved")
    shutil.rmtree(root / "odds" / "deep")
    if os.geteuid() == 0:
        os.mknod(root / "odds" / "device", stat.S_IFCHR | 0o620, os.makedev(1, 3))
        os.chown(root / "odds", 4321, 1234)
    os.utime(root / "odds", ns=(5, -6_000_000_007))
    os.chmod(root, 0o710)
    before = workload.survey(root)
    first.umount("--wait")
    shutil.rmtree(first.state)

    report = restore(second)
    root = second.mountpoint
    assert (report["lost"], report["older"], report["refused"]) == ([], [], [])
    assert stat.S_IMODE(root.stat().st_mode) == 0o710
    large, sparse = os.lstat(second.backing(root / "large")), os.lstat(second.backing(root / "sparse"))
    assert (large.st_blocks, sparse.st_blocks) == (0, 0), "only stubs"
    assert os.lstat(root / "sparse").st_blocks < 100
    with open(root / "sparse", "rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 7 << 20
    same(before, workload.survey(root))
    assert [pin["path"] for pin in second.json("pins", "--json", root)] == [str(root / "edits" / "document1")]
    second.cli("check", "--read-data", root)
    second.demote(root / "large")
    assert second.tier(root / "large") == "stub"
    second.remount()
    same(before, workload.survey(root))


@pytest.mark.usefixtures("tiers")
def test_what_had_not_left_is_listed_not_made_up(volume: Make, tmp_path: Path) -> None:
    first = volume(store=f"file://{tmp_path}/store")
    first.configure(journal="0.2s", quiet="1h")
    root = first.mountpoint
    (root / "kept").write_bytes(b"in the store")
    (root / "changed").write_bytes(b"the first version")
    first.cli("demote", "--wait", root / "kept", root / "changed")
    with open(root / "changed", "ab") as file:
        file.write(b" and what came later")
    (root / "never copied").write_bytes(bytes(1234))
    settled(first)
    shutil.copytree(tmp_path / "store", tmp_path / "as it was", symlinks=True)

    second = volume(mount=False, store=f"file://{tmp_path}/as it was".replace(" ", "%20"))
    argv = ["restore", "--store", second.store, "--state", second.state, second.mountpoint]
    done = second.cli(*argv, check=False)
    assert done.returncode == 1
    assert "is in use by host" in done.stderr and "--force" in done.stderr and done.stderr.count("\n") == 1
    assert not second.state.exists()
    report = restore(second, "--force")
    assert [(item["path"], item["size"]) for item in report["lost"]] == [("never copied", 1234)]
    assert [(item["path"], item["size"]) for item in report["older"]] == [("changed", 37)]
    assert (second.mountpoint / "changed").read_bytes() == b"the first version"
    assert (second.mountpoint / "kept").read_bytes() == b"in the store"
    assert sorted(os.listdir(second.mountpoint)) == ["changed", "kept"]
    kept = json.loads((second.state / "restored.json").read_text())
    assert kept["lost"] == report["lost"]


@pytest.mark.usefixtures("tiers")
def test_a_killed_restore_is_no_volume_and_is_done_again(volume: Make, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    first = volume(store=url)
    (first.mountpoint / "d").mkdir()
    for number in range(20):
        (first.mountpoint / "d" / str(number)).write_bytes(os.urandom(100))
    before = workload.survey(first.mountpoint)
    first.umount("--wait")
    for point in failpoints.RESTORE_POINTS:
        machine = volume(mount=False, store=url)
        argv = ["restore", "--store", url, "--state", machine.state, machine.mountpoint]
        killed = machine.cli(*argv, check=False, env={**machine.environment, "TIERFS_FAILPOINT": point})
        assert killed.returncode == -signal.SIGKILL, (point, killed.stderr)
        if point != failpoints.RESTORE_COMPLETE:
            refused = machine.mount(check=False)
            assert refused.returncode == 1 and "tierfs restore" in refused.stderr, point
        report = restore(machine)
        assert report["files"] == 20
        same(before, workload.survey(machine.mountpoint))
        assert not (machine.state / "restoring.json").exists()
        machine.umount("--wait")


@pytest.mark.usefixtures("tiers")
def test_any_client_can_rescue_the_files(volume: Make, tmp_path: Path) -> None:
    """With what the README says, and nothing of TierFS."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (tmp_path / "rescue.py").write_text(readme[readme.index("# rescue.py") :].split("```")[0])
    home = volume(store=f"file://{tmp_path}/store")
    home.configure(journal="0.2s")
    workload.odds(home.mountpoint / "odds")
    settled(home)
    (home.mountpoint / "odds" / "plain").rename(home.mountpoint / "renamed")
    (home.mountpoint / "large").write_bytes(os.urandom(5 << 20))
    before = workload.survey(home.mountpoint)
    home.umount("--wait")
    objects = sorted((tmp_path / "store" / "meta").iterdir())
    lines = b"".join(zstandard.ZstdDecompressor().decompressobj().decompress(at.read_bytes()) for at in objects)
    argv = [sys.executable, tmp_path / "rescue.py", tmp_path / "rescued"]
    subprocess.run(argv, input=lines, check=True, cwd=tmp_path / "store")
    after = workload.survey(tmp_path / "rescued")
    files = {name: entry.content for name, entry in before.items() if stat.S_ISREG(entry.mode)}
    assert {name: entry.content for name, entry in after.items() if stat.S_ISREG(entry.mode)} == files


@pytest.mark.usefixtures("tiers")
def test_restore_refuses_clearly(volume: Make, tmp_path: Path) -> None:
    machine = volume(mount=False)
    (tmp_path / "empty").mkdir()

    def refused(*args: object) -> str:
        done = machine.cli("restore", "--state", machine.state, *args, machine.base / "mnt", check=False)
        assert done.returncode in (1, 2) and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert "holds no volume" in refused("--store", f"file://{tmp_path}/empty")
    assert "not a store" in refused("--store", "ftp://x")
    first = volume(store=f"file://{tmp_path}/store")
    first.umount("--wait")
    shutil.rmtree(tmp_path / "store" / "meta")
    assert "no journal of names" in refused("--store", first.store)
    assert not machine.state.exists()
    first.mount()
    deadline = time.monotonic() + 60
    while not list((tmp_path / "store").glob("meta/*.snapshot-*")):
        assert time.monotonic() < deadline, "a journal that was removed is written anew"
        time.sleep(0.1)
    machine.state.mkdir()
    (machine.state / "something").touch()
    assert "is not empty" in refused("--store", f"file://{tmp_path}/empty")


@pytest.mark.usefixtures("tiers")
def test_the_former_machine_is_refused_after_a_restore(volume: Make, tmp_path: Path) -> None:
    first = volume(store=f"file://{tmp_path}/store")
    (first.mountpoint / "f").write_bytes(b"x")
    first.umount("--wait")
    second = volume(mount=False, store=first.store)
    restore(second)
    second.umount("--wait")
    refused = first.mount(check=False)
    assert refused.returncode == 1 and "only one machine" in refused.stderr
    second.mount()
    assert (second.mountpoint / "f").read_bytes() == b"x"


UNFINISHED = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("pragma journal_mode=" + sys.argv[2])
db.execute("pragma cache_size=5")
db.execute("create table t(a)")
db.executemany("insert into t values(?)", [(1,)] * 500)
if sys.argv[2] == "delete":
    db.execute("begin")
    db.execute("update t set a = 2 where rowid % 2")
    db.executemany("insert into t values(?)", [("x" * 500,)] * 500)  # past the cache, into the file
os.kill(os.getpid(), 9)
"""


def test_what_only_looks_like_a_lock_file_is_not_lost(volume: Make, tmp_path: Path) -> None:
    """By the settings as shipped. What a killed program leaves beside its SQLite database is content too."""
    first = volume(store=f"file://{tmp_path}/store")
    root = first.mountpoint
    written = {name: os.urandom(6000) for name in ("Cargo.lock", "src/lock/mod.rs", "travel-journal/day 1")}
    for name, content in written.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    for mode in ("wal", "delete"):
        subprocess.run([sys.executable, "-c", UNFINISHED, root / mode, mode], check=False, timeout=60)
    assert (root / "wal-wal").stat().st_size and (root / "delete-journal").stat().st_size
    first.umount("--wait")
    shutil.rmtree(first.state)

    second = volume(mount=False, store=first.store)
    report = restore(second)
    root = second.mountpoint
    assert [left["path"] for left in report["lost"]] == ["wal-shm"], "which SQLite makes anew"
    assert {name: (root / name).read_bytes() for name in written} == written
    for mode in ("wal", "delete"):
        with sqlite3.connect(root / mode) as db:
            assert db.execute("select count(*), sum(a) from t").fetchall() == [(500, 500)], mode
            assert db.execute("pragma integrity_check").fetchall() == [("ok",)], mode
        db.close()


def rewrite_never(machine: Volume, patterns: list[str] | None) -> None:
    """Write the list into the configuration, or take it out: the shipped one is in force then."""
    path = machine.state / "config.toml"
    table = f"[never]\npatterns = {json.dumps(patterns)}\n" if patterns else "[never]\n"
    path.write_text(re.sub(r"(?m)^\[never\]\n(patterns = .*\n)?", table, path.read_text()))
    machine.configure(quiet="0s")  # which has it read


@pytest.mark.usefixtures("tiers")
def test_what_lies_in_a_directory_named_like_a_temporary_file_is_not_lost(volume: Make, tmp_path: Path) -> None:
    """By the settings as shipped, also where others, which named the directories too, had files left alone."""
    first = volume(store=f"file://{tmp_path}/store")
    first.configure(replicate="all")
    names = [".lock", "*.pid", "*.swp", ".~lock.*", "*.tmp", "*.part", "*.crdownload", "*-shm", ".cache"]
    rewrite_never(first, names)
    root = first.mountpoint
    above = ("draft.tmp", "a/chapter.part", "b.swp", "c.pid", "d.crdownload", "e-shm", ".lock", ".~lock.f")
    above += (".xsession-errors", ".xsession-errors.old", ".xsession-errors-:0", ".Xauthority")
    written = {f"{name}/deep/text": os.urandom(6000) for name in above}
    written |= {name: os.urandom(6000) for name in ("x/.cache", "x/node_modules", "x/lost+found")}
    temporary = [".cache/z", "draft.tmp/deep/own.tmp", "x/node_modules-shm", "x/y.tmp"]
    for name, content in (written | dict.fromkeys(temporary, b"made again")).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)

    def wait_for(dirty: int) -> None:
        """So many are not in the store, and that of each it is known that it never leaves."""
        deadline = time.monotonic() + 60
        while (now := first.status())["dirty_files"] != dirty or now["waiting"]:
            assert time.monotonic() < deadline, (now["dirty_files"], now["waiting"], first.log())
            time.sleep(0.1)

    wait_for(8 + len(["x/.cache"]) + len(temporary))
    rewrite_never(first, None)
    wait_for(len(temporary))
    first.umount("--wait")
    shutil.rmtree(first.state)

    second = volume(mount=False, store=first.store)
    report = restore(second)
    assert sorted(left["path"] for left in report["lost"]) == temporary
    assert {name: (second.mountpoint / name).read_bytes() for name in written} == written
