"""Bytes of the index's file are changed, below what its records can notice. Who uses it reads nothing wrong,
and where it dies of it, or finds the whole damaged, the supervisor finds the same and a new index is made."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import damaging
import pytest
from tierfsd.indexcare import INDEX_DAMAGED, IndexCare

from tierfs import syscalls, volume
from tierfs.index import Index
from tierfs.marks import Mark, MarkWriter

SOUND = {"fine", "said"}


def outcomes(tmp_path, first, last):
    program = [sys.executable, damaging.__file__, str(tmp_path), str(first), str(last)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=3600, check=True)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(rows) == last - first, done.stderr
    return rows


def judge(rows):
    for seed, kind, outcome, found in rows:
        assert outcome not in ("wrong", "other"), (seed, kind, outcome)
        assert outcome in SOUND | {"damaged"} or found == "found", (seed, kind, outcome, found)
    assert {found for *_, found in rows} == {"found", "whole"}
    assert {outcome for _, _, outcome, _ in rows} >= {"fine", "damaged"}


def test_whatever_is_damaged_nothing_wrong_is_read_and_what_kills_is_found(tmp_path):
    judge(outcomes(tmp_path, 0, 60))


# --- the supervisor's care ----------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path):
    made = volume.create(str(tmp_path))
    os.makedirs(made.path("tree"), exist_ok=True)
    with_records(made)
    return made


def with_records(home):
    damaging.make(Path(home.path("index")))


@pytest.mark.parametrize("left", ["all", "nothing"])
def test_the_heat_of_a_tree_that_was_moved_is_made_anew_also_after_a_kill_in_between(home, left):
    IndexCare(home).begin_session()
    heat, tree = home.path("heat"), home.path("tree")
    os.makedirs(heat, exist_ok=True)
    Path(heat, "data.mdb").write_bytes(b"of other inodes")
    os.rename(tree, tree + "-before")
    os.mkdir(tree)
    if left == "nothing":  # killed when it was removed, before it was made again
        shutil.rmtree(heat)
    assert begin(home) == 0
    assert os.listdir(heat) == []


def begin(home):
    """A session; how many files the index knows then."""
    IndexCare(home).begin_session()
    index = Index.open(home.path("index"))
    files = index.totals().files
    index.close()
    return files


def aside(home):
    return sorted(name for name in os.listdir(home.state) if name.startswith("index.damaged-"))


def spoil(home, kind="leaf"):
    """A page that nobody reads at an opening."""
    file = Path(home.path("index"), "data.mdb")
    number = [number for number, what in damaging.page_kinds(file).items() if what == kind][-1]
    with open(file, "r+b") as opened:
        opened.seek(number * damaging.PAGE + 10)
        opened.write(b"\x77\x07")


def test_a_whole_index_is_used_whatever_the_mark_says(home):
    files = begin(home)
    assert files > 1000 and not os.path.exists(home.path("index.suspect"))
    IndexCare(home).doubt("a reason")
    assert begin(home) == files
    assert not aside(home) and not os.path.exists(home.path("index.suspect"))


def test_without_a_mark_not_all_pages_are_looked_at(home, monkeypatch):
    monkeypatch.setattr("tierfs.pages.verify", lambda *_: pytest.fail("work in proportion to the files"))
    begin(home)
    begin(home)


@pytest.mark.parametrize("status", [-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, INDEX_DAMAGED])
def test_after_a_death_of_that_kind_damage_is_looked_for(home, status):
    begin(home)
    spoil(home)
    assert IndexCare(home).suspect(status)
    assert begin(home) == 0
    assert len(aside(home)) == 1
    assert begin(home) == 0 and len(aside(home)) == 1


@pytest.mark.parametrize("status", [0, 1, -signal.SIGKILL, -signal.SIGTERM])
def test_other_ends_make_nothing_suspect(home, status):
    care = IndexCare(home)
    assert not care.suspect(status) and not os.path.exists(home.path("index.suspect"))


def test_whoever_dies_while_opening_it_leaves_a_mark(home):
    begin(home)
    spoil(home)
    script = (
        "import os, sys; from tierfs import volume; from tierfs.index import Index\n"
        "from tierfsd.indexcare import IndexCare\n"
        "Index.open = lambda *_, **__: os.abort()\n"
        "IndexCare(volume.load(sys.argv[1])).begin_session()"
    )
    died = subprocess.run([sys.executable, "-c", script, home.state], capture_output=True, timeout=60)
    assert died.returncode == -signal.SIGABRT
    assert begin(home) == 0 and len(aside(home)) == 1


def test_epochs_go_on_over_a_lost_index(home):
    care = IndexCare(home)
    epochs = [care.begin_session()]
    spoil(home)
    care.suspect(INDEX_DAMAGED)
    epochs.append(care.begin_session())
    spoil_meta(home)
    epochs.append(care.begin_session())
    assert epochs == sorted(set(epochs))


@pytest.mark.skipif(syscalls.mount_id(b"/") is None, reason="this kernel numbers no mounts")
def test_a_disk_that_was_torn_out_and_put_in_again_breaks_custody(home, monkeypatch):
    """In the same run of the machine: what was synced by fdatasync is there, its mark and its times are not."""

    def custody():
        IndexCare(home).begin_session()
        with contextlib.closing(Index.open(home.path("index"))) as index:
            return index.session.custody

    number = syscalls.mount_id(os.fsencode(home.state))
    before = custody()
    assert custody() == before, "only the processes had ended"
    monkeypatch.setattr(syscalls, "mount_id", lambda path: number + 1)
    assert custody() == before + 1
    IndexCare(home).end_session()
    monkeypatch.setattr(syscalls, "mount_id", lambda path: number + 2)
    assert custody() == before + 1, "after an orderly end it may be anywhere"
    monkeypatch.setattr(syscalls, "mount_id", lambda path: None)
    IndexCare(home).end_session()
    assert custody() == before + 1 == custody()


def test_a_session_ends_in_order_with_marks_that_outlive_a_power_cut(home, monkeypatch):
    """A mover that hung has read nothing of what was written last."""
    IndexCare(home).begin_session()
    marks = os.open(home.path("marks"), os.O_RDONLY | os.O_DIRECTORY)
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.fstat(fd).st_ino), fsync(fd)))
    try:
        with contextlib.closing(Index.open(home.path("index"))) as index:
            writer = MarkWriter(marks, index.log_position() or 0)
        writer.append(Mark.WRITE, 77, generation=1, handle=b"handle", name=b"f")
        writer.close()
        IndexCare(home).end_session()
        segment = os.stat(os.path.join(home.path("marks"), f"marks-{writer.start:016x}")).st_ino
        assert segment in synced and os.fstat(marks).st_ino in synced
    finally:
        os.close(marks)


def test_the_index_of_a_tree_that_was_copied_is_made_anew(home):
    """Each inode has another number there: what it says is of other files, or of none."""
    files = begin(home)
    assert files and begin(home) == files and not aside(home)
    Path(home.path("heat"), "of").touch()
    shutil.copytree(home.path("tree"), home.path("copy"))
    shutil.rmtree(home.path("tree"))
    os.rename(home.path("copy"), home.path("tree"))
    assert begin(home) == 0 and len(aside(home)) == 1
    assert not os.listdir(home.path("heat"))
    assert begin(home) == 0 and len(aside(home)) == 1


def test_only_a_suspect_and_damaged_one_is_put_aside_in_the_midst_of_a_session(home):
    care = IndexCare(home)
    epoch = care.begin_session()
    assert not care.put_aside_if_damaged()
    spoil(home)
    assert not care.put_aside_if_damaged(), "nobody has met anything"
    care.suspect(INDEX_DAMAGED)
    assert care.put_aside_if_damaged() and len(aside(home)) == 1
    assert care.begin_session() > epoch


def spoil_meta(home):
    with open(home.path("index/data.mdb"), "r+b") as file:
        file.seek(16)
        file.write(b"\0\0\0\0")


def test_damage_that_shows_at_the_opening_needs_no_mark(home):
    spoil_meta(home)
    assert begin(home) == 0 and len(aside(home)) == 1


def test_the_last_three_that_were_put_aside_are_kept(home):
    for _ in range(5):
        spoil_meta(home)
        begin(home)
    assert len(aside(home)) == 3


def test_an_index_of_a_later_version_is_not_put_aside(home):
    """A newer TierFS has written it, with all that it knows of versions and garbage."""
    index = Index.open(home.path("index"))
    with index.write() as writer:
        writer.meta.format = 99
    index.close()
    with pytest.raises(Exception, match="format 99"):
        begin(home)
    assert not aside(home)


def test_torn_heat_is_dropped_after_a_power_cut(home):
    """It is never synced: a mover that reads what is left of it may die of it over and over."""
    begin(home)
    index = Index.open(home.path("index"))
    with index.write() as writer:
        writer.meta.boot = "another"
    index.close()
    heat = Path(home.path("heat"))
    damaging.make(heat)  # any environment
    with open(heat / "data.mdb", "r+b") as file:
        file.seek(damaging.PAGE * 3)
        file.write(bytes(damaging.PAGE * 20))
    begin(home)
    assert os.listdir(heat) == []
