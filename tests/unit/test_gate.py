"""The gate over a real directory: I/O modes, seals against hidden writers, guards, truncation, marks."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import socket
import time

import pytest
from harness import mapped

from tierfs import idle, wire
from tierfs.codec import is_plain, pack_record
from tierfs.gate import Gate
from tierfs.handles import Inode
from tierfs.marks import Mark, MarkReader, MarkWriter
from tierfs.model import Copy, Record, Residency, Stub, make_generation
from tierfs.tree import open_tree
from tierfs.vigil import SILENCE_SECONDS
from tierfs.waits import Blocked, Stretch

EPOCH = 3


class DictIndex:
    """What the gate reads of an index."""

    def __init__(self):
        self.records = {}

    def get(self, ino):
        return self.records.get(ino)

    def is_plain(self, ino, ctime):
        record = self.records.get(ino)
        return record is not None and is_plain(ino, pack_record(record), ctime)

    def get_bits(self, ino):
        return None

    def get_leaves(self, fid, generation):
        return None


class FakeBacking:
    """Counts registrations as the kernel would."""

    def __init__(self):
        self.live = {}
        self._next = 0

    def open(self, fd):
        self._next += 1
        self.live[self._next] = os.fstat(fd).st_ino
        return self._next

    def close(self, backing_id):
        del self.live[backing_id]


class World:
    """A tree with one file in it, a gate, and the mover's end of the link."""

    def __init__(self, path):
        (path / "tree").mkdir()
        (path / "marks").mkdir()
        self.tree = open_tree(str(path / "tree"))
        self.marks_fd = os.open(path / "marks", os.O_RDONLY)
        self.index = DictIndex()
        self.backing = FakeBacking()
        ours, theirs = wire.make_pair()
        self.mover = wire.Link(theirs, server=False)
        theirs.setblocking(False)
        self.gate = Gate(
            self.tree, self.index, MarkWriter(self.marks_fd), EPOCH, self.backing, wire.Link(ours, server=True)
        )
        self.path = path / "tree" / "file"
        self.path.write_bytes(b"content" * 1000)
        self.reader = MarkReader(self.marks_fd, 0)

    def open(self, flags=os.O_RDONLY):
        opath = os.open(self.path, os.O_PATH | os.O_NOFOLLOW)
        try:
            return self.gate.open(opath, os.fstat(opath), flags, self.tree.root_ino, b"file")
        except BaseException:
            os.close(opath)
            raise

    def truncate(self, size):
        opath = os.open(self.path, os.O_PATH)
        try:
            self.gate.contents.truncate(opath, os.fstat(opath), size, self.tree.root_ino, b"file")
        finally:
            os.close(opath)

    @property
    def ino(self):
        return self.path.stat().st_ino

    def make_stub(self, content=None):
        """Punch the file as the mover would, with its record."""
        content = content if content is not None else self.path.read_bytes()
        stub = Stub(b"f" * 16, make_generation(1, 1), b"t" * 8, b"d" * 32)
        with open(self.path, "r+b") as file:
            st = os.fstat(file.fileno())
            self.tree.write_stub(file.fileno(), stub)
            self.tree.punch(file.fileno(), st)
            self.tree.set_times(file.fileno(), st.st_atime_ns, st.st_mtime_ns)
            now = os.fstat(file.fileno())
        copy = Copy(stub.generation, stub.tag, stub.digest, st.st_size, st.st_mtime_ns, st.st_ctime_ns, 1)
        handle = self._handle()
        self.index.records[st.st_ino] = Record(
            st.st_ino, handle, stub.fid, stub.generation, Residency.STUB, st.st_size, st.st_blocks, copy=copy,
            left_ctime=now.st_ctime_ns,
        )  # fmt: skip
        return st

    def _handle(self):
        fd = os.open(self.path, os.O_PATH)
        try:
            return self.tree.handle_of(fd)
        finally:
            os.close(fd)

    def sent(self, kind):
        found = []
        while True:
            try:
                received = self.mover.receive()
            except BlockingIOError:
                return found
            if received is None:
                return found
            message, fds = received
            for fd in fds:
                os.close(fd)
            if isinstance(message, kind):
                found.append(message)

    def tell(self, message, fds=()):
        self.mover.send(message, fds)
        self.gate.mover.on_readable()

    def drained(self):
        list(self.reader.read())
        self.tell(wire.Drained(self.reader.position))

    def fill(self):
        """Bring the content back as the mover would."""
        with open(self.path, "r+b") as file:
            file.write(b"content" * 1000)
        self.tell(wire.Filled(self.ino, 0, 7000))

    def settle(self):
        with open(self.path, "r+b") as file:
            self.tree.clear_stub(file.fileno())
        self.tell(wire.Settled(self.ino))

    def seal(self):
        fd = os.open(self.path, os.O_RDONLY)
        try:
            self.tell(wire.Seal(1, [self.ino]), [fd])
        finally:
            os.close(fd)
        (answer,) = self.sent(wire.SealAnswer)
        return answer.generations[0]

    def guard(self):
        self.drained()
        self.tell(wire.Guard(1, [self.ino], self.reader.position))
        (answer,) = self.sent(wire.GuardAnswer)
        return answer.granted[0]


@pytest.fixture
def world(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root: stubs are trusted.* attributes")
    made = World(tmp_path)
    yield made
    made.gate.mover.connect(None)
    made.mover.close()
    os.close(made.marks_fd)
    made.tree.close()


def test_resident_files_share_one_backing_id_until_the_last_release(world):
    first, second = world.open(), world.open(os.O_RDWR)
    assert first.backing_id == second.backing_id != 0 and first.fd == -1
    world.gate.release(first)
    world.gate.release(second)
    assert list(world.backing.live.values()) == [world.ino]  # for whoever opens it next
    third = world.gate.reopen(world.ino, os.O_RDONLY)
    assert third is not None and third.backing_id == first.backing_id and third.fd == -1
    world.gate.release(third)
    world.gate.tick(time.monotonic() + idle.SECONDS + 1)
    assert not world.backing.live and not world.gate.states.inodes


def test_what_is_open_outlives_the_time_of_the_idle(world):
    world.gate.release(world.open())
    again = world.gate.reopen(world.ino, os.O_RDONLY)
    world.gate.tick(time.monotonic() + idle.SECONDS + 1)
    assert list(world.backing.live) == [again.backing_id]
    assert not world.guard()


ENDS = {
    "guard": lambda world: world.guard(),
    "attributes": lambda world: world.gate.before_change(world.ino),
    "last name": lambda world: world.gate.gone(world.path.stat(), b"handle", world.tree.root_ino, b"file"),
    "mover": lambda world: world.gate.mover.connect(None),
}


@pytest.mark.parametrize("what", ENDS)
def test_an_idle_registration_ends_before(world, what):
    before = descriptors()
    world.gate.release(world.open(os.O_RDWR))
    assert world.backing.live
    assert world.gate.reopen(world.ino, os.O_RDONLY | os.O_TRUNC) is None
    ENDS[what](world)
    assert not world.backing.live and descriptors() == before
    assert world.gate.reopen(world.ino, os.O_RDONLY) is None


def test_an_idle_registration_is_in_no_ones_way(world):
    world.gate.release(world.open(os.O_RDWR))
    world.drained()
    assert world.seal()
    assert world.backing.live
    generation = world.gate.reopen(world.ino, os.O_RDWR)
    assert generation is not None
    assert world.sent(wire.SealBroken), "a write-open breaks the seal, registered or not"
    (mark,) = [entry for entry in world.reader.read() if entry.kind is Mark.WRITE]
    assert mark.ino == world.ino


def test_a_file_that_loses_its_last_name_while_open_is_not_kept(world):
    handle = world.open()
    world.gate.gone(world.path.stat(), b"handle", world.tree.root_ino, b"file")
    world.gate.release(handle)
    assert not world.backing.live


def test_only_so_many_registrations_are_kept(world, monkeypatch):
    monkeypatch.setattr(world.gate.states.idle, "most", 2)
    paths = [world.path.with_name(f"other{number}") for number in range(3)]
    for path in paths:
        path.write_bytes(b"content")
        opath = os.open(path, os.O_PATH)
        name = os.fsencode(path.name)
        world.gate.release(world.gate.open(opath, os.fstat(opath), os.O_RDONLY, world.tree.root_ino, name))
    assert sorted(world.backing.live.values()) == sorted(path.stat().st_ino for path in paths[1:])


def test_what_a_check_repairs_in_the_index_shows_soon(world):
    st = world.path.stat()
    known = Record(world.ino, world._handle(), b"f" * 16, make_generation(1, 1), size=st.st_size)
    world.index.records[world.ino] = known
    world.gate.tick(1000.0)
    assert world.gate.appearance.shown(st) is st
    world.make_stub()
    now = world.path.stat()
    world.gate.tick(1011.0)
    assert world.gate.appearance.shown(now).st_blocks == st.st_blocks


def test_what_a_file_shows_is_asked_of_the_index_anew_once_its_content_has_moved(world):
    st = world.path.stat()
    known = Record(world.ino, world._handle(), b"f" * 16, make_generation(1, 1), size=st.st_size)
    world.index.records[world.ino] = known
    shown = world.gate.appearance.shown
    assert shown(st).st_blocks == st.st_blocks
    assert world.guard()
    assert shown(st).st_mtime_ns == st.st_mtime_ns  # looked at while it is guarded
    world.make_stub()
    world.tell(wire.GuardEnd([world.ino]))
    now = world.path.stat()
    assert now.st_blocks == 0
    assert (shown(now).st_blocks, shown(now).st_ctime_ns) == (st.st_blocks, st.st_ctime_ns)


def test_set_id_files_are_never_passthrough(world):
    world.path.chmod(0o4755)
    handle = world.open(os.O_RDWR)
    assert handle.backing_id == 0 and handle.fd >= 0
    assert world.gate.contents.write(handle, 0, b"X") == 1
    world.gate.release(handle)


def test_an_inode_open_in_cached_mode_stays_cached_for_later_opens(world):
    world.path.chmod(0o4755)
    first = world.open()
    world.path.chmod(0o755)
    second = world.open()
    assert second.backing_id == 0
    world.gate.release(first)
    world.gate.release(second)
    third = world.open()
    assert third.backing_id
    world.gate.release(third)


def test_a_write_open_leaves_a_mark_with_a_new_generation_and_a_close_leaves_the_size(world):
    world.gate.release(world.open(os.O_RDWR))
    world.gate.release(world.open(os.O_RDWR))
    kinds = [(e.kind, e.generation, e.a) for e in world.reader.read()]
    first, second = make_generation(EPOCH, 1), make_generation(EPOCH, 2)
    assert kinds == [
        (Mark.WRITE, first, 0), (Mark.CLOSED, 0, 7000), (Mark.WRITE, second, 0), (Mark.CLOSED, 0, 7000),
    ]  # fmt: skip


def test_reading_leaves_no_mark(world):
    world.gate.release(world.open())
    assert list(world.reader.read()) == []


def test_a_seal_is_refused_while_a_handle_writes_and_while_a_mark_is_undrained(world):
    handle = world.open(os.O_RDWR)
    world.drained()
    assert world.seal() == 0
    world.gate.release(handle)
    assert world.seal() == 0
    world.drained()
    assert world.seal() != 0


def test_a_seal_is_refused_while_a_mapping_outlives_its_descriptor(world):
    with mapped(world.path, 4096):
        assert world.seal() == 0
    assert world.seal() != 0


def test_a_write_open_breaks_the_seal_and_raises_the_generation(world):
    generation = world.seal()
    world.gate.release(world.open())
    assert world.sent(wire.SealBroken) == []
    world.gate.release(world.open(os.O_WRONLY))
    assert [m.inos for m in world.sent(wire.SealBroken)] == [[world.ino]]
    (mark, *_) = world.reader.read()
    assert mark.kind == Mark.WRITE and mark.generation > generation


def test_truncating_a_sealed_file_breaks_the_seal(world):
    world.seal()
    world.truncate(10)
    assert world.sent(wire.SealBroken)
    assert world.path.stat().st_size == 10


def test_a_guard_is_refused_while_open_and_while_marks_are_undrained(world):
    handle = world.open()
    assert not world.guard()
    world.gate.release(handle)
    world.gate.release(world.open(os.O_RDWR))
    world.tell(wire.Guard(2, [world.ino], 0))
    assert world.sent(wire.GuardAnswer)[0].granted == [False]
    assert world.guard()


def test_a_guard_is_refused_while_content_is_on_its_way(world):
    """Nobody has it open: but what has come of it is known here, and would be gone."""
    world.make_stub()
    with pytest.raises(Blocked):
        world.open()
    (asked,) = world.sent(wire.Fetch)
    assert not world.guard()
    world.tell(wire.FetchEnd(asked.id, world.ino, errno.EIO, "no content"))
    assert world.guard()


def test_who_writes_after_a_seal_is_marked_though_the_end_of_the_last_writer_was_not(world, monkeypatch):
    """There was no room for that mark; what is known of the file outlives it while somebody reads."""
    reading, writing = world.open(), world.open(os.O_RDWR)

    def fail(inode):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(world.gate.marking, "closed", fail)
        with pytest.raises(OSError, match="No space"):
            world.gate.release(writing)
    world.drained()
    generation = world.seal()
    assert generation and list(world.reader.read()) == []
    world.gate.release(world.open(os.O_WRONLY))
    mark = next(world.reader.read())
    assert mark.kind == Mark.WRITE and mark.generation > generation
    assert [m.inos for m in world.sent(wire.SealBroken)] == [[world.ino]]
    world.gate.release(reading)


def test_a_guarded_file_opens_when_the_guard_ends_and_the_mover_is_told(world):
    assert world.guard()
    with pytest.raises(Blocked) as caught:
        world.open()
    assert [m.ino for m in world.sent(wire.GuardBreak)] == [world.ino]
    with pytest.raises(Blocked):
        world.gate.before_change(world.ino)
    world.tell(wire.GuardEnd([world.ino]))
    assert caught.value.wait.done
    world.gate.release(world.open())


def test_a_dead_mover_voids_its_guards_and_seals(world):
    assert world.seal() and world.guard()
    with pytest.raises(Blocked) as caught:
        world.open()
    world.gate.mover.connect(None)
    assert caught.value.wait.done
    world.gate.release(world.open())


def test_a_mover_that_stands_still_while_somebody_waits_is_told_of(world):
    told = []
    world.gate.mover.on_stuck = lambda pid, reason: told.append((pid, reason))
    world.tell(wire.Hello(77, 0))
    assert world.guard()
    now = time.monotonic()
    assert world.gate.tick(now) and not world.sent(wire.Ping)  # nobody waits
    with pytest.raises(Blocked) as caught:
        world.open()
    world.gate.tick(now)
    assert len(world.sent(wire.Ping)) == 1
    world.tell(wire.Pong())
    world.gate.tick(now + SILENCE_SECONDS + 1)
    assert len(world.sent(wire.Ping)) == 1 and not told
    world.gate.tick(now + 2 * SILENCE_SECONDS + 2)
    world.gate.tick(now + 2 * SILENCE_SECONDS + 3)
    assert [pid for pid, _ in told] == [77]
    assert not caught.value.wait.done  # its guard holds until there is another link
    world.gate.mover.connect(None)
    assert caught.value.wait.done


def test_a_small_stub_is_fetched_in_open_and_readers_need_not_wait_for_durability(world):
    shown = world.make_stub()
    with pytest.raises(Blocked) as caught:
        world.open()
    (fetch,) = world.sent(wire.Fetch)
    assert fetch.whole and fetch.length == 7000
    assert world.gate.appearance.shown(os.stat(world.path)).st_mtime_ns == shown.st_mtime_ns
    world.fill()
    assert caught.value.wait.done
    reader = world.open()
    assert reader.backing_id
    with pytest.raises(Blocked):
        world.open(os.O_RDWR)
    world.tell(wire.FetchEnd(fetch.id, world.ino, 0))
    world.settle()
    writer = world.open(os.O_RDWR)
    assert writer.backing_id == reader.backing_id
    world.gate.release(reader)
    world.gate.release(writer)


@pytest.mark.parametrize("flag", [os.O_NOATIME, os.O_NONBLOCK])
def test_who_only_looks_at_a_small_stub_fetches_nothing_and_has_not_used_it(world, flag):
    world.make_stub()
    looker = world.open(os.O_RDONLY | flag)
    assert not looker.backing_id and not world.sent(wire.Fetch) and not world.gate.heat
    with pytest.raises(Blocked) as caught:
        world.gate.contents.read(looker, 4000, 10)
    (fetch,) = world.sent(wire.Fetch)
    assert fetch.whole and (fetch.start, fetch.length) == (0, 7000) and not world.gate.heat
    world.fill()
    assert caught.value.wait.done
    for _ in range(2):
        assert len(world.gate.contents.read(looker, 4000, 10)) == 10
    assert world.gate.heat.count(world.ino) == 1
    reader = world.open()
    assert not reader.backing_id, "one I/O mode an inode"
    with pytest.raises(Blocked):
        world.open(os.O_RDWR | flag)
    world.gate.release(reader)
    world.gate.release(looker)


def test_who_touches_a_small_stub_fetches_nothing_before_writing(world):
    world.make_stub()
    toucher = world.open(os.O_WRONLY | os.O_NONBLOCK)
    assert not toucher.backing_id and not world.sent(wire.Fetch)
    with pytest.raises(Blocked):
        world.gate.contents.write(toucher, 0, b"changed")
    (fetch,) = world.sent(wire.Fetch)
    assert fetch.whole
    world.gate.release(toucher)


def test_a_failed_fetch_fails_the_open_with_its_reason(world):
    world.make_stub()
    with pytest.raises(Blocked) as caught:
        world.open()
    (fetch,) = world.sent(wire.Fetch)
    world.tell(wire.FetchEnd(fetch.id, world.ino, 5, "store is down"))
    assert caught.value.wait.errno == 5 and caught.value.wait.reason == "store is down"


def test_o_trunc_of_a_stub_fetches_nothing_and_marks_a_new_generation(world):
    world.make_stub()
    handle = world.open(os.O_WRONLY | os.O_TRUNC)
    assert world.sent(wire.Fetch) == []
    assert world.path.stat().st_size == 0 and world.tree.read_stub(handle.inode.opath) is None
    world.gate.release(handle)
    assert next(world.reader.read()).kind == Mark.WRITE


def test_truncating_a_stub_to_a_size_waits_for_its_content(world):
    world.make_stub()
    with pytest.raises(Blocked) as caught:
        world.truncate(100)
    world.fill()
    assert not caught.value.wait.done
    world.settle()
    assert caught.value.wait.done
    world.truncate(100)
    assert world.path.stat().st_size == 100


def test_a_stub_of_size_zero_is_a_truncation_to_be_finished(world):
    """Its own mark may be lost with the power: by another one the store learns of it."""
    world.make_stub()
    os.truncate(world.path, 0)
    handle = world.open()
    assert handle.inode.content is None and world.tree.read_stub(handle.inode.opath) is None
    world.gate.release(handle)
    assert [(entry.kind, entry.ino, entry.a) for entry in world.reader.read()] == [
        (Mark.WRITE, world.ino, 0), (Mark.CLOSED, world.ino, 0),
    ]  # fmt: skip


def test_a_truncation_that_cannot_be_marked_is_not_finished(world, monkeypatch):
    world.make_stub()
    os.truncate(world.path, 0)
    with monkeypatch.context() as patch:
        patch.setattr(MarkWriter, "append", refuse(errno.ENOSPC))
        with pytest.raises(OSError, match="No space"):
            world.open()
    handle = world.open()
    assert next(world.reader.read()).kind == Mark.WRITE
    world.gate.release(handle)


def test_a_stub_shows_its_old_times_and_blocks_until_somebody_changes_it(world):
    old = world.make_stub()
    shown = world.gate.appearance.shown(os.stat(world.path))
    assert (shown.st_mtime_ns, shown.st_ctime_ns, shown.st_blocks) == (
        old.st_mtime_ns, old.st_ctime_ns, old.st_blocks,
    )  # fmt: skip
    world.path.chmod(0o600)
    real = os.stat(world.path)
    shown = world.gate.appearance.shown(real)
    assert (shown.st_mtime_ns, shown.st_ctime_ns, shown.st_blocks) == (
        old.st_mtime_ns, real.st_ctime_ns, old.st_blocks,
    )  # fmt: skip


def test_a_new_mover_is_asked_again(world):
    world.make_stub()
    with pytest.raises(Blocked):
        world.open()
    world.sent(wire.Fetch)
    world.mover.close()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    world.mover = wire.Link(theirs, server=False)
    world.gate.mover.connect(wire.Link(ours, server=True))
    assert len(world.sent(wire.Fetch)) == 1


def refuse(number):
    def call(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    return call


def descriptors():
    gc.collect()  # What earlier tests left to the collector ends before the count, not between two counts.
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    # Servers of other tests in this process close their connections when they like.
    return sum(target.startswith("/") for target in found)


def create(world, flags=os.O_RDWR):
    fd = os.open(world.path.with_name("new"), os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        return world.gate.created(fd, os.fstat(fd), flags, world.tree.root_ino, b"new")
    except BaseException:
        os.close(fd)
        raise


def test_a_mark_that_found_no_room_is_tried_again_by_the_next_writer(world, monkeypatch):
    reader = world.open()
    assert world.seal()
    with monkeypatch.context() as full, pytest.raises(OSError, match="No space"):
        full.setattr(MarkWriter, "append", refuse(errno.ENOSPC))
        world.open(os.O_RDWR)
    writer = world.open(os.O_RDWR)
    assert [entry.kind for entry in world.reader.read()] == [Mark.WRITE]
    assert world.sent(wire.SealBroken)
    world.gate.release(writer)
    world.gate.release(reader)


def test_a_file_that_cannot_be_marked_leaves_nothing_behind(world, monkeypatch):
    before = descriptors()
    monkeypatch.setattr(MarkWriter, "append", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        create(world)
    assert descriptors() == before
    assert not world.gate.states.inodes


def test_without_a_backing_id_a_file_is_served_from_here(world, monkeypatch):
    monkeypatch.setattr(world.backing, "open", refuse(errno.ENOMEM))
    made, old = create(world), world.open(os.O_RDWR)
    assert made.fd >= 0 and old.fd >= 0 and not made.backing_id and not old.backing_id
    assert world.gate.contents.read(old, 0, 7) == b"content"
    size = os.fstat(old.fd).st_size
    assert world.gate.contents.stretch(old, 2, size) == Stretch(old.fd, 2, size - 2)
    assert world.gate.contents.stretch(old, size, 5) is None
    world.gate.release(made)
    world.gate.release(old)


def test_a_release_that_finds_no_room_for_its_mark_gives_back_all_else(world, monkeypatch):
    before = descriptors()
    handle = world.open(os.O_RDWR)
    monkeypatch.setattr(MarkWriter, "append", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        world.gate.release(handle)
    assert not world.backing.live and not world.gate.states.inodes and descriptors() == before


def test_an_open_that_runs_out_of_descriptors_keeps_none_that_is_another_files(world, monkeypatch):
    world.make_stub()
    with monkeypatch.context() as short, pytest.raises(OSError, match="Too many open files"):
        short.setattr(os, "dup", refuse(errno.EMFILE))
        world.open()
    assert world.sent(wire.Fetch) == []
    with pytest.raises(Blocked):
        world.open()
    (inode,) = world.gate.states.inodes.values()
    assert os.fstat(inode.opath).st_ino == world.ino


def test_a_filesystem_that_refuses_leases_seals_nothing(world, monkeypatch):
    monkeypatch.setattr(world.tree, "try_lease", refuse(errno.EACCES))
    assert world.seal() == 0


def test_a_message_that_cannot_be_received_opens_no_guard_of_a_mover_that_may_live(world, monkeypatch):
    assert world.guard()
    with pytest.raises(Blocked) as caught:
        world.open()
    monkeypatch.setattr(world.gate._outbox.link, "receive", refuse(errno.EIO))
    world.gate.mover.on_readable()
    assert not caught.value.wait.done
    ours, theirs = wire.make_pair()
    with theirs:
        world.gate.mover.connect(wire.Link(ours, server=True))
        assert caught.value.wait.done


def test_a_message_that_cannot_be_handled_ends_the_link_and_not_the_server(world, monkeypatch):
    monkeypatch.setattr(world.gate.guarding, "seal", refuse(errno.EIO))
    fd = os.open(world.path, os.O_RDONLY)
    try:
        world.tell(wire.Seal(1, [world.ino]), [fd])
    finally:
        os.close(fd)
    assert world.gate._outbox.link is None


def test_who_waits_for_a_guard_goes_on_when_the_inode_number_means_another_file(world):
    assert world.guard()
    with pytest.raises(Blocked) as caught:
        world.open()
    fd = os.open(world.path, os.O_RDWR)
    world.path.unlink()
    # As if the filesystem had given the number to this new file.
    handle = world.gate.created(fd, os.fstat(fd), os.O_RDWR, world.tree.root_ino, b"new")
    assert caught.value.wait.done
    world.gate.release(handle)


def test_a_full_batch_of_heat_fits_a_message(world):
    for ino in range(1 << 40, (1 << 40) + 1000):
        world.gate.heat.touch(Inode(ino, 1 << 40, b"n" * 255), 1 << 60)
    world.gate.heat.flush()
    assert sum(len(message.touches) for message in world.sent(wire.Touches)) == 1000


def test_what_waits_for_a_mover_that_stands_still_does_not_grow(world, monkeypatch):
    """One that was stopped, or hangs in a disk of the network: while nobody waits for it, it may for days."""
    with monkeypatch.context() as still:
        still.setattr(world.gate._outbox.link, "send", refuse(errno.EAGAIN))
        for turn in range(100):
            world.gate.heat.touch(Inode(turn % 7, 2, b"name"), 1)
            world.gate.marking.append(Mark.WRITE, 1000)
            if turn == 50:
                world.gate.marking.space_is_short()
            world.gate.tick(turn * 10.0)
    assert len(world.gate._outbox._queue) < 5
    world.gate.tick(2000.0)
    world.gate.tick(2010.0)
    assert sum(touch.count for sent in world.sent(wire.Touches) for touch in sent.touches) == 100


def test_a_fetch_that_finds_no_room_among_descriptors_in_flight_is_sent_later(world, monkeypatch):
    world.make_stub()
    with monkeypatch.context() as busy:
        busy.setattr(world.gate._outbox.link, "send", refuse(errno.ETOOMANYREFS))
        with pytest.raises(Blocked):
            world.open()
    world.gate.tick(0.0)
    assert len(world.sent(wire.Fetch)) == 1


def test_who_writes_on_a_full_disk_waits_until_the_mover_has_said_hello(world):
    world.gate.room.low = 1 << 62
    now = time.monotonic()
    with pytest.raises(Blocked) as caught:
        world.open(os.O_RDWR)
    assert world.sent(wire.Poke)[0].urgent
    world.gate.tick(now + 30)
    assert not caught.value.wait.done
    world.tell(wire.Hello(1, 0))
    world.gate.tick(now + 45)
    assert caught.value.wait.done and not caught.value.wait.errno
    world.gate.release(world.open(os.O_RDWR))
