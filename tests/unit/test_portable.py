"""The portable binding without a mount: what it does under its lock, and what beside it."""

import os
import threading
from types import SimpleNamespace

import pytest
from test_vfs_names import ME, World

from tierfs.fuse.portable import Portable
from tierfs.vfs import ROOT


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
