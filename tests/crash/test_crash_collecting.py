"""The mover is killed at each failpoint of a collection: nothing goes too soon, and in the end all of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from collecting_run import open_volume

from tierfs import failpoints
from tierfs.digests import SIDE_SUFFIX

SCRIPT = Path(__file__).with_name("collecting_run.py")


def run(base, action, day, point=None):
    environment = dict(os.environ)
    if point:
        environment["TIERFS_FAILPOINT"] = point
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(base), action, str(day)],
        env=environment, timeout=60, check=False, capture_output=True, text=True,
    )  # fmt: skip


def contents(base):
    """Objects that hold content, of the store itself."""
    found = (path.name for path in Path(base, "store", "data").rglob("*") if path.is_file())
    return {name for name in found if not name.endswith(SIDE_SUFFIX)}


def run_until_killed(base, point):
    """From day to day, until the point is passed; the day."""
    for day in range(1, 12):
        done = run(base, "collect", day, point)
        if done.returncode == -signal.SIGKILL:
            return day
        assert done.returncode == 0, done.stderr
    raise AssertionError(f"{point} was never passed")


@pytest.mark.parametrize("point", failpoints.COLLECT_POINTS)
def test_crash_in_a_collection(tmp_path, point):
    first = run(tmp_path, "write", 0, point if point == failpoints.GC_BEAT else None)
    assert first.returncode == (-signal.SIGKILL if point == failpoints.GC_BEAT else 0), first.stderr
    before = contents(tmp_path)
    assert len(before) == 3
    day = 0 if point == failpoints.GC_BEAT else run_until_killed(tmp_path, point)
    if point not in (failpoints.GC_DELETED, failpoints.GC_DROPPED):
        assert contents(tmp_path) == before and day < 4
    else:
        assert day >= 3, "not before its time"
    volume = open_volume(tmp_path, day)
    try:
        record = volume.record("b")
        assert volume.index.get_by_fid(record.fid) == record and not record.dirty
        current = f"{record.copy.generation:012x}-{record.copy.tag.hex()}"
    finally:
        volume.stop()
    assert current in contents(tmp_path)
    for later in range(day + 1, day + 8):
        assert run(tmp_path, "collect", later).returncode == 0
    assert contents(tmp_path) == {current}
    volume = open_volume(tmp_path, day + 8)
    try:
        assert volume.index.lists() == [] and volume.index.tombstones(1 << 62) == []
        assert [info.key for info in volume.store.list("gc/")] == ["gc/clock"]
        assert volume.index.versions_of(record.fid) == []
        assert volume.server.read(volume.path("b"))[:5] == b"newer"
    finally:
        volume.stop()


def test_a_crash_between_the_intent_and_the_copy_leaves_no_object_behind(tmp_path):
    for point in (failpoints.COPY_INTENDED, failpoints.COPY_PUT):
        base = tmp_path / point
        base.mkdir()
        assert run(base, "write", 0, point).returncode == -signal.SIGKILL
        put = contents(base)
        assert bool(put) is (point == failpoints.COPY_PUT)
        for day in range(1, 6):
            assert run(base, "collect", day).returncode == 0
            assert day > 2 or contents(base) in (put, set())
        assert contents(base) == set()
