"""Garbage: nothing goes before its time, nothing that is needed at all, everything else in the end."""

from __future__ import annotations

import errno
import json
import os
import time
from dataclasses import replace

import pytest
from dating import DAY, AgingVolume

from tierfs import collecting
from tierfs.errors import StoreDeniedError, StoreUnavailableError, VolumeError
from tierfs.looking import line
from tierfs.model import EPOCH_SHIFT, object_key
from tierfs.past import Ending
from tierfs.policy.aging import Clock


@pytest.fixture
def volume(tmp_path):
    made = AgingVolume(tmp_path, keep_versions=30 * DAY, grace=DAY)
    yield made
    made.stop()


def lists(volume):
    """The keys on all published lists."""
    found = [info.key for info in volume.store.list("gc/") if info.key != "gc/clock"]
    return {key for name in found for key in json.loads(volume.store.get(name))["keys"]}


def days(volume, count, step=1.0):
    """Let days pass, with a look each `step`; how many objects went."""
    gone = 0
    for _ in range(round(count / step)):
        volume.pass_time(step * DAY)
        gone += volume.collect()
    return gone


def test_a_superseded_version_is_kept_for_its_time_and_then_goes(volume):
    first = volume.write("a", b"one" * 1000)
    second = volume.write("a", b"two" * 1000)
    assert volume.collect() == 0 and first not in lists(volume)
    assert days(volume, 28) == 0
    assert days(volume, 1.9, 0.1) == 0
    assert volume.objects() == {first, second}
    assert first in lists(volume)
    assert days(volume, 0.5, 0.1) == 1
    assert volume.objects() == {second}
    assert volume.index.versions_of(volume.record("a").fid) == []
    assert volume.index.lists() == [] and lists(volume) == set()
    assert days(volume, 40) == 0 and volume.objects() == {second}


def test_a_store_that_is_full_to_the_last_byte_gets_room_by_what_may_go(volume):
    first = volume.write("a", b"one" * 10_000)
    second = volume.write("a", b"two" * 10_000)
    assert days(volume, 29.5, 0.1) == 0 and first in lists(volume)
    volume.store.room = volume.store.used
    assert days(volume, 1, 0.1) == 1
    assert volume.objects() == {second} and volume.store.used < volume.store.room - 29_000
    assert volume.write("b", b"new" * 9_000) in volume.objects()


def test_a_session_that_has_run_on_into_the_next_epoch_removes_what_it_made(volume):
    gate = volume.server.gate
    gate.ledger.generation = (volume.session.epoch + 1 << EPOCH_SHIFT) - 1
    first = volume.write("a", b"one" * 1000)
    second = volume.write("a", b"two" * 1000)
    volume.collect()
    assert days(volume, 32) == 1 and volume.objects() == {second} and first != second
    newest = volume.record("a").generation
    volume.restart()
    volume.server.write(volume.path("a"), b"six" * 1000)
    assert volume.record("a").generation > newest and volume.record("a").dirty


def test_the_digests_of_a_copy_that_is_committed_with_the_end_of_an_upload_stay(volume):
    """A copy of the same content, which an earlier attempt had failed to bring, in the same commit."""
    volume.server.create(volume.path("a"), b"x" * 10_000)
    volume.demote("a", punch=False)
    record = volume.record("a")
    failed = object_key(record.fid, record.generation, b"12345678")
    copy = record.copy
    volume.index.commit(lambda w: w.put(replace(record, copy=None, left_ctime=0))).result()
    with volume.index.write() as w:
        w.put(replace(record, copy=copy))
        w.put_leaves(record.fid, record.generation, b"d" * 32, [(0, 4096)])
        collecting._drop_leaves(w, failed)
    assert volume.index.get_leaves(record.fid, record.generation) is not None
    with volume.index.write() as w:
        w.delete(record.ino)
        collecting._drop_leaves(w, failed)
    assert volume.index.get_leaves(record.fid, record.generation) is None


def test_the_age_begins_with_the_end_not_with_the_look_before(volume):
    volume.write("a", b"one" * 1000)
    volume.write("a", b"two" * 1000)
    volume.collect()
    volume.pass_time(10 * DAY)
    late = volume.key("a")
    volume.server.unlink(volume.path("a"))
    assert days(volume, 29) == 1 and volume.objects() == {late}
    assert days(volume, 2) == 1


def test_nothing_is_asked_of_the_store_while_nothing_is_buried(volume):
    volume.write("a", b"one" * 1000)
    assert days(volume, 3) == 0
    assert list(volume.store.list("gc/")) == []


def test_keep_versions_0_keeps_for_the_grace_alone(volume):
    volume.configure(keep_versions=0.0)
    first = volume.write("a", b"one" * 1000)
    volume.write("a", b"two" * 1000)
    volume.collect()
    assert first in lists(volume)
    assert days(volume, 0.9, 0.1) == 0
    assert days(volume, 0.2, 0.1) == 1


def test_a_longer_time_counts_for_what_is_on_a_list_already(volume):
    volume.configure(keep_versions=0.0)
    first = volume.write("a", b"one" * 1000)
    volume.write("a", b"two" * 1000)
    volume.collect()
    volume.configure(keep_versions=10 * DAY)
    assert days(volume, 9) == 0 and first in volume.objects()
    assert days(volume, 2) == 1


def test_a_deleted_file_is_kept_too(volume):
    key = volume.write("a", b"one" * 1000)
    volume.server.unlink(volume.path("a"))
    volume.collect()
    assert days(volume, 29) == 0 and volume.objects() == {key}
    assert days(volume, 3) == 1 and volume.objects() == set()


@pytest.mark.parametrize("jump", ["local", "server", "both"])
def test_a_clock_that_jumps_makes_nothing_older(volume, jump, monkeypatch):
    first = volume.write("a", b"one" * 1000)
    volume.write("a", b"two" * 1000)
    volume.collect()
    volume.pass_time(60)
    year = 366 * DAY
    if jump in ("local", "both"):
        now = time.time
        monkeypatch.setattr("time.time", lambda: now() + year)
    if jump in ("server", "both"):
        volume.store.date += year
    assert volume.collect() == 0
    volume.pass_time(2 * DAY)
    assert volume.collect() == 0 and first in volume.objects()
    volume.store.date -= year  # and back: it never counts as less than nothing
    assert days(volume, 26) == 0
    assert days(volume, 4) == 1


def test_a_clock_that_stands_still_or_goes_back_only_delays():
    clock = Clock().advanced(1000.0, 5.0, "a")
    assert clock.believed == 0
    clock = clock.advanced(900.0, 65.0, "a")
    assert clock.believed == 0
    assert clock.advanced(960.0, 85.0, "a").believed == 20
    assert clock.advanced(900.0 + 10 * DAY, 5.0, "b").believed == DAY
    assert clock.advanced(930.0, 5.0, "b").believed == 29


def test_a_reboot_counts_a_day_at_most(volume):
    first = volume.write("a", b"one" * 1000)
    volume.write("a", b"two" * 1000)
    volume.collect()
    volume.boot, volume.uptime = "another", 7.0
    volume.store.date += 400 * DAY
    assert volume.collect() == 0
    assert volume.index.past.believed == DAY
    assert days(volume, 28.9, 0.1) == 0 and first in volume.objects()
    assert days(volume, 2) == 1


def test_nothing_goes_while_the_store_may_be_anothers(volume):
    key = volume.write("a", b"one" * 1000)
    volume.server.unlink(volume.path("a"))
    days(volume, 29.5)

    def refuse():
        raise VolumeError("it is another's")

    volume.tier.kit.still_ours = refuse
    with pytest.raises(VolumeError):
        days(volume, 5)
    volume.tier.kit.still_ours = lambda: None
    volume.tier.kit.withheld = "not ours"
    assert days(volume, 5) == 0 and volume.objects() == {key}
    volume.tier.kit.withheld = ""
    assert days(volume, 3) == 1


def test_the_owner_is_asked_before_each_batch(volume, monkeypatch):
    monkeypatch.setattr("tierfs.collecting._BATCH", 2)
    keys = {volume.write(f"f{i}", os.urandom(100)) for i in range(5)}
    for i in range(5):
        volume.server.unlink(volume.path(f"f{i}"))
    days(volume, 29.8, 0.2)
    asked = []

    def ask():
        asked.append(1)
        if len(asked) == 3:  # once at the beginning, then before each batch of two
            raise VolumeError("it is another's")

    volume.tier.kit.still_ours = ask
    with pytest.raises(VolumeError):
        days(volume, 5, 5)
    assert len(volume.objects() & keys) == 3


def test_what_a_snapshot_needs_stays_until_it_does_not(volume):
    key = volume.write("a", b"one" * 1000)
    volume.server.unlink(volume.path("a"))
    volume.snapshots_fail = True
    volume.take_snapshot()  # before the look that the age begins with: it may know the file
    assert days(volume, 60) == 0 and volume.objects() == {key}
    volume.take_snapshot()
    assert days(volume, 1) == 0, "the last but one is still from before"
    volume.take_snapshot()
    assert days(volume, 1) == 1


def test_snapshots_are_asked_for_while_garbage_waits_and_not_too_often(volume):
    days(volume, 20)
    assert volume.snapshots == 0
    for day in range(60):
        volume.write("a", b"%d" % day * 100)
        days(volume, 1)
    assert 5 <= volume.snapshots <= 8
    assert len(volume.objects()) <= 33
    days(volume, 40)
    before = volume.snapshots
    days(volume, 100)
    assert volume.snapshots == before and len(volume.objects()) == 1


def test_a_snapshot_that_does_not_count_is_not_asked_for_at_each_look(volume):
    """Where something cannot be read none does, for as long as the disk is as it is."""
    taken = []

    def take_one_that_remembers():
        volume.tier.kit.snapshot_wanted.clear()
        taken.append(1)

    volume.take_snapshot = take_one_that_remembers
    volume.write("a", b"one" * 1000)
    volume.server.unlink(volume.path("a"))
    days(volume, 60)
    assert 5 <= len(taken) <= 8


def test_what_is_being_read_stays(volume):
    key = volume.write("a", b"one" * 1000)
    volume.server.unlink(volume.path("a"))
    volume.collect()
    with volume.tier.kit.in_use.holding(key):
        assert days(volume, 40) == 0 and volume.objects() == {key}
    assert days(volume, 1) == 1


def test_a_stub_that_is_unlinked_and_open_keeps_its_object(volume):
    volume.write("a", b"one" * 1000)
    volume.demote("a")
    key = volume.stub("a").key
    fd = os.open(volume.path("a"), os.O_RDONLY)
    volume.server.unlink(volume.path("a"))
    try:
        volume.collect()
        assert days(volume, 40) == 0 and volume.objects() == {key}
    finally:
        os.close(fd)
    assert days(volume, 1) == 1


def test_a_stub_whose_unlink_was_undone_keeps_its_object(volume):
    """The index says gone; a power cut has brought the name back, and nothing knows of it yet."""
    volume.write("a", b"one" * 1000)
    volume.demote("a")
    key = volume.stub("a").key
    os.link(volume.path("a"), volume.path("back"))
    volume.server.unlink(volume.path("a"))
    volume.collect()
    assert days(volume, 40) == 0
    assert volume.objects() == {key} and volume.index.tombstones(1 << 62) == []


@pytest.mark.parametrize("twin", [False, True])
def test_a_file_that_cannot_be_asked_for_is_not_taken_for_gone(volume, monkeypatch, twin):
    """There may be too many files open just now: that says nothing of whether it is back."""
    volume.write("a", b"one" * 1000)
    volume.demote("a")
    stub = volume.stub("a")
    if twin:
        with open(volume.path("twin"), "wb") as file:
            file.truncate(3000)
            volume.tree.write_stub(file.fileno(), stub)
            handle = volume.tree.handle_of(file.fileno())
        volume.index.commit(lambda w: w.note_twin(stub.key, handle)).result()
    else:
        os.link(volume.path("a"), volume.path("twin"))
    volume.server.unlink(volume.path("a"))
    volume.collect()

    def refuse(handle, flags):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(volume.tree, "open_handle", refuse)
        assert days(volume, 40) == 0 and volume.objects() == {stub.key}
    assert days(volume, 2) == 0 and volume.objects() == {stub.key}
    assert volume.server.read(volume.path("twin")) == b"one" * 1000


def test_the_tree_is_synced_before_anything_is_looked_at_and_removed(volume, monkeypatch):
    """An unlink that a power cut undoes brings back a stub: only one that is durable ends an object."""
    key = volume.write("a", b"one" * 1000)
    volume.server.unlink(volume.path("a"))
    days(volume, 29.8, 0.2)
    told, sync, delete, look = [], volume.tree.sync, volume.store.delete, volume.tree.open_handle

    def remove(keys):
        told.extend("remove" for each in keys if each == key)
        delete(keys)

    monkeypatch.setattr(volume.tree, "sync", lambda: told.append("sync") or sync())
    monkeypatch.setattr(volume.store, "delete", remove)
    monkeypatch.setattr(volume.tree, "open_handle", lambda *which: told.append("look") or look(*which))
    assert days(volume, 1, 0.2) == 1
    assert told[told.index("remove") - 2 :][:3] == ["sync", "look", "remove"]


def test_a_stub_copied_behind_the_mount_keeps_the_object_of_a_deleted_file(volume):
    """Both walks of the two snapshots see it, whenever it was made."""
    volume.write("a", b"one" * 1000)
    volume.demote("a")
    stub = volume.stub("a")
    with open(volume.path("twin"), "wb") as file:
        file.truncate(3000)
        volume.tree.write_stub(file.fileno(), stub)
    volume.server.unlink(volume.path("a"))
    volume.collect()
    fd = os.open(volume.path("twin"), os.O_PATH)
    try:
        told = line(volume.tier.kit, fd, os.fstat(fd), volume.tree.handle_of(fd))
    finally:
        os.close(fd)
    assert told.copy is not None and not told.dirty
    assert days(volume, 40) == 0 and volume.objects() == {stub.key}
    assert volume.server.read(volume.path("twin")) == b"one" * 1000
    volume.settle("twin")
    days(volume, 1)
    assert volume.index.twins(stub.key) == [] or volume.record("twin").copy is not None


def test_what_was_being_put_by_an_index_older_than_its_store_may_be_anothers(volume):
    """A machine rolled back to an old image takes the store by force: the upload was finished long since."""
    key = volume.write("a", b"one" * 1000)
    record = volume.record("a")
    volume.index.commit(lambda w: (w.delete(record.ino), w.intend(key))).result()
    volume.take_snapshot()
    epoch = volume.index.session.epoch
    volume.index.begin_session("boot", epoch + 3)
    assert volume.index.intents() == [] and volume.index.orphans(1 << 62) == []
    assert volume.index.past.snapshots == (-1, -1)
    volume.index.commit(lambda w: w.set_surveyed(True)).result()
    volume.collect()
    assert days(volume, 29) == 0 and volume.objects() == {key}


def test_a_version_that_is_the_files_again_is_none(volume):
    """As the survey finds it: the stub is there, with a record made of it."""
    volume.write("a", b"one" * 1000)
    volume.demote("a")
    record = volume.record("a")
    os.link(volume.path("a"), volume.path("back"))
    volume.server.unlink(volume.path("a"))
    volume.collect()
    volume.index.commit(lambda w: w.put(record)).result()
    assert days(volume, 40) == 0 and len(volume.objects()) == 1
    assert volume.index.versions_of(record.fid) == []


def test_what_a_record_refers_to_stays_whatever_was_noted_of_it(volume):
    key = volume.write("a", b"one" * 1000)
    record = volume.record("a")
    volume.index.commit(lambda w: (w.end(record, Ending(1)), w.abandon(key))).result()
    volume.collect()
    assert days(volume, 40) == 0 and volume.objects() == {key}
    assert volume.index.orphans(1 << 62) == [] and volume.index.tombstones(1 << 62) == []


def test_what_a_check_has_found_is_kept_as_versions_are(volume):
    strange = f"data/ab/{'ab' * 16}/{1:012x}-{'cd' * 8}"
    volume.store.put(strange, b"x", 1)
    volume.index.commit(lambda w: w.bury_found(strange)).result()
    volume.collect()
    (candidate,) = volume.collector.plan()
    assert candidate.key == strange and "found in the store" in candidate.reason
    assert days(volume, 29) == 0 and volume.objects() == {strange}
    assert days(volume, 2) == 1


def test_an_upload_that_became_no_copy_goes_after_the_grace(volume):
    """The mover is killed between the put and the commit: only the intent knows of the object."""
    volume.write("a", b"one" * 1000)
    volume.server.write(volume.path("a"), b"two" * 1000)
    volume.tier._copier._commit = lambda taken: (_ for _ in ()).throw(VolumeError("killed"))
    volume.tier._copier._abandon = lambda items: None
    assert volume.demote("a", punch=False)[0].failed
    assert len(volume.objects()) == 2 and len(volume.index.intents()) == 1
    volume.restart()
    assert volume.index.intents() == []
    volume.collect()
    assert days(volume, 0.9, 0.1) == 0
    assert days(volume, 0.2, 0.1) == 1
    assert volume.objects() == {volume.key("a")}


def test_what_is_being_put_is_no_garbage(volume):
    volume.write("a", b"one" * 1000)
    volume.server.write(volume.path("a"), b"two" * 1000)
    real = volume.tier._copier._commit
    ended = []
    volume.tier._copier._commit = lambda taken: (ended.append(days(volume, 40)), real(taken))
    (item,) = volume.demote("a", punch=False)
    assert not item.reason and ended == [0]
    assert volume.key("a") in volume.objects()


def test_a_copy_that_was_given_up_is_never_committed(volume):
    """Its upload was taken for garbage meanwhile: the file stays dirty, and goes out again."""
    volume.write("a", b"one" * 1000)
    volume.server.write(volume.path("a"), b"two" * 1000)
    real = volume.tier._copier._commit

    def late(taken):
        volume.index.commit(lambda w: w.abandon_all()).result()
        real(taken)

    volume.tier._copier._commit = late
    (item,) = volume.demote("a", punch=False)
    assert item.reason and volume.record("a").dirty
    volume.tier._copier._commit = real
    assert not volume.demote("a", punch=False)[0].reason
    days(volume, 40)
    assert volume.objects() == {volume.key("a")}


def test_a_list_that_somebody_removed_is_published_again(volume):
    first = volume.write("a", b"one" * 1000)
    volume.write("a", b"two" * 1000)
    volume.collect()
    days(volume, 29.5, 0.5)
    assert first in lists(volume)
    volume.store.delete([info.key for info in volume.store.list("gc/")])
    assert days(volume, 1, 0.5) == 0 and first in lists(volume)
    assert days(volume, 1, 0.5) == 1


def test_a_list_that_nobody_knows_of_is_removed_and_a_later_owners_is_not(volume):
    volume.write("a", b"one" * 1000)
    volume.write("a", b"two" * 1000)
    epoch = volume.index.session.epoch
    old, new = f"gc/{epoch:05x}-{7:012x}-0", f"gc/{epoch + 1:05x}-{7:012x}-0"
    for key in (old, new):
        volume.store.put(key, b'{"keys": []}', 12)
    volume.collect()
    left = {info.key for info in volume.store.list("gc/")}
    assert old not in left and new in left


def test_objects_of_a_later_owner_are_left_alone(volume):
    volume.write("a", b"one" * 1000)
    later = f"data/ab/{'ab' * 16}/{(volume.index.session.epoch + 1) << 28:012x}-{'cd' * 8}"
    volume.store.put(later, b"x", 1)
    volume.index.commit(lambda w: w.abandon(later)).result()
    volume.collect()
    assert days(volume, 40) == 0 and later in volume.objects()


def test_a_store_that_fails_delays_and_loses_nothing(volume):
    volume.write("a", b"one" * 1000)
    second = volume.write("a", b"two" * 1000)
    volume.collect()
    days(volume, 29.5, 0.5)
    real = volume.store.delete

    def fail(keys):
        raise StoreUnavailableError("down")

    volume.store.delete = fail
    with pytest.raises(StoreUnavailableError):
        days(volume, 2)
    volume.store.delete = real
    assert days(volume, 1) == 1 and volume.objects() == {second}


def test_nothing_goes_before_the_tree_was_looked_through(volume):
    key = volume.write("a", b"one" * 1000)
    volume.server.unlink(volume.path("a"))
    volume.collect()
    volume.index.commit(lambda w: w.set_surveyed(False)).result()
    assert days(volume, 60) == 0 and volume.objects() == {key}


def test_the_plan_names_all_with_their_time(volume):
    first = volume.write("a", b"one" * 1000)
    volume.write("a", b"two" * 1000)
    volume.collect()
    (candidate,) = volume.collector.plan()
    now = time.time()
    assert candidate.key == first and candidate.size == 3000 and "superseded version of 'a'" in candidate.reason
    assert abs(candidate.may_go - now - 30 * DAY) < 60
    days(volume, 20)
    (candidate,) = volume.collector.plan()
    assert abs(candidate.may_go - now - 10 * DAY) < 60


def test_of_many_that_are_of_one_beat_the_plan_looks_once_for_its_time(volume, monkeypatch):
    keys = [f"data/ab/{'ab' * 16}/{number:012x}-{'cd' * 8}" for number in range(1, 41)]
    for few in (keys[:20], keys[20:]):
        volume.index.commit(lambda w, few=few: [w.bury_found(key) for key in few]).result()
        volume.index.commit(lambda w, key=few[0]: w.abandon(key)).result()
        volume.index.commit(lambda w: w.beat(w.past.clock)).result()
    asked, beats = [], volume.index.beats
    monkeypatch.setattr(volume.index, "beats", lambda *of: asked.append(of) or beats(*of))
    planned = list(volume.collector.plan())
    assert [candidate.key for candidate in planned] == [*keys, keys[0], keys[20]]
    assert len(asked) == 4, "two beats, once for what is kept and once for what was abandoned"
    assert {candidate.may_go for candidate in planned[:20]} == {planned[0].may_go}


def lock(volume, monkeypatch, is_locked):
    """The store refuses to remove these, alone or among others; what it was asked is in the list returned."""
    delete, asked = volume.store.delete, []

    def refuse(keys):
        asked.append(list(keys))
        delete([key for key in keys if not is_locked(key)])
        if any(map(is_locked, keys)):
            raise StoreDeniedError("it is locked")

    monkeypatch.setattr(volume.store, "delete", refuse)
    return asked


def test_an_object_that_is_locked_in_the_store_holds_up_no_other(volume, monkeypatch):
    volume.configure(keep_versions=0.0)
    names = [f"n{number}" for number in range(12)]
    old = [volume.write(name, b"one" * 1000) for name in names]
    new = {volume.write(name, b"two" * 1000) for name in names}
    locked = set(old[3:7])
    with monkeypatch.context() as patch:
        lock(volume, patch, locked.__contains__)
        assert days(volume, 3, 0.5) == len(names) - len(locked)
        assert volume.objects() == new | locked
        (trouble,) = {each.what for each in volume.tier.kit.troubles.list()}
        assert trouble.startswith("4 objects cannot be removed from the store, the last data/")
        assert trouble.endswith(": it is locked")
    assert days(volume, 1, 0.5) == len(locked)
    assert volume.objects() == new and volume.index.lists() == []


def test_a_store_that_lets_nothing_be_removed_is_not_asked_for_each_object(volume, monkeypatch):
    volume.configure(keep_versions=0.0)
    names = [f"n{number}" for number in range(30)]
    old = {volume.write(name, b"one" * 1000) for name in names}
    for name in names:
        volume.write(name, b"two" * 1000)
    with monkeypatch.context() as patch:
        asked = lock(volume, patch, old.__contains__)
        with pytest.raises(StoreDeniedError, match="it is locked"):
            days(volume, 5, 0.5)
        assert sum(bool(old.intersection(keys)) for keys in asked) == 11
    assert days(volume, 1, 0.5) == len(names)
