"""Files of several chunks: ranges, partial residency, cancellation, truncation, and what a restart finds."""

from __future__ import annotations

import errno
import os
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import pytest
from bare import until
from tierfsd.backend import _Count
from tiering import MIB, Volume

from tierfs import arrivals, copying, digests, versions, wire
from tierfs.copying import PIECE
from tierfs.digests import sha256
from tierfs.errors import (
    BucketMissingError,
    IndexFullError,
    ObjectCorruptError,
    StoreDeniedError,
    StoreUnavailableError,
)
from tierfs.model import LEAF, Residency
from tierfs.readback import Pace, Ref, examine
from tierfs.recovery import finish_pending
from tierfs.store.memory import MemoryStore
from tierfs.survey import Survey
from tierfs.waits import Blocked

SIZE = 5 * MIB + 12_345


class CountingStore(MemoryStore):
    """Remembers ranges; `hold` stops gets, `down` fails them."""

    def __init__(self):
        super().__init__()
        self.ranges = []
        self.hold = threading.Event()
        self.hold.set()
        self.down = False
        self.error = StoreUnavailableError

    def get(self, key, start=0, length=None):
        self.ranges.append((start, length))
        self.hold.wait(20)
        if self.down:
            raise self.error("the store is down")
        return super().get(key, start, length)


@pytest.fixture
def volume(tmp_path):
    made = Volume(tmp_path, CountingStore(), chunk_size=MIB, fetch_timeout=2.0)
    yield made
    made.store.hold.set()
    made.stop()


@pytest.fixture
def cold(volume):
    """The content of a demoted file `big`."""
    data = os.urandom(SIZE)
    volume.server.create(volume.path("big"), data)
    (item,) = volume.demote("big")
    assert item.demoted, item.reason
    volume.store.ranges.clear()
    return data


def times(volume):
    shown = volume.server.shown(volume.path("big"))
    return shown.st_mtime_ns, shown.st_ctime_ns


@pytest.mark.parametrize("lost", [False, True], ids=["index", "list in the store"])
def test_a_copy_of_the_time_before_blake3_is_read(volume, monkeypatch, lost):
    """Its leaves have SHA-256's digests, which the list of format 1 says alone, and the index does not."""

    def former(data):
        view = memoryview(data)
        return b"".join(sha256(view[at : at + LEAF]) for at in range(0, len(view), LEAF))

    data, path = os.urandom(SIZE), volume.path("big")
    volume.server.create(path, data)
    with monkeypatch.context() as then:
        then.setattr(copying, "leaf_digests", former)
        then.setattr(digests, "_FORMAT", 1)
        (item,) = volume.demote("big")
    assert item.demoted, item.reason
    record = volume.record("big")
    if lost:
        volume.index.commit(lambda w: w.drop_leaves(record.fid, record.generation)).result()
    kit = volume.tier.kit
    assert examine(kit, Ref.of_record(record), Pace(lambda: 0.0, threading.Event())) == ""
    (kept,) = versions.of_path(kit, b"big", record)
    assert b"".join(bytes(part) for _, part in versions.content(kit, kept)) == data
    assert volume.server.read(path, 4 * MIB, LEAF) == data[4 * MIB : 4 * MIB + LEAF]
    assert volume.server.read(path) == data
    volume.settle("big")


def test_whoever_waits_for_content_that_is_cut_away_goes_on(volume, cold):
    """A truncation to nothing has the flights cancelled that one to some bytes waits for, and overtakes it."""
    volume.store.hold.clear()
    path, gate = volume.path("big"), volume.server.gate
    parent, outcome = os.stat(volume.root).st_ino, []

    def shorten():
        opath = os.open(path, os.O_PATH)
        try:
            gate.contents.truncate(opath, os.fstat(opath), 10, parent, b"big")
        finally:
            os.close(opath)

    def in_time():
        began = time.monotonic()
        volume.server.run(shorten)
        outcome.append(time.monotonic() - began)

    waiting = threading.Thread(target=in_time)
    waiting.start()
    until = time.monotonic() + 10
    while not volume.store.ranges:
        assert time.monotonic() < until
        time.sleep(0.002)
    cut = threading.Thread(
        target=lambda: volume.server.release(volume.server.open(path, os.O_WRONLY | os.O_TRUNC))
    )
    cut.start()
    volume.store.hold.set()
    cut.join(10)
    waiting.join(10)
    assert outcome, "it waits for what nobody brings"
    assert volume.server.read(path) == bytes(10)
    assert os.stat(path).st_size == 10
    assert not gate.states.inodes


def test_times_set_while_a_range_is_written_are_kept(volume, cold, monkeypatch):
    """The write of a range takes the times back to what it found: what is set in between must not get lost."""
    path, set_mtime, done = volume.path("big"), volume.tree.set_mtime, []
    handle = volume.server.open(path)

    def interrupted(fd, mtime_ns):
        if not done:
            done.append(True)
            with volume.server.lock:  # as the vfs does
                st = os.stat(path)
                volume.server.gate.before_change(st.st_ino)
                os.utime(path, ns=(5, 777))
                st = os.stat(path)
                volume.server.gate.after_change(st.st_ino, st, mtime_set=True)
                done.append(st.st_ctime_ns)
        set_mtime(fd, mtime_ns)

    monkeypatch.setattr(volume.tree, "set_mtime", interrupted)
    volume.server.run(lambda: volume.server.gate.contents.read(handle, 3 * MIB, 100))
    assert times(volume) == (777, done[1])
    volume.server.run(lambda: volume.server.gate.contents.ready(handle, True))
    volume.server.release(handle)
    volume.settle("big")
    assert os.stat(path).st_mtime_ns == 777
    assert times(volume)[0] == 777


def test_times_do_not_move_when_a_part_is_read_and_the_file_closed(volume, cold):
    """Before the index knows what the arrival of that part has done to the inode's own times."""
    before = times(volume)
    for offset in (3 * MIB, 0, 5 * MIB):
        volume.server.read(volume.path("big"), offset, 100)
        assert times(volume) == before
    st = volume.server.chmod(volume.path("big"), 0o600)
    assert times(volume) == (before[0], st.st_ctime_ns)
    volume.server.read(volume.path("big"))
    volume.settle("big")
    assert times(volume) == (before[0], st.st_ctime_ns)


@pytest.fixture
def settler(volume, monkeypatch):
    """The settler, whose thread commits no bits: `commit_bits` does so here."""
    made = volume.tier._settler
    commit_bits = made.commit_bits
    monkeypatch.setattr(made, "commit_bits", lambda everything=False: None)
    yield SimpleNamespace(made=made, commit_bits=commit_bits)
    monkeypatch.undo()


def left_alone(volume):
    """The state of the file, of which a part was asked for long ago."""
    arrival = volume.tier.filler.arrival(os.stat(volume.path("big")).st_ino)
    assert until(lambda: not arrival.requests and not arrival.ranges)
    arrival.used -= 10
    return arrival


def test_what_comes_while_bits_are_committed_is_not_forgotten(volume, cold, settler, monkeypatch):
    """Somebody reads on just when the file is about to be forgotten for having been left alone."""
    before, path, commit_bits = times(volume), volume.path("big"), settler.made._commit_bits

    def interrupted(arrival):
        commit_bits(arrival)
        volume.server.read(path, 3 * MIB, 100)
        left_alone(volume)

    volume.server.read(path, 0, 100)
    left_alone(volume)
    with monkeypatch.context() as busy:
        busy.setattr(settler.made, "_commit_bits", interrupted)
        settler.commit_bits()
    volume.store.ranges.clear()
    assert volume.server.read(path) == cold
    assert all(start != 3 * MIB for start, _ in volume.store.ranges), "it came once more"
    volume.settle("big")
    assert times(volume) == before


def test_a_range_for_which_there_was_no_room_leaves_the_times_as_they_are(volume, cold, settler, monkeypatch):
    """Also when all that served it have forgotten the file."""
    before, path = times(volume), volume.path("big")

    def no_room(*given):
        raise OSError(errno.ENOSPC, "no room")

    with monkeypatch.context() as full:
        full.setattr(arrivals, "pwrite_all", no_room)
        assert volume.server.read(path, 3 * MIB, 100) == cold[3 * MIB : 3 * MIB + 100]
        arrival = left_alone(volume)
    settler.commit_bits()
    assert arrival.closed and volume.record("big").residency is Residency.STUB
    volume.server.gate.appearance.late.clear()
    assert times(volume) == before != (os.stat(path).st_mtime_ns, os.stat(path).st_ctime_ns)


def test_an_index_without_room_for_a_moment_leaves_the_times_as_they_are(volume, cold, settler, monkeypatch):
    """What it has not taken in it is told again, before the file is forgotten."""
    before, path = times(volume), volume.path("big")
    volume.server.read(path, 3 * MIB, 100)
    arrival = left_alone(volume)

    def full(run, later=False):
        future = Future()
        future.set_exception(IndexFullError("no room is left"))
        return future

    with monkeypatch.context() as patch:
        patch.setattr(volume.index, "commit", full)
        with pytest.raises(IndexFullError):
            settler.commit_bits()
    assert not arrival.closed
    settler.commit_bits()
    assert arrival.closed and volume.record("big").residency is Residency.PARTIAL
    volume.server.gate.appearance.late.clear()
    assert times(volume) == before


def partial_blocks(volume):
    return os.stat(volume.path("big")).st_blocks * 512


def test_the_whole_file_comes_back_and_settles(volume, cold):
    assert volume.server.read(volume.path("big")) == cold
    volume.settle("big")
    record = volume.record("big")
    assert record.residency is Residency.RESIDENT and not record.dirty
    (item,) = volume.demote("big")
    assert item.demoted and item.uploaded == 0


def test_a_random_read_fetches_little(volume, cold):
    assert volume.server.read(volume.path("big"), 3 * MIB, 4096) == cold[3 * MIB : 3 * MIB + 4096]
    assert volume.store.ranges == [(3 * MIB, 2 * LEAF)]
    assert partial_blocks(volume) == 2 * LEAF


def test_bits_outlive_a_restart_and_nothing_is_fetched_twice(volume, cold):
    volume.server.read(volume.path("big"), 0, 4096)
    volume.tier._settler.commit_bits(everything=True)
    assert volume.record("big").residency is Residency.PARTIAL
    before = volume.server.shown(volume.path("big"))
    volume.restart()
    after = volume.server.shown(volume.path("big"))
    assert (before.st_mtime_ns, before.st_ctime_ns, before.st_blocks) == (
        after.st_mtime_ns, after.st_ctime_ns, after.st_blocks,
    )  # fmt: skip
    volume.store.ranges.clear()
    assert volume.server.read(volume.path("big"), 0, 4096) == cold[:4096]
    assert volume.store.ranges == []
    assert volume.server.read(volume.path("big")) == cold
    assert all(start >= 2 * LEAF for start, _ in volume.store.ranges)


def test_pages_without_bits_are_recognised_after_a_restart(volume, cold):
    volume.server.read(volume.path("big"), 0, 4096)
    ino = os.stat(volume.path("big")).st_ino
    volume.tier.filler.arrival(ino).moved = False  # as if the process had died before the commit
    volume.restart()
    volume.store.ranges.clear()
    assert volume.server.read(volume.path("big"), 0, 4096) == cold[:4096]
    assert volume.store.ranges == []


def test_a_partial_file_is_demoted_again(volume, cold):
    before = volume.server.shown(volume.path("big"))
    volume.server.read(volume.path("big"), MIB, 4096)
    changed = volume.server.chmod(volume.path("big"), 0o640).st_ctime_ns
    (item,) = volume.demote("big")
    assert item.demoted, item.reason
    assert partial_blocks(volume) == 0
    assert volume.record("big").residency is Residency.STUB
    shown = volume.server.shown(volume.path("big"))
    assert (shown.st_mtime_ns, shown.st_ctime_ns, shown.st_blocks) == (
        before.st_mtime_ns, changed, before.st_blocks,
    )  # fmt: skip
    assert volume.server.read(volume.path("big")) == cold


def test_foreign_pages_in_a_partial_file_keep_it_from_being_punched(volume, cold):
    volume.server.read(volume.path("big"), MIB, 4096)
    with open(volume.path("big"), "r+b") as file:
        file.seek(MIB + 100)
        file.write(b"somebody's work")
    (item,) = volume.demote("big")
    assert item.failed and partial_blocks(volume) > 0


def test_two_readers_share_a_flight(volume, cold):
    volume.store.hold.clear()
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(volume.server.read(volume.path("big"), 0, 4096)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    volume.store.hold.set()
    for thread in threads:
        thread.join()
    assert results == [cold[:4096]] * 4
    assert volume.store.ranges == [(0, 2 * LEAF)]


def test_a_write_waits_for_all_of_it(volume, cold):
    volume.server.write(volume.path("big"), b"new", MIB)
    assert volume.stub("big") is None
    assert volume.server.read(volume.path("big")) == cold[:MIB] + b"new" + cold[MIB + 3 :]


def test_truncation_during_a_fetch_wins(volume, cold):
    volume.store.hold.clear()
    reader = threading.Thread(target=lambda: volume.server.read(volume.path("big"), 0, 4096))
    reader.start()
    while not volume.store.ranges:
        time.sleep(0.001)
    handle = volume.server.open(volume.path("big"), os.O_WRONLY | os.O_TRUNC)
    volume.server.run(lambda: volume.server.gate.contents.write(handle, 0, b"fresh"))
    volume.store.hold.set()
    reader.join()
    volume.server.release(handle)
    with open(volume.path("big"), "rb") as file:
        assert file.read() == b"fresh"


@pytest.mark.parametrize("touched", [False, True])
def test_times_that_a_killed_mover_left_are_not_the_files(volume, cold, touched):
    """It died between a write of what it fetched and the times that it puts back, with the file open."""
    before, path = times(volume), volume.path("big")
    handle = volume.server.open(path)
    volume.server.run(lambda: volume.server.gate.contents.read(handle, 0, 4096))
    volume.tier._settler.commit_bits(everything=True)
    ino = os.stat(path).st_ino
    assert volume.tier.filler.arrival(ino) is None
    volume.index.commit(lambda w: w.put_pending(ino)).result()
    with open(path, "r+b", buffering=0) as backing:
        os.pwrite(backing.fileno(), cold[2 * MIB : 2 * MIB + LEAF], 2 * MIB)
    assert os.stat(path).st_mtime_ns != before[0]
    if touched:
        with volume.server.lock:
            volume.server.gate.before_change(ino)
            os.utime(path, ns=(5, 777))
            volume.server.gate.after_change(ino, os.stat(path), mtime_set=True)
        volume.tier.drain()
    wanted = (777, 0) if touched else before
    assert volume.server.run(lambda: volume.server.gate.contents.read(handle, 0, SIZE)) == cold
    volume.server.run(lambda: volume.server.gate.contents.ready(handle, True))
    volume.server.release(handle)
    volume.settle("big")
    assert os.stat(path).st_mtime_ns == times(volume)[0] == wanted[0]
    assert touched or times(volume)[1] == wanted[1]


def test_a_store_that_is_down_gives_eio_within_the_deadline(volume, cold):
    volume.store.down = True
    with pytest.raises(OSError) as caught:
        volume.server.read(volume.path("big"), 0, 4096)
    assert caught.value.errno == errno.EIO
    assert partial_blocks(volume) == 0
    volume.store.down = False
    assert volume.server.read(volume.path("big"), 0, 4096) == cold[:4096]


@pytest.mark.parametrize("error", [StoreUnavailableError, StoreDeniedError, BucketMissingError])
def test_a_read_waits_for_a_store_that_is_away_in_any_way(volume, cold, error):
    """The network, credentials that have expired, a disk that is not plugged in."""
    volume.store.down, volume.store.error = True, error
    back = threading.Timer(0.3, lambda: setattr(volume.store, "down", False))
    back.start()
    try:
        assert volume.server.read(volume.path("big"), 0, 4096) == cold[:4096]
    finally:
        back.join()


def test_an_altered_leaf_fails_its_range_only(volume, cold):
    key = volume.stub("big").key
    altered = bytearray(cold)
    altered[3 * MIB] ^= 1
    volume.store.put(key, bytes(altered), SIZE)
    with pytest.raises(OSError):
        volume.server.read(volume.path("big"), 3 * MIB, 4096)
    assert volume.server.read(volume.path("big"), 0, 4096) == cold[:4096]


def test_a_lost_index_fetches_by_the_side_object(volume, cold):
    ino = os.stat(volume.path("big")).st_ino
    record = volume.record("big")
    volume.index.commit(lambda w: (w.drop_leaves(record.fid, record.generation), w.delete(ino))).result()
    assert volume.server.read(volume.path("big")) == cold
    volume.settle("big")
    assert not volume.record("big").dirty


def leave_alone(volume):
    """Until what has come of the file has its bits, and the mover has let go of it."""
    ino = os.stat(volume.path("big")).st_ino
    until(lambda: volume.index.get_bits(ino) is not None and volume.tier.filler.arrival(ino) is None)


def edit(volume, content=b"edited"):
    """Behind the mount, at the beginning of the file, with its time put back."""
    before = os.stat(volume.path("big"))
    with open(volume.path("big"), "r+b") as file:
        file.write(content)
    os.utime(volume.path("big"), ns=(before.st_atime_ns, before.st_mtime_ns))


def check_edited(volume, cold):
    """What somebody has written there has not left for the copy of something else."""
    content = b"edited" + cold[6:]
    volume.settle("big")
    assert volume.server.read(volume.path("big")) == content
    (item,) = volume.demote("big")
    assert item.demoted and item.uploaded == SIZE
    assert volume.server.read(volume.path("big")) == content


@pytest.mark.parametrize("restart", [False, True])
def test_an_edit_behind_the_mount_of_what_has_come_of_a_file_is_kept(volume, cold, restart):
    volume.server.read(volume.path("big"), 0, 4096)
    leave_alone(volume)
    edit(volume)
    if restart:
        volume.restart()
    volume.server.read(volume.path("big"))
    check_edited(volume, cold)


def test_an_edit_behind_the_mount_while_the_rest_comes_is_kept(volume, cold):
    handle = volume.server.open(volume.path("big"))
    volume.server.run(lambda: volume.server.gate.contents.read(handle, 0, 4096))
    edit(volume)
    volume.server.read(volume.path("big"))
    volume.server.release(handle)
    check_edited(volume, cold)


def test_an_edit_behind_the_mount_while_the_end_of_the_attribute_is_synced_is_kept(volume, cold, monkeypatch):
    sync = os.fsync

    def edit_then_sync(fd):
        if os.fstat(fd).st_ino == os.stat(volume.path("big")).st_ino:
            monkeypatch.setattr(os, "fsync", sync)
            edit(volume)
        sync(fd)

    monkeypatch.setattr(os, "fsync", edit_then_sync)
    volume.server.read(volume.path("big"))
    check_edited(volume, cold)


@pytest.mark.parametrize("again", [False, True])
def test_an_edit_behind_the_mount_of_a_part_keeps_it_from_being_punched(volume, cold, again):
    """Also where more has come since, or has only been asked for: our own work has moved the times then."""
    volume.server.read(volume.path("big"), 0, 4096)
    if again:
        leave_alone(volume)
    edit(volume)
    volume.server.read(volume.path("big"), 3 * MIB, 4096)
    (item,) = volume.demote("big")
    assert item.failed and "holds data that is not its copy's" in item.reason
    assert volume.server.read(volume.path("big"), 0, 6) == b"edited"


@pytest.mark.parametrize("residency", [Residency.PARTIAL, Residency.STUB])
def test_after_a_crash_what_is_here_of_a_part_is_compared(volume, cold, residency):
    """Though nothing seems to have touched it since: what was written may be on the disk, and its time not.
    Of what has no bits nothing was ever compared."""
    volume.server.read(volume.path("big"), 0, 4096)
    leave_alone(volume)
    edit(volume)
    st = os.stat(volume.path("big"))

    def as_the_inode_is(w):
        record = w.get(st.st_ino)
        copy = replace(record.copy, mtime=st.st_mtime_ns)
        w.put(replace(record, residency=residency, left_ctime=st.st_ctime_ns, copy=copy))

    volume.index.commit(as_the_inode_is).result()
    volume.restart(clean=residency is Residency.STUB, boot="another")
    (item,) = volume.demote("big")
    assert item.failed and "holds data that is not its copy's" in item.reason
    if residency is Residency.PARTIAL:
        volume.server.read(volume.path("big"))
        check_edited(volume, cold)


@pytest.mark.parametrize("other", ["stub", "size"])
def test_a_part_of_what_is_not_its_records_stays(volume, cold, other):
    """The blocks are the copy's that the record knows; what would be left to read is another one's."""
    volume.server.read(volume.path("big"), 0, 4096)
    leave_alone(volume)
    with open(volume.path("big"), "r+b") as file:
        if other == "stub":
            volume.tree.write_stub(file.fileno(), replace(volume.stub("big"), tag=bytes(8)))
        else:
            file.truncate(SIZE - LEAF)
    (item,) = volume.demote("big")
    assert item.failed and "its stub is not that of its record" in item.reason
    assert partial_blocks(volume) > 0


def restored(volume, name):
    """A stub that was removed and put back behind the mount with its attribute, as by rsync -X: another inode,
    of the same number."""
    path = volume.path(name)
    before, attribute = os.stat(path), os.getxattr(path, volume.tree.stub_name)
    os.unlink(path)
    for number in range(1000):
        other = f"{path}.{number}"
        with open(other, "wb") as file:
            file.truncate(before.st_size)
        if os.stat(other).st_ino == before.st_ino:
            break
    else:
        pytest.skip("this filesystem does not use inode numbers again")
    os.setxattr(other, volume.tree.stub_name, attribute)
    os.rename(other, path)


@pytest.mark.parametrize("restart", [False, True])
def test_what_was_here_of_a_former_file_of_that_number_is_not(volume, cold, restart):
    volume.server.read(volume.path("big"), 0, 4096)
    leave_alone(volume)
    restored(volume, "big")
    if restart:
        volume.restart()
    assert volume.server.read(volume.path("big"), 0, 4096) == cold[:4096]
    assert volume.server.read(volume.path("big")) == cold


def put_list(volume, listed):
    record = volume.record("big")
    volume.index.commit(
        lambda w: w.put_leaves(record.fid, record.copy.generation, listed, [(0, SIZE)])
    ).result()


def test_a_list_of_digests_that_is_not_the_copys_proves_nothing(volume, cold):
    """Though it is that of what is here."""
    volume.server.read(volume.path("big"))
    volume.settle("big")
    content = os.urandom(SIZE)
    with open(volume.path("big"), "r+b") as file:
        file.write(content)
    put_list(volume, digests.leaf_digests(content))
    (item,) = volume.demote("big")
    assert item.demoted and item.uploaded == SIZE
    assert volume.server.read(volume.path("big")) == content


def test_a_list_of_digests_that_is_not_the_copys_frees_no_part(volume, cold):
    volume.server.read(volume.path("big"), 0, 4096)
    leave_alone(volume)
    edit(volume)
    put_list(volume, digests.leaf_digests(b"edited" + cold[6:]))
    (item,) = volume.demote("big")
    assert item.failed and not item.demoted
    assert partial_blocks(volume) > 0


def test_what_is_here_of_a_pinned_file_stays(volume, cold):
    volume.server.read(volume.path("big"), 0, 4096)
    leave_alone(volume)
    before = partial_blocks(volume)
    fd = os.open(volume.path("big"), os.O_RDONLY)
    volume.tree.set_pin(fd, True)
    os.close(fd)
    (item,) = volume.demote("big")
    assert item.reason == "is pinned" and partial_blocks(volume) >= before > 0


def test_a_list_of_digests_that_is_not_the_copys_keeps_nothing_away(volume, cold):
    put_list(volume, digests.leaf_digests(os.urandom(SIZE)))
    assert volume.server.read(volume.path("big")) == cold


def test_a_stub_that_was_cut_behind_the_mount_is_not_taken_for_whole(volume, cold):
    """At the end of a leaf, where the digests of all that is left match."""
    os.truncate(volume.path("big"), SIZE - SIZE % LEAF - LEAF)
    with pytest.raises(OSError):
        volume.server.read(volume.path("big"))
    assert volume.stub("big") is not None and partial_blocks(volume) == 0


def test_attributes_that_somebody_sets_meanwhile_cost_no_upload(volume, cold):
    volume.server.read(volume.path("big"), 0, 4096)
    leave_alone(volume)
    volume.server.chmod(volume.path("big"), 0o600)
    volume.server.read(volume.path("big"))
    volume.settle("big")
    before = times(volume)
    (item,) = volume.demote("big")
    assert item.demoted and item.uploaded == 0 and times(volume) == before
    assert volume.server.read(volume.path("big")) == cold


def test_what_a_mover_that_died_left_is_compared_before_it_leaves(volume, cold):
    """Between the end of the attribute and the record's, or in the midst of a range."""
    volume.server.read(volume.path("big"))
    volume.settle("big")
    record = volume.record("big")
    stub = replace(record, residency=Residency.STUB)
    volume.index.commit(lambda w: (w.put(stub), w.put_pending(record.ino))).result()
    edit(volume)
    assert finish_pending(volume.tier) == 0
    assert volume.record("big").residency is Residency.RESIDENT
    check_edited(volume, cold)


def test_with_a_lost_index_a_part_can_leave_again_and_the_whole_costs_no_upload(volume, cold):
    record = volume.record("big")
    volume.index.commit(lambda w: (w.drop_leaves(record.fid, record.generation), w.delete(record.ino))).result()
    assert Survey(volume.tier, lambda guesses: None, threading.Event()).run()
    assert volume.server.read(volume.path("big"), 0, 4096) == cold[:4096]
    leave_alone(volume)
    (item,) = volume.demote("big")
    assert item.demoted, item.reason
    assert volume.server.read(volume.path("big")) == cold
    volume.settle("big")
    (item,) = volume.demote("big")
    assert item.demoted and item.uploaded == 0


@pytest.mark.parametrize("punch", [False, True])
def test_a_sparse_file_larger_than_an_object_may_be_stays(volume, punch):
    with open(volume.path("vast"), "wb") as file:
        file.write(b"a little")
        file.truncate(copying.MOST + 1)
    time.sleep(0.03)
    (item,) = volume.demote("vast", punch=punch)
    assert item.reason.startswith("is larger than 5 TiB") and not item.failed
    assert volume.store.ranges == [] and list(volume.store.list("data/")) == []


def rewrite_extents(volume, extents):
    """The list in the store, as a bit that flipped there may leave it, and the only one."""
    stub, record = volume.stub("big"), volume.record("big")
    listed, _ = digests.unpack_side(volume.store.get(stub.key + digests.SIDE_SUFFIX), SIZE, stub.digest)
    side = digests.pack_side(SIZE, extents, listed)
    volume.store.put(stub.key + digests.SIDE_SUFFIX, side, len(side))
    volume.index.commit(lambda w: w.drop_leaves(record.fid, record.generation)).result()


@pytest.mark.parametrize("extents", [[(0, 3 * MIB)], [(0, MIB), (2 * MIB, SIZE)], [(0, SIZE - SIZE % LEAF)]])
def test_holes_that_only_the_list_in_the_store_knows_of_are_not_read_as_zeros(volume, cold, extents):
    rewrite_extents(volume, extents)
    with pytest.raises(OSError, match=r"holes where the digests have content"):
        volume.server.read(volume.path("big"))
    assert volume.stub("big") is not None


@pytest.mark.parametrize("low", [100, LEAF - 1])
def test_what_the_list_of_extents_leaves_out_is_written_all_the_same(volume, cold, low):
    """Of a hole that is no whole leaf the digests say nothing, but its content comes with the leaf."""
    rewrite_extents(volume, [(0, low), (LEAF + 50, SIZE)])
    assert volume.server.read(volume.path("big")) == cold
    volume.settle("big")
    with open(volume.path("big"), "rb") as file:
        assert file.read() == cold


def test_a_flipped_bit_of_the_list_is_noticed(volume, cold):
    """Wherever it is: what the digests do not prove the list's own sum does."""
    key = volume.stub("big").key + digests.SIDE_SUFFIX
    whole = bytes(volume.store.get(key))
    for at in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        try:
            found = digests.unpack_side(bytes(flipped), SIZE, volume.stub("big").digest)
        except ObjectCorruptError:
            continue
        assert found == digests.unpack_side(whole, SIZE, volume.stub("big").digest), at


def test_a_sparse_file_is_told_from_its_list_in_the_store(volume):
    """Holes before, within and behind the data, some of them no whole leaves."""
    data = bytes(MIB) + os.urandom(MIB + 4096) + bytes(2 * MIB) + os.urandom(5000) + bytes(MIB)
    with open(volume.path("a"), "wb") as file:
        file.truncate(len(data))
        for start, end in ((MIB, 2 * MIB + 4096), (4 * MIB + 4096, 4 * MIB + 9096)):
            file.seek(start)
            file.write(data[start:end])
    time.sleep(0.03)
    blocks = os.stat(volume.path("a")).st_blocks
    (item,) = volume.demote("a")
    assert item.demoted, item.reason
    record = volume.record("a")
    volume.index.commit(lambda w: w.drop_leaves(record.fid, record.generation)).result()
    assert volume.server.read(volume.path("a")) == data
    volume.settle("a")
    assert os.stat(volume.path("a")).st_blocks <= blocks + 8


def test_a_large_file_opened_and_not_changed_is_not_uploaded_again(volume, cold):
    assert volume.fetch("big")[0].reason == ""
    handle = volume.server.open(volume.path("big"), os.O_RDWR)
    volume.server.release(handle)
    assert volume.record("big").dirty
    (item,) = volume.demote("big")
    assert item.demoted and item.uploaded == 0


def test_a_write_open_breaks_the_seal(volume):
    data = os.urandom(SIZE)
    volume.server.create(volume.path("big"), data)
    put = volume.store.put

    def interfering(key, body, size):
        handle = volume.server.open(volume.path("big"), os.O_RDWR)
        volume.server.run(lambda: volume.server.gate.contents.write(handle, 0, b"later"))
        volume.server.release(handle)
        return put(key, body, size)

    volume.store.put = interfering
    (item,) = volume.demote("big")
    assert not item.demoted and item.reason
    volume.store.put = put
    assert volume.record("big").copy is None
    assert list(volume.store.list("data/")) == []
    assert volume.demote("big")[0].demoted
    assert volume.server.read(volume.path("big"), 0, 5) == b"later"


def test_an_order_is_told_from_a_reader(volume, cold):
    """What is ordered has a small share of a busy processor after a while; who reads, a usual one."""
    volume.store.hold.clear()
    filler = volume.tier.filler
    order = threading.Thread(target=volume.tier.fetch, args=([volume.item("big")],))
    order.start()
    assert until(lambda: filler.waiting == 1)
    assert not filler.is_waited_for
    handle = volume.server.open(volume.path("big"))
    with volume.server.lock, pytest.raises(Blocked):
        volume.server.gate.contents.read(handle, 0, 4096)
    assert until(lambda: filler.is_waited_for)
    volume.store.hold.set()
    order.join()
    assert until(lambda: not filler.waiting and not filler.is_waited_for)
    volume.server.release(handle)


def test_a_cancelled_fetch_ends_at_once(volume, cold):
    volume.store.hold.clear()
    handle = volume.server.open(volume.path("big"))
    with volume.server.lock, pytest.raises(Blocked):
        volume.server.gate.contents.read(handle, 0, 4096)
    while not volume.store.ranges:
        time.sleep(0.001)
    assert volume.tier.filler.waiting == 1
    (ident,) = volume.tier.filler._requests
    volume.tier.filler.on_cancel(wire.CancelFetch(ident))
    assert volume.tier.filler.waiting == 0
    while handle.inode.content.flights:
        time.sleep(0.001)
    volume.store.hold.set()
    volume.server.release(handle)
    assert volume.server.read(volume.path("big"), 0, 4096) == cold[:4096]


def test_a_time_that_no_mark_can_hold_is_shown_of_an_open_stub(volume):
    """Setting it has been done by then, and must not be told as failed."""
    far = 9_300_000_000 * 10**9
    volume.server.create(volume.path("far"), bytes(1000) + os.urandom(5 * MIB))
    assert volume.demote("far")[0].demoted
    handle = volume.server.open(volume.path("far"))
    try:
        os.utime(volume.path("far"), ns=(far, far))
        st = os.stat(volume.path("far"))
        if st.st_mtime_ns != far:
            pytest.skip("the filesystem does not take it either")
        volume.server.run(lambda: volume.server.gate.after_change(st.st_ino, st, mtime_set=True))
        assert volume.server.shown(volume.path("far")).st_mtime_ns == far
        volume.tier.drain()
    finally:
        volume.server.release(handle)


class Halting(MemoryStore):
    """Stops each put and each get when so many bytes have passed, until it may go on."""

    def __init__(self, after):
        super().__init__()
        self.left = after
        self.go_on = threading.Event()

    def put(self, key, body, size):
        pieces = [body] if isinstance(body, bytes) else body
        return super().put(key, (self._passed(piece) for piece in pieces), size)

    def get(self, key, start=0, length=None):
        return self._passed(super().get(key, start, length))

    def _passed(self, data):
        if self.left <= 0:
            self.go_on.wait(20)
        self.left -= len(data)
        return data


@pytest.mark.parametrize("how", ["demote", "fetch"])
def test_how_far_a_large_file_has_come_is_told_meanwhile(tmp_path, how):
    size, reports = 4 * PIECE, []
    store = Halting(size if how == "demote" else 1 << 40)
    made = Volume(tmp_path, store, chunk_size=MIB, fetch_timeout=20.0)
    job = SimpleNamespace(report=reports.append)
    try:
        made.server.create(made.path("big"), os.urandom(size))
        if how == "fetch":
            assert made.demote("big")[0].demoted
        store.left, item = 2 * PIECE, made.item("big")

        def run():
            with _Count(1, size, job) as count:
                getattr(made.tier, how)(count.watched([item]), None, count)

        thread = threading.Thread(target=run)
        thread.start()
        until = time.monotonic() + 20
        while not any(0 < report.bytes_done < size for report in reports):
            assert time.monotonic() < until, reports
            time.sleep(0.02)
        store.go_on.set()
        thread.join()
        assert not item.reason and (reports[-1].files_done, reports[-1].bytes_done) == (1, size)
        assert [r.bytes_done for r in reports] == sorted(r.bytes_done for r in reports)
    finally:
        store.go_on.set()
        made.stop()
