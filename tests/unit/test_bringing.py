"""Orders to fetch while the store does not answer: one wait, one word, nothing lost."""

from __future__ import annotations

import errno
import threading
import time

import pytest
from tierfsd.backend import TierBackend
from tierfsd.reach import Target
from tiering import Job, Volume

from tierfs import bringing
from tierfs.errors import ObjectArchivedError
from tierfs.store.faults import Fault, FaultyStore, Kind
from tierfs.store.memory import MemoryStore

TIMEOUT = 1.5
NAMES = [f"f{number}" for number in range(3 * bringing._AT_ONCE)]


@pytest.fixture
def volume(tmp_path):
    made = Volume(tmp_path, store=FaultyStore(MemoryStore()), fetch_timeout=TIMEOUT)
    for name in NAMES:
        made.server.create(made.path(name), name.encode() * 1000)
    assert all(item.demoted for item in made.demote(*NAMES))
    yield made
    made.store.disarm()
    made.stop()


def down(volume, prefix="", times=float("inf")):
    volume.store.arm(Fault(Kind.ERROR, "get", prefix, times))


def fetch(volume, names=NAMES, awaited=True):
    """What `tierfs fetch` is answered, what it was told meanwhile, and how long that took."""
    job, targets = Job(), []
    job.awaited = awaited
    for name in names:
        item = volume.item(name)
        targets.append(Target(item.path, item.ino, item.handle, item.parent, item.name, item.size, named=True))
    backend = TierBackend.__new__(TierBackend)
    backend._tier, backend._kit = volume.tier, volume.tier.kit
    begun = time.monotonic()
    done = backend.fetch(targets, job)
    return done, {report.note for report in job.reports} - {""}, time.monotonic() - begun


def test_of_a_store_that_is_down_an_order_waits_for_one_file(volume, monkeypatch):
    monkeypatch.setattr(bringing, "_SILENT_SECONDS", 0.5)
    down(volume)
    done, notes, seconds = fetch(volume)
    assert seconds < 2 * TIMEOUT
    assert notes == {"nothing has come from the store for 0.5 s: it is waited for, 1.5 s in all"}
    (stayed,) = done.stayed
    assert (done.files, stayed.path, stayed.failed) == (0, b"", True)
    assert stayed.reason.startswith(
        f"{len(NAMES)} files were not fetched, the store does not answer (no content within 1.5 s: injected:"
    )
    volume.store.disarm()
    done, _, _ = fetch(volume)
    assert (done.files, done.stayed) == (len(NAMES), [])
    for name in NAMES:
        with open(volume.path(name), "rb") as file:
            assert file.read() == name.encode() * 1000


def test_one_file_is_named(volume):
    down(volume)
    done, _, _ = fetch(volume, NAMES[:1])
    assert [(stayed.path, stayed.failed) for stayed in done.stayed] == [(b"f0", True)]
    assert done.stayed[0].reason.startswith("no content within 1.5 s: injected")


def test_what_is_in_an_archive_is_said_at_once_and_keeps_no_other_away(volume):
    key = volume.stub(NAMES[0]).key
    gone = ObjectArchivedError(f"{key}: the provider has archived it")
    volume.store.arm(Fault(Kind.ERROR, "get", key, float("inf"), error=gone))
    done, _, seconds = fetch(volume)
    assert (done.files, [(stayed.path, stayed.failed) for stayed in done.stayed]) == (
        len(NAMES) - 1,
        [(NAMES[0].encode(), True)],
    )
    assert seconds < TIMEOUT and "archived" in done.stayed[0].reason
    begun = time.monotonic()
    with pytest.raises(OSError) as caught:
        volume.server.read(volume.path(NAMES[0]))
    assert caught.value.errno == errno.EIO and time.monotonic() - begun < TIMEOUT
    assert any("archived" in trouble.what for trouble in volume.tier.kit.troubles.list())


def test_a_file_that_alone_does_not_come_keeps_no_other_away(volume, monkeypatch):
    """The store has sent others meanwhile."""
    monkeypatch.setattr(bringing, "_AT_ONCE", 1)
    down(volume, volume.stub(NAMES[0]).key)
    done, _, _ = fetch(volume)
    assert (done.files, [stayed.path for stayed in done.stayed]) == (len(NAMES) - 1, [NAMES[0].encode()])


def test_the_end_of_an_earlier_wait_ends_no_order(volume, monkeypatch):
    """The store is back, and what was asked for while it was away times out only now."""
    outcomes, earlier = volume.tier.kit.outcomes, set(NAMES)
    expect = outcomes.expect

    def expect_late(ino):
        future = expect(ino)
        if earlier:
            earlier.pop()
            outcomes.tell(ino, errno.ETIMEDOUT, "no content within 1.5 s: it was away")
        return future

    monkeypatch.setattr(outcomes, "expect", expect_late)
    done, _, _ = fetch(volume)
    assert (done.files, done.stayed, earlier) == (len(NAMES), [], set())


def test_an_order_that_nobody_waits_for_is_patient(volume):
    """The store comes back while it waits: what it had not asked for yet arrives."""
    down(volume)
    threading.Timer(TIMEOUT + 0.5, volume.store.disarm).start()
    done, notes, _ = fetch(volume, awaited=False)
    stayed = [outcome.path for outcome in done.stayed]
    assert NAMES[0].encode() in stayed and NAMES[-1].encode() not in stayed and not notes
    assert done.files == len(NAMES) - len(stayed)


def test_of_those_who_waited_nothing_is_left(volume):
    outcomes = volume.tier.kit.outcomes
    one, other = outcomes.expect(7), outcomes.expect(7)
    outcomes.forget(7, one)
    outcomes.tell(7, 0, "")
    assert other.result(0) == (0, "") and not one.done()
    outcomes.forget(7, other)
    down(volume)
    fetch(volume)
    assert not outcomes._futures
