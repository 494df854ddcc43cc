"""A day without the store: local work goes on, only what has changed piles up, and all goes out by itself."""

from __future__ import annotations

import errno
import os
import threading
import time
import tracemalloc

import msgspec
import pytest
from journals import VOLUME, Journalled
from test_journal import store_is_down
from tierfsd import eviction as eviction_module
from tierfsd import journalling as journalling_module
from tierfsd import replication as replication_module
from tierfsd import trials as trials_module
from tierfsd.journalling import JournalKeeper
from tierfsd.scheduler import Scheduler
from tierfsd.waiting import MOST as MOST_NAMED
from tierfsd.waiting import waiting

from tierfs import draining as draining_module
from tierfs import index_writer as index_writer_module
from tierfs import journal as journal_module
from tierfs import tier as tier_module
from tierfs.config import Never
from tierfs.copying import Copier
from tierfs.errors import BucketMissingError, StoreDeniedError, StoreFullError
from tierfs.heat_index import HeatIndex
from tierfs.index import Index
from tierfs.model import Stub
from tierfs.restless import MOST, Restless, patience
from tierfs.store.faults import Fault, FaultyStore, Kind
from tierfs.store.memory import MemoryStore

HOURS, FILES_AN_HOUR = 24, 20


class Clock:
    """The machine's clocks, as far on as a test says."""

    def __init__(self):
        self.ahead = 0.0
        self.back = 0
        self.spent = 0.0

    def monotonic(self):
        return time.monotonic() + self.ahead

    def time(self):
        return time.time() + self.ahead

    def time_ns(self):
        return time.time_ns() + int(self.ahead * 1e9) - self.back

    def thread_time(self):
        return self.spent


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    for module in (eviction_module, replication_module, trials_module):
        monkeypatch.setattr(module, "time", made)
    return made


class Day:
    """A volume whose rounds are called by hand, a minute apart."""

    def __init__(self, base, clock):
        self.clock, self.base = clock, base
        self.faults = FaultyStore(MemoryStore())
        self.home = Journalled(base, self.faults, replicate="all")
        self.heat = HeatIndex(str(base / "heat"), 1 << 30)
        self.attach()

    def attach(self):
        tier = self.home.volume.tier
        tier.kit.still_ours = lambda: self.faults.head("volume.json")
        self.scheduler = Scheduler(tier, self.heat, False, str(self.base / "ballast"))
        self.keeper = JournalKeeper(tier, VOLUME, lambda _alive: None)

    def minute(self):
        self.clock.ahead += 60
        self.home.volume.tier.drain()
        self.scheduler.trials.ask_store()
        self.scheduler.replication.turn()
        self.keeper._work(False)

    def arrived(self, contents):
        """All of it is in the store, as it is."""
        assert self.home.volume.index.totals().dirty_files == 0
        for name, content in contents.items():
            record = self.home.volume.record(name)
            assert bytes(self.faults.get(Stub.of(record.fid, record.copy).key)) == content

    def left(self):
        """Rows of the index that say what may have arrived in the store and is nobody's."""
        return len(self.home.volume.index.orphans(1 << 62, limit=1 << 30))


def test_a_day_without_the_store(tmp_path, clock):
    day = Day(tmp_path, clock)
    home = day.home
    try:
        day.faults.put("volume.json", b"{}", 2)
        home.write("before", b"b" * 5000)
        day.minute()
        store_is_down(day.faults, True)
        most, contents = 0, {}
        for hour in range(HOURS):
            for number in range(FILES_AN_HOUR):
                name = f"h{hour}-{number}"
                contents[name] = name.encode() * 500
                home.write(name, contents[name])
            before = sum(day.faults.calls.values())
            for _ in range(60):
                day.minute()
            most = max(most, sum(day.faults.calls.values()) - before)
            if hour in (7, 15):  # the mover is replaced meanwhile
                home.restart(clean=hour == 7)
                day.attach()
        assert home.volume.index.totals().dirty_files == HOURS * FILES_AN_HOUR
        assert day.keeper.behind > 0
        # A question a minute for files and one for the journal, and what a new mover tries before it knows.
        assert most <= 60 * 3 + 2 * HOURS * FILES_AN_HOUR, most
        assert day.left() <= 4 * HOURS * FILES_AN_HOUR
        for name, content in contents.items():
            assert home.volume.server.read(home.volume.path(name)) == content

        store_is_down(day.faults, False)
        for _ in range(3):
            day.minute()
        day.keeper._work(True)  # its clock is the real one, in which these minutes were moments
        assert day.keeper.behind == 0 and home.told() == home.there()
        day.arrived(contents)
    finally:
        day.heat.close()
        home.close()


@pytest.mark.parametrize(
    ("operation", "error"),
    [
        ("put", StoreFullError("the store is full (QuotaExceeded)")),
        ("*", StoreDeniedError("the credentials have expired (ExpiredToken)")),
        ("*", BucketMissingError("/disk/store does not exist: mount it")),
    ],
    ids=["full", "expired", "unplugged"],
)
def test_hours_of_a_store_that_takes_nothing(tmp_path, clock, operation, error):
    """What is here is served, what is in a full store too; the cause is told, and all goes out in the end."""
    day = Day(tmp_path, clock)
    home, volume = day.home, day.home.volume
    try:
        day.faults.put("volume.json", b"{}", 2)
        home.write("cold", b"c" * 50_000)
        volume.tier.drain()
        assert all(item.demoted for item in volume.demote("cold"))
        day.minute()
        day.faults.arm(Fault(Kind.ERROR, operation, times=float("inf"), error=error))
        contents = {f"f{number}": b"%d" % number * 5000 for number in range(40)}
        for name, content in contents.items():
            home.write(name, content)
        for _ in range(180):
            day.minute()
        assert volume.index.totals().dirty_files == len(contents)
        assert day.left() <= 8 * len(contents)
        assert any(str(error) in trouble.what for trouble in volume.tier.kit.troubles.list())
        for name, content in contents.items():
            assert volume.server.read(volume.path(name)) == content
        if operation == "put":
            assert volume.server.read(volume.path("cold")) == b"c" * 50_000
        day.faults.disarm()
        for _ in range(3):
            day.minute()
        assert volume.server.read(volume.path("cold")) == b"c" * 50_000
        day.arrived(contents)
    finally:
        day.heat.close()
        home.close()


def test_a_clock_that_is_set_back_keeps_nothing_here(tmp_path, clock, monkeypatch):
    """What was queued while the clock was ahead by years (a laptop whose battery was empty) goes out all the
    same, and so do names; `umount --wait` does not take them for told."""
    day = Day(tmp_path, clock)
    home = day.home
    monkeypatch.setattr(journal_module, "time", clock)
    monkeypatch.setattr(journalling_module, "time", clock)
    try:
        home.snapshots.take()
        home.write("file", b"f" * 5000)
        home.volume.tier.drain()
        clock.ahead = -3 * 365 * 86400.0
        assert home.journal.behind < 60
        assert not home.journal.due
        clock.ahead += 60  # seconds pass
        day.scheduler.replication.turn()
        day.arrived({"file": b"f" * 5000})
        assert home.journal.due and home.journal.behind >= 60

        home.volume.tier.kit.claim_tried.set()
        day.keeper.start()
        assert day.keeper.catch_up(threading.Event()) == ""
        assert home.told() == home.there()
        day.keeper.stop()
    finally:
        day.heat.close()
        home.close()


@pytest.mark.parametrize("how", ["appended", "replaced"])
def test_what_is_never_quiet_is_copied_all_the_same(tmp_path, clock, monkeypatch, how):
    """A log that is opened for each line, a state that is renamed over the last one: every ten seconds."""
    day = Day(tmp_path, clock)
    home, volume = day.home, day.home.volume
    for module in (draining_module, index_writer_module):
        monkeypatch.setattr(module, "time", clock)
    try:
        copies, content = [], b""
        for turn in range(130):
            content += b"%d\n" % turn
            if how == "replaced":
                home.write("new", content)
                home.run("rename", *home.above("new"), *home.above("state"))
            elif not turn:
                home.write("state", content)
            else:
                volume.server.write(volume.path("state"), content)
            clock.ahead += 10
            volume.tier.drain()
            before = puts(day)
            day.scheduler.replication.turn()
            if puts(day) > before:
                copies.append(turn)
                assert not volume.record("state").dirty
        assert len(copies) == 2, copies
        assert copies[0] * 10 >= 590 and copies[1] - copies[0] >= 59
        clock.ahead += 60
        before = puts(day)
        day.scheduler.replication.turn()
        assert puts(day) == before + 1, "and when it is quiet it is copied for the last time"
        day.arrived({"state": content})
    finally:
        day.heat.close()
        home.close()


def puts(day):
    return day.faults.calls.get("put", 0)


def test_a_large_file_that_is_never_quiet_does_not_fill_the_line():
    assert patience(1000, 30.0) == 600
    assert patience(1 << 30, 30.0) * (64 << 10) == 1 << 30
    assert patience(1 << 50, 30.0) == 86400
    assert patience(1000, 3600.0) == 7200


def test_names_that_are_watched_are_few():
    restless = Restless()
    for number in range(MOST * 2):
        restless.changed(number, 1, b"%d" % number, number / MOST)
    restless.changed(0, 1, b"0", 3.0)  # forgotten, and begins anew
    restless.changed(MOST * 2, 1, b"%d" % (MOST * 2 - 1), 602.0)  # another inode of that name
    assert restless.waiting(603.0, 1000.0) == [(MOST * 2, 603.0 - (MOST * 2 - 1) / MOST)]
    restless.copied(MOST * 2)
    assert restless.waiting(603.0, 1000.0) == []
    assert restless.waiting(9000.0, 1000.0) == [], "what has been quiet is nobody's business here"


def test_a_date_that_is_yet_to_come_keeps_no_file_young(tmp_path, clock, monkeypatch):
    day = Day(tmp_path, clock)
    volume = day.home.volume
    monkeypatch.setattr(tier_module, "time", clock)
    try:
        day.home.write("file", b"f" * 50_000)
        os.utime(volume.path("file"), (2**32, 2**32))
        volume.tier.reconfigure(msgspec.structs.replace(volume.config, min_age=600.0))
        assert volume.tier.demote([volume.item("file", ordered=False)])[0].reason == "is younger than min_age"
        clock.ahead = 3600
        assert volume.tier.demote([volume.item("file", ordered=False)])[0].demoted
        ino = os.stat(volume.path("file")).st_ino
        assert volume.fetch("file")[0].reason == ""
        day.heat.touch_many([(ino, 1, 50_000)], now=time.time() + 10 * 365 * 86400)
        day.heat.admit(ino, 50_000, 0)
        assert [record.ino for record in day.scheduler.eviction.victims(False)] == [ino]
    finally:
        day.heat.close()
        day.home.close()


def test_one_file_that_cannot_be_read_does_not_keep_the_others_here(tmp_path, clock, monkeypatch):
    """After an outage the first file in the queue is the trial, and it may be that file's own fault."""
    day = Day(tmp_path, clock)
    take = Copier._take_small

    def damaged(copier, item, extents):
        if item.name == b"bad":
            raise OSError(errno.EIO, "the disk gives it no more")
        return take(copier, item, extents)

    monkeypatch.setattr(Copier, "_take_small", damaged)
    try:
        day.faults.put("volume.json", b"{}", 2)
        for name in ("bad", "good", "better"):
            day.home.write(name, b"x" * 5000)
        store_is_down(day.faults, True)
        day.minute()
        store_is_down(day.faults, False)
        for _ in range(6):
            day.minute()
        assert day.home.volume.index.totals().dirty_files == 1
        assert day.home.volume.record("bad").dirty
    finally:
        day.heat.close()
        day.home.close()


def test_who_waits_for_room_waits_for_no_pause(tmp_path, clock):
    """With writers waiting files are tried although the store did not answer a moment ago: it may be back."""
    day = Day(tmp_path, clock)
    home = day.home
    try:
        home.write("file", b"x" * 50_000)
        home.volume.tier.drain()
        ino = os.stat(home.volume.path("file")).st_ino
        day.heat.touch_many([(ino, 1, 50_000)])
        day.scheduler.trials.doubtful = True
        assert day.scheduler.eviction.evict(1000, urgent=False) == 0 and home.volume.stub("file") is None
        assert day.scheduler.eviction.evict(1000, urgent=True) and home.volume.stub("file") is not None
    finally:
        day.heat.close()
        home.close()


class Evicting(Day):
    """Three cold files, and a limit that is exceeded."""

    names = ("one", "two", "three")

    def __init__(self, base, clock):
        super().__init__(base, clock)
        self.faults.put("volume.json", b"{}", 2)
        for name in self.names:
            self.home.write(name, b"x" * 5000)
            self.heat.admit(os.stat(self.home.volume.path(name)).st_ino, 5000, 5000)
        self.home.volume.tier.drain()

    def minutes(self, count):
        for _ in range(count):
            self.clock.ahead += 60
            self.scheduler.trials.ask_store()
            self.scheduler.eviction.evict(1 << 20, urgent=False)

    def stubs(self):
        return {name for name in self.names if self.home.volume.stub(name)}

    def close(self):
        self.heat.close()
        self.home.close()


def test_eviction_alone_tries_again_after_each_file_has_failed_its_trial(tmp_path, clock):
    """Where only what is cold goes to the store (`replicate = "cold"`), nothing else begins the trials anew."""
    day = Evicting(tmp_path, clock)
    try:
        day.faults.arm(Fault(Kind.ERROR, "put", times=float("inf"), error=StoreFullError("the store is full")))
        day.minutes(20)
        assert not day.stubs()
        day.faults.disarm()
        day.minutes(5)
        assert day.stubs() == set(day.names)
    finally:
        day.close()


def test_where_nothing_may_leave_looking_for_it_takes_a_small_part_of_a_processor(tmp_path, clock, monkeypatch):
    """Over the limit for ever: all is pinned, or too small, and to find that out takes seconds."""
    day, looks = Evicting(tmp_path, clock), []
    eviction = day.scheduler.eviction

    def evict(wanted, *, urgent):
        looks.append(urgent)
        clock.spent += 3.0
        return 0

    monkeypatch.setattr(eviction, "evict", evict)
    monkeypatch.setattr(day.scheduler.space, "excess", lambda: 1)
    try:
        for _ in range(600):
            clock.ahead += 1
            eviction.turn()
        assert len(looks) == 10
        eviction.urgent.set()
        eviction.turn()
        assert looks[10:] == [True], "who waits is not kept waiting"
    finally:
        day.close()


def test_one_file_that_cannot_be_read_does_not_keep_the_others_from_leaving(tmp_path, clock, monkeypatch):
    day, take = Evicting(tmp_path, clock), Copier._take_small

    def damaged(copier, item, extents):
        if item.name == b"one":
            raise OSError(errno.EIO, "the disk gives it no more")
        return take(copier, item, extents)

    monkeypatch.setattr(Copier, "_take_small", damaged)
    try:
        store_is_down(day.faults, True)
        day.minutes(1)
        store_is_down(day.faults, False)
        day.minutes(6)
        assert day.stubs() == {"two", "three"}
    finally:
        day.close()


def test_two_threads_may_forget_at_once_which_files_are_left_alone(clock):
    """A fetch makes room in its own thread, while what is quiet is copied out in the scheduler's."""
    staying, told = trials_module.Trials(None).staying, []
    for ino in range(20_000):
        staying.add(ino, float(ino % 3))
    clock.ahead += 5

    def forget():
        for _ in range(100):
            staying.forget()
            told.extend(staying.take_over(200))

    threads = [threading.Thread(target=forget) for _ in range(2)]
    for thread in threads:
        thread.start()
    for ino in range(20_000, 30_000):
        staying.add(ino, 60.0)
    for thread in threads:
        thread.join()
    assert sorted(told) == list(range(20_000))
    assert not any(ino in staying for ino in range(20_000))
    assert all(ino in staying for ino in range(20_000, 30_000))


def test_files_that_are_left_alone_take_a_bit_each(clock):
    """Those that never leave may be most of a home."""
    staying, count = trials_module.Trials(None).staying, 20_000
    tracemalloc.start()
    for ino in range(count):
        staying.add(ino, trials_module._NEVER_SECONDS)
    clock.ahead += trials_module._NEVER_SECONDS / 2
    for ino in range(count, 2 * count):
        staying.add(ino, trials_module._NEVER_SECONDS)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 2 * count * 2
    assert all(staying.has(ino, trials_module._NEVER_SECONDS) for ino in range(2 * count))
    clock.ahead += trials_module._NEVER_SECONDS / 2
    staying.forget()
    assert not any(ino in staying for ino in range(count))
    assert all(ino in staying for ino in range(count, 2 * count))
    assert sorted(staying.take_over(1 << 30)) == list(range(count))


def test_files_that_never_leave_are_not_looked_at_over_and_over(tmp_path, clock, monkeypatch):
    """They are dirty for ever, and may be most of a home: caches, node_modules."""
    day = Day(tmp_path, clock)
    home, queued, looked = day.home, Index.queued, []

    def counted(index, start, before, limit):
        rows = queued(index, start, before, limit)
        looked.append(len(rows))
        return rows

    monkeypatch.setattr(Index, "queued", counted)
    try:
        day.faults.put("volume.json", b"{}", 2)
        for number in range(700):
            home.write(f"f{number}.pid", b"never")
        day.minute()
        assert home.volume.index.totals().dirty_files == 700
        for number in range(20):
            looked.clear()
            home.write(f"new{number}", os.urandom(5000))
            day.minute()
            assert not home.volume.record(f"new{number}").dirty
            assert sum(looked) <= 10, "the whole queue was gone through"
    finally:
        day.heat.close()
        home.close()


def test_what_is_open_is_named_however_many_files_never_leave(tmp_path, clock):
    day = Day(tmp_path, clock)
    home = day.home
    try:
        day.faults.put("volume.json", b"{}", 2)
        for number in range(MOST_NAMED + 50):
            home.write(f"f{number}.pid", b"never")
        home.write("database", b"d" * 5000)
        handle = home.volume.server.open(home.volume.path("database"), os.O_RDWR)
        day.minute()
        tier = home.volume.tier
        named = waiting(tier.kit, tier.places, day.scheduler.trials.never_leaves)
        assert [(file.path, file.open) for file in named] == [(b"database", True)]
        home.volume.server.release(handle)
    finally:
        day.heat.close()
        home.close()


def test_what_is_left_alone_for_a_while_is_tried_again_however_far_the_queue_has_been_passed(tmp_path, clock):
    day = Day(tmp_path, clock)
    home = day.home
    try:
        day.faults.put("volume.json", b"{}", 2)
        home.write("open", b"o" * 5000)
        home.write("named.pid", b"never")
        handle = home.volume.server.open(home.volume.path("open"), os.O_RDWR)
        home.write("other", b"x" * 5000)
        for _ in range(3):
            day.minute()
        assert home.volume.record("open").dirty and not home.volume.record("other").dirty
        home.volume.server.release(handle)
        os.rename(home.volume.path("named.pid"), home.volume.path("named"))
        home.volume.tier.places.forget()
        day.minute()
        assert not home.volume.record("open").dirty and home.volume.record("named").dirty
        clock.ahead += 3600
        day.minute()
        assert not home.volume.record("named").dirty
    finally:
        day.heat.close()
        home.close()


def test_what_new_settings_let_leave_does_not_wait_until_it_is_tried_again(tmp_path, clock):
    """A pattern of [never] is taken away: what it named had been left alone for an hour."""
    day = Day(tmp_path, clock)
    home = day.home
    try:
        day.faults.put("volume.json", b"{}", 2)
        home.write("named.pid", b"never")
        day.minute()
        day.minute()
        trials, ino = day.scheduler.trials, home.volume.record("named.pid").ino
        assert trials.never_leaves(ino) and home.volume.record("named.pid").dirty
        tier = home.volume.tier
        tier.reconfigure(msgspec.structs.replace(tier.kit.config, never=Never(patterns=("*.tmp",))))
        day.scheduler.reconfigured()
        day.minute()
        assert not trials.never_leaves(ino) and not home.volume.record("named.pid").dirty
    finally:
        day.heat.close()
        home.close()


def test_where_the_clock_is_set_back_what_is_changed_then_is_copied_too(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(index_writer_module, "time", clock)
    day = Day(tmp_path, clock)
    home = day.home
    try:
        day.faults.put("volume.json", b"{}", 2)
        home.write("a.pid", b"never")
        day.minute()
        day.minute()
        clock.back = 7200 * 10**9
        home.write("new", b"n" * 5000)
        day.minute()
        day.minute()
        assert not home.volume.record("new").dirty
    finally:
        day.heat.close()
        home.close()
