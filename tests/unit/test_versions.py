"""Former contents: which there are under which path, which one a moment means, and their bytes."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from dating import DAY, AgingVolume
from tierfsd.credentials import Peer
from tierfsd.versions_server import _permits

from tierfs import moments, versions
from tierfs.digests import SIDE_SUFFIX
from tierfs.errors import ObjectCorruptError, PathError, UsageError

CHUNK = 256 * 1024


@pytest.fixture
def volume(tmp_path):
    made = AgingVolume(tmp_path, keep_versions=30 * DAY, grace=DAY, chunk_size=CHUNK)
    yield made
    made.stop()


def listed(volume, name):
    """What is kept of a path, as the daemon finds it."""
    record = volume.record(name) if os.path.lexists(volume.path(name)) else None
    volume.tier.drain()
    return versions.of_path(volume.tier.kit, os.fsencode(name), record)


def beneath(volume, name):
    volume.tier.drain()
    return [(kept.path, kept.state) for kept in versions.beneath(volume.tier.kit, os.fsencode(name))]


def bytes_of(volume, kept):
    data = bytearray(kept.size)
    for offset, piece in versions.content(volume.tier.kit, kept):
        data[offset : offset + len(piece)] = piece
    return bytes(data)


def contents(volume, name):
    return [(kept.state, bytes_of(volume, kept)[:4]) for kept in listed(volume, name)]


def test_an_overwritten_file_has_all_its_contents(volume):
    for word in (b"one.", b"two.", b"six."):
        volume.write("a", word * 500)
    assert contents(volume, "a") == [("superseded", b"one."), ("superseded", b"two."), ("current", b"six.")]
    first, second, last = listed(volume, "a")
    assert first.until == second.since and second.until == last.since and last.until is None
    assert first.generation < second.generation < last.generation
    assert {kept.key for kept in (first, second, last)} == volume.objects()


def test_a_file_that_was_changed_since_its_copy_has_no_current_one(volume):
    volume.write("a", b"one." * 500)
    volume.server.write(volume.path("a"), b"two." * 500)
    assert contents(volume, "a") == [("superseded", b"one.")]


def test_a_deleted_file_is_found_under_its_last_place(volume):
    volume.server.mkdir(volume.path("d"))
    volume.write("d/a", b"one." * 500)
    os.chmod(volume.path("d/a"), 0o640)
    volume.server.rename(volume.path("d/a"), volume.path("d/b"))
    volume.server.rename(volume.path("d"), volume.path("e"))
    volume.server.unlink(volume.path("e/b"))
    os.rmdir(volume.path("e"))
    assert contents(volume, "e/b") == [("deleted", b"one.")]
    (kept,) = listed(volume, "e/b")
    assert (kept.mode & 0o777, kept.uid, kept.gid) == (0o640, os.getuid(), os.getgid())
    assert listed(volume, "d/a") == listed(volume, "e/a") == []
    assert beneath(volume, "e") == [(b"e/b", "deleted")] and beneath(volume, "d") == []
    assert beneath(volume, "") == [(b"e/b", "deleted")]


def test_a_version_follows_its_file_through_renames(volume):
    volume.write("a", b"one." * 500)
    volume.write("a", b"two." * 500)
    volume.server.rename(volume.path("a"), volume.path("b"))
    volume.write("b", b"six." * 500)
    assert contents(volume, "b") == [("superseded", b"one."), ("superseded", b"two."), ("current", b"six.")]
    assert contents(volume, "a") == [("superseded", b"one.")], "what it was while it was here"
    volume.server.unlink(volume.path("b"))
    assert [state for state, _ in contents(volume, "b")] == ["superseded", "superseded", "deleted"]


def test_several_files_at_one_path_over_time(volume):
    for word in (b"one.", b"two."):
        volume.write("a", word * 500)
        volume.server.unlink(volume.path("a"))
    volume.write("a", b"six." * 500)
    assert contents(volume, "a") == [("deleted", b"one."), ("deleted", b"two."), ("current", b"six.")]


def test_a_file_replaced_by_a_rename_is_kept_as_editors_do_it(volume):
    volume.write("a", b"one." * 500)
    volume.server.create(volume.path("a.new"), b"two." * 500)
    st = os.stat(volume.path("a"))
    os.link(volume.path("a"), volume.path(".held"))
    volume.server.unlink(volume.path("a"))
    volume.server.rename(volume.path("a.new"), volume.path("a"))
    assert not volume.demote("a", punch=False)[0].reason
    assert contents(volume, "a") == [("deleted", b"one."), ("current", b"two.")]
    assert listed(volume, "a")[0].mode == st.st_mode


def test_of_a_file_with_two_names_only_the_last_counts(volume):
    volume.write("a", b"one." * 500)
    os.link(volume.path("a"), volume.path("b"))
    os.unlink(volume.path("a"))  # one name less: no mark says so
    volume.server.unlink(volume.path("b"))
    assert contents(volume, "b") == [("deleted", b"one.")] and listed(volume, "a") == []


def test_paths_longer_than_a_key_of_the_index(volume):
    parts = [letter * 200 for letter in "abc"]
    for depth in range(1, 4):
        volume.server.mkdir(volume.path("/".join(parts[:depth])))
    deep = "/".join(parts)
    for name in ("x", "y"):
        volume.write(f"{deep}/{name}", name.encode() * 900)
        volume.server.unlink(volume.path(f"{deep}/{name}"))
    assert contents(volume, f"{deep}/x") == [("deleted", b"xxxx")]
    assert len(beneath(volume, deep)) == len(beneath(volume, parts[0])) == 2
    assert beneath(volume, "a" * 199) == []


def test_large_and_sparse_files_come_back_with_their_holes(volume):
    data = os.urandom(3 * CHUNK + 12345)
    volume.write("large", data)
    with open(volume.path("sparse"), "wb") as file:
        file.write(b"begin")
        file.seek(5 * CHUNK)
        file.write(b"end")
    sparse = Path(volume.path("sparse")).read_bytes()
    assert not volume.demote("sparse", punch=False)[0].reason
    for name, content in (("large", data), ("sparse", sparse)):
        volume.server.unlink(volume.path(name))
        (kept,) = listed(volume, name)
        assert bytes_of(volume, kept) == content
    assert sum(len(piece) for _, piece in versions.content(volume.tier.kit, kept)) < CHUNK


def test_digests_come_from_the_store_where_the_index_has_none(volume):
    data = os.urandom(2 * CHUNK)
    volume.write("a", data)
    volume.server.unlink(volume.path("a"))
    (kept,) = listed(volume, "a")
    volume.index.commit(lambda w: w.drop_leaves(kept.fid, kept.generation)).result()
    assert bytes_of(volume, kept) == data
    volume.store.delete([kept.key + SIDE_SUFFIX])
    with pytest.raises(Exception, match="list of digests"):
        bytes_of(volume, kept)


@pytest.mark.parametrize("size", [1000, 2 * CHUNK])
def test_altered_bytes_are_never_given(volume, size):
    key = volume.write("a", os.urandom(size))
    data = bytearray(volume.store.get(key))
    data[size // 2] ^= 1
    volume.store.put(key, bytes(data), size)
    with pytest.raises(ObjectCorruptError):
        bytes_of(volume, listed(volume, "a")[0])


def test_choosing(volume):
    times = []
    for word in (b"one.", b"two."):
        volume.write("a", word * 500)
        times.append(time.time_ns())
        time.sleep(0.03)  # two ticks of ctime
    volume.server.unlink(volume.path("a"))
    found = listed(volume, "a")
    assert [bytes_of(volume, versions.choose(found, None, at))[:4] for at in times] == [b"one.", b"two."]
    assert versions.choose(found, found[0].generation, None) is found[0]
    for generation, when in ((5, None), (None, 7), (None, time.time_ns() + 10**12)):
        with pytest.raises(PathError, match="no such version"):
            versions.choose(found, generation, when)


NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("text", "ago"),
    [
        ("2 days ago", 172800),
        ("1 hour ago", 3600),
        ("90 Minutes ago", 5400),
        ("3weeks ago", 1814400),
        ("5 seconds ago", 5),
    ],
)
def test_moments_ago(text, ago):
    assert moments.parse(text, NOW) == int((NOW - ago) * 1e9)


def test_moments_as_dates(monkeypatch):
    monkeypatch.setenv("TZ", "UTC-2")
    time.tzset()
    try:
        assert moments.parse("1970-01-02", NOW) == (86400 - 7200) * 10**9
        assert moments.parse("1970-01-02T03:00:01", NOW) == (86400 + 3601) * 10**9
        assert moments.parse("1970-01-02 03:00Z", NOW) == (86400 + 10800) * 10**9
        assert moments.parse("1970-01-02T03:00+01:00", NOW) == (86400 + 7200) * 10**9
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    "text", ["", "yesterday", "2 days", "2026-13-01", "2026-1-1", "12:30", "-1 days ago", "20260101"]
)
def test_what_is_no_moment(text):
    with pytest.raises(UsageError, match="is no moment: write"):
        moments.parse(text, NOW)


def test_what_others_might_not_read_then_they_do_not_get_for_what_they_may_read_now(volume):
    """A secret is overwritten, and the file then opened to all: of the former content nobody knows by whom it
    could be read."""
    owner, other = Peer(4711, 4711, ()), Peer(4712, 4712, ())
    for name in ("a", "b", "c", "d"):
        volume.write(name, b"secret" * 500)
        os.chown(volume.path(name), owner.uid, owner.gid)
    volume.server.chmod(volume.path("d"), 0o644)
    for name in ("a", "b", "c"):
        volume.server.chmod(volume.path(name), 0o600)
    for name in ("a", "b", "c"):
        volume.server.write(volume.path(name), b"public" * 500)
        volume.server.chmod(volume.path(name), 0o644)
    volume.write("a", b"public" * 600)
    for name in ("c", "d"):
        volume.server.unlink(volume.path(name))
    allowed = {}
    for name in ("a", "b", "c", "d"):
        first = listed(volume, name)[0]
        assert bytes_of(volume, first)[:6] == b"secret"
        there = os.stat(volume.path(name)) if name in "ab" else None
        if first.version is None:  # as the file that is there now says
            first = replace(first, mode=there.st_mode, uid=there.st_uid, gid=there.st_gid)
        assert _permits(owner, first, True)
        allowed[name] = _permits(other, first, True)
    assert allowed == {"a": False, "b": False, "c": False, "d": True}
