"""A full disk: an honest ENOSPC, nothing lost, and room again as soon as something may leave."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from harness import BLOCK, Scratch, Volume

from tierfs import pages
from tierfs.errors import IndexFullError
from tierfs.index import Index, Writer
from tierfs.model import Record
from tierfs.room import WAIT_SECONDS
from tierfs.volume import read_runtime

# They take a tenth of it where the mover has a processor when it wants one.
SECONDS = 300
pytestmark = [pytest.mark.usefixtures("tiers", "needs_root"), pytest.mark.timeout(SECONDS)]
MIB = 1 << 20
Make = Callable[..., Volume]


@pytest.fixture
def disk(area: Scratch) -> Iterator[Path]:
    """A filesystem of 192 MiB of its own."""
    if not shutil.which("mkfs.ext4"):
        pytest.skip("mkfs.ext4 is not installed")
    image, place = area.path / "disk.img", area.path / "disk"
    with open(image, "wb") as out:
        out.truncate(192 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    place.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-o", "loop", image, place], capture_output=True).returncode:
        pytest.skip("loop devices are not to be had here")
    yield place
    subprocess.run(["umount", place], check=True)
    image.unlink()


@pytest.fixture
def small(disk: Path, volume: Make) -> Volume:
    """A volume on that filesystem, its store elsewhere."""
    made = volume(mount=False, limit=SECONDS)
    (made.base / "store").mkdir()
    made.store, made.state = f"file://{made.base}/store", disk / "state"
    made.mount()
    made.configure(min_age="0s", quiet="0s", replicate="all")
    made.remount()  # its journal has begun: what happens is noted in the index until it is in the store
    return made


def content(number: int) -> bytes:
    return random.Random(number).randbytes(MIB)


def fill(path: Path) -> int:
    """Write until nothing more fits, and say what that error was."""
    with open(path, "wb", buffering=0) as out:
        try:
            for _ in range(400):
                out.write(bytes(MIB))
                os.fsync(out.fileno())
        except OSError as exc:
            return exc.errno or -1
    return 0


def test_full_of_what_cannot_leave(small: Volume) -> None:
    stubs = {small.mountpoint / f"stub{number}": content(number) for number in range(30)}
    for path, data in stubs.items():
        path.write_bytes(data)
    small.demote(*stubs)
    with open(small.mountpoint / "kept", "wb") as held:
        held.write(content(99))
        held.flush()
        assert fill(small.mountpoint / "filler") == errno.ENOSPC
        assert (small.mountpoint / "kept").read_bytes() == content(99)
    for path, data in stubs.items():
        assert path.read_bytes() == data, "a cold read needs no room of its own"
    assert small.status()["files"] >= 32
    (small.mountpoint / "filler").unlink()
    for path, data in stubs.items():
        assert path.read_bytes() == data
    (small.mountpoint / "after").write_bytes(content(7))
    assert (small.mountpoint / "after").read_bytes() == content(7)


def test_cold_files_are_read_past_a_disk_full_of_what_cannot_leave(small: Volume) -> None:
    """Larger than all that is free and held back: read, mapped and run, and kept nowhere."""
    large, script = small.mountpoint / "large", small.mountpoint / "script"
    data = random.Random(1).randbytes(40 * MIB + 123)
    large.write_bytes(data)
    script.write_text("#!/bin/sh\necho it runs\n" + "#" * 100_000)
    script.chmod(0o755)
    small.demote(large, script)
    with open(small.mountpoint / "filler", "wb", buffering=0) as held:
        for size in (MIB, 4096):
            with pytest.raises(OSError, match="No space"):
                while True:
                    held.write(bytes(size))
        assert large.read_bytes() == data
        assert subprocess.run([script], capture_output=True, text=True, check=True).stdout == "it runs\n"
        with open(large, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[30 * MIB : 30 * MIB + 100] == data[30 * MIB : 30 * MIB + 100]
        assert os.stat(small.backing(large)).st_blocks * BLOCK < 20 * MIB
        with open(large, "r+b", buffering=0) as file, pytest.raises(OSError, match="No space"):
            file.write(b"new")
        assert any("cannot be brought to this disk" in found["what"] for found in small.status()["errors"])
    (small.mountpoint / "filler").unlink()
    with open(large, "r+b", buffering=0) as file:
        file.write(b"new")
    assert large.read_bytes() == b"new" + data[3:]


def test_full_of_what_can_leave(small: Volume) -> None:
    """Twice the disk's size goes in, one file after another: older ones make room."""
    files = {small.mountpoint / f"f{number:03}": content(number) for number in range(300)}
    for path, data in files.items():
        path.write_bytes(data)
    assert small.status()["stubs"] >= 120
    for number, (path, data) in enumerate(files.items()):
        if number % 10 == 0:
            assert path.read_bytes() == data


# --- the index on a disk that is full to the last block -----------------------------------------------------


def fill_to_the_last_block(path: Path) -> None:
    with open(path, "ab", buffering=0) as out:
        for size in (MIB, 4096):
            try:
                while True:
                    out.write(bytes(size))
            except OSError as exc:
                assert exc.errno == errno.ENOSPC
            os.fsync(out.fileno())


def a_record(ino: int) -> Record:
    return Record(ino, b"handle%d" % ino, ino.to_bytes(16, "big"), 1, name=b"n" * 100)


@pytest.mark.parametrize("left", [0, 30 << 10, 300 << 10])
def test_an_index_on_a_full_disk_loses_nothing_and_goes_on_by_itself(disk: Path, left: int) -> None:
    """What was acknowledged is there, what was not is not; with room again the same environment writes on.
    With a little room left the first write that fails is one of which a part was written."""
    index = Index.open(str(disk / "index"))
    fill_to_the_last_block(disk / "filler")
    os.truncate(disk / "filler", os.path.getsize(disk / "filler") - left)
    acknowledged, failed = [], []
    for first in range(1, 40_000, 500):
        inos = range(first, first + 500)
        futures = [index.commit(partial(Writer.put, record=a_record(ino))) for ino in inos]
        for ino, future in zip(inos, futures, strict=True):
            (acknowledged if future.exception() is None else failed).append((ino, future.exception()))
    assert failed and all(isinstance(error, IndexFullError) for _, error in failed)
    assert {error.errno for _, error in failed} == {errno.ENOSPC}
    for ino, _ in acknowledged:
        assert index.get(ino) == a_record(ino)
    assert not any(index.get(ino) for ino, _ in failed)
    assert index.totals().files == len(acknowledged)
    (disk / "filler").unlink()
    for ino, _ in failed[:2000]:
        index.commit(partial(Writer.put, record=a_record(ino)))
    index.commit(lambda w: None).result()
    assert index.totals().files == len(acknowledged) + 2000
    index.close()
    pages.verify(str(disk / "index" / "data.mdb"))


def test_the_reserve_is_for_the_index_too(disk: Path) -> None:
    """A commit that finds no room is tried again once the reserve is let go of."""
    reserve = disk / "reserve"
    with open(reserve, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 4 * MIB)
    index = Index.open(str(disk / "index"))
    calls = []

    def make_room() -> bool:
        calls.append(reserve.exists())
        reserve.unlink(missing_ok=True)
        return calls[-1]

    index.make_room = make_room
    fill_to_the_last_block(disk / "filler")
    for first in range(1, 5000, 500):
        inos = range(first, first + 500)
        for future in [index.commit(partial(Writer.put, record=a_record(ino))) for ino in inos]:
            future.result()
    assert calls == [True]
    assert index.totals().files == 5000
    index.close()


def test_a_disk_full_to_the_last_block_and_room_again(small: Volume, disk: Path) -> None:
    """With no reserve, no block left and nothing that may leave, the index cannot take in what happens. Local
    work goes on, and with room again all of it is made up for without help, by the same processes."""
    files = {small.mountpoint / f"{number:03}-{'y' * 205}": os.urandom(9000) for number in range(50)}
    for path, data in files.items():
        path.write_bytes(data)
    small.umount("--wait")
    small.mount()
    small.cli("pin", small.mountpoint)
    pids = small.status()["pids"]
    store = small.base / "store"
    store.rename(small.base / "away")  # so that the notes of the journal stay in the index
    (small.state / "ballast").unlink(missing_ok=True)
    fill_to_the_last_block(disk / "filler")
    deadline = time.monotonic() + SECONDS / 2
    for turn in itertools.count():
        for number, path in enumerate(sorted(small.mountpoint.iterdir())):
            new = path.with_name(f"{number:03}-{turn:04}-{'x' * 200}")
            try:
                path.rename(new)
            except OSError as exc:
                assert exc.errno == errno.ENOSPC, "the directory itself has to grow"
            else:
                files[new] = files.pop(path)
        fill_to_the_last_block(disk / "filler")
        if "the index cannot be written" in small.log():
            break
        assert time.monotonic() < deadline, small.log()
    assert all(path.read_bytes() == data for path, data in files.items())
    (disk / "filler").unlink()
    (small.base / "away").rename(store)
    (small.mountpoint / "after").write_bytes(content(2))
    small.cli("unpin", small.mountpoint)
    assert small.status()["pids"] == pids
    small.umount("--wait")
    small.mount()
    assert all(path.read_bytes() == data for path, data in files.items())
    assert (small.mountpoint / "after").read_bytes() == content(2)
    found = small.json("check", "--json", small.mountpoint)
    assert not found["left"] and not small.status()["dirty_files"], found


def test_a_full_disk_can_be_mounted(small: Volume, disk: Path) -> None:
    (small.mountpoint / "file").write_bytes(content(3))
    small.umount("--wait")
    with open(small.state / "ballast", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 4 * MIB)
    fill_to_the_last_block(disk / "filler")
    small.mount()
    assert (small.mountpoint / "file").read_bytes() == content(3)
    (disk / "filler").unlink()
    small.umount()
    assert not list(small.state.glob("index.damaged*")), "a full disk is no damage"


def test_a_full_disk_without_a_reserve_can_be_mounted(small: Volume, disk: Path) -> None:
    """What was let go of when it ran full is not there when the machine starts anew."""
    (small.mountpoint / "file").write_bytes(content(4))
    small.umount("--wait")
    (small.state / "ballast").unlink(missing_ok=True)
    fill_to_the_last_block(disk / "filler")
    small.mount()
    assert (small.mountpoint / "file").read_bytes() == content(4)
    (disk / "filler").unlink()
    (small.mountpoint / "new").write_bytes(content(5))
    small.umount("--wait")
    small.mount()
    assert (small.mountpoint / "new").read_bytes() == content(5)
    assert not list(small.state.glob("index.damaged*")), "a full disk is no damage"


def test_a_mover_that_dies_on_a_full_disk_is_replaced(small: Volume, disk: Path) -> None:
    """That there is no room to write down who runs ends nothing, and `status` says the truth all the same."""
    (small.mountpoint / "file").write_bytes(content(6))
    (small.state / "ballast").unlink(missing_ok=True)
    before = small.status()["pids"]
    fill_to_the_last_block(disk / "filler")
    os.kill(before["mover"], signal.SIGKILL)
    deadline = time.monotonic() + SECONDS / 2
    while read_runtime(str(small.state)).get("pids", before)["mover"] == before["mover"]:
        assert time.monotonic() < deadline, small.log()
        time.sleep(0.05)
    assert os.path.ismount(small.mountpoint)
    (disk / "filler").unlink()  # the new one may have to write before it can answer
    after = small.status()["pids"]
    assert read_runtime(str(small.state))["pids"] == after
    assert (after["supervisor"], after["server"]) == (before["supervisor"], before["server"])
    assert not (small.state / "run.json.new").exists()
    assert (small.mountpoint / "file").read_bytes() == content(6)


def test_with_the_store_on_the_full_disk_too_nobody_waits_for_nothing(disk: Path, volume: Make) -> None:
    made = volume(mount=False, limit=SECONDS)
    made.state = disk / "state"
    made.mount()
    made.cli("check", made.mountpoint)  # the mover is there: before that it would be waited for
    assert fill(made.mountpoint / "big") == errno.ENOSPC
    began = time.monotonic()
    (made.mountpoint / "empty").touch()
    assert time.monotonic() - began < WAIT_SECONDS / 2
    assert not made.objects()
    assert made.tier(made.mountpoint / "big") == "resident"
