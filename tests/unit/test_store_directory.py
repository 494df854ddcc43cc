"""The directory store where it is a directory: crashes, full disks, vanished roots, files that were changed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierfs.errors import (
    BucketMissingError,
    ObjectCorruptError,
    ObjectMissingError,
    StoreDeniedError,
    StoreFullError,
    StoreUnavailableError,
    UsageError,
)
from tierfs.store.directory import DirectoryStore
from tierfs.store.groupsync import GroupSync


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def store(root: Path) -> DirectoryStore:
    return DirectoryStore(str(root), create=True)


def test_an_object_is_a_plain_private_file(store: DirectoryStore, root: Path) -> None:
    store.put("data/ab/id/1-tag", b"content", 7)
    path = root / "data/ab/id/1-tag"
    assert path.read_bytes() == b"content"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == root.stat().st_mode & 0o777 == 0o700


_BLOCK = 64 << 10


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from([b"\0", b"\1", b"\0\1"]), st.integers(0, 3 * _BLOCK)), max_size=6))
def test_zeros_of_any_length_are_read_as_they_were_written(runs: list[tuple[bytes, int]]) -> None:
    pieces = [(what * length)[:length] for what, length in runs]
    content = b"".join(pieces)
    with tempfile.TemporaryDirectory() as place:
        store = DirectoryStore(f"{place}/root", create=True)
        store.put("data/one", iter(pieces), len(content))
        store.put("data/other", content, len(content))
        assert store.get("data/one") == store.get("data/other") == content
        assert store.head("data/one").size == len(content)
        store.close()


def test_a_disk_image_takes_no_more_room_than_its_content(store: DirectoryStore, root: Path) -> None:
    data, hole = os.urandom(_BLOCK), bytes(8 << 20)
    pieces = [hole, data + hole[_BLOCK:], hole, hole[_BLOCK:] + data, hole]
    store.put("data/image", iter(pieces), 40 << 20)
    found = (root / "data/image").stat()
    assert found.st_size == 40 << 20
    assert found.st_blocks * 512 <= 4 * _BLOCK
    assert store.get("data/image") == b"".join(pieces)


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_crash_before_the_name_leaves_nothing_visible(root: Path, call: str) -> None:
    code = f"""
import os, signal
from tierfs.store.directory import DirectoryStore
os.{call} = lambda *args, **names: os.kill(os.getpid(), signal.SIGKILL)
DirectoryStore({str(root)!r}, create=True).put("data/ab/id/1-tag", b"content", 7)
"""
    root.mkdir()
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    store = DirectoryStore(str(root))
    assert list(store.list("")) == []
    with pytest.raises(ObjectMissingError):
        store.get("data/ab/id/1-tag")
    assert len(list((root / ".tmp").iterdir())) == 1


def test_a_root_that_is_made_has_its_name_on_the_disk(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, sync = [], os.fsync

    def note(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        sync(fd)

    monkeypatch.setattr(os, "fsync", note)
    store.put("a", b"x", 1)
    assert synced[0] == str(root.parent) and str(root) in synced


def test_a_directory_that_is_only_looked_at_stays_as_it_is(root: Path) -> None:
    root.mkdir()
    store = DirectoryStore(str(root))
    with pytest.raises(ObjectMissingError):
        store.get("volume.json")
    assert list(store.list("")) == [] and list(root.iterdir()) == []
    store.put("a", b"x", 1)
    assert store.get("a") == b"x"


def test_old_unfinished_objects_are_removed_and_young_ones_kept(store: DirectoryStore, root: Path) -> None:
    store.put("a", b"x", 1)
    for name, age in (("old", 25 * 3600), ("young", 23 * 3600)):
        path = root / ".tmp" / name
        path.write_bytes(b"part")
        os.utime(path, (time.time() - age,) * 2)
    again = DirectoryStore(str(root))
    assert again.get("a") == b"x"
    assert [path.name for path in (root / ".tmp").iterdir()] == ["young"]


def test_the_own_names_are_no_keys(store: DirectoryStore) -> None:
    store.put_if("a", b"x", None)
    assert [info.key for info in store.list("")] == ["a"]
    for key in (".tmp", ".tmp/x", ".lock"):
        with pytest.raises(UsageError):
            store.get(key)


def test_every_change_is_synced_before_the_answer(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("first", b"x", 1)
    synced: list[str] = []
    fsync, rename = os.fsync, os.rename

    def traced_fsync(fd: int) -> None:
        name = os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), root)
        synced.append("file" if name.startswith(".tmp/") else name)
        fsync(fd)

    def traced_rename(*args, **names) -> None:
        synced.append("rename")
        rename(*args, **names)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "rename", traced_rename)
    store.put("data/ab/id/1", b"x", 1)
    assert synced[:2] == ["file", "rename"]
    assert set(synced[2:]) == {"data/ab/id", "data/ab", "data", "."}
    synced.clear()
    store.put("data/ab/id/2", b"x", 1)
    assert synced[:3] == ["file", "rename", "data/ab/id"]


def test_a_cut_object_is_never_short_data(store: DirectoryStore, root: Path) -> None:
    store.put("a", b"0123456789", 10)
    before = store.head("a")
    os.truncate(root / "a", 6)
    assert store.head("a").etag != before.etag
    for call in (
        lambda: store.get("a", 0, 10),
        lambda: list(store.stream("a", 5, 5)),
        lambda: store.get("a", 7),
    ):
        with pytest.raises(ObjectCorruptError, match="shorter than recorded"):
            call()


def test_what_is_no_file_is_no_object(store: DirectoryStore, root: Path) -> None:
    store.put("d/a", b"x", 1)
    (root / "link").symlink_to("/etc/passwd")
    os.mkfifo(root / "fifo")
    assert [info.key for info in store.list("")] == ["d/a"]
    for key in ("link", "d", "fifo"):
        for read in (store.get, store.head):
            with pytest.raises(ObjectMissingError):
                read(key)


def test_a_root_that_vanished_is_not_made_again(store: DirectoryStore, root: Path, tmp_path: Path) -> None:
    store.put("a", b"x", 1)
    root.rename(tmp_path / "away")
    for call in (lambda: store.put("b", b"x", 1), lambda: store.get("a"), lambda: list(store.list(""))):
        with pytest.raises(BucketMissingError):
            call()
    assert not root.exists()
    (tmp_path / "away").rename(root)
    assert store.get("a") == b"x"


def test_two_threads_make_a_store_at_once(tmp_path, monkeypatch):
    """One has looked in vain when the other makes it."""
    path, looked = tmp_path / "new", []
    store = DirectoryStore(path, create=True)
    stat_ = os.stat

    def disturbed(what, *args, **named):
        if os.fspath(what) == str(path) and not looked:
            looked.append(True)
            store.put("other", b"2", 1)
            raise FileNotFoundError(what)
        return stat_(what, *args, **named)

    monkeypatch.setattr(os, "stat", disturbed)
    store.put("key", b"1", 1)
    assert looked and bytes(store.get("key")) == b"1" and bytes(store.get("other")) == b"2"
    shutil.rmtree(path)
    with pytest.raises(BucketMissingError):
        store.put("key", b"1", 1)
    store.close()


def test_another_directory_in_the_roots_place_is_refused(
    store: DirectoryStore, root: Path, tmp_path: Path
) -> None:
    store.put("volume.json", b"{}", 2)
    root.rename(tmp_path / "away")
    root.mkdir()  # what is beneath an unmounted NAS
    for call in (lambda: store.put("b", b"x", 1), lambda: store.get("volume.json")):
        with pytest.raises(StoreUnavailableError, match="is it mounted"):
            call()
    assert list(root.iterdir()) == []
    (root / "volume.json").write_bytes(b"{}")  # mounted again: the same store, another device
    assert store.get("volume.json") == b"{}"


def test_the_parents_of_a_root_are_not_made(tmp_path: Path) -> None:
    with pytest.raises(BucketMissingError, match="does not exist"):
        DirectoryStore(str(tmp_path / "nas" / "store"), create=True).put("a", b"x", 1)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BucketMissingError, match="not a directory"):
        DirectoryStore(str(tmp_path / "file")).get("a")


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, StoreFullError),
        (errno.EDQUOT, StoreFullError),
        (errno.EROFS, StoreDeniedError),
        (errno.EACCES, StoreDeniedError),
        (errno.EIO, StoreUnavailableError),
        (errno.ESTALE, StoreUnavailableError),
    ],
)
@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_errors_of_the_disk(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, error: type
) -> None:
    store.put("a", b"x", 1)

    def fail(*args, **names) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(os, call, fail)
        store.put("b", b"x", 1)
    assert [info.key for info in store.list("")] == ["a"]
    assert list((root / ".tmp").iterdir()) == []


def test_a_sync_that_fails_fails_the_put(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("a", b"x", 1)

    def fail(self: GroupSync, root: int, directory: str) -> None:
        raise OSError(errno.EIO, "disk")

    monkeypatch.setattr(GroupSync, "sync", fail)
    with pytest.raises(StoreUnavailableError):
        store.put("b", b"x", 1)


def test_the_directory_of_a_file_goes_with_its_last_version(store: DirectoryStore, root: Path) -> None:
    for generation in "12":
        store.put(f"data/ab/id/{generation}", b"x", 1)
    store.delete(["data/ab/id/1"])
    assert (root / "data/ab/id").exists()
    store.delete(["data/ab/id/2"])
    assert list((root / "data/ab").iterdir()) == []
    store.put("data/ab/id/3", b"x", 1)
    assert store.get("data/ab/id/3") == b"x"
