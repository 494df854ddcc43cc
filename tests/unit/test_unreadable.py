"""A disk that begins to fail: what cannot be read any more is in the newest snapshot all the same."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from dataclasses import replace

import pytest
from journals import ROOT, Journalled

from tierfs.errors import ObjectArchivedError
from tierfs.survey import Survey


@pytest.fixture
def home(tmp_path):
    made = Journalled(tmp_path)
    made.mkdir("dir")
    made.mkdir("dir/below")
    made.write("dir/one", b"x" * 5000)
    made.write("dir/two", b"y" * 6000, 0o444)
    made.write("dir/below/three", b"z" * 7000)
    made.run("symlink", *made.above("dir/link"), b"one", ROOT)
    made.write("beside", b"b")
    made.snapshots.take()
    yield made
    made.close()


class Disk:
    """Gives an error for what is listed, opened by its name, or looked up in a directory; to the kernel what it
    cannot read by a handle is gone."""

    def __init__(self, home):
        self.home = home
        self.unlisted: set[str] = set()  # directories that cannot be read, or looked up in
        self.lost: set[str] = set()  # inodes that cannot be read
        self.error = errno.EIO
        self._usual = os.open, os.scandir, os.stat
        self._by_handle = home.volume.tree.open_handle

    def place(self, dirfd, path):
        root = os.path.realpath(self.home.volume.root)
        above = os.readlink(f"/proc/self/fd/{dirfd}") if dirfd is not None else root
        return os.path.relpath(os.path.join(above, os.fsdecode(path)), root)

    def refuse(self, place, listing=False):
        inside = os.path.dirname(place) in self.unlisted
        if inside or place in self.lost or (listing and place in self.unlisted):
            raise OSError(self.error, os.strerror(self.error))

    def open(self, path, flags, mode=0o777, *, dir_fd=None):
        if dir_fd is not None:
            self.refuse(self.place(dir_fd, path), bool(flags & os.O_DIRECTORY and not flags & os.O_PATH))
        return self._usual[0](path, flags, mode, dir_fd=dir_fd)

    def stat(self, path, *, dir_fd=None, follow_symlinks=True):
        if dir_fd is not None:
            self.refuse(self.place(dir_fd, path))
        return self._usual[2](path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)

    def scandir(self, fd):
        self.refuse(self.place(fd, "."), True)
        return self._usual[1](fd)

    def open_handle(self, handle, flags):
        fd = self._by_handle(handle, os.O_PATH)
        try:
            place = self.place(fd, ".") if os.path.isdir(f"/proc/self/fd/{fd}") else self.place(fd, "")
            listing = not flags & os.O_PATH
            if place.rstrip("/") in self.lost or (listing and place in self.unlisted):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        finally:
            os.close(fd)
        return self._by_handle(handle, flags)


@pytest.fixture
def disk(home):
    return Disk(home)


@contextlib.contextmanager
def failing(disk, monkeypatch):
    tree = disk.home.volume.tree
    with monkeypatch.context() as patch:
        patch.setattr(tree, "open_handle", disk.open_handle)
        for name in ("open", "stat", "scandir"):
            patch.setattr(os, name, getattr(disk, name))
        patch.setattr(os, "listdir", lambda fd: [entry.name for entry in disk.scandir(fd)])
        yield


@pytest.fixture(params=["with handles", "without"])
def with_handles(request, home, monkeypatch):
    if request.param == "without":
        monkeypatch.setattr(home.volume.tree, "privileged", False)
    return request.param == "with handles"


def troubles(home):
    return [trouble.what for trouble in home.volume.tier.kit.troubles.list()]


@pytest.mark.usefixtures("with_handles")
@pytest.mark.parametrize("lost", [(), ("dir/one", "dir/two"), ("dir/below", "dir/below/three", "dir/link")])
@pytest.mark.parametrize("error", [errno.EIO, errno.EUCLEAN, errno.EACCES])
def test_a_directory_that_cannot_be_read_is_told_as_it_was(home, disk, monkeypatch, lost, error):
    before = home.there()
    disk.unlisted, disk.lost, disk.error = {"dir"}, set(lost), error
    with failing(disk, monkeypatch):
        assert home.snapshots.take()
    assert home.told() == before
    named = [what for what in troubles(home) if "directory 'dir' cannot be read" in what]
    assert len(named) == (error != errno.EACCES), "its owner may want it so"


@pytest.mark.usefixtures("with_handles")
@pytest.mark.parametrize("lost", ["dir", "dir/one", "dir/below", "dir/link"])
def test_an_inode_that_cannot_be_read_is_told_as_it_was(home, disk, monkeypatch, lost):
    before = home.there()
    disk.lost = {lost}
    with failing(disk, monkeypatch):
        assert home.snapshots.take()
    assert home.told() == before
    assert any("1 names in directory" in what for what in troubles(home))


@pytest.mark.parametrize("lost", [True, False])
def test_what_happened_since_is_told_as_the_index_knows_it(home, disk, monkeypatch, lost):
    """A copy that was made, a file that no journal has told of, and one that is gone."""
    home.write("dir/four", b"new" * 100)
    home.run("unlink", *home.above("dir/two"))
    assert home.volume.demote("dir/one")[0].demoted and home.volume.demote("dir/four")[0].demoted
    before, records = home.there(), {name: home.volume.record(f"dir/{name}") for name in ("one", "four")}
    home.volume.index.commit(lambda w: w.begin_notes(True)).result()
    disk.unlisted = {"dir"}
    disk.lost = {"dir/one", "dir/four", "dir/two"} if lost else set()
    with failing(disk, monkeypatch):
        assert home.snapshots.take()
    tree = home.read_journal()
    for name, record in records.items():
        file = tree.find(os.fsencode(f"dir/{name}"))
        assert not file.dirty and file.fid == record.fid.hex() and file.copy.tag == record.copy.tag.hex()
    told = home.told()
    assert told.keys() - before.keys() == {b"dir/two"}, "nobody can say that it is gone"
    assert {path for path in before if told[path] != before[path]} == ({b"dir/four"} if lost else set())
    assert tree.find(b"dir/four").mode == (0o600 if lost else 0o644)


def test_with_a_new_index_a_file_has_the_copy_that_was_told(home, disk, monkeypatch):
    """Its directory cannot be read, so that the index does not know it; what it has become it says itself."""
    assert home.volume.demote("dir/one")[0].demoted
    for name in ("dir/two", "dir/below/three"):
        home.volume.demote(name, punch=False)
    home.journal.flush()
    before = home.read_journal()
    for name in ("dir/one", "dir/two", "dir/below/three"):
        record = home.volume.record(name)
        home.volume.index.commit(lambda w, ino=record.ino: w.delete(ino)).result()
    with open(home.volume.path("dir/below/three"), "ab") as file:
        file.write(b"more")
    disk.unlisted = {"dir"}
    with failing(disk, monkeypatch):
        assert home.snapshots.take()
    after = home.read_journal()
    for name in (b"dir/one", b"dir/two", b"dir/below/three"):
        was, is_ = before.find(name), after.find(name)
        assert (is_.fid, is_.copy.tag, is_.copy.digest) == (was.fid, was.copy.tag, was.copy.digest), name
        assert is_.dirty == (name == b"dir/below/three")


def test_another_name_that_a_file_had_is_not_told(home, disk, monkeypatch):
    """The index has one place of each file, which may be an old one."""
    home.run("link", home.node("dir/one"), *home.above("dir/other"))
    home.journal.flush()
    home.run("rename", *home.above("dir/one"), *home.above("again"))
    home.run("unlink", *home.above("dir/other"))
    home.journal.flush()
    record = home.volume.record("again")
    parent = os.stat(home.volume.path("dir")).st_ino
    stale = replace(record, parent=parent, name=b"one")
    home.volume.index.commit(lambda w: w.put(stale)).result()
    disk.error, before = errno.EIO, home.there()
    with failing(disk, monkeypatch):
        disk.refuse = lambda place, listing=False: refuse_listing(listing and place == "dir")
        assert home.snapshots.take()
    assert home.told() == before


def refuse_listing(refused):
    if refused:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_it_is_looked_at_again_in_the_next_session_and_not_before(home, disk, monkeypatch):
    disk.unlisted = {"dir"}
    home.volume.tier.kit.snapshot_wanted.set()
    with failing(disk, monkeypatch):
        assert home.snapshots.take()
    assert not home.snapshots.due
    home.write("dir/new", b"x")
    home.journal.flush()
    assert not home.snapshots.due
    home.restart()
    assert home.snapshots.due
    assert home.snapshots.take() and not home.snapshots.due
    assert home.told() == home.there()


def test_what_is_remembered_lets_no_garbage_go(home, disk, monkeypatch):
    """It may be what nothing refers to any more."""
    before = home.volume.index.past.snapshots
    disk.unlisted = {"dir"}
    with failing(disk, monkeypatch):
        assert home.snapshots.take()
    assert home.volume.index.past.snapshots == before
    assert home.snapshots.take()
    assert home.volume.index.past.snapshots != before


@pytest.mark.parametrize("lost", ["dir/one", "dir/new", "dir"])
def test_what_cannot_be_read_keeps_nothing_else_from_the_journal(home, disk, monkeypatch, lost):
    home.write("dir/new", b"n")
    home.run("setattr", home.node("dir/one"), mode=0o640)
    home.run("setattr", home.node(""), mode=0o750)
    home.write("other", b"o")
    home.volume.tier.drain()
    disk.lost = {lost}
    with failing(disk, monkeypatch):
        home.journal.flush()
        told = home.told()
        assert b"other" in told and b"dir/one" in told and b"dir/two" in told
        assert any("cannot be read" in what for what in troubles(home)) == (lost == "dir/new")
        assert home.snapshots.due == (lost == "dir/new") and home.snapshots.take() and not home.snapshots.due
        told = home.told()
        assert b"dir/one" in told and b"dir/new" in told and b"other" in told


def test_without_a_journal_that_can_be_read_the_index_alone_tells(home, disk, monkeypatch):
    store, get = home.volume.store, home.volume.store.get
    archived = {info.key for info in store.list("meta/")}

    def read(key, start=0, length=None):
        if key in archived:
            raise ObjectArchivedError(f"{key}: the provider has archived it")
        return get(key, start, length)

    home.volume.tier.drain()
    monkeypatch.setattr(store, "get", read)
    disk.unlisted = {"dir"}
    with failing(disk, monkeypatch):
        assert home.snapshots.take()
    assert {b"dir/one", b"dir/two", b"beside"} <= home.told().keys()


def test_a_file_that_cannot_be_read_ends_no_look_through_the_tree(home, disk, monkeypatch):
    disk.lost = {"dir/one"}
    home.volume.tier.drain()
    before = home.volume.record("dir/one")
    home.volume.index.commit(lambda w: w.set_surveyed(False)).result()
    with failing(disk, monkeypatch):
        assert Survey(home.volume.tier, lambda guesses: None, threading.Event()).run()
    assert any("file 'dir/one' cannot be read" in what for what in troubles(home))
    assert home.volume.record("dir/one") == before, "nor is it taken for gone"


def test_after_a_lost_index_the_copies_that_the_journal_knows_are_told_until_there_are_others(home):
    """A resident file has no stub attribute that could say so; a restore would count it as lost."""
    for name in ("dir/one", "beside"):
        home.volume.demote(name, punch=False)
    home.journal.flush()
    before = home.read_journal()
    home.volume.index.commit(forget_everything).result()
    home.volume.tier.drain()
    Survey(home.volume.tier, lambda guesses: None, threading.Event()).run()
    with open(home.volume.path("beside"), "ab") as file:
        file.write(b"more")
    assert home.volume.record("dir/one").copy is None
    assert home.snapshots.take()
    after = home.read_journal()
    for name, dirty in ((b"dir/one", False), (b"beside", True)):
        was, is_ = before.find(name), after.find(name)
        assert (is_.fid, is_.copy, is_.dirty, is_.since > 0) == (was.fid, was.copy, dirty, dirty)
    assert home.volume.index.past.snapshots == (-1, -1), "what it tells of the index does not refer to"
    assert after.find(b"dir/two").copy is None


def test_copies_are_lent_to_all_snapshots_until_the_index_has_them(home):
    """The first may be cut short, and is not the last before all is copied out anew."""
    home.volume.demote("dir/one", punch=False)
    home.journal.flush()
    before = home.read_journal().find(b"dir/one").copy
    home.volume.index.commit(forget_everything).result()
    home.volume.tier.drain()
    Survey(home.volume.tier, lambda guesses: None, threading.Event()).run()
    home.stopping.set()
    assert not home.snapshots.take()
    home.stopping.clear()
    assert home.snapshots.holds_back == "", "it is not known yet"
    for _ in range(2):
        home.volume.tier.kit.snapshot_wanted.set()
        assert home.snapshots.take()
        assert home.read_journal().find(b"dir/one").copy == before
        assert home.volume.index.past.snapshots == (-1, -1)
        assert "before 1 file is copied anew" in home.snapshots.holds_back
    home.restart()
    assert home.snapshots.holds_back.startswith("nothing is removed from the store"), "a new mover knows it too"
    home.volume.demote("dir/one", punch=False)
    assert home.snapshots.take()
    assert home.read_journal().find(b"dir/one").copy not in (None, before)
    assert home.volume.index.past.snapshots[1] >= 0 and home.snapshots.holds_back == ""


@pytest.mark.usefixtures("with_handles")
@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES])
def test_a_directory_that_is_now_above_the_one_it_was_in_is_told_once(home, disk, monkeypatch, error):
    """What the journal says leads from each of the two into the other by the second time: nobody can look
    whether the first is gone from where it was."""
    home.run("rename", *home.above("dir/below"), *home.above("below"))
    home.run("rename", *home.above("dir"), *home.above("below/dir"))
    disk.unlisted, disk.error = {"below/dir"}, error
    home.volume.tier.kit.snapshot_wanted.set()
    limit = threading.Timer(5.0, home.stopping.set)
    limit.start()
    try:
        for _ in range(2):
            with failing(disk, monkeypatch):
                assert home.snapshots.take(), "it does not come to an end"
            assert {b"below/three", b"below/dir/one", b"below/dir/two"} <= home.told().keys()
    finally:
        limit.cancel()


def test_what_is_closed_within_what_is_closed_is_looked_at_when_both_are_open(home, disk, monkeypatch):
    home.journal.found_closed(os.stat(home.volume.path("dir/below")).st_ino)
    home.volume.tier.places.forget()
    disk.unlisted, disk.error = {"dir"}, errno.EACCES
    home.write("first", b"1")
    with failing(disk, monkeypatch):
        home.journal.flush()
    assert not home.snapshots.due
    home.write("second", b"2")
    home.journal.flush()
    assert home.snapshots.due


def forget_everything(w):
    for table in ("files", "fids", "dirs", "quiet", "changes"):
        w._txn.drop(w._db[table], delete=False)
    w._txn.delete(b"chain", db=w._db["meta"])
    w.meta.noting, w.past.snapshots = False, (-1, -1)
