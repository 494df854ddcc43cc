"""The portable binding without a mount: what it does under its lock, and what beside it."""

import errno
import os
import threading
from types import SimpleNamespace

import pytest
from harness import needs_libfuse
from test_vfs_names import ME, World

from tierfs.vfs import ROOT

needs_libfuse()
from tierfs.fuse.portable import Portable  # noqa: E402


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.close()


def test_a_flush_of_the_disk_holds_up_no_other_operation(world, monkeypatch):
    lock = threading.RLock()
    binding = Portable(world.vfs, lock, lambda: None)
    free = []

    def others(_fd):
        def ask():
            free.append(lock.acquire(timeout=1))
            if free[-1]:
                lock.release()

        asking = threading.Thread(target=ask)
        asking.start()
        asking.join()

    monkeypatch.setattr(os, "fdatasync", others)
    flags = os.O_WRONLY | os.O_DSYNC
    _, _, fh, _ = world.vfs.create(ROOT, b"f", flags, 0o644, ME)
    assert binding("write", None, b"content", 0, SimpleNamespace(fh=fh, flags=flags)) == 7
    assert free == [True]
    assert (world.path / "f").read_bytes() == b"content"
    world.vfs.release(fh)


@pytest.fixture
def binding(world):
    return Portable(world.vfs, threading.RLock(), lambda: None)


def test_an_open_file_keeps_the_node_that_was_opened_and_nothing_else_is_left(world, binding, monkeypatch):
    """Also where it has another name a moment later."""
    (world.path / "dir").mkdir()
    (world.path / "dir" / "f").write_bytes(b"content")
    nodes, opened = len(world.vfs.nodes), world.vfs.open
    info = SimpleNamespace(fh=0, flags=os.O_RDONLY)
    monkeypatch.setattr(world.vfs, "open", lambda *_, **o: (_ for _ in ()).throw(OSError(errno.EACCES, "no")))
    with pytest.raises(OSError, match="no"):
        binding("open", "/dir/f", info)
    assert len(world.vfs.nodes) == nodes and not len(world.vfs.files)

    def replaced(*arguments, **more):
        answer = opened(*arguments, **more)
        (world.path / "dir" / "f").rename(world.path / "dir" / "g")
        return answer

    monkeypatch.setattr(world.vfs, "open", replaced)
    assert binding("open", "/dir/f", info) == 0
    assert binding("getattr", None, info)["st_size"] == 7
    assert binding("release", None, info) == 0
    assert len(world.vfs.nodes) == nodes and not len(world.vfs.files)


def test_a_release_that_fails_leaves_nothing_known(world, binding, monkeypatch):
    (world.path / "f").write_bytes(b"content")
    nodes, info = len(world.vfs.nodes), SimpleNamespace(fh=0, flags=os.O_RDONLY)
    binding("open", "/f", info)
    released = world.vfs.release

    def fail(fh):
        released(fh)
        raise OSError(errno.ENOSPC, "no room for its mark")

    monkeypatch.setattr(world.vfs, "release", fail)
    with pytest.raises(OSError, match="no room"):
        binding("release", None, info)
    assert len(world.vfs.nodes) == nodes and not binding._nodes
