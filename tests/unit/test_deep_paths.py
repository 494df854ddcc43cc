"""What lies so deep that its path is longer than a system call takes is a file like others; and one with which
something is wrong is no reason for others to stay as they are."""

import errno
import os
import threading
from pathlib import Path

import pytest
from bare import until
from journals import Journalled
from tierfsd import checking
from tierfsd.pinned import _stubs_beneath
from tiering import Job

from tierfs.errors import StoreUnavailableError
from tierfs.filling import Filler
from tierfs.survey import Survey
from tierfs.tier import Item

NAME = "d" * 200
DEPTH = 25  # times 200: more than PATH_MAX, which is 4096


def dig(root):
    """A descriptor of a directory that no path leads to, with two files in it."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(DEPTH):
        os.mkdir(NAME, dir_fd=fd)
        below = os.open(NAME, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    for name in ("one", "two"):
        at = os.open(name, os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=fd)
        os.write(at, name.encode() * 3000)
        os.close(at)
    return fd


@pytest.fixture
def deep(volume):
    fd = dig(volume.root)
    assert Survey(volume.tier, lambda guesses: None, threading.Event()).run()
    yield fd
    os.close(fd)


def demote_all(volume):
    return volume.tier.demote([Item.of(record, ordered=True) for record in list(volume.index.records())])


def test_they_are_found_copied_out_and_given_up_with_others(volume, deep):
    volume.server.create(volume.path("other"), b"other" * 3000)
    volume.tier.drain()
    assert {record.name for record in volume.index.records()} == {b"one", b"two", b"other"}
    assert [(item.reason, item.demoted) for item in demote_all(volume)] == [("", True)] * 3
    assert not volume.tier.kit.troubles.list()
    found = checking.check(volume.tier, False, None, Job())
    assert found.findings == [] and found.files == 3
    assert sorted(item.name for item in _stubs_beneath(volume.tier, b"")) == [b"one", b"other", b"two"]


def test_one_that_cannot_be_fetched_keeps_nobody_waiting(volume, deep, monkeypatch):
    demote_all(volume)
    ended = []

    def away(*args):
        raise StoreUnavailableError("away")

    monkeypatch.setattr(volume.store, "get", away)
    monkeypatch.setattr(volume.tier.kit, "config", volume.config.__class__(fetch_timeout=0.2))
    monkeypatch.setattr(Filler, "_end", lambda filler, request, error: ended.append(error))
    record = next(record for record in volume.index.records() if record.name == b"one")
    opath = volume.tree.open_handle(record.handle, os.O_PATH)
    states = volume.server.gate.states
    volume.server.run(lambda: states.enter(opath, os.fstat(opath), record.parent, record.name))
    with volume.server.lock:
        states._inflow.bring(record.ino)
    assert until(lambda: ended) and "no content within" in str(ended[0])
    for fd in (opath, states.inodes[record.ino].opath):  # a path that nobody can read is in others' way
        os.close(fd)
    assert f"inode {record.ino} cannot be fetched" in volume.tier.kit.troubles.list()[-1].what


def test_the_journal_tells_of_them(tmp_path):
    home = Journalled(tmp_path)
    try:
        os.close(dig(home.volume.root))
        assert Survey(home.volume.tier, lambda guesses: None, threading.Event()).run()
        home.snapshots.take()
        record = next(record for record in home.volume.index.records() if record.name == b"one")
        home.volume.index.commit(lambda w: w.note(record.parent, b"one")).result()
        for _ in range(8):
            home.journal.flush()
        assert not home.volume.index.notes() and not home.journal.lost_track
        names = {name for entries in home.read_journal().names.values() for name in entries}
        assert {b"one", b"two"} <= {name if isinstance(name, bytes) else name.encode() for name in names}
    finally:
        home.close()


@pytest.mark.parametrize("step", ["stub", "lease"])
def test_one_file_with_which_something_is_wrong_fails_alone(volume, monkeypatch, step):
    for name in ("bad", "good", "fine"):
        volume.server.create(volume.path(name), os.urandom(10_000))
    bad = Path(volume.path("bad"))
    if step == "stub":
        os.setxattr(bad, volume.tree.stub_name, b"of another version")
    else:
        real, ino = volume.tree.try_lease, bad.stat().st_ino

        def lease(fd, kind):
            if os.fstat(fd).st_ino == ino and os.readlink(f"/proc/self/fd/{fd}") == str(bad):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(fd, kind)

        volume.demote("bad", "good", "fine", punch=False)
        monkeypatch.setattr(volume.tree, "try_lease", lease)
    done = volume.demote("bad", "good", "fine")
    assert [(item.demoted, item.failed) for item in done] == [(False, True), (True, False), (True, False)]
