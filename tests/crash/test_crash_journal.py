"""The process is killed at each failpoint of the journal: what is in the store stays readable, and nothing that
changed before or after is missing once it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from journalling import open_home, storm
from journals import as_told

from tierfs import failpoints, snapshots
from tierfs.namespace import Chronicle
from tierfs.store.directory import DirectoryStore

SCRIPT = Path(__file__).with_name("journalling.py")


def settle(home):
    if home.snapshots.due:
        home.snapshots.take()
    while home.journal.flush():
        pass


@pytest.fixture
def begun(tmp_path):
    """A volume with a snapshot in its store."""
    home = open_home(str(tmp_path))
    home.write("first", b"1")
    settle(home)
    home.close()
    return tmp_path


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("point", failpoints.JOURNAL_POINTS)
def test_crash_in_the_journal(begun, point, count):
    environment = {**os.environ, "TIERFS_FAILPOINT": f"{point}:{count}"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(begun)], env=environment, timeout=60, check=False, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    # A machine lost at this moment: what there is in the store is a tree, with what was in it before.
    journal = Chronicle(DirectoryStore(str(begun / "store")))
    assert b"first" in as_told(journal.read())
    assert not journal.missing
    home = open_home(str(begun))
    try:
        settle(home)
        assert home.told() == home.there()
        storm(home, 7)
        settle(home)
        assert home.told() == home.there()
        journal = Chronicle(home.volume.store)
        journal.read()
        assert not journal.missing
    finally:
        home.close()


def test_a_crash_between_the_parts_of_a_snapshot(begun, monkeypatch):
    """With parts of a few lines each: the one before it counts."""
    monkeypatch.setattr(snapshots, "PART_LINES", 3)
    home = open_home(str(begun))
    try:
        storm(home, 0)
        home.journal.flush()
        told = home.told()
        whole = home.snapshots._walk
        home.snapshots._walk = lambda: cut_short(whole())
        with pytest.raises(KeyboardInterrupt):
            home.snapshots.take()
        assert home.told() == told
        home.snapshots._walk = whole
        assert home.snapshots.take()
        parts = [info.key for info in home.volume.store.list("meta/") if ".snapshot" in info.key]
        assert len(parts) > 5
        assert home.told() == home.there()
    finally:
        home.close()


def cut_short(lines):
    for number, line in enumerate(lines):
        if number == 6:
            raise KeyboardInterrupt
        yield line
