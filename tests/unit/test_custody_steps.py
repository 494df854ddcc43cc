"""Each step of custody by itself: what the step before or behind it would also have noticed, it notices alone.

The order in which a file is taken away and brought back is written down as it happens, since a killed process
shows nothing of a missing sync.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from tiering import MIB, Volume

from tierfs import failpoints
from tierfs import survey as survey_module
from tierfs.arrivals import Request
from tierfs.copying import CHANGED, _put_copy
from tierfs.digests import SIDE_SUFFIX, leaf_digests, unpack_side
from tierfs.errors import BusyError, ForeignStubError, StoreUnavailableError
from tierfs.kit import same_tuple
from tierfs.marks import Mark
from tierfs.model import DOUBTED, Residency, Stub
from tierfs.opening import AlreadyResident
from tierfs.readback import doubt_copy
from tierfs.recovery import finish_pending
from tierfs.store.memory import MemoryStore
from tierfs.survey import Survey

SIZE = 2 * MIB + 777


@pytest.fixture
def volume(tmp_path):
    made = Volume(tmp_path, chunk_size=MIB)
    yield made
    made.stop()


@pytest.fixture
def at(monkeypatch):
    """`at(point, act)`: do that once, when the point is passed."""

    def arm(point, act):
        def hit(name):
            if name == point:
                monkeypatch.setattr(failpoints, "hit", lambda name: None)
                act()

        monkeypatch.setattr(failpoints, "hit", hit)

    return arm


def until(is_so):
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def break_lease(path):
    """Somebody opens it past the gate, and does not wait."""
    with pytest.raises(BlockingIOError):
        os.open(path, os.O_RDONLY | os.O_NONBLOCK)


@contextmanager
def directory(path):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def check_whole(volume, name, content):
    """It is as it was before somebody tried to demote it."""
    st = os.stat(volume.path(name))
    assert volume.stub(name) is None and st.st_blocks * 512 >= len(content)
    assert volume.record(name).residency is Residency.RESIDENT and volume.index.pending() == []
    assert volume.server.read(volume.path(name)) == content


# --- a copy -----------------------------------------------------------------------------------------------


def copy_once(volume, name):
    """As nobody has ordered it: what fails is not tried again."""
    (item,) = volume.tier.demote([volume.item(name, ordered=False)], punch=False)
    return item


def during_put(volume, monkeypatch, act):
    """Do that while the object is being put."""
    put = volume.store.put

    def put_and_act(key, body, size):
        monkeypatch.setattr(volume.store, "put", put)
        answer = put(key, body, size)
        act()
        return answer

    monkeypatch.setattr(volume.store, "put", put_and_act)


def test_what_changes_behind_the_gate_while_it_is_copied_makes_the_copy_void(volume, monkeypatch):
    volume.server.create(volume.path("a"), b"x" * 10_000)

    def write():
        with open(volume.path("a"), "r+b") as file:
            file.write(b"changed")

    during_put(volume, monkeypatch, write)
    item = copy_once(volume, "a")
    assert item.reason == CHANGED
    assert volume.record("a").copy is None and list(volume.store.list("data/")) == []


def test_a_seal_that_breaks_after_the_last_byte_was_read_makes_the_copy_void(volume, monkeypatch):
    """Before the commit asks for generations: the object goes at once."""
    volume.server.create(volume.path("a"), b"x" * 10_000)
    ino, committed = os.stat(volume.path("a")).st_ino, []

    def open_to_write():
        volume.server.write(volume.path("a"), b"")
        until(lambda: not volume.link.sealed(ino))

    during_put(volume, monkeypatch, open_to_write)
    monkeypatch.setattr(volume.tier._copier, "_commit", committed.extend)
    item = copy_once(volume, "a")
    assert item.reason == CHANGED and committed == []


def test_a_write_between_reading_and_commit_makes_the_copy_void(volume, at):
    volume.server.create(volume.path("a"), b"x" * 10_000)
    volume.demote("a", punch=False)
    volume.server.write(volume.path("a"), b"second")
    at(failpoints.COPY_PUT, partial(volume.server.write, volume.path("a"), b"third"))
    item = copy_once(volume, "a")
    assert item.reason == CHANGED
    assert volume.record("a").dirty


def test_a_copy_of_another_generation_is_not_committed(volume):
    """Though it were not asked for anywhere else."""
    volume.server.create(volume.path("a"), b"x" * 10_000)
    volume.demote("a", punch=False)
    record, item = volume.record("a"), volume.item("a")
    item.record, item.st, item.generation = record, os.stat(volume.path("a")), record.generation + 1
    with pytest.raises(BusyError, match=CHANGED):
        volume.index.commit(partial(_put_copy, item, None)).result()


@pytest.mark.parametrize("what", ["data", "side"])
@pytest.mark.parametrize("kind", ["large", "sparse"])
def test_what_the_store_altered_of_a_file_or_of_its_digests_keeps_it_here(volume, monkeypatch, what, kind):
    """The memory store proves nothing about what it was given: all is read back."""
    make(volume, kind)
    put = volume.store.put

    def lie(key, body, size):
        if key.endswith(SIDE_SUFFIX) == (what == "side"):
            put(key, body, size)
            whole = bytes(volume.store.get(key))
            body = whole[:-1] + bytes([whole[-1] ^ 1])
        return put(key, body, size)

    monkeypatch.setattr(volume.store, "put", lie)
    (item,) = volume.demote("a")
    assert item.failed and "gave back other bytes" in item.reason
    assert volume.stub("a") is None and list(volume.store.list("data/")) == []


def test_the_tuple_of_a_copy_has_size_and_both_times(volume):
    volume.server.create(volume.path("a"), b"x" * 10_000)
    volume.demote("a", punch=False)
    record, st = volume.record("a"), os.stat(volume.path("a"))

    class Stat:
        st_size, st_mtime_ns, st_ctime_ns = st.st_size, st.st_mtime_ns, st.st_ctime_ns

    assert same_tuple(record, record.copy, Stat)
    for field in ("st_size", "st_mtime_ns", "st_ctime_ns"):
        other = type("Other", (Stat,), {field: getattr(Stat, field) + 1})
        assert not same_tuple(record, record.copy, other), field


def test_content_that_changed_under_its_old_mtime_is_copied_anew(volume):
    volume.server.create(volume.path("a"), b"x" * 10_000)
    volume.demote("a", punch=False)
    before = os.stat(volume.path("a"))
    with open(volume.path("a"), "r+b") as file:
        file.write(b"changed")
    os.utime(volume.path("a"), ns=(before.st_atime_ns, before.st_mtime_ns))
    (item,) = volume.demote("a")
    assert item.demoted and item.uploaded == 10_000
    assert volume.server.read(volume.path("a")) == b"changed" + b"x" * 9_993


# --- a punch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", [failpoints.STUB_WRITTEN, failpoints.STUB_COMMITTED])
def test_a_lease_that_breaks_before_the_punch_keeps_all_blocks(volume, at, monkeypatch, point):
    content = os.urandom(20_000)
    volume.server.create(volume.path("a"), content)
    puncher, committed = volume.tier._puncher, []
    commit = puncher._commit_stubs
    monkeypatch.setattr(puncher, "_commit_stubs", lambda files: committed.extend(files) or commit(files))
    at(point, partial(break_lease, volume.path("a")))
    (item,) = volume.demote("a")
    assert len(committed) == (point == failpoints.STUB_COMMITTED)
    assert item.reason == "was opened meanwhile" and not item.demoted
    check_whole(volume, "a", content)


@pytest.mark.parametrize("privileged", [True, False])
@pytest.mark.parametrize("size", [20_000, 19_999])
def test_what_changes_before_the_lease_is_taken_stays(volume, monkeypatch, privileged, size):
    """Behind the gate, in the moment after the last look: also where mtime is put back (but without privileges,
    where our own opening moves ctime)."""
    volume.server.create(volume.path("a"), os.urandom(20_000))
    os.chmod(volume.path("a"), 0o444)
    volume.demote("a", punch=False)
    monkeypatch.setattr(volume.tree, "privileged", privileged)
    st, take, content = os.stat(volume.path("a")), volume.tree.try_lease, os.urandom(size)

    def write_first(fd, kind):
        monkeypatch.setattr(volume.tree, "try_lease", take)
        with open(volume.path("a"), "r+b") as file:
            file.write(content)
            file.truncate()
        if privileged:
            os.utime(volume.path("a"), ns=(st.st_atime_ns, st.st_mtime_ns))
        return take(fd, kind)

    monkeypatch.setattr(volume.tree, "try_lease", write_first)
    item = volume.item("a")
    item.record = volume.record("a")
    volume.tier._puncher.punch([item])
    assert item.reason in ("is changing right now", "was changed after it was copied") and not item.demoted
    monkeypatch.setattr(volume.tree, "privileged", True)
    check_whole(volume, "a", content)


@pytest.mark.parametrize("what", ["handle", "residency", "copy"])
def test_a_record_that_is_not_of_a_resident_file_of_this_handle_proves_nothing(volume, what):
    """Though its tuple is the file's: a number that is used again, or an index that was put back."""
    content = os.urandom(20_000)
    volume.server.create(volume.path("a"), content)
    volume.demote("a", punch=False)
    record, item = volume.record("a"), volume.item("a")
    other = {"handle": b"another's", "residency": Residency.STUB, "copy": None}[what]
    volume.index.commit(lambda w: w.put(replace(record, **{what: other}))).result()
    volume.tier._puncher.punch([item])
    assert item.reason and not item.demoted
    assert volume.stub("a") is None
    with open(volume.path("a"), "rb") as file:
        assert file.read() == content


def test_who_waits_at_the_guard_before_the_stub_is_committed_wins(volume, at):
    content = os.urandom(20_000)
    volume.server.create(volume.path("a"), content)
    ino, opened = os.stat(volume.path("a")).st_ino, []
    waiting = threading.Thread(target=lambda: opened.append(volume.server.open(volume.path("a"))))

    def come():
        waiting.start()
        until(lambda: volume.link.wanted(ino))

    at(failpoints.STUB_WRITTEN, come)
    (item,) = volume.demote("a")
    waiting.join(10)
    volume.server.release(*opened)
    assert item.reason == "was opened meanwhile"
    check_whole(volume, "a", content)


@pytest.mark.parametrize("broken", [False, True])
def test_what_is_not_punched_after_all_is_durably_as_before(volume, at, monkeypatch, broken):
    """And its time is our own doing only while nobody has broken the lease."""
    volume.server.create(volume.path("a"), os.urandom(20_000))
    ino, story, sync = os.stat(volume.path("a")).st_ino, [], os.fsync

    def note(fd):
        sync(fd)
        if os.fstat(fd).st_ino == ino:
            story.append((volume.stub("a") is not None, volume.index.get(ino).residency))

    monkeypatch.setattr(os, "fsync", note)
    if broken:
        at(failpoints.STUB_COMMITTED, partial(break_lease, volume.path("a")))
    else:
        monkeypatch.setattr(volume.tier._puncher, "_undisturbed", lambda file: file.item.stay("was asked for"))
    (item,) = volume.demote("a")
    assert item.reason and not item.demoted
    committed = Residency.STUB if broken else Residency.RESIDENT
    assert story == [(True, Residency.RESIDENT), (False, committed)]
    record = volume.record("a")
    assert (record.left_ctime == os.stat(volume.path("a")).st_ctime_ns) is not broken


def test_a_record_that_changed_after_the_proof_makes_it_void(volume, at):
    content = os.urandom(20_000)
    volume.server.create(volume.path("a"), content)
    ino = os.stat(volume.path("a")).st_ino

    def change():
        def commit(w):
            w.put(replace(w.get(ino), name=b"b"))

        volume.index.commit(commit).result()

    at(failpoints.STUB_WRITTEN, change)
    (item,) = volume.demote("a")
    assert item.reason == "was changed meanwhile"
    check_whole(volume, "a", content)


def test_what_lies_in_a_directory_that_is_pinned_while_it_is_copied_stays(volume, at):
    """The file itself shows nothing of it."""
    content = os.urandom(20_000)
    volume.server.mkdir(volume.path("d"))
    volume.server.create(volume.path("d/a"), content)
    volume.tier.drain()

    def pin():
        with directory(volume.path("d")) as fd:
            volume.tier.set_pin(fd, os.stat(volume.root).st_ino, b"d", True)

    at(failpoints.COPY_COMMITTED, pin)
    (item,) = volume.demote("d/a")
    assert item.reason == "is pinned"
    check_whole(volume, "d/a", content)


@pytest.mark.parametrize("times", [1, 1000])
def test_what_lies_in_a_pinned_directory_that_is_renamed_just_now_stays(volume, at, monkeypatch, times):
    """Where it stands is asked again; where that is never told, nothing is known of what is pinned above it."""
    content = os.urandom(20_000)
    volume.server.mkdir(volume.path("d"))
    volume.server.create(volume.path("d/a"), content)
    volume.tier.drain()
    is_pinned, ino, left = volume.tree.is_pinned, os.stat(volume.path("d/a")).st_ino, [times]

    def renamed(fd):
        if os.fstat(fd).st_ino == ino and left[0]:
            left[0] -= 1
            here, there = ("d", "z") if os.path.exists(volume.path("d")) else ("z", "d")
            os.rename(volume.path(here), volume.path(there))
        return is_pinned(fd)

    def pin():
        with directory(volume.path("d")) as fd:
            volume.tier.set_pin(fd, os.stat(volume.root).st_ino, b"d", True)
        os.rename(volume.path("d"), volume.path("z"))  # what the index does not know of as yet
        monkeypatch.setattr(volume.tree, "is_pinned", renamed)

    at(failpoints.COPY_COMMITTED, pin)
    (item,) = volume.demote("d/a")
    assert item.reason == ("is pinned" if times == 1 else "was moved just now")
    monkeypatch.setattr(volume.tree, "is_pinned", is_pinned)
    check_whole(volume, "d/a" if os.path.exists(volume.path("d")) else "z/a", content)


# --- a stub -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [20_000, SIZE])
def test_a_stub_is_fetched_whatever_the_index_says_of_it(volume, size):
    """An index from before the demotion calls it resident: without its attribute it would read as zeros."""
    content = os.urandom(size)
    volume.server.create(volume.path("a"), content)
    volume.demote("a", punch=False)
    before = volume.record("a")
    (item,) = volume.demote("a")
    assert item.demoted and before.residency is Residency.RESIDENT
    volume.index.commit(lambda w: w.put(before)).result()
    assert volume.server.read(volume.path("a")) == content


def test_a_copy_that_is_found_bad_while_the_file_comes_back_stays_so(volume, at):
    """What came of it was good, or is not known to be otherwise: it is copied out anew before it leaves."""
    content = os.urandom(20_000)
    volume.server.create(volume.path("a"), content)
    volume.demote("a")
    at(failpoints.FILL_SYNCED, lambda: doubt_copy(volume.tier.kit, volume.index.get(ino)))
    ino = os.stat(volume.path("a")).st_ino
    assert volume.server.read(volume.path("a")) == content
    volume.settle("a")
    assert volume.record("a").copy.custody == DOUBTED
    (item,) = volume.demote("a")
    assert item.demoted and item.uploaded == 20_000


@pytest.mark.parametrize("other", ["stub", "size"])
def test_content_of_another_stub_than_was_asked_for_is_not_given(volume, other):
    """As where a file is cut, written and demoted between the server's look and the mover's."""
    volume.server.create(volume.path("a"), b"x" * 20_000)
    volume.demote("a")
    stub, opath = volume.stub("a"), os.open(volume.path("a"), os.O_PATH)
    asked = replace(stub, tag=bytes(8)) if other == "stub" else stub
    size = 20_000 - (other == "size")
    ino = os.fstat(opath).st_ino
    request = Request(1, ino, asked.pack(), size, 0, size, True, False, time.monotonic() + 5)
    with pytest.raises(ForeignStubError, match="not the one that was opened"):
        volume.tier.filler._opener.open(request, opath)
    assert volume.tier.kit.claims.take(ino)
    volume.tier.kit.claims.give(ino)
    os.close(opath)


@pytest.mark.parametrize("kind", ["found without its attribute", "written over"])
def test_what_is_no_stub_any_more_is_so_on_the_disk_before_the_index_says_it(volume, monkeypatch, kind):
    """Else a power cut could bring the attribute back under a record that says resident."""
    volume.server.create(volume.path("a"), b"x" * 20_000)
    volume.demote("a")
    stub, opath, story = volume.stub("a"), os.open(volume.path("a"), os.O_PATH), []
    with open(volume.path("a"), "r+b") as file:
        file.write(b"y" * 20_000)
        if kind == "found without its attribute":
            volume.tree.clear_stub(file.fileno())
    sync, commit, ino = os.fsync, volume.index.commit, os.fstat(opath).st_ino

    def note_sync(fd):
        story.append("sync" if os.fstat(fd).st_ino == ino and volume.stub("a") is None else "another")
        sync(fd)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(volume.index, "commit", lambda run: story.append("commit") or commit(run))
    request = Request(1, ino, stub.pack(), 20_000, 0, 20_000, True, False, time.monotonic() + 5)
    with pytest.raises(AlreadyResident):
        volume.tier.filler._opener.open(request, opath)
    os.close(opath)
    assert story == ["sync", "commit"] and volume.record("a").residency is Residency.RESIDENT


def test_a_crash_left_a_stub_that_is_not_that_of_its_record(volume):
    """Of a state directory that was put back: what the record says of times and copy is another content's."""
    volume.server.create(volume.path("a"), b"first" * 4000)
    volume.demote("a")
    earlier = volume.record("a")
    content = os.urandom(20_000)
    volume.server.write(volume.path("a"), content, flags=os.O_WRONLY | os.O_TRUNC)
    (item,) = volume.demote("a")
    assert item.demoted
    before, stub = os.stat(volume.path("a")), volume.stub("a")

    def put_back(w):
        w.put(earlier)
        w.put_pending(earlier.ino)

    volume.index.commit(put_back).result()
    assert finish_pending(volume.tier) == 0
    after = os.stat(volume.path("a"))
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
    assert volume.stub("a") == stub and volume.index.get(earlier.ino) == earlier
    assert volume.server.read(volume.path("a")) == content


@pytest.mark.parametrize("size", [20_000, SIZE])
def test_blocks_of_a_stub_that_are_not_its_copys_are_not_made_its_content_by_a_recovery(volume, size):
    """A demotion was cut short, and before the next mover looked somebody had written over it."""
    volume.server.create(volume.path("a"), os.urandom(size))
    volume.demote("a")
    record, content = volume.record("a"), os.urandom(size)
    with open(volume.path("a"), "r+b") as file:
        file.write(content)
    volume.index.commit(lambda w: w.put_pending(record.ino)).result()
    assert finish_pending(volume.tier) == 0
    assert volume.stub("a") is not None
    assert volume.server.read(volume.path("a")) == content
    volume.settle("a")
    (item,) = volume.demote("a")
    assert item.demoted and item.uploaded == size
    assert volume.server.read(volume.path("a")) == content


@pytest.mark.parametrize("kind", ["without attribute", "whole", "hole"])
def test_the_order_of_a_recovery(volume, monkeypatch, kind):
    """What the record is about to say is on the disk before."""
    content = os.urandom(20_000)
    volume.server.create(volume.path("a"), content)
    volume.demote("a")
    record, story = volume.record("a"), []
    with open(volume.path("a"), "r+b") as file:
        if kind != "hole":
            file.write(content)
        if kind == "without attribute":
            volume.tree.clear_stub(file.fileno())
    volume.index.commit(lambda w: w.put_pending(record.ino)).result()
    sync, commit = os.fsync, volume.index.commit

    def note_sync(fd):
        if os.fstat(fd).st_ino == record.ino:
            story.append("sync of a stub" if volume.stub("a") else "sync")
        sync(fd)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(volume.index, "commit", lambda run: story.append("commit") or commit(run))
    assert finish_pending(volume.tier) == 0
    assert story == ["sync of a stub" if kind == "hole" else "sync", "commit"]
    assert (volume.index.get(record.ino).residency is Residency.RESIDENT) == (kind != "hole")


def test_what_somebody_has_open_is_not_made_resident_by_a_recovery(volume):
    """Behind the mount: who writes while it is compared would be taken for the copy."""
    content = os.urandom(20_000)
    volume.server.create(volume.path("a"), content)
    volume.demote("a")
    record = volume.record("a")
    with open(volume.path("a"), "r+b") as file:
        file.write(content)
        file.flush()
        volume.index.commit(lambda w: w.put_pending(record.ino)).result()
        assert finish_pending(volume.tier) == 0
        assert volume.stub("a") is not None and volume.record("a").residency is Residency.STUB
    assert volume.server.read(volume.path("a")) == content


def test_a_stub_copied_behind_the_mount_becomes_a_file_of_its_own(volume):
    """As `cp -a` and rsync -X copy it: one file id on two inodes, of which each may change and go."""
    content = os.urandom(20_000)
    volume.server.create(volume.path("a"), content)
    volume.demote("a")
    name = volume.tree.stub_name
    with open(volume.path("b"), "wb") as twin:
        twin.truncate(len(content))
    os.setxattr(volume.path("b"), name, os.getxattr(volume.path("a"), name))
    assert volume.server.read(volume.path("b")) == content
    volume.settle("b")
    first, second = volume.record("a"), volume.record("b")
    assert second.fid != first.fid and second.copy is None
    assert volume.index.get_by_fid(first.fid) == first
    (item,) = volume.demote("b")
    assert item.demoted and volume.stub("b").key != volume.stub("a").key
    volume.server.unlink(volume.path("a"))
    assert volume.server.read(volume.path("b")) == content


def test_without_privilege_another_file_at_the_place_of_one_is_not_taken_for_it(volume, monkeypatch):
    """Nothing is opened by handle then, and a path may lead elsewhere by now."""
    for name in ("a", "b"):
        volume.server.create(volume.path(name), name.encode() * 10_000)
    item, kit = volume.item("a"), volume.tier.kit
    monkeypatch.setattr(volume.tree, "privileged", False)
    os.close(kit.open(item.ino, item.handle, os.O_RDONLY, b"a"))
    for ino, handle in ((item.ino, b"another"), (item.ino + 1, item.handle)):
        with pytest.raises(OSError, match=r"[Ss]tale"):
            kit.open(ino, handle, os.O_RDONLY, b"a")
    os.rename(volume.path("b"), volume.path("a"))
    with pytest.raises(OSError, match=r"[Ss]tale"):
        kit.open(item.ino, item.handle, os.O_RDONLY, b"a")


# --- an inode number ---------------------------------------------------------------------------------------


def test_a_number_that_is_used_again_is_another_file(volume):
    """Whose mark of removal is missing: nothing of the former one is taken for the new one's."""
    volume.server.create(volume.path("a"), b"x" * 10_000)
    volume.demote("a", punch=False)
    former = volume.record("a")
    place = {"parent": former.parent, "name": b"b"}
    volume.marks.append(Mark.WRITE, former.ino, former.generation + 1, handle=b"another", **place)
    volume.tier.drain()
    now = volume.index.get(former.ino)
    assert (now.handle, now.copy, now.dirty) == (b"another", None, True) and now.fid != former.fid
    assert [version.tag for version in volume.index.versions_of(former.fid)] == [former.copy.tag]


def test_the_removal_of_a_former_file_of_that_number_removes_nothing(volume):
    volume.server.create(volume.path("a"), b"x" * 10_000)
    volume.demote("a", punch=False)
    record = volume.record("a")
    volume.marks.append(Mark.GONE, record.ino, handle=b"a former file", name=b"a", parent=record.parent)
    volume.tier.drain()
    assert volume.index.get(record.ino) == record and volume.index.tombstones(1 << 62) == []


# --- a look through the tree -------------------------------------------------------------------------------


def test_a_file_that_moves_behind_the_look_is_not_taken_for_gone(volume, monkeypatch):
    """From a directory that is not looked through yet into one that is: nobody sees it, and it is there."""
    content = os.urandom(20_000)
    for name in ("one", "two"):
        volume.server.mkdir(volume.path(name))
    volume.server.create(volume.path("two/a"), content)
    (item,) = volume.demote("two/a")
    assert item.demoted
    record = volume.record("two/a")
    survey = Survey(volume.tier, lambda guesses: None, threading.Event())
    look = survey._directory

    def look_and_move(here):
        below = look(here)
        if here.path == b"":
            below.sort(key=lambda each: each.path, reverse=True)  # the last one is looked through first
        if here.path == b"one" and os.path.exists(volume.path("two/a")):
            volume.server.rename(volume.path("two/a"), volume.path("one/a"))
        return below

    monkeypatch.setattr(survey, "_directory", look_and_move)
    assert survey.run()
    volume.tier.drain()
    assert volume.index.get(record.ino).fid == record.fid and volume.index.tombstones(1 << 62) == []
    assert volume.server.read(volume.path("one/a")) == content


@pytest.mark.parametrize("call", ["open", "listdir"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_what_is_in_a_directory_that_cannot_be_read_is_not_gone(volume, monkeypatch, call, number):
    """One that is damaged is named, and the rest looked at; where it is just now only, the look is none."""
    for name in ("one", "two"):
        volume.server.mkdir(volume.path(name))
        with open(volume.path(f"{name}/a"), "wb") as file:
            file.write(os.urandom(5000))
    volume.server.create(volume.path("gone"), b"x" * 5000)
    gone = volume.record("gone")
    os.unlink(volume.path("gone"))
    place, usual = os.stat(volume.path("two")).st_ino, getattr(os, call)

    def fail(which, *more, **named):
        here = os.stat(which, dir_fd=named.get("dir_fd")).st_ino if isinstance(which, bytes) else None
        if place in (here, isinstance(which, int) and os.fstat(which).st_ino):
            raise OSError(number, os.strerror(number))
        return usual(which, *more, **named)

    handle, opened = volume.tree.handle_at(volume.tree.rootfd, b"two"), volume.tree.open_handle

    def fail_by_handle(which, flags):
        if which == handle and call == "open":  # a directory that cannot be read is gone to the kernel
            raise OSError(number if number == errno.EMFILE else errno.ESTALE, os.strerror(number))
        return opened(which, flags)

    look = Survey(volume.tier, lambda guesses: None, threading.Event())
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        patch.setattr(volume.tree, "open_handle", fail_by_handle)
        if number == errno.EIO:
            assert look.run()
            assert "'two' cannot be read" in volume.tier.kit.troubles.list()[-1].what
            assert volume.record("one/a") is not None
        else:
            with pytest.raises(OSError, match=os.strerror(number)):
                look.run()
    assert volume.record("two/a") is None and volume.index.surveyed == (number == errno.EIO)
    assert volume.index.get(gone.ino) == gone
    assert Survey(volume.tier, lambda guesses: None, threading.Event()).run()
    assert volume.record("two/a") is not None and volume.index.get(gone.ino) is None


def test_the_look_finds_what_has_changed_without_a_mark(volume):
    volume.server.create(volume.path("a"), b"x" * 10_000)
    volume.demote("a", punch=False)
    before = volume.record("a").copy
    with open(volume.path("a"), "r+b") as file:
        file.write(b"changed")
    assert Survey(volume.tier, lambda guesses: None, threading.Event()).run()
    copy = volume.record("a").copy
    assert copy.tag != before.tag
    assert bytes(volume.store.get(Stub.of(volume.record("a").fid, copy).key)) == b"changed" + b"x" * 9_993


@pytest.mark.parametrize("size", [20_000, SIZE])
@pytest.mark.parametrize("partly", [False, True])
def test_the_look_finds_a_stub_that_was_emptied_and_written_without_a_mark(volume, size, partly):
    """A program has emptied and written it and synced that; then the power was cut, which took the marks."""
    volume.server.create(volume.path("a"), os.urandom(size))
    (item,) = volume.demote("a")
    assert item.demoted
    if partly and size > MIB:
        volume.server.read(volume.path("a"), 0, 4096)
        volume.tier._settler.commit_bits(everything=True)
        assert volume.record("a").residency is Residency.PARTIAL
    with open(volume.path("a"), "wb") as file:
        os.removexattr(volume.path("a"), volume.tree.stub_name)
        file.write(b"written anew" * 500)
    volume.restart(clean=False, boot="another")
    survey = Survey(volume.tier, lambda guesses: None, threading.Event())
    assert survey.run() and survey.left == 0
    record = volume.record("a")
    assert record.residency is Residency.RESIDENT and not record.dirty
    assert bytes(volume.store.get(Stub.of(record.fid, record.copy).key)) == b"written anew" * 500


@pytest.mark.parametrize("emptied", [False, True])
def test_what_the_look_cannot_compare_is_dirty(volume, monkeypatch, emptied):
    """The store is away when the machine is started again after a power cut."""
    volume.server.create(volume.path("a"), b"x" * 10_000)
    volume.demote("a", punch=emptied)
    before = volume.record("a")
    with open(volume.path("a"), "wb") as file:
        if emptied:
            os.removexattr(volume.path("a"), volume.tree.stub_name)
        file.write(b"y" * 10_000)
    volume.restart(clean=False, boot="another")

    def away(*args):
        raise StoreUnavailableError("the store is down")

    with monkeypatch.context() as outage:
        outage.setattr(volume.store, "put", away)
        assert Survey(volume.tier, lambda guesses: None, threading.Event()).run()
    record = volume.record("a")
    assert record.dirty and record.residency is Residency.RESIDENT and record.copy.tag == before.copy.tag
    assert volume.index.quiet(time.time_ns(), 10) == [record.ino], "it waits to be copied out"
    assert [item.reason for item in volume.demote("a", punch=False)] == [""]
    copy = volume.record("a").copy
    assert not volume.record("a").dirty
    assert bytes(volume.store.get(Stub.of(record.fid, copy).key)) == b"y" * 10_000


def test_what_the_look_cannot_compare_and_is_as_it_was_costs_no_copy(volume, monkeypatch):
    volume.server.create(volume.path("a"), b"x" * 10_000)
    volume.demote("a", punch=False)
    before = volume.record("a")
    os.utime(volume.path("a"))
    volume.restart(clean=False, boot="another")

    def busy(items, *rest, **more):
        for item in items:
            item.stay("is being worked on")
        return items

    with monkeypatch.context() as nothing:
        nothing.setattr(volume.tier, "demote", busy)
        assert Survey(volume.tier, lambda guesses: None, threading.Event()).run()
    assert volume.record("a").dirty
    (item,) = volume.demote("a", punch=False)
    record = volume.record("a")
    assert (item.reason, item.uploaded) == ("", 0) and not record.dirty and record.copy.tag == before.copy.tag


def test_a_look_that_is_cut_short_while_it_compares_begins_anew(volume, monkeypatch):
    volume.server.create(volume.path("a"), b"x" * 10_000)
    volume.demote("a", punch=False)
    os.utime(volume.path("a"))
    volume.restart(clean=False, boot="another")
    stopping = threading.Event()
    survey = Survey(volume.tier, lambda guesses: None, stopping)
    monkeypatch.setattr(survey, "_forget_unseen", stopping.set)
    assert not survey.run() and not volume.index.surveyed


def test_a_file_that_goes_while_it_is_looked_at_gets_no_record_after_its_end(volume, monkeypatch):
    Path(volume.path("a")).write_bytes(b"made behind the mount")
    real, looked = survey_module.fresh_record, []

    def late(kit, opath, *rest):
        record = real(kit, opath, *rest)
        volume.server.unlink(volume.path("a"))
        volume.tier.drain()
        looked.append(opath)
        return record

    monkeypatch.setattr(survey_module, "fresh_record", late)
    assert Survey(volume.tier, lambda guesses: None, threading.Event()).run()
    assert looked and volume.index.totals().files == 0 and list(volume.index.records(0)) == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(looked[0])


def test_the_look_leaves_stubs_whose_attributes_were_changed_alone(volume):
    content = os.urandom(20_000)
    volume.server.create(volume.path("a"), content)
    (item,) = volume.demote("a")
    assert item.demoted
    os.chmod(volume.path("a"), 0o600)
    before = volume.record("a")
    volume.restart(clean=False, boot="another")
    assert Survey(volume.tier, lambda guesses: None, threading.Event()).run()
    assert volume.record("a") == before and volume.stub("a") is not None
    assert volume.server.read(volume.path("a")) == content


# --- in which order ---------------------------------------------------------------------------------------


STEPS_OUT = {
    "commit intend_all", "put", "put side", "commit _put_copy", "fdatasync", "stub", "no stub", "fsync",
    "commit _put_stub", "punch", "times", "commit _put_punched",
}  # fmt: skip
STEPS_IN = {"fdatasync", "commit note_pending", "no stub", "fsync", "commit _put_resident"}


def make(volume, kind):
    """A file `a` of that kind; its content."""
    content = os.urandom(SIZE if kind == "large" else 20_000)
    if kind != "sparse":
        volume.server.create(volume.path("a"), content)
        return content
    with open(volume.path("a"), "wb") as file:
        file.seek(256 * 1024)
        file.write(content)
    return bytes(256 * 1024) + content


@pytest.fixture
def story(volume, monkeypatch):
    """What is done to the store, to the tree and to the index, in order."""
    told = []

    def tell(owner, name, what):
        real = getattr(owner, name)

        def tells(*args, **more):
            told.append(what(*args) if callable(what) else what)
            return real(*args, **more)

        monkeypatch.setattr(owner, name, tells)

    def committed(work):
        name = getattr(work, "func", work).__name__
        return f"commit {name}"

    tell(MemoryStore, "put", lambda store, key, *rest: "put side" if key.endswith(SIDE_SUFFIX) else "put")
    tell(volume.tree, "write_stub", "stub")
    tell(volume.tree, "clear_stub", "no stub")
    tell(volume.tree, "punch", "punch")
    tell(volume.tree, "set_times", "times")
    tell(os, "fsync", "fsync")
    tell(os, "fdatasync", "fdatasync")
    tell(volume.index, "commit", committed)
    return told


@pytest.mark.parametrize("kind", ["small", "large", "sparse"])
def test_the_order_of_a_demotion(volume, story, kind):
    content = make(volume, kind)
    volume.tier.drain()
    story.clear()
    (item,) = volume.demote("a")
    assert item.demoted, item.reason
    steps = [step for step in story if step in STEPS_OUT]
    side = [] if kind == "small" else ["put side"]
    assert steps == [
        "commit intend_all", "put", *side, "commit _put_copy", "fdatasync", "stub", "fsync",
        "commit _put_stub", "punch", "times", "fsync", "commit _put_punched",
    ]  # fmt: skip
    if kind == "large":
        stub = volume.stub("a")
        side = volume.store.get(stub.key + SIDE_SUFFIX)
        assert unpack_side(side, len(content), stub.digest) == (leaf_digests(content), [(0, len(content))])


@pytest.mark.parametrize("kind", ["small", "large", "sparse"])
def test_the_order_of_a_fetch(volume, story, kind):
    content = make(volume, kind)
    (item,) = volume.demote("a")
    assert item.demoted, item.reason
    story.clear()
    assert volume.server.read(volume.path("a")) == content
    volume.settle("a")
    steps = [step for step in story if step in STEPS_IN]
    end = ["fdatasync", "commit note_pending", "no stub", "fsync", "commit _put_resident"]
    assert steps[-len(end) :] == end, steps


@pytest.mark.parametrize("kind", ["small", "large"])
@pytest.mark.parametrize("how", ["open", "truncate"])
def test_the_order_of_a_truncation_to_nothing(volume, monkeypatch, kind, how):
    """The other way round a server that is killed in between leaves zeros of the former length."""
    make(volume, kind)
    (item,) = volume.demote("a")
    assert item.demoted, item.reason
    told, cut, clear, path = [], os.ftruncate, volume.tree.clear_stub, volume.path("a")
    monkeypatch.setattr(os, "ftruncate", lambda fd, size: told.append(f"size {size}") or cut(fd, size))
    monkeypatch.setattr(volume.tree, "clear_stub", lambda fd: told.append("no stub") or clear(fd))
    if how == "open":
        volume.server.release(volume.server.open(path, os.O_WRONLY | os.O_TRUNC))
    else:
        opath = os.open(path, os.O_PATH)
        parent = os.stat(volume.root).st_ino
        try:
            truncate = volume.server.gate.contents.truncate
            volume.server.run(lambda: truncate(opath, os.fstat(opath), 0, parent, b"a"))
        finally:
            os.close(opath)
    assert told == ["size 0", "no stub"]
    assert volume.stub("a") is None and os.stat(path).st_size == 0
