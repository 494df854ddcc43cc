"""The process is killed at each failpoint of a demotion and of a fetch; what comes back has every byte."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from crashing import CHUNK, open_volume

from tierfs import failpoints
from tierfs.model import Residency
from tierfs.recovery import finish_pending

NAMES = ("small", "large", "sparse")
SCRIPT = Path(__file__).with_name("crashing.py")


@pytest.fixture
def made(tmp_path):
    return make(tmp_path)


def make(base):
    """A volume with one file of each kind, stopped: where it is; their content, times and modes."""
    volume = open_volume(str(base))
    content = {"small": os.urandom(20_000), "large": os.urandom(5 * CHUNK + 777)}
    for name, data in content.items():
        volume.server.create(volume.path(name), data)
    with open(volume.path("sparse"), "wb") as file:
        file.write(b"a" * 5000)
        file.seek(3 * CHUNK)
        file.write(os.urandom(5000))
    content["sparse"] = Path(volume.path("sparse")).read_bytes()
    os.chmod(volume.path("small"), 0o751)
    before = {name: os.stat(volume.path(name)) for name in NAMES}
    volume.close()
    return base, content, before


def run(base, action, point=None, count=1):
    environment = dict(os.environ)
    if point:
        environment["TIERFS_FAILPOINT"] = f"{point}:{count}"
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(base), action, *NAMES],
        env=environment, timeout=60, check=False, capture_output=True, text=True,
    )  # fmt: skip


def check_whole(base, content, before):
    """Recover, then every file reads as it was, shows its times, and can be demoted and read again."""
    volume = open_volume(str(base))
    try:
        assert finish_pending(volume.tier) == 0
        assert volume.index.pending() == []
        for name in NAMES:
            check_state(volume, name, before[name])
            assert volume.server.read(volume.path(name)) == content[name], name
            volume.settle(name)
            st = os.stat(volume.path(name))
            assert (st.st_size, st.st_mode) == (before[name].st_size, before[name].st_mode)
            assert volume.server.shown(volume.path(name)).st_mtime_ns == before[name].st_mtime_ns
        demote_all(volume)
        for name in NAMES:
            assert volume.server.read(volume.path(name)) == content[name], name
    finally:
        volume.close()


def demote_all(volume):
    """All files go. One that was read a moment ago may stay once or twice, but not by a failure."""
    left = NAMES
    for _ in range(20):
        items = [item for item in volume.demote(*left) if item.reason]
        assert not any(item.failed for item in items), [(item.path, item.reason) for item in items]
        left = [os.fsdecode(item.path) for item in items]
        if not left:
            break
    assert not left, [(item.path, item.reason) for item in items]
    assert all(volume.stub(name) is not None for name in NAMES)


def check_state(volume, name, before):
    """The invariants: a record that says what the attribute says; a stub only with a copy."""
    st, stub = os.stat(volume.path(name)), volume.stub(name)
    record = volume.record(name)
    assert st.st_mtime_ns == before.st_mtime_ns
    if stub is None:
        assert st.st_blocks == before.st_blocks
    else:
        assert record is not None and record.copy is not None
        assert volume.store.head(stub.key).size == st.st_size
    if record is not None and stub is None:
        assert record.residency is Residency.RESIDENT


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("point", failpoints.DEMOTE_POINTS)
def test_crash_in_a_demotion(made, point, count):
    base, content, before = made
    done = run(base, "demote", point, count)
    passed_once = point in (failpoints.PUNCHED,)
    if count == 1 or passed_once:
        assert done.returncode == -signal.SIGKILL, done.stderr
    check_whole(base, content, before)


@pytest.mark.parametrize("point", failpoints.FETCH_POINTS)
def test_crash_in_a_fetch(made, point):
    base, content, before = made
    assert run(base, "demote").returncode == 0
    done = run(base, "read-part", point)
    assert done.returncode == -signal.SIGKILL, done.stderr
    check_whole(base, content, before)


def test_crash_in_a_fetch_after_some_pages(made):
    base, content, before = made
    assert run(base, "demote").returncode == 0
    done = run(base, "fetch", failpoints.FILL_WRITTEN, 2)
    assert done.returncode == -signal.SIGKILL, done.stderr
    check_whole(base, content, before)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("point", failpoints.RECOVER_POINTS)
@pytest.mark.parametrize("left", [failpoints.STUB_COMMITTED, failpoints.PUNCHED, failpoints.FILL_SYNCED])
def test_crash_in_a_recovery(made, left, point, count):
    """What an earlier crash left is put right by whoever comes last."""
    base, content, before = made
    if left in failpoints.FETCH_POINTS:
        assert run(base, "demote").returncode == 0
    assert run(base, "read-part" if left in failpoints.FETCH_POINTS else "demote", left).returncode
    done = run(base, "recover", point, count)
    assert done.returncode == -signal.SIGKILL or count == 2, done.stderr
    check_whole(base, content, before)


@pytest.mark.parametrize("point", failpoints.REPLICATE_POINTS)
def test_crash_in_a_replication(made, point):
    base, content, before = made
    done = run(base, "replicate", point)
    assert done.returncode == -signal.SIGKILL, done.stderr
    check_whole(base, content, before)


@pytest.mark.parametrize("point", failpoints.DRAIN_POINTS)
def test_crash_in_a_drain(made, point):
    base, content, before = made
    done = run(base, "drain", point)
    assert done.returncode == -signal.SIGKILL, done.stderr
    check_whole(base, content, before)


def test_crash_after_the_digests_were_had_from_the_store(made):
    """A fresh index knows nothing of the stubs that are there."""
    base, content, _ = made
    assert run(base, "demote").returncode == 0
    shutil.rmtree(base / "index")
    done = run(base, "read-part", failpoints.OPEN_LISTED)
    assert done.returncode == -signal.SIGKILL, done.stderr
    check_content(base, content)


def test_crash_while_content_of_somebody_else_is_kept(made):
    """All of a stub was written over behind the mount. It counts, also for whoever comes after the crash."""
    base, content, _ = made
    assert run(base, "demote").returncode == 0
    path = base / "tree" / "large"
    content["large"] = os.urandom(len(content["large"]))
    with path.open("r+b") as file:
        file.write(content["large"])
        os.fsync(file.fileno())
    done = run(base, "read-part", failpoints.OPEN_KEPT)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_bytes() == content["large"]
    check_content(base, content)


def check_content(base, content):
    """Every file reads as it shall, before and after all went to the store and came back."""
    volume = open_volume(str(base))
    try:
        assert finish_pending(volume.tier) == 0
        for _ in range(2):
            for name in NAMES:
                assert volume.server.read(volume.path(name)) == content[name], name
                volume.settle(name)
            demote_all(volume)
    finally:
        volume.close()


def test_unused_objects_of_a_crash_are_never_referred_to(made):
    base, content, before = made
    run(base, "demote", failpoints.COPY_PUT)
    volume = open_volume(str(base))
    orphans = {info.key for info in volume.store.list("data/")}
    assert orphans
    volume.demote(*NAMES)
    for name in NAMES:
        assert volume.stub(name).key not in orphans
    volume.close()
    check_whole(base, content, before)


def descriptors():
    """What the descriptors of this process are of."""
    found = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return sorted(os.readlink(path) for path in found if os.path.lexists(path))


def test_a_volume_that_is_closed_keeps_no_descriptor(made):
    """`make soak` has thousands of volumes in one process, and `select` takes no descriptor above 1023."""
    before = descriptors()
    for _ in range(5):  # something may be on its way in when it stops
        check_whole(*made)
        assert descriptors() == before
