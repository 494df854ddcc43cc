"""Reading copies back: what is damaged is found and named, a pass goes on where it was stopped, at its pace."""

from __future__ import annotations

import json
import os
import threading
import time

import pytest
from tierfsd import checking
from tiering import MIB, Job, Volume

from tierfs import control, copying, punching, readback, transitions
from tierfs.digests import SIDE_SUFFIX
from tierfs.errors import BusyError, ObjectArchivedError, StoreUnavailableError, TransitionError
from tierfs.model import Residency, object_key
from tierfs.readback import Pace, Pass, Place, Ref, StoppedError, examine, load_place
from tierfs.store.decorators import Decorator
from tierfs.store.memory import MemoryStore

LARGE = os.urandom(9 * MIB + 12_345)


class Watched(Decorator):
    """Remembers what is read, and calls `before(key, start)` first."""

    def __init__(self):
        super().__init__(MemoryStore())
        self.read = []
        self.before = lambda key, start: None

    def get(self, key, start=0, length=None):
        self.before(key, start)
        self.read.append((key, start))
        return super().get(key, start, length)


@pytest.fixture
def volume(tmp_path):
    made = Volume(tmp_path, store=Watched())
    yield made
    made.stop()


@pytest.fixture
def filled(volume):
    """Stubs of a few sizes; `large` has the highest inode number."""
    names = [f"small{at}" for at in range(5)] + ["large"]
    made = [volume.path(f"new{at}") for at in range(len(names))]
    for path in made:
        volume.server.create(path, b"")
    made.sort(key=lambda path: os.stat(path).st_ino)
    for at, (path, name) in enumerate(zip(made, names, strict=True)):
        volume.server.rename(path, volume.path(name))
        volume.server.write(volume.path(name), LARGE if name == "large" else os.urandom(1000 + at))
    assert all(item.demoted for item in volume.demote(*names))
    volume.store.read.clear()
    return volume


def place_file(volume):
    return str(volume.base / "check.json")


def check(volume, job=None, repair=False, **how):
    return checking.check(
        volume.tier, repair, checking.Reading(place_file(volume), **how), job if job is not None else Job()
    )


def ref_of(volume, name):
    return Ref.of_record(volume.record(name))


def spoil(volume, key, at):
    """Flip a bit of an object."""
    raw = bytearray(volume.store.get(key))
    raw[at] ^= 0x04
    volume.store.delete([key])
    volume.store.put(key, bytes(raw), len(raw))
    volume.store.read.clear()


FREE = Pace(lambda: 0.0, threading.Event())


@pytest.mark.parametrize("at", [0, 65535, 65536, 4 * MIB + 70_000, len(LARGE) - 1])
def test_a_flipped_bit_of_a_large_copy_is_found_to_its_leaf(filled, at):
    ref = ref_of(filled, "large")
    assert examine(filled.tier.kit, ref, FREE) == ""
    spoil(filled, ref.key, at)
    found = examine(filled.tier.kit, ref, FREE)
    assert f"(at byte {at // 65536 * 65536})" in found


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda store, key: store.delete([key]), "its object is not in the store"),
        (lambda store, key: store.delete([key + SIDE_SUFFIX]), "the list of its digests is not in the store"),
        (lambda store, key: store.put(key + SIDE_SUFFIX, b"no list", 7), "list of digests is damaged"),
        (lambda store, key: store.put(key, LARGE + b"!", len(LARGE) + 1), f"{len(LARGE) + 1} bytes instead of"),
    ],
)
def test_what_is_missing_or_of_another_length_is_said(filled, damage, words):
    ref = ref_of(filled, "large")
    damage(filled.store, ref.key)
    assert words in examine(filled.tier.kit, ref, FREE)


@pytest.mark.parametrize("name", ["small1", "large"])
def test_what_is_in_an_archive_is_named_and_neither_believed_bad_nor_in_the_way(filled, name):
    key, copy = ref_of(filled, name).key, filled.record(name).copy

    def before(asked, start):
        if asked == key:
            raise ObjectArchivedError(f"{key}: the provider has archived it")

    filled.store.before = before
    found = check(filled, repair=True)
    assert [(each.what, each.path, each.repaired) for each in found.findings] == [
        (f"{readback.ARCHIVED}: {key}", name.encode(), False)
    ]
    assert found.read_files == 6 and not os.path.exists(place_file(filled))
    assert filled.record(name).copy == copy


def test_one_wrong_answer_is_not_believed(filled):
    """A bit that was flipped on the way: read again, it is right."""
    ref, real = ref_of(filled, "small1"), filled.store
    answers = [b"x" * ref.size]

    class Lying(Decorator):
        def get(self, key, start=0, length=None):
            return answers.pop() if answers else super().get(key, start, length)

    filled.tier.kit.store = Lying(real)
    assert examine(filled.tier.kit, ref, FREE) == ""
    assert not answers


def test_every_copy_is_read_once_and_a_whole_check_leaves_no_place(filled):
    job = Job()
    findings = check(filled, job)
    assert (findings.findings, findings.read_files) == ([], 6)
    assert findings.read_bytes == sum(1000 + at for at in range(5)) + len(LARGE)
    objects = [read for read in filled.store.read if not read[0].endswith(SIDE_SUFFIX)]
    assert len(set(objects)) == len(objects) == 5 + 3
    assert job.reports[-1].bytes_done == job.reports[-1].bytes_total == findings.read_bytes
    assert not os.path.exists(place_file(filled))


def test_a_check_that_was_stopped_goes_on_inside_a_large_file(filled):
    """Stopped after the first 4 MiB; damage found before the stop is still named at the end."""
    bad = ref_of(filled, "small2").key
    spoil(filled, bad, 17)
    large, job = ref_of(filled, "large").key, Job()

    def before(key, start):
        if key == large and start == 4 * MIB:
            job.cancelled.set()

    filled.store.before = before
    check(filled, job)
    place = load_place(place_file(filled))
    assert place.ended == 0 and place.offset >= 4 * MIB and [b.path for b in place.bad] == [b"small2"]
    filled.store.before = lambda key, start: None
    filled.store.read.clear()
    findings = check(filled, Job())
    assert [finding.path for finding in findings.findings] == [b"small2"]
    assert findings.resumed_bytes == place.bytes
    assert min(start for key, start in filled.store.read if key == large) == place.offset
    assert {key for key, _ in filled.store.read} == {bad, large, large + SIDE_SUFFIX}
    assert findings.read_files == 6 and findings.read_bytes == sum(1000 + i for i in range(5)) + len(LARGE)


def test_from_start_begins_anew(filled):
    Pass(
        filled.tier.kit, filled.tier.places, filled.tier.drain, place_file(filled),
        Place(ino=1 << 60, files=3, bytes=77), FREE, repair=False,
    ).save()  # fmt: skip
    assert check(filled, from_start=True).read_files == 6


@pytest.mark.parametrize("left", [b"", b"{", b'{"ino": "seven"}'])
def test_a_place_that_cannot_be_read_is_the_beginning(filled, left):
    with open(place_file(filled), "wb") as file:
        file.write(left)
    assert check(filled).read_files == 6


def test_a_store_that_is_down_is_no_finding_and_the_place_is_kept(filled):
    large = ref_of(filled, "large").key

    def down(key, start):
        if key == large and start:
            raise StoreUnavailableError("nobody answers")

    filled.store.before = down
    with pytest.raises(StoreUnavailableError):
        check(filled)
    filled.store.before = lambda key, start: None
    findings = check(filled)
    assert findings.findings == [] and findings.resumed_bytes >= 4 * MIB


def test_a_store_that_is_not_ours_has_lost_nothing(filled):
    """A disk of the network that is not mounted: everything is missing in it."""

    def gone():
        raise StoreUnavailableError("holds no volume.json: it is not this volume's store, or is not mounted")

    filled.store.delete([ref_of(filled, "small3").key])
    filled.tier.kit.still_ours = gone
    reader = Pass(
        filled.tier.kit, filled.tier.places, filled.tier.drain, place_file(filled), Place(), FREE, repair=True
    )
    with pytest.raises(StoreUnavailableError):
        list(reader.run())
    assert load_place(place_file(filled)).bad == []


def test_a_file_changed_or_removed_while_its_copy_is_read_is_no_finding(filled):
    changed, removed = ref_of(filled, "small1"), ref_of(filled, "small2")
    spoil(filled, changed.key, 3)
    spoil(filled, removed.key, 3)
    acted = []

    def before(key, start):
        if not acted:
            acted.append(key)
            filled.server.write(filled.path("small1"), b"anew", flags=os.O_WRONLY | os.O_TRUNC)
            filled.server.unlink(filled.path("small2"))

    filled.store.before = before
    reader = Pass(
        filled.tier.kit, filled.tier.places, filled.tier.drain, place_file(filled), Place(), FREE, repair=True
    )
    assert list(reader.run()) == []


def test_a_resident_files_bad_copy_is_dropped_and_it_goes_out_again(volume):
    data = os.urandom(5000)
    volume.server.create(volume.path("file"), data)
    volume.demote("file", punch=False)
    ref = ref_of(volume, "file")
    spoil(volume, ref.key, 100)
    findings = check(volume, repair=True)
    assert [(f.path, f.repaired) for f in findings.findings] == [(b"file", True)]
    assert volume.record("file").dirty
    assert volume.demote("file")[0].demoted
    assert ref_of(volume, "file").key != ref.key
    assert check(volume).findings == []
    assert volume.server.read(volume.path("file")) == data


def test_without_leave_to_repair_a_bad_copy_is_named(volume):
    volume.server.create(volume.path("file"), b"z" * 5000)
    volume.demote("file", punch=False)
    spoil(volume, ref_of(volume, "file").key, 100)
    findings = check(volume)
    assert [(f.path, f.repaired) for f in findings.findings] == [(b"file", False)]


@pytest.mark.parametrize("size", [5000, 9 * MIB], ids=["small", "large"])
@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_a_copy_that_was_found_bad_frees_no_disk(volume, size, harm):
    """Also without leave to repair: the file holds the only good bytes, and comparing it with the copy's digest
    proves nothing of the object."""
    data = os.urandom(size)
    volume.server.create(volume.path("file"), data)
    volume.demote("file", punch=False)
    bad = ref_of(volume, "file").key
    if harm == "damaged":
        spoil(volume, bad, 100)
    else:
        volume.store.delete([bad])
    assert [finding.repaired for finding in check(volume).findings] == [False]
    assert [finding.repaired for finding in check(volume).findings] == [False], "named as long as it is so"
    volume.restart()
    os.utime(volume.path("file"))  # what needs a proof anew is compared with its copy
    (item,) = volume.demote("file")
    assert item.demoted and item.uploaded == size
    assert ref_of(volume, "file").key != bad
    assert volume.server.read(volume.path("file")) == data
    volume.settle("file")
    assert check(volume).findings == []


@pytest.mark.parametrize("moment", ["committed", "coming"])
def test_what_is_here_of_a_copy_that_was_found_bad_stays(filled, moment):
    """Of a file that is only partly here: these leaves may be the last good ones."""
    filled.server.read(filled.path("large"), 0, 4096)
    arrival = filled.tier.filler.arrival(os.stat(filled.path("large")).st_ino)
    if moment == "committed":
        filled.tier._settler.release(arrival)
        assert filled.record("large").residency is Residency.PARTIAL
    bad = ref_of(filled, "large").key
    good = filled.store.get(bad)
    spoil(filled, bad, 100)
    assert [finding.repaired for finding in check(filled).findings] == [False]
    (item,) = filled.demote("large")
    assert not item.demoted and "found bad" in item.reason
    with open(filled.path("large"), "rb") as backing:
        assert backing.read(4096) == LARGE[:4096]
    filled.restart()
    (item,) = filled.demote("large")
    assert not item.demoted and "found bad" in item.reason
    assert filled.server.read(filled.path("large")) == LARGE
    filled.settle("large")
    (item,) = filled.demote("large")
    assert item.demoted and item.uploaded == len(LARGE)
    assert filled.store.get(ref_of(filled, "large").key) == good
    assert check(filled).findings == []


def test_a_doubt_overtakes_a_comparison_and_a_proof(volume):
    volume.server.create(volume.path("file"), b"z" * 5000)
    volume.demote("file", punch=False)
    record = volume.record("file")
    readback.doubt_copy(volume.tier.kit, record)
    with pytest.raises(BusyError):
        volume.index.commit(lambda w: punching._put_stub(record, record, w)).result()
    item = volume.item("file")
    item.record, item.st = record, os.stat(volume.path("file"))
    item.generation, item.handle = record.generation, record.handle
    taken = copying.Taken(record.copy, "", [], b"", fresh=False)
    with pytest.raises(BusyError):
        volume.index.commit(lambda w: copying._put_copy(item, taken, w)).result()
    with pytest.raises(TransitionError):
        transitions.stubbed(volume.record("file"), 8, volume.record("file").copy)


def test_nothing_is_repaired_while_the_store_may_not_be_written(volume):
    volume.server.create(volume.path("file"), b"z" * 5000)
    volume.demote("file", punch=False)
    volume.store.delete([ref_of(volume, "file").key])
    volume.tier.kit.withheld = "another machine has the store"
    findings = check(volume, repair=True)
    assert [(f.path, f.repaired) for f in findings.findings] == [(b"file", False)]
    assert not volume.record("file").dirty


def test_a_former_copy_of_a_dirty_file_is_not_read(volume):
    volume.server.create(volume.path("file"), b"z" * 5000)
    volume.demote("file", punch=False)
    key = object_key(
        volume.record("file").fid, volume.record("file").copy.generation, volume.record("file").copy.tag
    )
    volume.server.write(volume.path("file"), b"new")
    spoil(volume, key, 1)
    assert check(volume).findings == []


def test_the_pace_is_kept_and_a_stop_ends_a_wait(filled):
    began = time.monotonic()
    pace = Pace(lambda: 2.0 * MIB, threading.Event())
    for _ in range(3):
        pace.spend(MIB // 4)
    assert time.monotonic() - began >= 0.25  # the first goes at once
    stop = threading.Event()
    slow = Pace(lambda: 1.0, stop)
    slow.spend(1 << 30)
    threading.Timer(0.05, stop.set).start()
    with pytest.raises(StoppedError):
        slow.spend(1)


def test_while_somebody_waits_nothing_is_read():
    waiting = [True, True, False]
    stop = threading.Event()
    Pace(lambda: 0.0, stop, lambda: waiting.pop(0)).spend(1)
    assert waiting == []


def told(found):
    findings = checking._Findings()
    findings.extend(found)
    return findings.told()


def test_an_answer_of_very_many_findings_is_cut_short(monkeypatch):
    monkeypatch.setattr(checking, "_MOST", 3)
    found = [control.Finding("is bad", b"%d" % at, repaired=True) for at in range(7)]
    assert told(found[:3]) == found[:3]
    assert [f.repaired for f in told(found)] == [True] * 4
    found[5] = control.Finding("is bad", b"5")
    assert not told(found)[-1].repaired


def test_the_place_is_a_document_of_its_own(filled):
    job = Job()
    filled.store.before = lambda key, start: job.cancelled.set()
    check(filled, job)
    with open(place_file(filled), encoding="utf-8") as file:
        document = json.load(file)
    assert document["ended"] == 0 and document["began"] > 0
    assert os.stat(place_file(filled)).st_mode & 0o777 == 0o600
