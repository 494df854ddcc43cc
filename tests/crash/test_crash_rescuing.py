"""The mover is killed at each failpoint of a rescue copy: the file has what was written, what index and journal
tell of is in the store, and what nothing came to refer to is collected."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rescuing_run import NAMES, content_of, open_home, rescue
from tierfsd import checking
from tiering import Job

from tierfs import failpoints
from tierfs.digests import SIDE_SUFFIX
from tierfs.model import Residency, object_key
from tierfs.recovery import finish_pending

SCRIPT = Path(__file__).with_name("rescuing_run.py")


@pytest.fixture
def begun(tmp_path):
    """A volume with a snapshot in its store, and the files."""
    home = open_home(str(tmp_path))
    for name in NAMES:
        home.write(name, content_of(name, 0))
    settle(home)
    home.close()
    return tmp_path


def settle(home):
    if home.snapshots.due:
        home.snapshots.take()
    while home.journal.flush():
        pass


def written(count):
    """How often each file had been written when the n-th copy was under way."""
    turn, place = divmod(count - 1, len(NAMES))
    return {name: turn + (number <= place) for number, name in enumerate(NAMES)}


def rescued(home, name):
    """The content of the rescue copy that the index refers to."""
    record = home.volume.record(name)
    found = home.volume.index.rescue(record.fid)
    return None if found is None else bytes(home.volume.store.get(found.key(record.fid)))


def told(home, name):
    """The same of the one that the journal tells of."""
    file = home.read_journal().find(os.fsencode(name))
    if file.rescue is None:
        return None
    line = file.rescue
    fid = home.volume.record(name).fid
    return bytes(home.volume.store.get(object_key(fid, line.generation, bytes.fromhex(line.tag))))


def objects(home):
    found = {info.key for info in home.volume.store.list("data/")}
    return {key for key in found if not key.endswith(SIDE_SUFFIX)}


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("point", failpoints.RESCUE_POINTS)
def test_crash_in_a_rescue_copy(begun, point, count):
    """The first copy of a small and of a large file, and that which takes the place of the first."""
    environment = {**os.environ, "TIERFS_FAILPOINT": f"{point}:{count}"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(begun)],
        env=environment, timeout=60, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    turns, under_way = written(count), NAMES[(count - 1) % len(NAMES)]
    whole = dict(turns)
    if point != failpoints.RESCUE_COMMITTED:
        whole[under_way] -= 1
    home = open_home(str(begun))
    try:
        assert finish_pending(home.volume.tier) == 0 and home.volume.index.pending() == []
        assert len(objects(home)) == count - (point == failpoints.COPY_INTENDED)
        for name in NAMES:
            check_dirty(home, name, content_of(name, turns[name]))
        check_rescued(home, whole)
    finally:
        home.close()
    collect(begun, range(1, 6))
    home = open_home(str(begun), 6)
    try:
        assert len(objects(home)) == sum(map(bool, whole.values())), "what nothing refers to is gone"
        check_rescued(home, whole)
        for name in NAMES:
            go_on(home, name)
    finally:
        home.close()
    collect(begun, range(7, 13))
    check_copied(begun, 13)


def check_dirty(home, name, content):
    """All that was written is here, and nothing believes that it is anywhere else."""
    volume = home.volume
    record, path = volume.record(name), volume.path(name)
    assert record.dirty and record.copy is None and record.residency is Residency.RESIDENT
    assert volume.stub(name) is None and os.stat(path).st_blocks
    assert Path(path).read_bytes() == volume.server.read(path) == content


def check_rescued(home, whole):
    """The last copies that were whole are there, told, and all that a check finds in the store."""
    settle(home)
    for name in NAMES:
        assert rescued(home, name) == (content_of(name, whole[name]) if whole[name] else None)
        assert told(home, name) == rescued(home, name)
    assert checking.check(home.volume.tier, True, None, Job()).findings == []


def go_on(home, name):
    """The next one is taken, told, and gives way to a copy."""
    volume, content = home.volume, content_of(name, 9)
    handle = volume.server.open(volume.path(name), os.O_RDWR)
    volume.server.run(lambda: volume.server.gate.contents.write(handle, 0, content))
    assert rescue(home, name)
    settle(home)
    assert told(home, name) == rescued(home, name) == content
    volume.server.release(handle)
    (item,) = volume.demote(name)
    assert item.demoted and rescued(home, name) is None
    assert volume.server.read(volume.path(name)) == content


def collect(base, days):
    """What a collection of each of these days removes."""
    for day in days:
        home = open_home(str(base), day)
        try:
            home.collector.run(now=True)
            home.volume.index.commit(lambda w: w.note_snapshot(w.past.beat)).result()
        finally:
            home.close()


def check_copied(base, day):
    """Of all that was put only the copies are left."""
    home = open_home(str(base), day)
    try:
        records = [home.volume.record(name) for name in NAMES]
        copies = {object_key(each.fid, each.copy.generation, each.copy.tag) for each in records}
        assert objects(home) == copies and home.volume.index.intents() == []
        for name in NAMES:
            assert home.volume.server.read(home.volume.path(name)) == content_of(name, 9)
    finally:
        home.close()
