"""Demote and fetch of files of one chunk, against the memory store and a real gate."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
import time

import pytest
from tierfsd.backend import TierBackend
from tierfsd.reach import Target
from tiering import Job

from tierfs import config, failpoints
from tierfs import tier as tier_module
from tierfs.errors import BusyError, IndexError_, VolumeError
from tierfs.kit import GONE
from tierfs.marks import Mark
from tierfs.model import Residency


def reasons(items):
    return [item.reason for item in items]


def test_demote_frees_the_blocks_and_a_read_brings_them_back(volume):
    data = os.urandom(50_000)
    volume.server.create(volume.path("a"), data)
    before = os.stat(volume.path("a"))
    (item,) = volume.demote("a")
    assert item.demoted and not item.reason
    after = os.stat(volume.path("a"))
    assert (after.st_blocks, after.st_size, after.st_mtime_ns) == (0, 50_000, before.st_mtime_ns)
    shown = volume.server.shown(volume.path("a"))
    assert (shown.st_blocks, shown.st_mtime_ns, shown.st_ctime_ns) == (
        before.st_blocks, before.st_mtime_ns, before.st_ctime_ns,
    )  # fmt: skip
    record = volume.record("a")
    assert record.residency is Residency.STUB and not record.dirty and record.local == 0
    assert volume.index.pending() == []
    assert volume.server.read(volume.path("a")) == data
    volume.settle("a")
    record = volume.record("a")
    assert record.residency is Residency.RESIDENT and not record.dirty
    shown = volume.server.shown(volume.path("a"))
    assert (shown.st_mtime_ns, shown.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)


@pytest.mark.parametrize("order", ["demote", "fetch"])
def test_of_files_that_go_during_an_order_only_named_ones_are_told(volume, order):
    job = Job()
    targets = []
    for name in ("stays", "named", "other", "replaced"):
        volume.server.create(volume.path(name), name.encode() * 5000)
        if order == "fetch":
            volume.demote(name)
        item, named = volume.item(name), name == "named"
        targets.append(Target(item.path, item.ino, item.handle, item.parent, item.name, item.size, named))
    for name in ("named", "other", "replaced"):
        os.unlink(volume.path(name))
    volume.server.create(volume.path("replaced"), b"another")
    backend = TierBackend.__new__(TierBackend)
    backend._tier = volume.tier
    done = getattr(backend, order)(targets, job)
    assert (done.files, [(stayed.path, stayed.reason) for stayed in done.stayed]) == (1, [(b"named", GONE)])
    assert not volume.tier.kit.troubles.list()


def test_a_file_that_goes_while_it_is_copied_is_gone(volume, monkeypatch):
    volume.server.create(volume.path("a"), b"a" * 5000)
    real = volume.store.put

    def put(key, body, size):
        if os.path.exists(volume.path("a")):
            volume.server.unlink(volume.path("a"))
        return real(key, body, size)

    monkeypatch.setattr(volume.store, "put", put)
    assert reasons(volume.demote("a")) == [GONE]
    assert not volume.tier.kit.troubles.list()


def test_a_file_that_goes_while_it_is_copied_gets_no_record_after_its_end(volume, monkeypatch):
    """The mark of its end has been applied: the record would stay, and its object, for ever."""
    volume.server.create(volume.path("a"), b"a" * 5000)
    item, real, puts = volume.item("a"), volume.store.put, []

    def put(key, body, size):
        puts.append(key)
        if len(puts) == 1:
            volume.server.unlink(volume.path("a"))
            volume.tier.drain()
            assert volume.index.get(item.ino) is None
        return real(key, body, size)

    monkeypatch.setattr(volume.store, "put", put)
    assert reasons(volume.tier.demote([item])) == [GONE]
    assert len(puts) == 1 and volume.index.get(item.ino) is None and volume.index.totals().files == 0


def test_a_file_that_goes_before_the_first_record_of_it_is_made_gets_none(volume, monkeypatch):
    with open(volume.path("a"), "wb") as out:  # behind the mount: there is no mark of it
        out.write(b"a" * 5000)
    item, commit = volume.item("a"), volume.tier._copier._commit

    def late(taken):
        if os.path.exists(volume.path("a")):
            os.unlink(volume.path("a"))
        commit(taken)

    monkeypatch.setattr(volume.tier._copier, "_commit", late)
    assert reasons(volume.tier.demote([item])) == [GONE]
    assert volume.index.get(item.ino) is None and volume.index.totals().files == 0


def test_a_stub_that_goes_while_its_content_arrives_gets_no_record_after_its_end(volume, monkeypatch):
    volume.server.create(volume.path("a"), b"a" * 5000)
    assert volume.demote("a")[0].demoted
    ino, hit, gone = os.stat(volume.path("a")).st_ino, failpoints.hit, threading.Event()

    def between(point):
        if point == failpoints.FILL_CLEARED:
            volume.server.unlink(volume.path("a"))
            volume.tier.drain()
            assert volume.index.get(ino) is None
            gone.set()
        hit(point)

    monkeypatch.setattr(failpoints, "hit", between)
    assert volume.server.read(volume.path("a")) == b"a" * 5000
    assert gone.wait(10)
    while volume.tier.filler.arrival(ino) is not None:
        time.sleep(0.01)
    assert volume.index.get(ino) is None and volume.index.totals().files == 0 and not volume.index.pending()


def test_what_was_written_over_and_goes_while_it_is_kept_gets_no_record_after_its_end(volume, monkeypatch):
    volume.server.create(volume.path("a"), b"a" * 5000)
    assert volume.demote("a")[0].demoted
    ino, hit = os.stat(volume.path("a")).st_ino, failpoints.hit
    with open(volume.path("a"), "r+b") as file:  # behind the mount
        file.write(b"b" * 5000)

    def between(point):
        if point == failpoints.OPEN_KEPT:
            volume.server.unlink(volume.path("a"))
            volume.tier.drain()
            assert volume.index.get(ino) is None
        hit(point)

    monkeypatch.setattr(failpoints, "hit", between)
    volume.fetch("a")
    assert not os.path.exists(volume.path("a")) and volume.index.get(ino) is None
    assert volume.index.totals().files == 0 and not volume.index.pending()


def test_a_file_that_goes_while_it_is_looked_at_is_gone(volume, monkeypatch):
    volume.server.create(volume.path("a"), b"a" * 5000)

    def place(fd, parent, name):
        os.unlink(volume.path("a"))

    item = volume.item("a")
    monkeypatch.setattr(volume.tier.places, "of_file", place)
    assert reasons(volume.tier.demote([item])) == [GONE]


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("times", [1, 1000])
def test_a_directory_that_is_renamed_while_a_file_below_it_is_looked_at_is_no_trouble(
    volume, monkeypatch, replaced, times
):
    """Also where another one, with other pins, has its name by then: it is looked at again, and where it is
    renamed at each look the file is tried again later."""
    os.makedirs(volume.path("d/e"))
    volume.server.create(volume.path("d/e/a"), b"a" * 5000)
    item = volume.item("d/e/a")
    os.rename(volume.path("d"), volume.path("z"))  # what the index does not know of as yet
    volume.tier.places.forget()
    is_pinned, ino, left = volume.tree.is_pinned, item.ino, [times]

    def renamed(fd):
        if os.fstat(fd).st_ino == ino and left[0]:
            left[0] -= 1
            here, there = ("z", "d") if os.path.exists(volume.path("z/e/a")) else ("d", "z")
            shutil.rmtree(volume.path(there), ignore_errors=True)
            os.rename(volume.path(here), volume.path(there))
            if replaced:
                os.makedirs(volume.path(here) + "/e")
        return is_pinned(fd)

    monkeypatch.setattr(volume.tree, "is_pinned", renamed)
    assert reasons(volume.tier.demote([item])) == ([""] if times == 1 else ["was moved just now"])
    assert item.demoted == (times == 1)
    assert not item.failed and not volume.tier.kit.troubles.of(ino)
    left[0] = 0
    (again,) = volume.demote("d/e/a" if os.path.exists(volume.path("d/e/a")) else "z/e/a")
    assert again.already if times == 1 else again.demoted


def test_a_program_that_runs_stays_and_says_so(volume):
    shutil.copy("/bin/sh", volume.path("a"))
    volume.server.create(volume.path("b"), b"b" * 10_000)
    with subprocess.Popen([volume.path("a"), "-c", "read line"], stdin=subprocess.PIPE) as running:
        try:
            items = volume.demote("a", "b")
        finally:
            running.kill()
    assert reasons(items) == ["is being run", ""]
    assert volume.demote("a")[0].demoted


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a file immutable")
def test_an_immutable_file_stays_and_says_so(volume):
    volume.server.create(volume.path("a"), b"a" * 10_000)
    if subprocess.run(["chattr", "+i", volume.path("a")], check=False, capture_output=True).returncode:
        pytest.skip("this filesystem knows no immutable files")
    try:
        (item,) = volume.demote("a")
    finally:
        subprocess.run(["chattr", "-i", volume.path("a")], check=True)
    assert "immutable or append-only" in item.reason


def test_a_second_demotion_uploads_nothing(volume):
    volume.server.create(volume.path("a"), b"x" * 10_000)
    volume.demote("a")
    volume.server.read(volume.path("a"))
    volume.settle("a")
    keys = {info.key for info in volume.store.list("")}
    (item,) = volume.demote("a")
    assert item.demoted and item.uploaded == 0
    assert {info.key for info in volume.store.list("")} == keys


def test_an_open_file_stays(volume):
    volume.server.create(volume.path("a"), b"x" * 10_000)
    handle = volume.server.open(volume.path("a"))
    (item,) = volume.demote("a")
    assert item.reason == "is open" and volume.stub("a") is None
    volume.server.release(handle)
    handle = volume.server.open(volume.path("a"), os.O_RDWR)
    (item,) = volume.demote("a")
    assert "writing" in item.reason and volume.stub("a") is None
    volume.server.release(handle)
    (item,) = volume.demote("a")
    assert item.demoted


def test_a_file_opened_behind_the_gate_is_not_punched(volume):
    volume.server.create(volume.path("a"), b"x" * 10_000)
    with open(volume.path("a"), "rb"):
        (item,) = volume.demote("a")
        assert item.reason == "is open or mapped" and volume.stub("a") is None
    with open(volume.path("a"), "r+b"):
        (item,) = volume.demote("a")
        assert not item.demoted and volume.stub("a") is None


def test_a_write_behind_the_gate_is_noticed_and_copied_anew(volume):
    volume.server.create(volume.path("a"), b"x" * 10_000)
    volume.demote("a", punch=False)
    first = volume.record("a").copy
    with open(volume.path("a"), "r+b") as file:
        file.write(b"changed")
    (item,) = volume.demote("a")
    assert item.demoted
    assert volume.record("a").copy.tag != first.tag
    assert volume.server.read(volume.path("a")) == b"changed" + b"x" * 9_993


def test_broken_custody_hashes_the_file_again(volume):
    volume.server.create(volume.path("a"), b"x" * 10_000)
    volume.demote("a", punch=False)
    custody = volume.record("a").copy.custody
    # Same size and times, other content: what a power cut may leave.
    st = os.stat(volume.path("a"))
    volume.restart(clean=False, boot="another")
    (item,) = volume.demote("a")
    assert item.demoted and item.uploaded == 0
    assert volume.record("a").copy.custody == custody + 1
    assert os.stat(volume.path("a")).st_mtime_ns == st.st_mtime_ns


def test_pins_hold_from_above_and_on_the_file(volume):
    os.makedirs(volume.path("d/e"))
    volume.server.create(volume.path("d/e/a"), b"x" * 10_000)
    os.setxattr(volume.path("d"), volume.tree.pin_name, b"1")
    assert reasons(volume.demote("d/e/a")) == ["is pinned"]
    os.removexattr(volume.path("d"), volume.tree.pin_name)
    os.setxattr(volume.path("d/e/a"), volume.tree.pin_name, b"1")
    volume.tier.places.forget()
    assert reasons(volume.demote("d/e/a")) == ["is pinned"]


def test_what_never_leaves_is_named(volume):
    volume.server.create(volume.path("a.pid"), b"x" * 10_000)
    assert "never" in reasons(volume.demote("a.pid"))[0]


def test_what_is_kept_is_copied_and_not_demoted(volume):
    volume.server.create(volume.path(".profile"), b"x" * 10_000)
    assert "[keep]" in reasons(volume.demote(".profile"))[0]
    (item,) = volume.demote(".profile", punch=False)
    assert not item.reason and not volume.record(".profile").dirty
    assert "[keep]" in reasons(volume.demote(".profile"))[0]
    assert volume.stub(".profile") is None and os.stat(volume.path(".profile")).st_blocks
    volume.tier.reconfigure(config.VolumeConfig(keep=config.Keep(patterns=())))
    (item,) = volume.demote(".profile")
    assert item.demoted


def test_writing_to_a_stub_fetches_first(volume):
    data = os.urandom(20_000)
    volume.server.create(volume.path("a"), data)
    volume.demote("a")
    generation = volume.record("a").generation
    volume.server.write(volume.path("a"), b"new", 5)
    assert volume.stub("a") is None
    assert volume.server.read(volume.path("a")) == data[:5] + b"new" + data[8:]
    record = volume.record("a")
    assert record.generation > generation and record.dirty and record.residency is Residency.RESIDENT


def test_truncation_fetches_nothing(volume):
    volume.server.create(volume.path("a"), b"x" * 20_000)
    volume.demote("a")
    volume.store.delete([info.key for info in volume.store.list("")])
    handle = volume.server.open(volume.path("a"), os.O_WRONLY | os.O_TRUNC)
    volume.server.run(lambda: volume.server.gate.contents.write(handle, 0, b"fresh"))
    volume.server.release(handle)
    assert volume.server.read(volume.path("a")) == b"fresh"
    record = volume.record("a")
    assert record.dirty and record.size == 5 and record.residency is Residency.RESIDENT


def test_a_missing_or_altered_object_is_an_error_and_never_zeros(volume):
    for name in ("a", "b"):
        volume.server.create(volume.path(name), os.urandom(20_000))
    volume.demote("a", "b")
    key_a, key_b = volume.stub("a").key, volume.stub("b").key
    volume.store.delete([key_a])
    volume.store.put(key_b, b"y" * 20_000, 20_000)
    for name in ("a", "b"):
        with pytest.raises(OSError) as caught:
            volume.server.read(volume.path(name))
        assert caught.value.errno == errno.EIO
        assert os.stat(volume.path(name)).st_blocks == 0
        assert volume.tier.kit.troubles.of(os.stat(volume.path(name)).st_ino)


def test_foreign_data_in_a_stub_is_not_overwritten(volume):
    volume.server.create(volume.path("a"), os.urandom(40_000))
    volume.demote("a")
    with open(volume.path("a"), "r+b") as file:
        file.seek(8192)
        file.write(b"somebody's work")
    with pytest.raises(OSError):
        volume.server.read(volume.path("a"))
    with open(volume.path("a"), "rb") as file:
        file.seek(8192)
        assert file.read(15) == b"somebody's work"


def test_a_lost_index_loses_no_data(volume):
    data = os.urandom(30_000)
    volume.server.create(volume.path("a"), data)
    volume.demote("a")
    ino = os.stat(volume.path("a")).st_ino
    volume.index.commit(lambda w: w.delete(ino)).result()
    assert volume.server.read(volume.path("a")) == data
    volume.settle("a")
    record = volume.record("a")
    assert record.residency is Residency.RESIDENT and not record.dirty


def test_hard_links_are_one_file(volume):
    volume.server.create(volume.path("a"), b"x" * 20_000)
    os.link(volume.path("a"), volume.path("b"))
    first, second = volume.demote("a", "b")
    assert first.demoted and (second.already or second.reason)
    assert volume.server.read(volume.path("b")) == b"x" * 20_000


def test_sparse_files_keep_their_holes(volume):
    with open(volume.path("a"), "wb") as file:
        file.write(b"a" * 4096)
        file.seek(512 * 1024)
        file.write(b"b" * 4096)
    before = os.stat(volume.path("a"))
    time.sleep(0.03)
    (item,) = volume.demote("a")
    assert item.demoted, item.reason
    content = volume.server.read(volume.path("a"))
    assert content == b"a" * 4096 + bytes(508 * 1024) + b"b" * 4096
    volume.settle("a")
    assert os.stat(volume.path("a")).st_blocks == before.st_blocks


def test_orders_fetch_many(volume):
    names = [f"f{i}" for i in range(60)]
    for name in names:
        volume.server.create(volume.path(name), name.encode() * 1000)
    assert all(item.demoted for item in volume.demote(*names))
    items = volume.fetch(*names)
    assert reasons(items) == [""] * 60
    for name in names:
        assert volume.stub(name) is None
        with open(volume.path(name), "rb") as file:
            assert file.read() == name.encode() * 1000


def test_a_changed_attribute_of_a_stub_shows(volume):
    volume.server.create(volume.path("a"), b"x" * 20_000)
    volume.demote("a")
    time.sleep(0.03)  # a change within the tick of the punch has the punch's own ctime
    os.chmod(volume.path("a"), 0o600)
    changed = os.stat(volume.path("a")).st_ctime_ns
    assert volume.server.shown(volume.path("a")).st_ctime_ns == changed
    volume.server.read(volume.path("a"))
    volume.settle("a")
    volume.tier.drain()
    assert volume.server.shown(volume.path("a")).st_ctime_ns == changed


def test_an_unprovable_store_keeps_the_file(volume):
    volume.server.create(volume.path("a"), b"x" * 20_000)
    honest = volume.store.put

    def lying(key, body, size):
        return honest(key, b"z" * size, size)

    volume.store.put = lying
    (item,) = volume.demote("a")
    assert item.failed and volume.stub("a") is None
    assert list(volume.store.list("data/")) == []


def test_a_pin_outlives_an_older_mark_of_its_inode_number(volume):
    """Numbers are used again: what the log says of a former file of this number came before the pin."""
    volume.server.create(volume.path("a"), b"x")
    st = os.stat(volume.path("a"))
    volume.marks.append(Mark.GONE, st.st_ino, handle=b"a former file")
    fd = os.open(volume.path("a"), os.O_PATH)
    try:
        volume.tier.set_pin(fd, os.stat(volume.root).st_ino, b"a", True)
    finally:
        os.close(fd)
    volume.tier.drain()
    assert list(volume.tier.pins()) == [b"a"]


def test_marks_whose_look_at_the_index_failed_are_read_again(volume, monkeypatch):
    """Otherwise the next ones would be noted, and these never."""
    volume.server.create(volume.path("pinned"), b"x")
    fd = os.open(volume.path("pinned"), os.O_PATH)
    volume.tier.set_pin(fd, os.stat(volume.root).st_ino, b"pinned", True)
    os.close(fd)
    volume.server.create(volume.path("a"), b"x")

    def fail(index):
        raise IndexError_("no more readers")

    with monkeypatch.context() as patch:
        patch.setattr(type(volume.index), "has_pins", property(fail))
        with pytest.raises(IndexError_):
            volume.tier.drain()
    volume.server.create(volume.path("b"), b"x")
    assert volume.record("b").dirty
    assert volume.record("a").dirty


def test_a_place_that_was_looked_up_before_a_rename_is_not_kept(volume, monkeypatch):
    """A thread that is slow between its look and its note must not put the old place back."""
    os.makedirs(volume.path("d/e"))
    for name, parent in (("d", volume.root), ("d/e", volume.path("d"))):
        st, above = os.stat(volume.path(name)), os.stat(parent)
        volume.marks.append(Mark.DIR, st.st_ino, parent=above.st_ino, name=os.path.basename(name).encode())
    volume.tier.drain()
    places, ino = volume.tier.places, os.stat(volume.path("d/e")).st_ino
    look = places._look

    def slow(*args):
        found = look(*args)
        places.forget()  # here the rename is drained by another thread
        return found

    with monkeypatch.context() as slowly:
        slowly.setattr(places, "_look", slow)
        assert places.directory(ino).path == b"d/e"
    os.rename(volume.path("d"), volume.path("f"))
    st = os.stat(volume.path("f"))
    volume.marks.append(Mark.DIR, st.st_ino, parent=os.stat(volume.root).st_ino, name=b"f")
    monkeypatch.setattr(volume.tier.drainer, "_moved", lambda: None)  # only what was kept wrongly counts
    volume.tier.drain()
    assert places.directory(ino).path == b"f/e"


def test_a_time_that_no_record_can_hold_keeps_a_file_here_and_nothing_else(volume):
    """The filesystem takes years until 2446, a record until 2262: the file is copied, and never a stub."""
    far = 9_300_000_000 * 10**9
    for name in ("far", "near"):
        volume.server.create(volume.path(name), name.encode() * 10_000)
    os.utime(volume.path("far"), ns=(far, far))
    if os.stat(volume.path("far")).st_mtime_ns != far:
        pytest.skip("the filesystem does not take it either")
    item, near = volume.demote("far", "near")
    assert not item.demoted and near.demoted
    assert not volume.record("far").dirty
    assert volume.server.shown(volume.path("far")).st_mtime_ns == far
    assert volume.server.read(volume.path("far")) == b"far" * 10_000
    assert not volume.demote("far")[0].demoted


def test_such_a_time_given_to_a_stub_is_shown_and_does_not_keep_it_away(volume):
    far = 9_300_000_000 * 10**9
    volume.server.create(volume.path("far"), b"far" * 10_000)
    assert volume.demote("far")[0].demoted
    os.utime(volume.path("far"), ns=(far, far))
    if os.stat(volume.path("far")).st_mtime_ns != far:
        pytest.skip("the filesystem does not take it either")
    assert volume.server.read(volume.path("far")) == b"far" * 10_000
    volume.settle("far")
    assert os.stat(volume.path("far")).st_mtime_ns == far


def test_a_drain_ends_while_others_go_on_making_files(volume, monkeypatch):
    """Who asks for the volume's status, or an eviction, would otherwise wait as long as a build takes."""
    commit, made = volume.index.commit, []

    def and_another(change):
        made.append(volume.server.create(volume.path(f"f{len(made)}"), b"x"))
        assert len(made) < 20, "it goes on for ever"
        return commit(change)

    volume.server.create(volume.path("first"), b"x")
    monkeypatch.setattr(volume.index, "commit", and_another)
    volume.tier.drain()
    monkeypatch.undo()
    assert len(made) == 1 and volume.record("first") is not None
    volume.tier.drain()
    assert volume.record("f0") is not None


def test_who_waits_for_another_drain_gets_what_was_there_when_it_began_to_wait(volume, monkeypatch):
    """In a storm each of those that wait would otherwise apply what came meanwhile, one after another."""
    commit, commits, waiter = volume.index.commit, [], threading.Thread(target=volume.tier.drain)
    waits, newest_end = threading.Event(), volume.tier.drainer._reader.newest_end

    def newest():
        found = newest_end()
        if threading.current_thread() is waiter:
            assert volume.tier.drainer._lock.locked(), "it looks when the other is done already"
            waits.set()
        return found

    def slow(change):
        commits.append(change)
        if len(commits) == 1:
            waiter.start()
            assert waits.wait(10)
            volume.server.create(volume.path("late"), b"x")
        return commit(change)

    volume.server.create(volume.path("first"), b"x")
    monkeypatch.setattr(volume.tier.drainer._reader, "newest_end", newest)
    monkeypatch.setattr(volume.index, "commit", slow)
    volume.tier.drain()
    waiter.join(10)
    assert len(commits) == 1
    assert volume.record("first") is not None and volume.record("late") is not None


def test_a_store_that_was_taken_while_a_file_was_copied_frees_nothing(volume):
    """The new owner may remove what it does not know of: copying may have taken hours."""
    volume.server.create(volume.path("a"), b"x" * 50_000)
    put = volume.store.put

    def taken():
        raise VolumeError("the store is used by host 'other'")

    def put_and_be_taken_over(*args):
        answer = put(*args)
        volume.tier.kit.fence = taken
        return answer

    volume.store.put = put_and_be_taken_over
    (item,) = volume.demote("a")
    assert not item.demoted and item.failed and "'other'" in item.reason
    assert volume.stub("a") is None and os.stat(volume.path("a")).st_blocks


def test_an_order_waits_for_who_works_on_a_file_holding_no_other(volume, monkeypatch):
    """As while it is being replicated: "is being worked on" is of no use to whoever ordered it."""
    for name in ("a", "b"):
        volume.server.create(volume.path(name), b"x" * 50_000)
    claims, claim, tries = volume.tier.kit.claims, volume.tier._claim, []
    a, b = (os.stat(volume.path(name)).st_ino for name in ("a", "b"))
    told = []

    def tried(ino):
        tries.append(ino)
        if tries.count(a) == 2:
            assert claims.take(b), "what was to be done with the other is done"
            claims.give(b)
            claims.give(a)
        return claim(ino)

    monkeypatch.setattr(volume.tier, "_claim", tried)
    assert claims.take(a)
    items = volume.demote("a", "b", report=lambda item: told.append((item.ino, item.reason)))
    assert [item.demoted for item in items] == [True, True]
    assert sorted(told) == sorted([(a, ""), (b, "")])
    assert claims.take(a) and claims.take(b)


def test_an_order_does_not_wait_for_ever(volume, monkeypatch):
    volume.server.create(volume.path("a"), b"x" * 50_000)
    monkeypatch.setattr(tier_module, "_PATIENCE", 0.1)
    told = []
    assert volume.tier.kit.claims.take(os.stat(volume.path("a")).st_ino)
    (item,) = volume.demote("a", report=lambda item: told.append(item.reason))
    assert (item.demoted, item.reason) == (False, "is being worked on")
    assert told == ["is being worked on"]


@pytest.mark.parametrize("where", ["at once", "in the pool"])
def test_who_is_told_of_an_error_while_a_fetch_begins_finds_the_reason_in_status(volume, monkeypatch, where):
    volume.server.create(volume.path("a"), os.urandom(5000))
    volume.demote("a")

    def fail(*given):
        if where == "at once":
            raise BusyError("there are too many threads on this machine")
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        if where == "at once":
            patch.setattr(volume.tier.kit.fetches, "post", fail)
        else:
            patch.setattr(volume.tier.filler, "_take", fail)
        with pytest.raises(OSError):
            volume.server.read(volume.path("a"))
    why = "too many threads" if where == "at once" else "Too many open files"
    (told,) = [trouble.what for trouble in volume.tier.kit.troubles.list()]
    assert "'a' cannot be fetched" in told and why in told


def test_what_of_an_order_had_not_begun_when_the_daemon_ends_stays(volume, monkeypatch):
    """That is no failure of the order, and whoever reads the log shall not take it for one."""
    monkeypatch.setattr(tier_module, "BATCH", 2)  # batches of one
    began, go_on, stop = threading.Semaphore(0), threading.Event(), threading.Event()

    def slow(batch, *_):
        began.release()
        go_on.wait(20)
        batch[0].stay("was slow")

    monkeypatch.setattr(volume.tier, "_batch", slow)
    names = [f"f{number}" for number in range(2 * tier_module._IN_HAND)]
    for name in names:
        volume.server.create(volume.path(name), b"content")
    found, told = [], []
    order = {"cancelled": stop, "report": told.append}
    ordered = threading.Thread(target=lambda: found.extend(volume.demote(*names, **order)))
    ordered.start()
    for _ in range(tier_module._AT_ONCE):
        assert began.acquire(timeout=20)
    stop.set()
    volume.tier._batches.shutdown(wait=False, cancel_futures=True)
    go_on.set()
    ordered.join(20)
    slow_ones = tier_module._AT_ONCE
    assert reasons(found) == ["was slow"] * slow_ones + ["was cancelled"] * (len(names) - slow_ones)
    assert not any(item.failed for item in found)
    assert told == found[slow_ones:], "whoever counts hears of each"
