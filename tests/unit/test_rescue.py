"""Rescue copies: what is open all the time is not all lost with the disk; nothing is freed for their sake."""

import os
import threading
import time

import msgspec
import pytest
from journals import Journalled
from test_planting import COPY, file, plant, root
from tierfsd import checking, rescues
from tierfsd.rescues import Rescues
from tiering import Job

from tierfs import copying, manifest
from tierfs.errors import BusyError, VolumeError
from tierfs.kit import proven, read_exactly
from tierfs.model import Residency

MIB = 1 << 20


@pytest.fixture
def home(tmp_path):
    made = Journalled(tmp_path)
    made.snapshots.take()
    yield made
    made.close()


def take(home, name):
    record = home.volume.record(name)
    return home.volume.tier.rescue(record, threading.Event())


def rescue_of(home, name):
    return home.volume.index.rescue(home.volume.record(name).fid)


def objects(home):
    return {info.key for info in home.volume.store.list("data/") if not info.key.endswith(".leaves")}


def buried(home):
    return {key for _, key in home.volume.index.tombstones(1 << 62)}


def open_to_write(home, name, content):
    home.write(name, content)
    return home.volume.server.open(home.volume.path(name), os.O_RDWR)


@pytest.mark.parametrize("size", [50_000, 5 * MIB + 77])
def test_what_is_open_is_rescued_and_nothing_is_freed_for_it(home, size):
    content, volume = os.urandom(size), home.volume
    handle = open_to_write(home, "db", content)
    assert take(home, "db")
    rescue, record = rescue_of(home, "db"), volume.record("db")
    key = rescue.key(record.fid)
    assert bytes(volume.store.get(key)) == content and key in objects(home)
    assert record.dirty and record.copy is None and record.residency is Residency.RESIDENT
    assert not proven(record, os.stat(volume.path("db")), volume.session.custody)
    assert volume.demote("db")[0].reason == "is open for writing, or mapped"
    assert not take(home, "db"), "it has not changed since"
    volume.server.run(lambda: volume.server.gate.contents.write(handle, 0, b"new"))
    assert take(home, "db")
    assert key in buried(home) and rescue_of(home, "db").key(record.fid) in objects(home) - buried(home)
    volume.server.release(handle)
    (item,) = volume.demote("db")
    assert item.demoted and item.uploaded == size, "by a copy of its own"
    assert rescue_of(home, "db") is None and len(buried(home)) == 2
    assert volume.server.read(volume.path("db")) == b"new" + content[3:]


def test_what_can_be_copied_or_is_gone_needs_no_rescue(home):
    volume = home.volume
    home.write("closed", b"c" * 5000)
    assert not take(home, "closed")
    home.mkdir("node_modules")
    handle = open_to_write(home, "node_modules/never", b"n" * 5000)
    assert not take(home, "node_modules/never")
    volume.server.release(handle)
    handle = open_to_write(home, "gone", b"g" * 5000)
    assert take(home, "gone")
    key = rescue_of(home, "gone").key(volume.record("gone").fid)
    record = volume.record("gone")
    home.run("unlink", *home.above("gone"))
    volume.tier.drain()
    assert volume.index.rescue(record.fid) is None and key in buried(home)
    volume.server.release(handle)
    assert volume.index.orphans(1 << 62) == [] and volume.index.intents() == []


def test_one_that_is_closed_and_copied_meanwhile_is_no_rescue_any_more(home, monkeypatch):
    volume = home.volume
    handle = open_to_write(home, "db", b"d" * 5000)
    put = volume.store.put

    def put_and_copy(key, body, size):
        monkeypatch.undo()
        answer = put(key, body, size)
        volume.server.release(handle)
        volume.server.write(volume.path("db"), b"other")
        volume.tier.drain()
        volume.demote("db", punch=False)
        assert not volume.record("db").dirty
        return answer

    monkeypatch.setattr(volume.store, "put", put_and_copy)
    record = volume.record("db")
    with pytest.raises(BusyError):
        volume.tier.rescue(record, threading.Event())
    assert rescue_of(home, "db") is None
    volume.index.commit(lambda w: None).result()  # behind what nobody waits for
    assert len(volume.index.orphans(1 << 62)) == 1, "what was put for it is collected"


def test_one_that_is_copied_and_opened_again_meanwhile_is_none(home, monkeypatch):
    """The copy is newer than what was read before it, and whole."""
    volume = home.volume
    handle = open_to_write(home, "db", b"d" * 5000)
    put = volume.store.put

    def put_late(key, body, size):
        monkeypatch.undo()
        answer = put(key, body, size)
        volume.server.release(handle)
        volume.server.write(volume.path("db"), b"other")
        volume.demote("db", punch=False)
        assert not volume.record("db").dirty
        volume.server.write(volume.path("db"), b"newest")
        assert volume.record("db").dirty
        return answer

    monkeypatch.setattr(volume.store, "put", put_late)
    record = volume.record("db")
    with pytest.raises(BusyError):
        volume.tier.rescue(record, threading.Event())
    assert rescue_of(home, "db") is None
    home.journal.flush()
    told = home.read_journal().find(b"db")
    assert told.dirty and told.rescue is None
    assert told.copy is not None, "a restore gives that back"


def test_what_is_as_its_copy_is_read_once(home, monkeypatch):
    """Opened for writing and not written, as the disk of a machine that is idle: not over and over."""
    volume = home.volume
    home.write("db", b"d" * 5000)
    home.volume.tier.drain()
    volume.demote("db", punch=False)
    handle = volume.server.open(volume.path("db"), os.O_RDWR)
    assert volume.record("db").dirty
    reads = []
    monkeypatch.setattr(copying, "read_exactly", lambda *where: reads.append(where) or read_exactly(*where))
    assert not take(home, "db") and not take(home, "db")
    assert len(reads) == 1 and rescue_of(home, "db") is None
    volume.server.run(lambda: volume.server.gate.contents.write(handle, 0, b"new"))
    assert take(home, "db")
    volume.server.release(handle)


def test_a_store_that_another_machine_has_taken_gets_none(home):
    def fence():
        raise VolumeError("is used by host 'other'")

    handle = open_to_write(home, "db", b"d" * 5000)
    home.volume.tier.kit.fence = fence
    with pytest.raises(VolumeError):
        take(home, "db")
    assert not objects(home) and home.volume.index.orphans(1 << 62) == []
    home.volume.server.release(handle)


def test_a_check_knows_one_that_is_taken_while_it_lists_the_store(home, monkeypatch):
    volume, listing = home.volume, home.volume.store.list
    handle = open_to_write(home, "db", b"d" * 5000)

    def take_and_list(prefix):
        assert take(home, "db")
        return listing(prefix)

    monkeypatch.setattr(volume.store, "list", take_and_list)
    assert checking.check(volume.tier, True, None, Job()).findings == []
    assert buried(home) == set(), "else it would be removed one day, and the index refer to it"
    volume.server.release(handle)


def test_a_check_knows_them(home):
    handle = open_to_write(home, "db", b"d" * 5000)
    assert take(home, "db")
    home.journal.flush()
    assert checking.check(home.volume.tier, True, None, Job()).findings == []
    home.volume.server.release(handle)


def test_the_journal_tells_of_it_until_there_is_a_copy(home):
    handle = open_to_write(home, "db", b"d" * 5000)
    home.journal.flush()
    assert home.read_journal().find(b"db").rescue is None
    assert take(home, "db")
    home.journal.flush()
    told, rescue = home.read_journal().find(b"db"), rescue_of(home, "db")
    assert told.dirty and told.copy is None
    assert (bytes.fromhex(told.rescue.tag), told.rescue.size, told.rescued) == (rescue.tag, 5000, rescue.at)
    home.volume.server.release(handle)
    home.volume.tier.drain()
    home.volume.demote("db", punch=False)
    home.journal.flush()
    told = home.read_journal().find(b"db")
    assert told.rescue is None and not told.dirty


def test_a_restore_gives_it_back_where_nothing_better_is_known_and_says_so(tmp_path):
    rescue = msgspec.structs.replace(COPY, generation=COPY.generation + 1, tag="cc" * 8, size=7000, mtime=77)
    newer = {"generation": COPY.generation + 1, "size": 9000, "since": 55}
    outcome, kept = plant(
        tmp_path,
        [
            root(),
            file("1", "never copied", **newer, copy=None, rescue=rescue, rescued=66),
            file("2", "copied before", fid="aa" * 16, **newer, rescue=rescue, rescued=66),
            file("3", "clean", fid="bb" * 16, rescue=rescue, rescued=66),
            file("4", "lost", fid="cc" * 16, **newer, copy=None),
        ],
    )
    assert [left.path for left in outcome.rescued] == [b"never copied", b"copied before"]
    assert {left.copied for left in outcome.rescued} == {66}
    assert [left.path for left in outcome.lost] == [b"lost"] and outcome.older == []
    sizes = {planted.record.name: planted.record.copy.size for planted in kept}
    assert sizes == {b"never copied": 7000, b"copied before": 7000, b"clean": 5000}
    st = os.stat(tmp_path / "tree" / "never copied")
    assert (st.st_size, st.st_mtime_ns, st.st_blocks) == (7000, 77, 0)


def test_they_are_taken_after_an_hour_and_once_a_day(home, monkeypatch):
    class Clock:
        ahead = 0.0

        def time(self):
            return time.time() + self.ahead

        def time_ns(self):
            return time.time_ns() + int(self.ahead * 1e9)

        def monotonic(self):
            return time.monotonic() + self.ahead

    clock = Clock()
    monkeypatch.setattr(rescues, "time", clock)
    turns = Rescues(home.volume.tier, threading.Event())

    def taken():
        """How many after some rounds."""
        clock.ahead += 601
        for _ in range(4):
            turns.turn()
            if turns._taking is not None:
                turns._taking.result(20)
        return len(objects(home))

    home.mkdir("node_modules")
    handles = [open_to_write(home, name, b"x" * 5000) for name in ("node_modules/never", "a", "b")]
    home.write("closed", b"x" * 5000)
    home.volume.tier.drain()
    assert taken() == 0
    clock.ahead += 3600
    assert taken() == 2 and rescue_of(home, "closed") is None
    home.volume.server.run(lambda: home.volume.server.gate.contents.write(handles[1], 0, b"new"))
    clock.ahead += 20 * 3600
    assert taken() == 2
    clock.ahead += 4 * 3600
    assert taken() == 3, "the other has not changed"
    clock.ahead -= 365 * 86400
    home.volume.server.run(lambda: home.volume.server.gate.contents.write(handles[1], 0, b"newer"))
    turns._next_look = float("-inf")
    assert taken() == 4, "a year set back is not waited for"
    for handle in handles:
        home.volume.server.release(handle)


def test_a_line_of_a_version_that_knows_no_rescue_is_read():
    line = file("1", "f")
    assert line.rescue is None and b"rescue" not in msgspec.json.encode(line)
    assert msgspec.json.decode(msgspec.json.encode(line), type=manifest.Change) == line
