"""Without privileges a file that its owner may not write has another mode for a moment: never for longer."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from crashing import UNPRIVILEGED, open_volume

from tierfs import failpoints
from tierfs.lent import Note
from tierfs.recovery import finish_pending
from tierfs.tree import Tree

SCRIPT = Path(__file__).with_name("crashing.py")
CONTENT = os.urandom(20_000)


@pytest.fixture(autouse=True)
def unprivileged(monkeypatch):
    monkeypatch.setattr(Tree, "_is_privileged", lambda tree: False)


def make(base):
    """A stopped volume, in which `f` may not be written and `shut` not even be read."""
    base.mkdir()
    volume = open_volume(str(base))
    for name, mode in (("f", 0o4555), ("shut", 0)):
        volume.server.create(volume.path(name), CONTENT)
        os.chmod(volume.path(name), mode)
    volume.stop()
    return base


def run(base, action, point=None, count=1):
    environment = {**os.environ, UNPRIVILEGED: "1"}
    if point:
        environment["TIERFS_FAILPOINT"] = f"{point}:{count}"
    argv = [sys.executable, str(SCRIPT), str(base), action, "f"]
    return subprocess.run(argv, env=environment, timeout=60, check=False, capture_output=True, text=True)


def mode_of(volume, name="f"):
    return stat.S_IMODE(os.stat(volume.path(name)).st_mode)


def notes(volume):
    path = f"{volume.tree.path}.lent"
    return os.listdir(path) if os.path.isdir(path) else []


def check_whole(base):
    volume = open_volume(str(base))
    try:
        assert finish_pending(volume.tier) == 0
        assert (mode_of(volume), mode_of(volume, "shut"), notes(volume)) == (0o4555, 0, [])
        assert volume.server.read(volume.path("f")) == CONTENT
        volume.settle("f")
        assert mode_of(volume) == 0o4555 and not notes(volume)
    finally:
        volume.stop()


@pytest.mark.parametrize("action", ["demote", "fetch", "recover"])
def test_a_mode_that_a_crash_left_is_put_back(tmp_path, action):
    """At each place where it is changed."""
    for count in range(1, 20):
        base = make(tmp_path / str(count))
        if action != "demote":
            assert run(base, "demote").returncode == 0
        if action == "recover":
            assert run(base, "fetch", failpoints.FILL_SYNCED).returncode == -signal.SIGKILL
        done = run(base, action, failpoints.LENT, count)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        left = open_volume(str(base))
        assert mode_of(left) & 0o777 == 0o755 and len(notes(left)) == 1
        left.stop()
        check_whole(base)
    assert 1 < count < 19
    check_whole(base)


@pytest.fixture
def volume(tmp_path):
    opened = open_volume(str(make(tmp_path / "volume")))
    yield opened
    opened.stop()


def abandon(volume, name, bits, **of):
    """As a process that was killed in the midst leaves it."""
    with subprocess.Popen(["true"]) as ended:
        pass
    fd = os.open(volume.path(name), os.O_PATH)
    try:
        with volume.tree.lending(fd, bits):
            (noted,) = notes(volume)
            assert volume.tree.lent.left() == [], "it is at work"
            mode = mode_of(volume, name)
    finally:
        os.close(fd)
    assert notes(volume) == []
    os.chmod(volume.path(name), mode)
    os.symlink("-", f"{volume.tree.path}.lent/{Note.parse(noted)._replace(**(of or {'pid': ended.pid}))}")


def test_rights_to_read_are_put_back_as_well(volume):
    abandon(volume, "shut", stat.S_IRUSR)
    assert mode_of(volume, "shut") == 0o400
    assert finish_pending(volume.tier) == 0
    assert mode_of(volume, "shut") == 0 and not notes(volume)


def test_another_process_with_the_same_number_has_not_lent_it(volume):
    """As the next run in a container may have."""
    abandon(volume, "shut", stat.S_IRUSR, pid=os.getpid(), began=1)
    assert finish_pending(volume.tier) == 0
    assert mode_of(volume, "shut") == 0 and not notes(volume)


def test_of_a_directory_as_well(volume):
    volume.server.mkdir(volume.path("d"))
    volume.tier.drain()
    os.chmod(volume.path("d"), 0o555)
    abandon(volume, "d", stat.S_IWUSR)
    assert finish_pending(volume.tier) == 0
    assert mode_of(volume, "d") == 0o555 and not notes(volume)


def test_a_mode_that_its_owner_has_given_it_since_stays(volume):
    abandon(volume, "f", stat.S_IWUSR)
    os.chmod(volume.path("f"), 0o700)
    assert finish_pending(volume.tier) == 0
    assert mode_of(volume) == 0o700 and not notes(volume)
    fd = os.open(volume.path("shut"), os.O_PATH)
    with volume.tree.lending(fd, stat.S_IRUSR):
        os.chmod(volume.path("shut"), 0o640)
    os.close(fd)
    assert mode_of(volume, "shut") == 0o640


@pytest.mark.parametrize("gone", [True, False])
def test_it_is_looked_for_until_the_tree_has_been_looked_through(volume, gone):
    """A new index does not know yet where the file is; another one with its number is left as it is."""
    record = volume.record("f")
    abandon(volume, "f", stat.S_IWUSR)
    volume.index.commit(lambda w: w.delete(record.ino)).result()
    assert finish_pending(volume.tier) == 1 and len(notes(volume)) == 1
    if gone:
        os.unlink(volume.path("f"))
    else:
        volume.index.commit(lambda w: w.put(record)).result()
    volume.index.commit(lambda w: w.set_surveyed(True)).result()
    assert finish_pending(volume.tier) == 0 and not notes(volume)
    assert gone or mode_of(volume) == 0o4555


def test_a_full_disk_keeps_nobody_from_freeing_it(volume, monkeypatch):
    def full(target, where):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", full)
        assert volume.demote("f")[0].demoted
    assert mode_of(volume) == 0o4555 and volume.server.read(volume.path("f")) == CONTENT
