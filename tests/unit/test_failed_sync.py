"""What could not be written to the local disk: the kernel says so once, and the next sync says all is well.

The pages that it gave up stay in memory for as long as there is room, and look as if they had been written.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading

import pytest
from bare import until
from tiering import MIB, Volume

from tierfs import syscalls
from tierfs.fuse import protocol as p
from tierfs.model import LEAF, Residency
from tierfs.recovery import finish_pending
from tierfs.vfs import ROOT

SIZE = 5 * MIB + 12_345
READ = 2 * MIB


@pytest.fixture
def volume(tmp_path):
    made = Volume(tmp_path, chunk_size=MIB, fetch_timeout=5.0)
    yield made
    made.stop()


def cold(volume, size=SIZE):
    data = os.urandom(size)
    volume.server.create(volume.path("file"), data)
    (item,) = volume.demote("file")
    assert item.demoted, item.reason
    return data


@pytest.fixture
def fails(volume, monkeypatch):
    """A list: one sync of the file fails for each of its items, when that (an event) has been set. What was not
    written is gone at once, as from a memory that is short of room; what is on the disk stays."""
    left, fdatasync, written = [], os.fdatasync, {}

    def sync(fd):
        ino, size = os.fstat(fd).st_ino, os.fstat(fd).st_size
        if not left or ino != os.stat(volume.path("file")).st_ino:
            written[ino] = {at for at in range(0, size, LEAF) if any(os.pread(fd, LEAF, at))}
            return fdatasync(fd)
        assert left[-1].wait(10)
        left.pop()
        mode = syscalls.FALLOC_PUNCH_HOLE | syscalls.FALLOC_KEEP_SIZE
        for at in set(range(0, size, LEAF)) - written.get(ino, set()):
            syscalls.fallocate(fd, mode, at, LEAF)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", sync)
    return left


def test_what_was_lost_of_a_part_is_fetched_anew(volume, fails):
    data, path = cold(volume), volume.path("file")
    ino, part = os.stat(path).st_ino, data[READ : READ + MIB]
    fails.append(threading.Event())
    handle = volume.server.open(path)
    assert volume.server.read(path, READ, MIB) == part
    fails[0].set()
    assert until(lambda: not fails and volume.tier.filler.arrival(ino) is None)
    assert volume.index.get_bits(ino) is None
    assert until(lambda: not any(volume.server.gate.states.inodes[ino].content.present))
    assert volume.server.read(path, READ, MIB) == part
    volume.server.release(handle)


def test_what_was_on_the_disk_before_stays(volume, fails):
    data, path = cold(volume), volume.path("file")
    ino = os.stat(path).st_ino
    volume.server.read(path, 4 * MIB, LEAF)
    assert until(lambda: volume.index.get_bits(ino) is not None)
    before = volume.index.get_bits(ino)
    handle = volume.server.open(path)
    fails.append(threading.Event())
    assert volume.server.read(path, READ, MIB) == data[READ : READ + MIB]
    fails[0].set()
    assert until(lambda: not fails and volume.tier.filler.arrival(ino) is None)
    assert volume.index.get_bits(ino) == before
    kept = int.from_bytes(before, "little").bit_count()
    assert until(lambda: volume.server.gate.states.inodes[ino].content.present.count(1) == kept)
    volume.server.release(handle)
    assert volume.server.read(path) == data


@pytest.mark.parametrize("size", [100_000, SIZE], ids=["small", "large"])
def test_a_file_whose_last_sync_failed_does_not_become_resident(volume, fails, size):
    data, path = cold(volume, size), volume.path("file")
    fails.append(threading.Event())
    handle = volume.server.open(path)
    assert volume.server.read(path) == data
    fails[0].set()
    assert until(lambda: not fails and volume.tier.filler.arrival(os.stat(path).st_ino) is None)
    assert volume.stub("file") is not None and volume.record("file").residency is not Residency.RESIDENT
    assert until(lambda: not any(handle.inode.content.present))
    assert volume.server.read(path) == data
    volume.server.release(handle)
    volume.settle("file")
    assert volume.record("file").residency is Residency.RESIDENT
    with open(path, "rb") as file:
        assert file.read() == data


def test_zeros_that_were_read_before_blocks_that_nobody_wrote_are_nobodys_work(volume):
    """As after a mover that was killed: what it was about to write has its blocks, and who read on in the file
    has zeros of them in memory, which count as data then."""
    data, path = cold(volume), volume.path("file")
    fd = os.open(path, os.O_RDWR)
    try:
        syscalls.fallocate(fd, syscalls.FALLOC_KEEP_SIZE, 0, SIZE)
        assert os.pread(fd, SIZE, 0) == bytes(SIZE)
        if volume.tree.extents(fd, SIZE) != [(0, SIZE)]:
            pytest.skip("this filesystem looks at the blocks alone")
    finally:
        os.close(fd)
    assert volume.server.read(path) == data


def test_each_who_has_a_file_open_hears_of_a_failed_sync_once(side, monkeypatch):
    """As without TierFS: in passthrough the server syncs by descriptors of its own, of which the kernel tells
    only the first that content did not come to the disk."""
    (side.path / "file").write_bytes(b"content")
    node = side.lookup(ROOT, b"file")[0]

    def opened():
        number, body = side.ask(p.Op.OPEN, node, p.OPEN_IN.pack(os.O_RDWR, 0))
        fh, how, _ = p.OPEN_OUT.unpack(body)
        assert not number and how & p.OPEN_PASSTHROUGH
        return fh

    def synced(fh):
        try:
            side.vfs.fsync(fh, True).run()
        except OSError as error:
            return error.errno
        return 0

    def fails(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    first, second = opened(), opened()
    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", fails)
        assert synced(first) == errno.ENOSPC
    later = opened()
    assert [synced(fh) for fh in (first, second, second, later)] == [0, errno.EIO, 0, 0]


@pytest.fixture
def thin(tmp_path):
    """A volume whose tree lies on a disk that can be filled up behind its back: all writes to it fail then."""
    if os.geteuid() or not shutil.which("mkfs.ext4"):
        pytest.skip("needs root and mkfs.ext4")
    below, image = tmp_path / "below", tmp_path / "below" / "disk.img"
    for place in (below, tmp_path / "tree"):
        place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tierfs-test", below], check=True)
    try:
        with open(image, "wb") as out:
            out.truncate(256 * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", image], check=True)
        if subprocess.run(["mount", "-o", "loop", image, tmp_path / "tree"], capture_output=True).returncode:
            pytest.skip("loop devices are not to be had here")
        try:
            made = Volume(tmp_path, chunk_size=MIB, fetch_timeout=5.0)
            yield made
            made.stop()
            made.tree.close()
        finally:
            subprocess.run(["umount", "-l", tmp_path / "tree"], check=True)
    finally:
        subprocess.run(["umount", "-l", below], check=True)


def from_disk(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return b"".join(iter(lambda: os.read(fd, MIB), b""))
    finally:
        os.close(fd)


@pytest.mark.parametrize("size", [100_000, SIZE], ids=["small", "large"])
@pytest.mark.parametrize("crash", [False, True], ids=["goes on", "crash"])
def test_pages_that_are_in_memory_alone_are_not_taken_for_content(thin, tmp_path, size, crash):
    data, path = cold(thin, size), thin.path("file")
    os.sync()
    subprocess.run(["fstrim", thin.root], check=True)
    full = tmp_path / "below" / "full"
    with open(full, "wb", buffering=0) as filling, pytest.raises(OSError, match="No space"):
        while True:
            filling.write(bytes(64 * 1024))
    thin.server.read(path)
    ino = os.stat(path).st_ino
    assert until(lambda: thin.tier.filler.arrival(ino) is None)
    assert thin.stub("file") is not None and thin.record("file").residency is not Residency.RESIDENT
    full.unlink()
    if crash:
        thin.restart(clean=False)
        assert finish_pending(thin.tier) == 0
    assert thin.server.read(path) == data
    thin.settle("file")
    assert from_disk(path) == data
