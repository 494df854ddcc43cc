"""A home directory in use, all of it demoted, against a twin that never was in TierFS."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3servers
import workload
from harness import BLOCK, Scratch, Volume
from workload import Entry

from tierfs.config import Never

Make = Callable[..., Volume]
# git keeps stat data in its index, and locks it beside it even to look; SQLite's pages depend on when it wrote
# them back; compiled Python holds the path of its source.
VOLATILE = {"src/.git", "src/.git/index", "data.sqlite"}
COMPILED = ".pyc"


@pytest.fixture(scope="module")
def archive(area: Scratch) -> Path:
    path = area.path / "sources.tar"
    assert workload.make_archive(path) >= 5000
    return path


@pytest.fixture(scope="module")
def twin(area: Scratch, archive: Path) -> Path:
    """The same work done on the plain filesystem."""
    path = area.path / "twin"
    path.mkdir()
    workload.everything(path, archive)
    return path


@pytest.fixture(scope="module")
def twin_survey(twin: Path) -> dict[str, Entry]:
    return workload.survey(twin)


@pytest.fixture(params=["directory", pytest.param("s3", marks=pytest.mark.s3)])
def home(request: pytest.FixtureRequest, volume: Make) -> Iterator[Volume]:
    if request.param == "directory":
        yield volume(limit=400)
    else:
        server: s3servers.Server = request.getfixturevalue("quick_s3")
        yield volume(store=server.url_for("home"), env=server.env, limit=400)


@pytest.mark.usefixtures("tiers")
@pytest.mark.timeout(420)
def test_a_home_demoted_while_in_use(
    home: Volume, twin: Path, twin_survey: dict[str, Entry], archive: Path
) -> None:
    root = home.mountpoint / "home"
    root.mkdir()
    workload.everything(root, archive)
    before = workload.survey(root)
    used = backing_blocks(home)
    turns = demote_busy(home)
    stays_local(home)
    assert backing_blocks(home) < used / 10, "the tree has shrunk to its stubs"
    git_reads_nothing_back(home, root / "src")
    after = workload.survey(root)
    same_as_before(before, after)
    same_as_twin(twin_survey, after)
    assert workload.dump(root / "data.sqlite") == workload.dump(twin / "data.sqlite")
    assert workload.run("git", "fsck", "--full", cwd=root / "src") == ""
    workload.check_busy(home.mountpoint / "busy", turns)
    assert workload.run("./program", cwd=root / "build") == workload.run("./program", cwd=twin / "build")


def demote_busy(home: Volume) -> int:
    """Demote everything while a program works; how many turns it did."""
    argv = [sys.executable, "-c", workload.BUSY, str(home.mountpoint / "busy")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as busy:
        assert busy.stdout is not None
        assert busy.stdout.readline() == "busy\n"
        began = time.monotonic()
        home.cli("demote", "--wait", home.mountpoint, timeout=300)
        print(f"demoted in {time.monotonic() - began:.1f} s")
        told, _ = busy.communicate("x", timeout=60)
    assert busy.returncode == 0
    return int(told)


def backing_files(home: Volume) -> Iterator[tuple[str, os.stat_result]]:
    tree = os.fsencode(home.state / "tree")
    for at, _, names in os.walk(tree):
        for name in names:
            path = os.path.join(at, name)
            yield os.fsdecode(os.path.relpath(path, tree)), os.lstat(path)


def backing_blocks(home: Volume) -> int:
    return sum(found.st_blocks * BLOCK for _, found in backing_files(home))


def stays_local(home: Volume) -> None:
    """Only what is in use, or never to leave, has blocks; attributes that do not fit an inode take one."""
    never = Never().matcher()
    for name, found in backing_files(home):
        if not stat.S_ISREG(found.st_mode) or name.startswith("busy/") or never(os.fsencode(name)):
            continue
        spilled = 4096 if name.startswith("home/odds/") else 0
        assert found.st_blocks * BLOCK <= spilled, f"{name} has {found.st_blocks} blocks"


def git_reads_nothing_back(home: Volume, source: Path) -> None:
    assert workload.run("git", "status", "--porcelain", cwd=source) == ""
    assert workload.run("git", "diff", "--stat", cwd=source) == ""
    tracked = set(workload.run("git", "ls-files", "-z", cwd=source).split("\0")) - {"", ".gitignore"}
    assert len(tracked) >= 5000
    never = Never().matcher()
    for name in tracked:
        backing = os.lstat(home.backing(source / name))
        assert backing.st_blocks == 0 or never(os.fsencode(name)), f"{name} was read back"


def same_as_before(before: dict[str, Entry], after: dict[str, Entry]) -> None:
    assert before.keys() == after.keys()
    for name, entry in before.items():
        if name not in VOLATILE:
            assert after[name] == entry, name


def same_as_twin(twin: dict[str, Entry], after: dict[str, Entry]) -> None:
    """Everything but inode numbers and times of what was made at another moment."""
    assert twin.keys() == after.keys()
    assert workload.groups(twin) == workload.groups(after)
    for name, entry in twin.items():
        mtime = after[name].times[0]
        if name.startswith("src/p") and stat.S_ISREG(entry.mode) and "__pycache__" not in name:
            assert mtime == entry.times[0], name
        if name not in VOLATILE and not name.endswith(COMPILED):
            assert after[name]._replace(times=(), inode=0) == entry._replace(times=(), inode=0), name


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_the_workload_is_repeatable(
    area: Scratch, twin: Path, twin_survey: dict[str, Entry], archive: Path
) -> None:
    """Two plain runs give the same: what differs above is then TierFS's doing."""
    again = area.path / "again"
    again.mkdir()
    workload.everything(again, archive)
    same_as_twin(twin_survey, workload.survey(again))
    assert workload.dump(again / "data.sqlite") == workload.dump(twin / "data.sqlite")
