"""Of a large file only what the store does not have is sent, and what is there then is the file all the same.
"""

import contextlib
import logging
import os
import tempfile
import threading
from dataclasses import replace

import pytest
import s3servers
from bare import until
from hypothesis import given, settings
from hypothesis import strategies as st
from journals import Journalled
from tiering import MIB, Volume

from tierfs import copying
from tierfs.errors import ObjectArchivedError, ObjectMissingError, StoreUnavailableError
from tierfs.model import DOUBTED, LEAF, object_key
from tierfs.reusing import Sources
from tierfs.store.base import PART, Part
from tierfs.store.memory import MemoryStore
from tierfs.store.probe import probe
from tierfs.store.urls import open_store

SIZE = 5 * PART + 12_345


class PartsStore(MemoryStore):
    """Takes parts from other objects. `sent` counts bytes that it was given; it reads `astray` bytes from where
    it was told to; `failing`: what the next uploads in parts end with, when all is there."""

    def __init__(self, part: int = PART, verifies: bool = False) -> None:
        super().__init__(verifies)
        self.part, self.sent, self.astray, self.failing = part, 0, 0, []

    def part_size(self, size):
        return self.part if size >= 4 * self.part else 0

    def put(self, key, body, size):
        answer = super().put(key, body, size)
        self.sent += 0 if key.endswith(".leaves") else size
        return answer

    def put_parts(self, key, parts, size):
        before, body = self.sent, b"".join([self._made(part) for part in parts])
        answer = MemoryStore.put(self, key, body, size)
        if self.failing:
            raise self.failing.pop()
        return replace(answer, copied=size - (self.sent - before))

    def _made(self, part: Part) -> bytes:
        if not part.key:
            self.sent += len(part.body)
            return part.body
        start = part.start + self.astray
        return (bytes(self.get(part.key)) + bytes(self.astray))[start : start + len(part.body)]


@pytest.fixture
def volume(tmp_path):
    made = Volume(tmp_path, PartsStore(), chunk_size=MIB)
    yield made
    made.close()


def copied(volume, name="image"):
    """Have a copy taken of the file, which stays; what was sent for it."""
    before = volume.store.sent
    (item,) = volume.tier.demote([volume.item(name)], punch=False)
    assert not item.reason, item.reason
    if not volume.store.astray:
        zeros = volume.store.part if volume.store.sent - before > item.uploaded else 0
        assert volume.store.sent - before == item.uploaded + zeros
    return volume.store.sent - before


def key_of(volume, name="image"):
    record = volume.record(name)
    assert record.copy is not None and not record.dirty
    return object_key(record.fid, record.copy.generation, record.copy.tag)


def in_store(volume, name="image"):
    return bytes(volume.store.get(key_of(volume, name)))


def orphans(volume):
    """What is to be collected."""
    return {key for _, key in volume.index.orphans(1 << 62)}


def made(volume, size=SIZE):
    content = bytearray(os.urandom(size))
    volume.server.create(volume.path("image"), bytes(content))
    assert copied(volume) == size
    return content


def edit(volume, content, at, data):
    content[at : at + len(data)] = data
    volume.server.write(volume.path("image"), data, at)


def test_what_has_not_changed_is_not_sent_again(volume):
    content = made(volume)
    edit(volume, content, 2 * PART + 5, b"changed")
    assert copied(volume) == PART
    assert in_store(volume) == content
    edit(volume, content, SIZE, b"more")  # the last part is another
    assert copied(volume) == SIZE + 4 - 5 * PART
    assert in_store(volume) == content
    (item,) = volume.demote("image")
    assert item.demoted
    assert volume.server.read(volume.path("image")) == content


def test_what_has_moved_by_whole_parts_is_not_sent_again(volume):
    content = made(volume)
    edit(volume, content, 0, bytes(content[PART : 3 * PART]))
    edit(volume, content, 2 * PART, b"x")
    assert copied(volume) == PART
    assert in_store(volume) == content


def test_a_file_that_is_cut_goes_without_sending_what_is_left(volume):
    content = made(volume)
    truncate(volume, 4 * PART + 1)
    assert copied(volume) == 1
    assert in_store(volume) == content[: 4 * PART + 1]


def test_holes_are_not_sent(volume):
    path, size = volume.path("image"), 20 * PART + 1
    volume.server.create(path, b"head")
    volume.server.write(path, b"t", size - 1)
    assert copied(volume) == PART + PART + 1  # with content, of zeros, what is left
    assert in_store(volume) == b"head" + bytes(size - 5) + b"t"
    key = key_of(volume)
    (zeros,) = {info.key for info in volume.store.list("data/")} - {key, f"{key}.leaves"}
    assert bytes(volume.store.get(zeros)) == bytes(PART)
    assert until(lambda: zeros in orphans(volume))
    # From now on its own copy has zeros.
    volume.server.write(path, b"more", 7 * PART)
    assert copied(volume) == PART
    assert volume.demote("image")[0].demoted
    assert os.stat(path).st_blocks * 512 < PART
    content = volume.server.read(path)
    assert content[: 7 * PART + 4] == b"head" + bytes(7 * PART - 4) + b"more"
    assert content[7 * PART + 4 :] == bytes(13 * PART - 4) + b"t"
    volume.settle("image")
    assert os.stat(path).st_blocks * 512 < 3 * PART


def test_few_holes_are_no_reason_for_an_object_of_zeros(volume):
    path, size = volume.path("image"), 4 * PART
    volume.server.create(path, b"head")
    volume.server.write(path, b"tail", size - 4)
    assert copied(volume) == size
    assert len(list(volume.store.list("data/"))) == 2
    assert in_store(volume) == b"head" + bytes(size - 8) + b"tail"


def test_an_object_of_zeros_is_collected_whatever_becomes_of_the_copy(volume):
    path, size = volume.path("image"), 20 * PART
    volume.server.create(path, b"head")
    volume.server.write(path, b"tail", size - 4)
    volume.store.failing.append(StoreUnavailableError("away"))
    (item,) = volume.tier.demote([volume.item("image")], punch=False)
    assert "away" in item.reason
    left = {info.key for info in volume.store.list("data/")}
    assert left
    assert until(lambda: left <= orphans(volume))


def test_a_mover_that_dies_leaves_the_object_of_zeros_to_be_collected(volume):
    """What was intended at its death is given up by the next."""
    sources = Sources(volume.tier.kit, PART)
    with sources.with_zeros(20 * PART, [(0, 4096)]):
        (key,) = {info.key for info in volume.store.list("data/")}
        volume.index.commit(lambda w: w.abandon_all()).result()
        assert key in orphans(volume)


def test_a_server_that_takes_other_bytes_than_it_is_told_is_not_asked_twice(volume, caplog):
    content = made(volume)
    volume.store.astray = LEAF
    for _ in range(2):
        edit(volume, content, 2 * PART, os.urandom(8))
        with caplog.at_level(logging.WARNING):
            assert copied(volume) >= SIZE
        assert in_store(volume) == content
    assert caplog.text.count("sent as a whole from now on") == 1


def test_nothing_is_taken_from_a_copy_that_is_doubted(volume):
    content = made(volume)
    edit(volume, content, 2 * PART, b"changed")
    ino = volume.record("image").ino

    def doubt(w):
        record = w.get(ino)
        w.put(replace(record, copy=replace(record.copy, custody=DOUBTED)))

    volume.index.commit(doubt).result()
    assert copied(volume) == SIZE
    assert in_store(volume) == content


def test_digests_that_are_not_the_copys_lead_nowhere(volume):
    """The index has lost them, or has others: all is sent."""
    content = made(volume)
    for leaves in (None, os.urandom(32 * (SIZE // LEAF + 1))):
        record = volume.record("image")

        def change(w, record=record, leaves=leaves):
            w.drop_leaves(record.fid, record.copy.generation)
            if leaves is not None:
                w.put_leaves(record.fid, record.copy.generation, leaves, [(0, SIZE)])

        volume.index.commit(change).result()
        edit(volume, content, 2 * PART, os.urandom(8))
        assert copied(volume) == SIZE
        assert in_store(volume) == content


# --- rescue copies ----------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path):
    made = Journalled(tmp_path, PartsStore(), chunk_size=MIB)
    made.snapshots.take()
    yield made
    made.close()
    made.volume.tree.close()


def rescued(volume):
    """Have a rescue copy taken; what was sent for it, and what is in it."""
    before, record = volume.store.sent, volume.record("image")
    assert volume.tier.rescue(record, threading.Event())
    key = volume.index.rescue(record.fid).key(record.fid)
    return volume.store.sent - before, bytes(volume.store.get(key))


def test_of_what_never_closes_only_what_has_changed_is_rescued_again(home, monkeypatch):
    volume, content = home.volume, bytearray(os.urandom(SIZE))
    home.write("image", bytes(content))
    handle = volume.server.open(volume.path("image"), os.O_RDWR)

    def write(at, data):
        content[at : at + len(data)] = data
        volume.server.run(lambda: volume.server.gate.contents.write(handle, at, data))

    assert rescued(volume) == (SIZE, content)
    write(2 * PART, b"changed")
    assert rescued(volume) == (PART, content)
    write(3 * PART, b"changed")
    plain = PartsStore.get
    for error in (ObjectMissingError, ObjectArchivedError):

        def get(store, key, start=0, length=None, error=error):
            if key.endswith(".leaves"):
                raise error(key)
            return plain(store, key, start, length)

        with monkeypatch.context() as then:
            then.setattr(PartsStore, "get", get)
            write(3 * PART, os.urandom(8))
            # Nothing verifies here, which reads the list back: it fails, after all was sent.
            before = volume.store.sent
            with pytest.raises(error):
                volume.tier.rescue(volume.record("image"), threading.Event())
            assert volume.store.sent - before == SIZE
    volume.server.release(handle)
    write_back = volume.store.sent
    (item,) = volume.tier.demote([volume.item("image")], punch=False)
    assert not item.reason
    assert volume.store.sent - write_back == PART  # the copy takes what the rescue copy has
    assert in_store(volume) == content


# --- any change at all ------------------------------------------------------------------------------------

SMALL = 2 * LEAF  # a part
EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 20 * SMALL), st.integers(1, 3 * SMALL), st.integers(0, 2)),
        st.tuples(st.just("cut"), st.integers(0, 20 * SMALL), st.just(0), st.just(0)),
    ),
    max_size=3,
)


@settings(max_examples=25, deadline=None)
@given(st.lists(EDITS, min_size=1, max_size=4), st.booleans())
def test_after_any_changes_the_object_is_the_file(rounds, verifies):
    with tempfile.TemporaryDirectory() as base, pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "PIECE", LEAF)
        volume = Volume(base, PartsStore(SMALL, verifies), chunk_size=MIB)
        try:
            path, content = volume.path("image"), bytearray(os.urandom(17 * SMALL + 77))
            volume.server.create(path, bytes(content))
            for edits in rounds:
                for kind, at, length, byte in edits:
                    if kind == "cut":
                        del content[at:]
                        content += bytes(max(0, at - len(content)))
                        truncate(volume, at)
                    else:
                        content += bytes(max(0, at + length - len(content)))
                        edit(volume, content, at, bytes([byte]) * length)
                if os.stat(path).st_size > MIB:
                    copied(volume)
                    assert in_store(volume) == content
        finally:
            volume.close()


def truncate(volume, size):
    path, parent = volume.path("image"), os.stat(volume.root).st_ino

    def call():
        opath = os.open(path, os.O_PATH)
        try:
            volume.server.gate.contents.truncate(opath, os.fstat(opath), size, parent, b"image")
        finally:
            os.close(opath)

    volume.server.run(call)


# --- a real server ----------------------------------------------------------------------------------------


@pytest.mark.s3
@pytest.mark.parametrize("kind, copies", [("moto", True), ("versitygw", False), ("rclone", False)])
def test_through_a_server(kind, copies, tmp_path, monkeypatch):
    """moto copies parts; versitygw names no sum of them, and rclone takes an empty part in their place."""
    for name, value in s3servers.credentials().items():
        monkeypatch.setenv(name, value)
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(s3servers.SERVERS[kind](tmp_path / "server"))
        except s3servers.Unavailable as exc:
            pytest.skip(str(exc))
        with contextlib.closing(open_store(server.url)) as unknown:
            capabilities = probe(unknown)
        volume = Volume(tmp_path, open_store(server.url, capabilities=capabilities), chunk_size=MIB)
        stack.callback(volume.close)
        path, content = volume.path("image"), bytearray(os.urandom(SIZE))
        volume.server.create(path, bytes(content))
        assert not volume.tier.demote([volume.item("image")], punch=False)[0].reason
        edit(volume, content, 2 * PART + 5, b"changed")
        (item,) = volume.demote("image")
        assert item.demoted, item.reason
        assert (item.uploaded == PART) == copies
        assert volume.server.read(path) == content
