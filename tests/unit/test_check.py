"""Each check finds the defect planted for it, repairs what can be, and is silent on a sound volume."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tierfsd import checking
from tiering import Job

from tierfs import recovery, survey
from tierfs.codec import pack_record, unpack_record
from tierfs.digests import SIDE_SUFFIX
from tierfs.errors import IndexError_
from tierfs.inodes import InodeSet
from tierfs.model import Residency, Stub, object_key
from tierfs.past import U64

SMALL = os.urandom(30_000)


@pytest.fixture
def filled(volume):
    """A stub, a clean resident file and a dirty one."""
    for name in ("stub", "clean", "dirty"):
        volume.server.create(volume.path(name), SMALL)
    volume.demote("stub")
    volume.demote("clean", punch=False)
    assert volume.record("dirty").dirty and not volume.record("clean").dirty
    return volume


def run(volume, repair=False, read_data=False):
    reading = checking.Reading(str(volume.base / "check.json")) if read_data else None
    return checking.check(volume.tier, repair, reading, Job()).findings


def words(findings):
    return [(finding.path, finding.repaired) for finding in findings]


def ino_of(volume, name):
    return os.stat(volume.path(name)).st_ino


def raw_put(volume, table, key, value):
    """Behind all codecs."""
    volume.index.commit(lambda w: w._txn.put(key, value, db=w._db[table])).result()


def spoil(volume, name, at=40):
    """Flip a bit of a file's record."""
    key = U64.pack(ino_of(volume, name))
    raw = bytearray(volume.index._get("files", key))
    raw[at % len(raw)] ^= 0x10
    raw_put(volume, "files", key, bytes(raw))


def bury_the_defect(volume, *, left=()):
    """A repair finds something, and the check after it only what cannot be repaired."""
    assert run(volume)
    assert run(volume, repair=True)
    assert [finding.path for finding in run(volume)] == list(left)


def test_a_sound_volume_has_no_findings(filled):
    assert run(filled, read_data=True) == []


@pytest.mark.parametrize("name", ["stub", "clean", "dirty"])
def test_a_damaged_record_is_made_anew(filled, name):
    before = filled.stub(name)
    spoil(filled, name)
    assert (name.encode(), False) in words(run(filled))
    bury_the_defect(filled)
    record = filled.record(name)
    assert (record.residency is Residency.STUB) == (name == "stub")
    if before is not None:
        assert (record.fid, record.copy.generation) == (before.fid, before.generation)
    assert filled.server.read(filled.path(name)) == SMALL


def test_of_many_findings_so_many_are_kept_and_the_others_counted(filled, monkeypatch):
    monkeypatch.setattr(checking, "_MOST", 2)
    for name in ("a", "b", "c"):
        filled.server.create(filled.path(name), SMALL)
        filled.demote(name)
    for key in [info.key for info in filled.store.list("data/")]:
        filled.store.delete([key])
    found = run(filled)
    assert len(found) == 3 and found[-1].what == "... and 3 more findings" and not found[-1].repaired


def test_of_files_that_are_as_the_index_says_no_list_is_kept(filled, monkeypatch):
    kept, real = [], checking._orphans

    def orphans(tier, repair, strange):
        kept.append(set(strange))
        return real(tier, repair, strange)

    monkeypatch.setattr(checking, "_orphans", orphans)
    assert run(filled) == []
    spoil(filled, "stub")
    run(filled)
    assert kept == [set(), {filled.stub("stub").key}]


def test_the_object_of_a_stub_with_a_damaged_record_is_no_orphan(filled):
    key = filled.stub("stub").key
    spoil(filled, "stub")
    run(filled, repair=True)
    assert key not in {buried for _, buried in filled.index.tombstones(1 << 62)}


def test_a_missing_record_is_made_anew(filled):
    ino = ino_of(filled, "stub")
    filled.index.commit(lambda w: w.delete(ino)).result()
    bury_the_defect(filled)
    assert filled.server.read(filled.path("stub")) == SMALL


def test_a_stub_that_the_index_calls_resident(filled):
    record = filled.record("stub")
    raw_put(filled, "files", U64.pack(record.ino), pack_record(replace(record, residency=Residency.RESIDENT)))
    assert filled.server.read(filled.path("clean")) == SMALL
    bury_the_defect(filled)
    assert filled.record("stub").residency is Residency.STUB
    assert filled.server.read(filled.path("stub")) == SMALL


def test_a_resident_file_that_the_index_calls_a_stub(filled):
    record = filled.record("clean")
    raw_put(filled, "files", U64.pack(record.ino), pack_record(replace(record, residency=Residency.STUB)))
    bury_the_defect(filled)
    assert filled.record("clean").residency is Residency.RESIDENT
    assert filled.server.read(filled.path("clean")) == SMALL


def test_a_stub_that_is_not_its_records(filled):
    record = filled.record("stub")
    wrong = replace(record, copy=replace(record.copy, tag=b"x" * 8))
    raw_put(filled, "files", U64.pack(record.ino), pack_record(wrong))
    run(filled, repair=True)
    assert run(filled) == []
    assert filled.record("stub").copy.tag == record.copy.tag
    assert filled.server.read(filled.path("stub")) == SMALL


def test_data_in_what_says_it_is_a_stub_is_nobodys_to_give_up(filled):
    """Somebody's work under a stub attribute that is not its own: found, and left to a person."""
    stub = filled.stub("stub")
    fd = os.open(filled.path("dirty"), os.O_RDWR)
    try:
        filled.tree.write_stub(fd, replace(stub, tag=b"y" * 8))
    finally:
        os.close(fd)
    before = filled.record("dirty")
    findings = [finding for finding in run(filled, repair=True) if finding.path == b"dirty"]
    assert findings and not any(finding.repaired for finding in findings)
    assert filled.record("dirty") == before
    with open(filled.path("dirty"), "rb") as file:
        assert file.read() == SMALL


def test_a_lost_object_of_a_resident_file_is_copied_out_anew(filled):
    record = filled.record("clean")
    filled.store.delete([object_key(record.fid, record.copy.generation, record.copy.tag)])
    bury_the_defect(filled)
    assert filled.record("clean").dirty


def test_a_lost_object_of_a_stub_is_named(filled):
    filled.store.delete([filled.stub("stub").key])
    bury_the_defect(filled, left=[b"stub"])


def test_only_reading_finds_rotten_content(filled):
    key = filled.stub("stub").key
    filled.store.delete([key])
    filled.store.put(key, [bytes(len(SMALL))], len(SMALL))
    assert run(filled) == []
    assert words(run(filled, read_data=True)) == [(b"stub", False)]


def test_an_object_that_nothing_refers_to_is_buried(filled):
    key = object_key(b"q" * 16, 77, b"r" * 8)
    filled.store.put(key, [b"left over"], 9)
    bury_the_defect(filled)
    assert key in {buried for _, buried in filled.index.tombstones(1 << 62)}


def test_what_a_collection_removes_during_a_check_is_no_finding(filled, monkeypatch):
    """With its object goes all that the index knew of it."""
    key, listed = object_key(b"q" * 16, 77, b"r" * 8), filled.store.list
    filled.store.put(key, [b"a former version"], 16)
    filled.index.commit(lambda w: w.bury_found(key)).result()
    ((beat, _),) = [buried for buried in filled.index.tombstones(1 << 62) if buried[1] == key]

    def listing(prefix):
        yield from list(listed(prefix))
        filled.store.delete([key])
        filled.index.commit(lambda w: w.drop_tombstone(beat, key)).result()

    monkeypatch.setattr(filled.store, "list", listing)
    assert run(filled, repair=True) == []
    assert key not in {buried for _, buried in filled.index.tombstones(1 << 62)}


def test_a_record_of_a_file_that_is_gone_goes_and_keeps_no_object(filled, needs_root):
    """The mark of its end was lost: nothing else would ever ask for it."""
    record = filled.record("clean")
    key = object_key(record.fid, record.copy.generation, record.copy.tag)
    os.unlink(filled.path("clean"))
    assert words(run(filled)) == [(b"clean", False)]
    assert filled.index.get(record.ino) == record
    bury_the_defect(filled)
    assert filled.index.get(record.ino) is None and filled.index.totals().files == 2
    assert key in {buried for _, buried in filled.index.tombstones(1 << 62)}


def test_what_is_removed_during_a_check_is_no_finding(filled, monkeypatch):
    def found(_kit, _seen):
        yield filled.record("clean")
        filled.server.unlink(filled.path("clean"))

    monkeypatch.setattr(checking, "gone", found)
    assert list(checking._gone(filled.tier, True, set())) == []


def test_what_cannot_be_asked_for_is_not_taken_for_gone(filled, monkeypatch):
    def refused(_handle, _flags):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(filled.tier.kit.tree, "open_handle", refused)
    with pytest.raises(OSError, match="Too many open files"):
        list(survey.gone(filled.tier.kit, set()))


def test_what_others_put_into_the_bucket_is_theirs(filled):
    strange = ["data/readme.txt", "data/ab", "data/ab/cd/ef-01", "data/a/b/c/d/e"]
    for key in strange:
        filled.store.put(key, b"x", 1)
    assert run(filled, repair=True) == []
    assert {info.key for info in filled.store.list("data/")} >= set(strange)


def test_sums_that_are_not_those_of_the_records(filled):
    def spoil_sums(w):
        w._totals[0] += 5

    filled.index.commit(spoil_sums).result()
    bury_the_defect(filled)
    assert filled.index.totals().files == 3


def test_work_goes_on_over_a_damaged_record(filled):
    """Marks of a file with a damaged record, and of others, are applied; the next mount looks at the tree."""
    filled.index.commit(lambda w: w.set_surveyed(True)).result()
    spoil(filled, "clean")
    filled.server.write(filled.path("clean"), b"new work")
    filled.server.create(filled.path("other"), b"other")
    assert filled.record("clean").dirty and filled.record("other").dirty
    assert not filled.index.surveyed
    assert [item.demoted for item in filled.demote("clean", "other")] == [True, True]
    assert filled.server.read(filled.path("clean")) == b"new work" + SMALL[8:]


def test_a_record_under_another_inodes_key_is_damaged(filled):
    record = filled.record("clean")
    with pytest.raises(IndexError_, match="damaged"):
        unpack_record(record.ino ^ 4, pack_record(record))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["stub", "clean"]),
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 40),
)
def test_whatever_a_record_has_become_content_is_never_wrong(filled, name, flips, cut):
    """Bytes of a stub's or a clean file's record are changed or missing: it reads right, before and after."""
    key = U64.pack(ino_of(filled, name))
    raw = bytearray(filled.index._get("files", key))
    for at, bits in flips:
        raw[at % len(raw)] ^= bits
    raw_put(filled, "files", key, bytes(raw[: len(raw) - cut]))
    assert filled.server.read(filled.path(name)) == SMALL
    filled.settle(name)
    run(filled, repair=True)
    assert filled.record(name) is not None and run(filled) == []
    assert filled.server.read(filled.path(name)) == SMALL
    deadline = time.monotonic() + 10
    while not (item := filled.demote(name)[0]).demoted:
        assert "open" in item.reason and time.monotonic() < deadline, item.reason  # the fetch lets go of it
        time.sleep(0.002)
    assert filled.server.read(filled.path(name)) == SMALL
    filled.settle(name)


# --- each check alone -------------------------------------------------------------------------------------


def forget_record(volume):
    ino = ino_of(volume, "clean")
    volume.index.commit(lambda w: w.delete(ino)).result()


def another_tag(volume):
    record = volume.record("stub")
    wrong = replace(record, copy=replace(record.copy, tag=b"x" * 8))
    raw_put(volume, "files", U64.pack(record.ino), pack_record(wrong))


def longer_object(volume):
    record = volume.record("clean")
    key = object_key(record.fid, record.copy.generation, record.copy.tag)
    volume.store.put(key, SMALL + b"more", len(SMALL) + 4)


# What is planted, in which file, for which check alone to find.
DEFECTS = {
    recovery.check_record: (forget_record, b"clean"),
    recovery.check_stub: (another_tag, b"stub"),
    recovery.check_object: (longer_object, b"clean"),
}


def found_alone(volume, check, repair=False):
    cases = checking._cases(volume.tier, repair, False, checking._Findings(), InodeSet())
    found = [f for case in cases for f in check(case)]
    return [(f.path, f.repaired) for f in found]


def test_what_is_just_being_made_to_agree_is_no_finding(filled):
    """The attribute of a stub and its record are two: a fetch that is settling changes one before the other."""
    ino = os.stat(filled.path("clean")).st_ino
    before = filled.record("clean")
    copy = replace(before.copy, generation=before.generation)
    stubbed = replace(before, residency=Residency.STUB, copy=copy)
    filled.index.commit(lambda w: (w.put(stubbed), w.put_pending(ino))).result()
    assert found_alone(filled, recovery.check_record) == []
    filled.index.commit(lambda w: w.drop_pending(ino)).result()
    assert found_alone(filled, recovery.check_record) == [(b"clean", False)]
    cases = checking._cases(filled.tier, False, False, checking._Findings(), InodeSet())
    (case,) = [case for case in cases if case.path == b"clean"]
    filled.index.commit(lambda w: w.put(before)).result()
    assert list(recovery.check_record(case)) == []
    # Moved and moved back since the look: its record is as it was.
    fd = os.open(filled.path("clean"), os.O_PATH)
    moved = replace(case, fd=fd, record=filled.record("clean"), stub=Stub.of(before.fid, before.copy))
    assert list(recovery.check_record(moved)) == []
    os.close(fd)


def test_every_check_has_a_defect_of_its_own():
    assert set(DEFECTS) == set(recovery.CHECKS)


@pytest.mark.parametrize("check", recovery.CHECKS, ids=lambda check: check.__name__)
def test_a_check_finds_its_defect_alone_and_repairs_it(filled, check):
    plant, path = DEFECTS[check]
    plant(filled)
    for other in recovery.CHECKS:
        assert found_alone(filled, other) == ([(path, False)] if other is check else []), other
    assert found_alone(filled, check, repair=True) == [(path, True)]
    assert [found_alone(filled, each) for each in recovery.CHECKS] == [[], [], []]
    assert filled.server.read(filled.path(os.fsdecode(path))) == SMALL


def test_a_stub_of_another_length_than_its_copy_is_named(filled):
    """Truncated behind the mount: the object has all of it still, and gives it back (test_shortened.py)."""
    key = filled.stub("stub").key
    os.truncate(filled.path("stub"), 10)
    assert found_alone(filled, recovery.check_stub) == [(b"stub", False)]
    assert found_alone(filled, recovery.check_record) == found_alone(filled, recovery.check_object) == []
    assert filled.stub("stub").key == key and os.stat(filled.path("stub")).st_size == 10
    assert found_alone(filled, recovery.check_stub, repair=True) == [(b"stub", True)]
    assert filled.server.read(filled.path("stub")) == SMALL


def test_a_large_file_without_its_list_of_digests_is_found(filled):
    filled.server.create(filled.path("large"), os.urandom(9 << 20))
    filled.demote("large", punch=False)
    record = filled.record("large")
    key = object_key(record.fid, record.copy.generation, record.copy.tag)
    filled.store.delete([key + SIDE_SUFFIX])
    assert found_alone(filled, recovery.check_object) == [(b"large", False)]
    assert found_alone(filled, recovery.check_object, repair=True) == [(b"large", True)]
    assert filled.record("large").dirty
    filled.demote("large", punch=False)
    assert found_alone(filled, recovery.check_object) == []


def test_a_read_finds_the_copy_of_a_stub_whose_record_is_another(filled):
    """A pass through the index would not come by it."""
    key = filled.stub("stub").key
    another_tag(filled)
    filled.store.put(key, bytes(len(SMALL)), len(SMALL))
    found = [finding for finding in run(filled, read_data=True) if "digest" in finding.what]
    assert [(finding.path, finding.repaired) for finding in found] == [(b"stub", False)]


@pytest.mark.parametrize("what", ["gone", "moved", "link"])
def test_directories_that_change_while_a_check_runs(filled, monkeypatch, tmp_path, what):
    """Those that go are none of its business, those that move are looked at, and a link leads nowhere."""
    path = filled.path
    for name in ("a", "a/b", "a/c"):
        filled.server.mkdir(path(name))
    for name in ("a/b/inner", "a/c/before"):
        filled.server.create(path(name), SMALL)
    (tmp_path / "outside/b").mkdir(parents=True)
    (tmp_path / "outside/b/secret").write_bytes(SMALL)
    filled.tier.drain()
    looked, real = [], os.listdir

    def listdir(fd):
        names = real(fd)
        if isinstance(fd, int) and names == ["before"] and not looked:
            looked.append(names)
            if what == "gone":
                filled.server.unlink(path("a/b/inner"))
                os.rmdir(path("a/b"))
            else:
                filled.server.rename(path("a"), path("elsewhere"))
                if what == "link":
                    os.symlink(tmp_path / "outside", path("a"))
        return names

    monkeypatch.setattr(os, "listdir", listdir)
    found = checking.check(filled.tier, True, None, Job())
    assert looked and found.findings == [] and found.files == (4 if what == "gone" else 5)
    assert filled.index.get((tmp_path / "outside/b/secret").stat().st_ino) is None


def test_a_directory_that_cannot_be_looked_into_is_a_finding_and_hides_no_other(filled, monkeypatch):
    filled.server.mkdir(filled.path("closed"))
    filled.server.create(filled.path("closed/a"), SMALL)
    filled.tier.drain()
    place, real = os.stat(filled.path("closed")).st_ino, os.open

    def refuse(name, flags, *more, **named):
        directory = named.get("dir_fd")
        if name == b"a" and directory is not None and os.fstat(directory).st_ino == place:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(name, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    found = checking.check(filled.tier, False, None, Job())
    assert [finding.path for finding in found.findings] == [b"closed"] and found.files == 3
