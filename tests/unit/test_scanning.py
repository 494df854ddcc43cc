"""Scans: who is taken for one, what that changes for files, and in which order what they brought leaves."""

from __future__ import annotations

import os
import struct
import threading

import lmdb
import msgspec
import pytest
from bare import until
from tierfsd import scanning
from tierfsd.scanning import Scanners, program_of
from tierfsd.scheduler import Scheduler

from tierfs import report as reporting
from tierfs import wire
from tierfs.handles import Inode
from tierfs.heat_index import HeatIndex
from tierfs.policy.heat import admitted, lent, shown_at, touched
from tierfs.policy.scans import LENT_SECONDS, SCAN_FILES, Scans
from tierfs.report import HeatReport, Outbox
from tierfs.transfer import Urgency
from tierfs.wire import Fetch, Touch

MIB = 1 << 20
CAPACITY = 100 * MIB
DAY = 86400.0


@pytest.fixture
def heat(tmp_path):
    opened = HeatIndex(str(tmp_path / "heat"), CAPACITY)
    yield opened
    opened.close()


def brought(scans, who, files, size, now=0.0, every=0.06):
    """Bring in these files one after another; the numbers of those that came for a scan."""
    found = []
    for number, file in enumerate(files):
        if scans.brings(who, file, size, CAPACITY, now + number * every)[0]:
            found.append(file)
    return found


# --- who scans --------------------------------------------------------------------------------------------


def test_a_project_that_is_opened_whole_is_no_scan():
    """2,000 files of 2 KiB: a twentieth of the tier is more."""
    assert brought(Scans(), "cp", range(2000), 2048) == []


def test_a_few_large_files_are_no_scan():
    assert brought(Scans(), "player", range(7), 50 * MIB) == []


def test_who_brings_in_much_of_the_tier_scans_and_what_it_brought_before_is_told():
    assert brought(Scans(), "grep", range(20), MIB // 2 + 1000) == list(range(9, 20))
    scans = Scans()
    found = [scans.brings("grep", file, MIB // 2 + 1000, CAPACITY, float(file)) for file in range(11)]
    assert found[:9] == [(False, [])] * 9
    assert found[9:] == [(True, [(file, float(file)) for file in range(9)]), (True, [])]


def test_who_brings_in_thousands_of_small_files_scans():
    files = range(SCAN_FILES + 1)
    assert brought(Scans(), "updater", files, 10, every=0.0) == [SCAN_FILES - 1, SCAN_FILES]


def test_pieces_of_one_file_are_one_file():
    scans = Scans()
    assert not any(scans.brings("player", 1, 8 * MIB, CAPACITY, float(at))[0] for at in range(100))


def test_who_works_all_day_is_no_scan():
    """A share of the tier, but over a day."""
    assert brought(Scans(), "editor", range(24 * 8), MIB // 4, every=450.0) == []


def test_a_scan_is_forgotten_when_it_is_long_over():
    scans = Scans()
    brought(scans, "shell", range(100), MIB)
    assert not scans.counts("shell", 7000, CAPACITY, 60.0)
    assert scans.counts("shell", 7000, CAPACITY, 6 * 3600.0)


def test_a_scans_uses_count_for_nothing_but_those_that_it_goes_back_to():
    scans = Scans()
    brought(scans, "grep", range(100), MIB)
    assert not scans.counts("grep", 5000, CAPACITY, 20.0), "what is here already"
    assert not scans.counts("grep", 99, CAPACITY, 20.0), "the opening for which it came"
    assert scans.counts("grep", 99, CAPACITY, 400.0)
    assert scans.counts("vi", 99, CAPACITY, 20.0)


def test_who_goes_back_to_what_he_read_is_no_scan():
    """As a server for others does, through whom all of their work goes."""
    scans = Scans()
    brought(scans, "smbd", range(100), MIB)
    assert not scans.counts("smbd", 5000, CAPACITY, 400.0)
    assert all(scans.counts("smbd", file, CAPACITY, 400.0) for file in range(90, 100))
    assert scans.counts("smbd", 5000, CAPACITY, 400.0)
    assert scans.brings("smbd", 6000, MIB, CAPACITY, 400.0) == (False, [])


def test_who_scans_each_day_goes_back_to_nothing():
    scans = Scans()
    for day in range(3):
        assert len(brought(scans, "clamd", range(500), MIB, now=day * DAY)) > 480


def test_programs_that_are_remembered_are_bounded():
    scans = Scans()
    for who in range(1000):
        scans.brings(who, 1, 1, CAPACITY, 0.0)
    assert len(scans._meters) < 300


# --- what it changes for a file ---------------------------------------------------------------------------


def test_what_is_lent_keeps_what_is_known_of_its_uses():
    used = touched(admitted(None, 1.0, 0.0, 10), 1.5, 7200.0, 5, 10)
    came = lent(used, 9000.0, 10)
    assert (came.level, came.clock, came.last) == (used.level, used.clock, 9000.0)
    assert shown_at(came, 9000.0) == pytest.approx(shown_at(used, 9000.0))


def test_what_is_lent_is_admitted_by_the_first_use_and_the_clock_stands_still_until_then(heat):
    heat.lend_many([(ino, 10 * MIB) for ino in range(1, 51)], now=0.0)
    with heat._batch() as batch:
        assert batch.clock == 0.0
    heat.touch_many([(7, 1, 10 * MIB)], now=10.0)
    with heat._batch() as batch:
        assert batch.clock == pytest.approx(0.1)
    seven = heat.of(7)
    assert seven.probation and not seven.lent and heat.heat(7, now=10.0) == 1.0
    assert heat.probation_bytes() == 10 * MIB and heat.lent_bytes() == 490 * MIB
    heat.touch_many([(7, 1, 10 * MIB)], now=DAY)
    assert not heat.of(7).probation


def test_what_comes_for_somebody_as_well_or_is_written_is_lent_no_more(heat):
    heat.lend_many([(1, MIB), (2, MIB)], now=0.0)
    heat.admit(1, MIB, MIB, now=1.0)
    assert (heat.of(1).lent, heat.of(2).lent) == (False, True)
    assert (heat.probation_bytes(), heat.lent_bytes()) == (MIB, MIB)


def test_a_scan_takes_nothing_from_anybody(heat):
    heat.admit(1, MIB, MIB, now=0.0)
    heat.lend_many([(1, 2 * MIB)], now=1.0)
    assert not heat.of(1).lent and heat.probation_bytes() == 2 * MIB


def test_what_turns_out_to_have_come_for_a_scan_is_lent_unless_somebody_has_used_it(heat):
    heat.seed_many([(1, MIB, DAY), (2, MIB, DAY)], now=0.0)
    heat.left([1, 2])
    heat.admit_many([(ino, MIB, MIB) for ino in (1, 2, 3)], now=100.0)
    heat.touch_many([(2, 1, MIB)], now=130.0)
    heat.lend_known([(1, 100.0), (2, 100.0), (3, 100.0), (4, 100.0)], now=200.0)
    assert [heat.of(ino).lent for ino in (1, 2, 3)] == [True, False, True]
    assert heat.of(4) is None


def test_what_is_lent_and_leaves_is_a_stub_like_others(heat):
    heat.lend_many([(1, MIB)], now=0.0)
    heat.left([1])
    assert not heat.of(1).lent and heat.lent_bytes() == 0 and list(heat.victims(0)) == []
    heat.admit(1, MIB, MIB)
    assert heat.of(1).probation


# --- what leaves first ------------------------------------------------------------------------------------


def test_what_scans_brought_leaves_first_but_for_a_share(heat):
    heat.admit_many([(ino, MIB, MIB) for ino in range(1, 61)], now=0.0)
    heat.touch_many([(ino, 1, MIB) for ino in range(1, 61)], now=DAY)  # past probation
    heat.lend_many([(ino, MIB) for ino in range(100, 140)], now=DAY)
    order = list(heat.victims(100 * MIB, now=DAY + 60))
    assert order[:35] == list(range(100, 135)), "the oldest of it, down to a twentieth of what is here"
    assert set(order[35:95]) == set(range(1, 61)) and order[95:] == list(range(100, 140))
    assert list(heat.victims(100 * MIB, now=DAY + LENT_SECONDS))[:40] == list(range(100, 140)), (
        "a day later all"
    )


def test_what_scans_brought_leaves_after_a_day_although_there_is_room(heat):
    heat.lend_many([(ino, MIB) for ino in range(20)], now=0.0)
    assert list(heat.overdue(now=3600.0)) == []
    assert list(heat.overdue(now=LENT_SECONDS)) == list(range(15))


def test_a_project_of_less_than_the_share_stays_while_there_is_room(heat):
    heat.lend_many([(ino, MIB) for ino in range(5)], now=0.0)
    assert list(heat.overdue(now=100 * DAY)) == []


# --- the daemon's part ------------------------------------------------------------------------------------


def test_the_mark_outlives_the_mover(tmp_path, heat):
    heat.lend_many([(1, MIB)], now=0.0)
    heat.admit(2, MIB, MIB, now=0.0)
    heat.close()
    again = HeatIndex(heat.path, CAPACITY)
    assert (again.lent_bytes(), again.of(1).lent, again.of(2).lent) == (MIB, True, False)
    again.close()


def test_heat_of_a_version_that_knew_no_scans_is_read_and_reads_ours(heat):
    """No record has another form: what is lent is behind all others in a former version's probation."""
    heat.admit(1, MIB, MIB, now=0.0)
    heat.lend_many([(2, MIB)], now=0.0)
    heat.close()
    with lmdb.open(heat.path, max_dbs=8) as env, env.begin() as txn:
        record = txn.get(struct.pack(">Q", 2), db=env.open_db(b"heat", txn=txn, create=False))
        flags = struct.unpack("<dfIfQB8s", record)[5]
        assert flags == 3, "on probation, listed"
        with txn.cursor(db=env.open_db(b"queue", txn=txn, create=False)) as cursor:
            assert [struct.unpack(">8sQ", key)[1] for key in cursor.iternext(values=False)] == [1, 2]
    heat._open(heat.path, False)


def test_a_thread_stands_for_its_program():
    found, ready, done = [], threading.Event(), threading.Event()

    def run():
        found.append(threading.get_native_id())
        ready.set()
        done.wait(10)

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(10)
    assert found[0] != os.getpid()
    assert program_of(found[0]) == program_of(os.getpid()) != None  # noqa: E711
    done.set()
    thread.join()
    assert until(lambda: program_of(found[0]) is None)  # the kernel ends it a moment later


def fetch(ino, pid, size=MIB, ordered=False):
    return Fetch(1, ino, b"", size, 0, size, True, False, ordered=ordered, pid=pid)


def use(ino, pid, last):
    return Touch(ino, 1, 0, last, MIB, 1, b"", pid)


def test_what_an_order_or_nobody_known_asks_for_is_for_no_scan(heat):
    scanners = Scanners(heat)
    assert not any(scanners.brings(fetch(ino, 0)) for ino in range(100))
    assert not any(scanners.brings(fetch(ino, os.getpid(), ordered=True)) for ino in range(100))
    assert scanners.found() == []


def test_what_comes_ahead_for_a_scan_comes_for_it(heat, monkeypatch):
    monkeypatch.setattr(scanning, "program_of", lambda thread: (thread, 1))
    monkeypatch.setattr(scanning.time, "monotonic", lambda: 1000.0)
    scanners = Scanners(heat, dict.fromkeys(range(1, 100, 2), 11).get)
    found = [scanners.brings(fetch(ino, 0 if ino % 2 else 11, ordered=bool(ino % 2))) for ino in range(10)]
    assert found == [False] * 7 + [True] * 3


def test_all_threads_of_a_scan_scan_and_a_number_that_is_used_again_does_not(heat, monkeypatch):
    scanners = Scanners(heat)
    programs, now = {11: (10, 5), 12: (10, 5), 30: (30, 7)}, [1000.0]
    monkeypatch.setattr(scanning, "program_of", programs.get)
    monkeypatch.setattr(scanning.time, "monotonic", lambda: now[0])
    assert [scanners.brings(fetch(ino, 11 + ino % 2)) for ino in range(10)] == [False] * 7 + [True] * 3
    assert [ino for ino, _ in scanners.found()] == list(range(7)) and scanners.found() == []
    assert not scanners.brings(fetch(50, 30))
    assert not scanners.counts(use(400, 12, now[0])) and scanners.counts(use(400, 30, now[0]))
    assert scanners.counts(use(400, 0, now[0])) and scanners.counts(use(400, 13, now[0]))
    now[0] += 60.0
    assert not scanners.counts(use(400, 12, now[0]))
    now[0] += 60.0
    programs[12] = 12, 99
    assert scanners.counts(use(400, 12, now[0]))
    programs.clear()
    now[0] += 60.0
    assert not scanners.counts(use(400, 11, now[0])), "it has ended, and its uses are told only now"


class Sent(Outbox):
    """What has been posted, with room for more."""

    def __init__(self):
        super().__init__()
        self.touches = []

    def post(self, message, fds=()):
        self.touches += message.touches


def test_who_opens_what_a_scan_reads_is_told_apart(monkeypatch):
    """Also within the same five seconds. While nothing is taken that needs no more room than it is given."""
    sent, inode = Sent(), Inode(5, 1, b"name")
    report = HeatReport(sent)
    for pid in (10, 20, 10, 20, 20, 0):
        report.touch(inode, 7, pid)
    report.flush()
    assert [(touch.pid, touch.count, touch.size) for touch in sent.touches] == [
        (10, 2, 7),
        (20, 3, 7),
        (0, 1, 7),
    ]
    sent.touches.clear()
    monkeypatch.setattr(reporting, "MOST_BESIDES", 1)
    for pid in (10, 20, 30, 20):
        report.touch(inode, 7, pid)
    report.flush()
    assert [(touch.pid, touch.count) for touch in sent.touches] == [(10, 1), (20, 2)]


def test_messages_of_a_former_version_are_read():
    former = wire.msgspec.msgpack.encode(["Touches", [["Touch", 1, 1, 0, 1.0, 1, 1, b""]]])
    assert wire._to_mover.decode(former).touches[0].pid == 0


# --- what comes for several -------------------------------------------------------------------------------


@pytest.fixture
def away(volume):
    """A file that is away, its content, and the means to say who scans."""
    volume.server.create(volume.path("f"), b"f" * 5000)
    (item,) = volume.demote("f")
    assert item.demoted, item.reason
    volume.tier.kit.movements.take()
    return volume


def came(volume):
    """(size, grown, lent) of what has come, which is told last of all."""
    found = []
    assert until(lambda: found.extend(volume.tier.kit.movements.take()[0]) or found)
    return [told[1:] for told in found]


@pytest.mark.parametrize(("lent", "first"), [(True, Urgency.AHEAD), (False, Urgency.READER)])
def test_what_comes_for_a_scan_alone_is_told_as_lent_and_comes_behind_others(away, monkeypatch, lent, first):
    urgencies, post = [], away.tier.kit.fetches.post
    monkeypatch.setattr(
        away.tier.kit.fetches, "post", lambda urgency, run: (urgencies.append(urgency), post(urgency, run))[1]
    )
    monkeypatch.setattr(away, "on_fetch", lambda m, opath: away.tier.filler.on_fetch(m, opath, lent))
    assert away.server.read(away.path("f")) == b"f" * 5000
    assert came(away) == [(5000, 5000, lent)]
    assert urgencies[0] is first


def test_what_somebody_else_asks_for_as_well_is_his(away, monkeypatch):
    """He comes while it is on its way."""

    def both(message, opath):
        own, other = os.dup(opath), msgspec.structs.replace(message, id=message.id + 1000)
        away.tier.filler.on_fetch(message, opath, True)
        away.tier.filler.on_fetch(other, own, False)

    taken, get = threading.Event(), away.store.get
    monkeypatch.setattr(away.store, "get", lambda *args: (taken.wait(10), get(*args))[1])
    monkeypatch.setattr(away, "on_fetch", both)
    reader = threading.Thread(target=away.server.read, args=(away.path("f"),))
    reader.start()
    ino = os.stat(away.path("f")).st_ino
    assert until(lambda: (arrival := away.tier.filler.arrival(ino)) and len(arrival.requests) == 2, 10)
    taken.set()
    reader.join()
    assert came(away) == [(5000, 5000, False)]


def test_of_what_is_lent_no_minimums_count_unless_somebody_has_changed_it(away, heat, tmp_path):
    """It leaves in a round, however young; and what is overdue although there is room."""
    scheduler = Scheduler(away.tier, heat, False, str(tmp_path / "ballast"))
    away.tier.reconfigure(msgspec.structs.replace(away.config, min_age=3600.0, min_size=1 << 20))
    (item,) = away.fetch("f")
    assert not item.reason and came(away)
    ino = os.stat(away.path("f")).st_ino
    heat.admit(ino, 5000, 5000)
    assert list(scheduler.eviction.victims(False)) == []
    heat.lend_known([(ino, 0.0)])
    assert [record.ino for record in scheduler.eviction.victims(False)] == [ino]
    assert scheduler.eviction.evict(1, urgent=False, overdue=True) == 0, "it is not a day old"
    assert scheduler.eviction.evict(1, urgent=False) > 0
    assert away.stub("f") is not None
    away.server.write(away.path("f"), b"g")
    heat.lend_many([(ino, 5000)])
    away.tier.drain()
    assert list(scheduler.eviction.victims(False)) == []
