"""An order of as many files as a volume has: what is kept of them, and how many are in hand at once."""

from __future__ import annotations

import os
import threading
import tracemalloc
from types import SimpleNamespace

import pytest
from tierfsd import backend as backend_module
from tierfsd.backend import TierBackend
from tierfsd.credentials import Peer
from tierfsd.reach import Gathered, Reach, Target
from tiering import Job, Volume

from tierfs import bringing, control, places
from tierfs import tier as tier_module

NAMES = [f"f{number:03}" for number in range(60)]


@pytest.fixture
def volume(tmp_path):
    made = Volume(tmp_path)
    for name in NAMES:
        made.server.create(made.path(name), name.encode() * 1000)
    yield made
    made.stop()


class Given:
    """Items, and how many have been taken."""

    def __init__(self, items):
        self._items = items
        self.taken = 0

    def __iter__(self):
        for item in self._items:
            self.taken += 1
            yield item


def test_of_a_demotion_only_a_few_batches_are_in_hand(volume, monkeypatch):
    monkeypatch.setattr(tier_module, "BATCH", 4)
    given = Given([volume.item(name) for name in NAMES])
    for done, item in enumerate(volume.tier.demoted(given)):
        assert item.demoted
        assert given.taken - done <= 2 * (tier_module._IN_HAND + 1) + 1
    assert given.taken == len(NAMES)


def test_of_a_fetch_only_a_few_files_are_in_hand(volume, monkeypatch):
    monkeypatch.setattr(bringing, "_IN_HAND", 4)
    volume.demote(*NAMES)
    given = Given([volume.item(name) for name in NAMES])
    for done, item in enumerate(volume.tier.fetched(given)):
        assert not item.reason
        assert given.taken - done <= bringing._IN_HAND + 1
    assert given.taken == len(NAMES)


def test_one_that_takes_long_keeps_no_other_waiting(volume, monkeypatch):
    monkeypatch.setattr(bringing, "_IN_HAND", 4)
    volume.demote(*NAMES)
    slow, go, real = volume.stub(NAMES[0]).key, threading.Event(), volume.store.get

    def get(key, *range_):
        if key == slow:
            assert go.wait(20)
        return real(key, *range_)

    monkeypatch.setattr(volume.store, "get", get)
    done = []
    for item in volume.tier.fetched(volume.item(name) for name in NAMES):
        done.append(item.path.decode())
        if len(done) == len(NAMES) - 1:
            go.set()
    assert sorted(done[:-1]) == NAMES[1:] and done[-1] == NAMES[0]


def test_files_in_directories_are_kept_in_few_bytes(tmp_path):
    depth = tmp_path / ("a long name of a directory " * 5) / ("and of one in it " * 5)
    depth.mkdir(parents=True)
    for number in range(2000):
        os.close(os.open(depth / f"{number:08}", os.O_CREAT, 0o600))
    rootfd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    reach = Reach(rootfd, lambda opath: b"\1" * 12)
    tracemalloc.start()
    try:
        targets, _ = reach.targets(Peer(0, 0, ()), [b""], os.O_RDONLY, threading.Event())
        taken, _ = tracemalloc.get_traced_memory()
        assert len(targets) == 2000 and taken < 70 * len(targets)
    finally:
        tracemalloc.stop()
        os.close(rootfd)
    inos = {target.ino: target for target in targets}
    for entry in os.scandir(depth):
        path = os.fsencode(os.path.relpath(entry.path, tmp_path))
        parent, name = os.stat(depth).st_ino, os.fsencode(entry.name)
        assert inos.pop(entry.inode()) == Target(path, entry.inode(), b"\1" * 12, parent, name, 0, False)
    assert not inos


def test_what_is_named_counts_once_whether_it_is_named_before_or_after_its_directory():
    named = Target(b"link", 7, b"h", 1, b"link", 5, True)
    for before in (True, False):
        targets = Gathered()
        if before:
            targets.add_named(named)
        targets.enter(b"empty", 2)
        targets.enter(b"d", 3)
        targets.add(7, 5, b"h", b"a")
        targets.add(8, 6, b"handle", b"b")
        targets.add(8, 6, b"handle", b"another link")
        if not before:
            targets.add_named(named)
        assert list(targets) == [named, Target(b"d/b", 8, b"handle", 3, b"b", 6, False)]
        assert len(targets) == 2


def test_an_unmount_looks_at_the_dirty_files_page_by_page(volume, monkeypatch):
    monkeypatch.setattr(backend_module, "_ROUND", 7)
    volume.tier.drain()
    backend = TierBackend.__new__(TierBackend)
    backend._tier, backend._kit = volume.tier, volume.tier.kit
    backend._home = SimpleNamespace(identity=SimpleNamespace(view=False))
    backend._looked = threading.Event()
    backend._looked.set()
    backend._journal = SimpleNamespace(catch_up=lambda cancelled: "")
    volume.index.commit(lambda w: w.set_surveyed(True)).result()
    pages, real = [], volume.index.queued

    def queued(start, before, limit):
        pages.append(limit)
        return real(start, before, limit)

    monkeypatch.setattr(volume.index, "queued", queued)
    job = Job()
    done = backend.drain(job)
    assert (done.files, done.stayed) == (len(NAMES), [])
    assert max(pages) == 7 and len(pages) > len(NAMES) // 7
    assert job.reports[-1].files_total == len(NAMES)
    assert not any(volume.record(name).dirty for name in NAMES)


def test_an_answer_names_so_many_and_what_has_failed_before_all(monkeypatch):
    monkeypatch.setattr(backend_module, "LIST_LIMIT", 3)
    stayed = backend_module._Stayed()
    for number in range(10):
        stayed.add(control.Outcome(b"%d" % number, "for a reason", failed=number in (5, 9)))
    assert [outcome.path for outcome in stayed.named] == [b"5", b"9", b"0"]


def test_marks_that_come_in_are_looked_at_without_the_list_of_pins(volume, monkeypatch):
    """There may be as many as files, and each batch of marks would read them all."""
    for name in ("pinned", "other"):
        volume.server.mkdir(volume.path(name))
    item = volume.item("pinned")
    opath = os.open(volume.path("pinned"), os.O_PATH)
    volume.tier.set_pin(opath, item.parent, b"pinned", True)
    os.close(opath)
    volume.demote(NAMES[0])
    volume.tier.drainer.pinned.clear()

    def pins():
        raise AssertionError("the list of pins is read")

    monkeypatch.setattr(volume.index, "pins", pins)
    volume.server.rename(volume.path("other"), volume.path("elsewhere"))
    volume.tier.drain()
    assert not volume.tier.drainer.pinned.is_set()
    volume.server.rename(volume.path(NAMES[0]), volume.path("pinned/stub"))
    volume.tier.drain()
    assert volume.tier.drainer.pinned.is_set()


def test_only_so_many_places_are_remembered(volume, monkeypatch):
    monkeypatch.setattr(places, "_MOST", 7)
    known = {}
    for number in range(10):
        for name in (f"d{number}", f"d{number}/below"):
            volume.server.mkdir(volume.path(name))
            known[os.stat(volume.path(name)).st_ino] = name.encode()
    volume.tier.drain()
    for _ in range(2):
        for ino, path in known.items():
            assert volume.tier.places.directory(ino).path == path
            assert len(volume.tier.places._known) <= 7
