"""A range that comes in pieces: each is checked, written and told by itself, and what has landed stays."""

import contextlib
import errno
import fcntl
import functools
import os
import threading
from collections.abc import Callable

import pytest
from bare import until
from tiering import MIB, Volume

from tierfs import index, syscalls, wire
from tierfs.errors import StoreUnavailableError
from tierfs.kit import Kit
from tierfs.model import LEAF, Residency
from tierfs.store.memory import MemoryStore

SIZE = 5 * MIB + 12_345
PIECE = 4 * LEAF
START = 2 * MIB  # of the range that is read here: four pieces


class Pieces(MemoryStore):
    """Gives ranges in pieces, and calls `before` with the place of each; `open` counts those under way."""

    def __init__(self):
        super().__init__()
        self.ranges: list[tuple[int, int]] = []
        self.before: Callable[[int], None] = lambda at: None
        self.open = 0

    def pieces(self, key, start, length):
        self.ranges.append((start, length))
        self.open += 1
        piece = bytearray()
        try:
            for at in range(start, start + length, PIECE):
                self.before(at)
                # As a client that uses one buffer for all, and for the next range too: what was given is gone.
                piece = bytearray(self.get(key, at, min(PIECE, start + length - at)))
                yield memoryview(piece)
                piece[:] = bytes(len(piece))
        finally:
            piece[:] = bytes(len(piece))
            self.open -= 1


@pytest.fixture
def volume(tmp_path):
    made = Volume(tmp_path, Pieces(), chunk_size=MIB, fetch_timeout=10.0)
    yield made
    made.stop()


@pytest.fixture
def cold(volume):
    """The content of a demoted file `big`."""
    data = os.urandom(SIZE)
    volume.server.create(volume.path("big"), data)
    (item,) = volume.demote("big")
    assert item.demoted, item.reason
    return data


def local(volume, start, length):
    with open(volume.path("big"), "rb") as backing:
        return os.pread(backing.fileno(), length, start)


def alter(volume, at):
    """Change a byte of the object; what it takes to have it as it was."""
    key = volume.stub("big").key
    raw = bytes(volume.store.get(key))
    wrong = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]

    def put(data):
        volume.store.delete([key])
        volume.store.put(key, data, len(data))

    put(wrong)
    return lambda: put(raw)


def test_a_reader_goes_on_with_the_first_piece(volume, cold):
    go = threading.Event()
    volume.store.before = lambda at: at < START + PIECE or go.wait(20)
    handle = volume.server.open(volume.path("big"))
    whole = threading.Thread(target=volume.server.read, args=(volume.path("big"), START, MIB))
    whole.start()
    try:
        assert until(lambda: volume.store.open)
        read = volume.server.run(lambda: volume.server.gate.contents.read(handle, START, PIECE), seconds=5)
        assert read == cold[START : START + PIECE]
        assert volume.store.open, "the rest is still on its way"
    finally:
        go.set()
        whole.join(20)
        volume.server.release(handle)
    assert volume.store.ranges == [(START, MIB)]


def test_what_is_read_ahead_is_asked_for_before_the_first_content_has_come(volume, cold, monkeypatch):
    """Both requests come while the file's state is being opened."""
    filler, ahead, in_time = volume.tier.filler, threading.Event(), []
    opened = filler._opener.open

    def opening(request, opath):
        assert until(lambda: any(filler._waiting.values()))
        return opened(request, opath)

    def before(at):
        if at == 0:
            in_time.append(ahead.wait(5))
        elif at >= MIB:
            ahead.set()

    monkeypatch.setattr(filler._opener, "open", opening)
    volume.store.before = before
    assert volume.server.read(volume.path("big"), 0, MIB) == cold[:MIB]
    assert in_time == [True]


def test_who_comes_while_it_is_being_opened_may_be_served_when_all_is_over(volume, monkeypatch):
    """Another has fetched the file meanwhile, and it is resident: that is no failure."""
    path = volume.path("small")
    volume.server.create(path, b"content")
    (item,) = volume.demote("small")
    assert item.demoted, item.reason
    filler, ended = volume.tier.filler, {}
    opened, end, submit = filler._opener.open, filler._end, filler._kit.fetches.submit

    def late(urgency, run):
        return submit(urgency, lambda: until(lambda: filler.arrival(item.ino) is None) and run())

    def opening(request, opath):
        if request.id == 999:
            return opened(request, opath)
        second = wire.Fetch(
            999, request.ino, request.stub, request.size, 0, request.size, True, False, True, *request.shown
        )
        filler.on_fetch(second, os.dup(opath))
        assert until(lambda: any(filler._waiting.values()))
        monkeypatch.setattr(filler._kit.fetches, "submit", late)
        return opened(request, opath)

    def note(request, error):
        if request.id == 999:
            ended[request.id] = error
        else:
            end(request, error)

    monkeypatch.setattr(filler._opener, "open", opening)
    monkeypatch.setattr(filler, "_end", note)
    assert volume.server.read(path) == b"content"
    assert until(lambda: ended) and ended == {999: None}


def test_content_that_has_come_waits_for_no_later_commit(volume, cold, monkeypatch):
    monkeypatch.setattr(index, "LATER_SECONDS", 60.0)
    assert volume.server.read(volume.path("big"), START, MIB) == cold[START : START + MIB]


def test_whoever_proves_for_a_moment_that_nobody_writes_disturbs_no_read(volume, cold):
    """The mount server does, by a read lease, whenever a file that changed lately is looked at."""
    tree, proof = volume.server.tree, os.open(volume.path("big"), os.O_RDONLY)
    assert tree.try_lease(proof, fcntl.F_RDLCK)
    end = threading.Timer(0.3, os.close, [proof])
    end.start()
    try:
        assert volume.server.read(volume.path("big"), START, MIB) == cold[START : START + MIB]
        assert end.finished.is_set()
    finally:
        end.join()


def test_of_a_range_that_breaks_off_the_rest_is_asked_for(volume, cold):
    def breaks(at):
        if at == START + 2 * PIECE and len(volume.store.ranges) == 1:
            raise StoreUnavailableError("the line is cut")

    volume.store.before = breaks
    assert volume.server.read(volume.path("big"), START, MIB) == cold[START : START + MIB]
    assert volume.store.ranges == [(START, MIB), (START + 2 * PIECE, MIB - 2 * PIECE)]


def test_a_store_that_ends_too_soon_is_found_out(volume, cold, monkeypatch):
    pieces = volume.store.pieces
    monkeypatch.setattr(volume.store, "pieces", lambda key, start, length: pieces(key, start, length // 2))
    with pytest.raises(OSError) as failed:
        volume.server.read(volume.path("big"), START, MIB)
    assert failed.value.errno == errno.EIO


def test_wrong_bytes_in_the_second_piece(volume, cold):
    """Asked for once more, then an error for whoever wants them; they are never written."""
    restore = alter(volume, START + PIECE + 100)
    handle = volume.server.open(volume.path("big"))
    try:
        with pytest.raises(OSError) as failed:
            volume.server.run(lambda: volume.server.gate.contents.read(handle, START, MIB))
        assert failed.value.errno == errno.EIO
        assert volume.store.ranges == [(START, MIB), (START + PIECE, MIB - PIECE)]
        assert local(volume, START, PIECE) == cold[START : START + PIECE]
        assert local(volume, START + PIECE, PIECE) == bytes(PIECE)
        volume.store.ranges.clear()
        first = volume.server.run(lambda: volume.server.gate.contents.read(handle, START, PIECE))
        assert first == cold[START : START + PIECE]
        assert volume.store.ranges == [], "that is here"
        restore()
        whole = volume.server.run(lambda: volume.server.gate.contents.read(handle, START, MIB))
        assert whole == cold[START : START + MIB]
        assert volume.store.ranges[0] == (START + PIECE, MIB - PIECE)
    finally:
        volume.server.release(handle)


@pytest.mark.parametrize("trouble", ["wrong bytes", "a full disk"])
def test_who_wanted_what_has_come_is_done_when_the_rest_fails(volume, cold, monkeypatch, trouble):
    """Also in the mover's books: a file for which something is asked for cannot leave."""
    go, full, room = threading.Event(), threading.Event(), Kit.has_room
    if trouble == "wrong bytes":
        alter(volume, START + PIECE + 100)
    monkeypatch.setattr(Kit, "has_room", lambda kit, count: not full.is_set() and room(kit, count))
    volume.store.before = lambda at: at != START or go.wait(20)

    ino, handle = os.stat(volume.path("big")).st_ino, volume.server.open(volume.path("big"))
    with volume.server.lock:  # read ahead, as for somebody who reads on and on
        volume.server.gate._inflow.ahead(ino, START, START + MIB)
    assert until(lambda: volume.store.open)
    read = functools.partial(volume.server.gate.contents.read, handle, START, PIECE)
    reader = threading.Thread(target=volume.server.run, args=(read,))
    reader.start()
    assert until(lambda: volume.tier.filler.waiting == 2)
    if trouble == "a full disk":
        volume.store.before = lambda at: full.set() if at == START + PIECE else None
    go.set()
    reader.join(20)
    assert until(lambda: volume.tier.filler.waiting == 0)
    assert not volume.tier.filler.is_wanted(ino)
    volume.server.release(handle)


def test_a_truncation_between_two_pieces(volume, cold):
    """Nothing is written after it, and nothing more is taken from the store."""
    go, asked = threading.Event(), []

    def hold(at):
        asked.append(at)
        assert at < START + PIECE or go.wait(20)

    volume.store.before = hold
    path = volume.path("big")

    def read():
        with contextlib.suppress(OSError):  # the file ends before it meanwhile
            volume.server.read(path, START, MIB)

    reader = threading.Thread(target=read)
    reader.start()
    assert until(lambda: len(asked) == 2)
    cut = threading.Thread(target=lambda: volume.server.write(path, b"new", 0, os.O_WRONLY | os.O_TRUNC))
    cut.start()
    cut.join(20)
    go.set()
    reader.join(20)
    assert until(lambda: not volume.store.open)
    assert asked == [START, START + PIECE]
    with open(path, "rb") as backing:
        assert backing.read() == b"new"


@pytest.mark.parametrize("writes_fail", [False, True])
def test_a_disk_that_fills_up_between_two_pieces(volume, cold, monkeypatch, writes_fail):
    """What is here stays, room is looked for while nothing is asked of the store, and the rest goes past it."""
    full, under_way = threading.Event(), []
    room, fill, make = Kit.has_room, volume.tree.set_mtime, volume.tier.filler._make_room

    def make_room(count, failed):
        under_way.append(volume.store.open)
        make(count, failed)

    def has_room(kit, count):
        return (writes_fail or not full.is_set()) and room(kit, count)

    def set_mtime(fd, mtime_ns):
        if writes_fail and full.is_set():
            raise OSError(errno.ENOSPC, "full")
        fill(fd, mtime_ns)

    monkeypatch.setattr(Kit, "has_room", has_room)
    monkeypatch.setattr(volume.tree, "set_mtime", set_mtime)
    monkeypatch.setattr(volume.tier.filler, "_make_room", make_room)
    volume.store.before = lambda at: full.set() if at == START + PIECE else None
    assert volume.server.read(volume.path("big"), START, MIB) == cold[START : START + MIB]
    assert local(volume, START, PIECE) == cold[START : START + PIECE]
    assert under_way and not any(under_way)
    assert volume.record("big").residency is not Residency.RESIDENT
    full.clear()
    volume.store.before = lambda at: None
    assert volume.server.read(volume.path("big")) == cold


def test_blocks_are_got_for_a_range_at_once_and_only_for_its_data(volume, monkeypatch):
    data = os.urandom(MIB) + bytes(MIB) + os.urandom(SIZE - 2 * MIB)
    volume.server.create(volume.path("big"), data)
    os.truncate(volume.path("big"), 0)  # to be written again with a hole
    with open(volume.path("big"), "r+b") as file:
        file.write(data[:MIB])
        file.seek(2 * MIB)
        file.write(data[2 * MIB :])
    (item,) = volume.demote("big")
    assert item.demoted, item.reason
    asked, allocate = [], volume.tree.allocate
    monkeypatch.setattr(volume.tree, "allocate", lambda fd, *where: asked.append(where) or allocate(fd, *where))
    assert volume.server.read(volume.path("big"), 4096, 2 * MIB) == data[4096 : 2 * MIB + 4096]
    assert asked and all(start + length <= MIB or start >= 2 * MIB for start, length in asked)
    with open(volume.path("big"), "rb") as backing:
        assert os.lseek(backing.fileno(), MIB, os.SEEK_DATA) == 2 * MIB


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EOPNOTSUPP])
def test_what_gets_no_blocks_at_once_is_written_as_it_comes(volume, cold, monkeypatch, number):
    asked = []

    def refuse(fd, mode, offset, length):
        asked.append((offset, length))
        raise OSError(number, os.strerror(number))

    before = os.stat(volume.path("big")).st_mtime_ns
    monkeypatch.setattr(syscalls, "fallocate", refuse)
    assert volume.server.read(volume.path("big"), START, MIB) == cold[START : START + MIB]
    assert local(volume, START, MIB) == cold[START : START + MIB]
    assert asked == [(START, MIB)]
    assert os.stat(volume.path("big")).st_mtime_ns == before


def test_room_that_is_made_between_two_pieces(volume, cold, monkeypatch):
    full, room = threading.Event(), Kit.has_room
    monkeypatch.setattr(Kit, "has_room", lambda kit, count: not full.is_set() and room(kit, count))
    monkeypatch.setattr(volume.tier.filler, "_make_room", lambda count, failed: full.clear())
    volume.store.before = lambda at: full.set() if at == START + PIECE else None
    assert volume.server.read(volume.path("big"), START, MIB) == cold[START : START + MIB]
    assert local(volume, START, MIB) == cold[START : START + MIB]
    rest = (START + 2 * PIECE, MIB - 2 * PIECE)
    assert volume.store.ranges == [(START, MIB), rest], "the piece that found no room was kept"


def test_a_defect_fails_those_whom_it_concerns_and_keeps_nobody_waiting(volume, cold, monkeypatch):
    """Two ask while the file is being opened: what fails for the first must not leave the second unanswered."""
    opened, both = volume.tier.filler._opener.open, threading.Event()

    def opening(request, opath):
        assert both.wait(20)
        return opened(request, opath)

    def broken(arrival, piece):
        raise RuntimeError("a defect")

    monkeypatch.setattr(volume.tier.filler._opener, "open", opening)
    monkeypatch.setattr(volume.tier.filler, "_stream", broken)
    failed = []

    def read(start):
        with pytest.raises(OSError, match="a defect") as caught:
            volume.server.read(volume.path("big"), start, LEAF)
        failed.append(caught.value.errno)

    readers = [threading.Thread(target=read, args=(start,)) for start in (0, 4 * MIB)]
    for reader in readers:
        reader.start()
    assert until(lambda: volume.tier.filler.waiting == 2)
    both.set()
    for reader in readers:
        reader.join(5)
    assert failed == [errno.EIO] * 2
