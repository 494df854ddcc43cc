"""The power fails: whatever a program has synced is there afterwards, byte for byte, here or in the store.

Tree and state lie on an ext4 of their own, the store elsewhere. Files are replaced, appended to, written over,
cut short, emptied and removed, and demoted and fetched all the while; then the filesystem is shut down in
mid-flight without writing its log (as a power cut leaves it), the processes are killed, and all is mounted
anew. What was acknowledged by fsync, of the file and of its directory, was noted outside before: it must be
there. What was under way may be as before or as after.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from harness import Scratch, Volume, connection_of, detach, kill, wait_gone

from tierfs import control, locate
from tierfs.errors import TierError
from tierfs.index import Index

pytestmark = pytest.mark.usefixtures("tiers", "needs_root")
MIB = 1 << 20
SIZES = (100, 5_000, 60_000, 300_000, 1_500_000)
WRITERS = 3
BLOCK = 4096
POWERLESS = (OSError, TierError)  # what a program hears of a machine that goes down
GOING_DOWN, NO_LOG_FLUSH = 0x8004587D, 2  # EXT4_IOC_SHUTDOWN


@dataclass
class Noted:
    """What the manifest says of one file: acknowledged content (None: none), and what is under way."""

    acked: bytes | None = None
    under_way: list[bytes | None] = field(default_factory=list)
    rewritten: bool = False  # it is emptied first

    def allows(self, content: bytes | None) -> bool:
        if content == self.acked or content in self.under_way:
            return True
        if content is None or self.acked is None:
            return False
        return any(coming is not None and self._is_on_the_way(content, coming) for coming in self.under_way)

    def _is_on_the_way(self, content: bytes, coming: bytes) -> bool:
        """What the filesystem beneath may have of it, too, when the power fails before a sync has answered."""
        acked = b"" if self.rewritten else self.acked or b""
        if len(coming) > len(acked):
            # Of what is written behind the end any part may have come; of what fits the last block ext4 may
            # have the size before data.
            behind = zip(content[len(acked) :], coming[len(acked) :], strict=False)
            within = content.startswith(acked) and len(content) <= len(coming)
            return within and all(found in (0, byte) for found, byte in behind)
        if len(content) != len(acked):
            return False
        if len(coming) < len(acked):
            # The rest of the block in which it is cut is zeros before it is shorter.
            end = -(-len(coming) // BLOCK) * BLOCK
            cut = zip(content[len(coming) : end], acked[len(coming) : end], strict=True)
            whole = content.startswith(coming) and content[end:] == acked[end:]
            return whole and all(found in (0, byte) for found, byte in cut)
        # What is written over comes block by block.
        return all(found in pair for found, *pair in zip(content, acked, coming, strict=True))


class Disk:
    """An ext4 on a loop device that can be cut off."""

    def __init__(self, base: Path) -> None:
        self.image, self.place = base / "disk.img", base / "disk"
        with open(self.image, "wb") as out:
            out.truncate(512 * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-F", self.image], check=True)
        self.place.mkdir()

    def mount(self) -> bool:
        argv = ["mount", "-o", "loop", self.image, self.place]
        return not subprocess.run(argv, capture_output=True).returncode

    def cut(self) -> None:
        fd = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, GOING_DOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def umount(self) -> None:
        """The last files of processes that were killed are let go of a moment after their end; those that the
        kernel has opened for a FUSE mount when no mount namespace made meanwhile, by whomever, holds that."""
        deadline = time.monotonic() + 180
        while os.path.ismount(self.place):
            done = subprocess.run(["umount", self.place], capture_output=True, text=True, timeout=30)
            if done.returncode and time.monotonic() > deadline:
                used = subprocess.run(["fuser", "-vm", self.place], capture_output=True, text=True)
                raise AssertionError(f"{done.stderr}{used.stdout}{used.stderr}")
            if done.returncode:
                time.sleep(0.1)
        self.wait_until_let_go()

    def wait_until_let_go(self) -> None:
        """A mount namespace that was made meanwhile, by whomever, holds the filesystem that was cut off: while
        it is there, a mount would give the dead one again, which answers EIO."""
        deadline = time.monotonic() + 180
        while held := subprocess.run(["losetup", "-j", self.image], capture_output=True, text=True).stdout:
            assert time.monotonic() < deadline, f"a mount namespace keeps {held}"
            time.sleep(0.1)


@pytest.fixture
def disk(area: Scratch, tmp_path: Path) -> Iterator[Disk]:
    if not shutil.which("mkfs.ext4"):
        pytest.skip("mkfs.ext4 is not installed")
    made = Disk(tmp_path)
    if not made.mount():
        pytest.skip("loop devices are not to be had here")
    yield made
    made.umount()
    made.image.unlink()


class Load(threading.Thread):
    """Works until the power is cut. Whatever goes wrong before that is told by `end`."""

    def __init__(self, off: threading.Event) -> None:
        super().__init__(daemon=True)
        self.off = off
        self.problem: BaseException | None = None

    def step(self) -> None:
        raise NotImplementedError

    def run(self) -> None:
        try:
            while not self.off.is_set():
                self.step()
        except BaseException as error:
            if not self.off.is_set() or not isinstance(error, POWERLESS):
                self.problem = error

    def end(self) -> None:
        self.join(20)
        assert not self.is_alive(), "something hangs after the power cut"
        if self.problem is not None:
            raise self.problem


class Writer(Load):
    """Works on files of its own."""

    def __init__(
        self, number: int, place: Path, noted: dict[str, Noted], seed: int, off: threading.Event
    ) -> None:
        super().__init__(off)
        self.number, self.noted = number, noted
        # Through a descriptor: once the mount is gone its path leads to the directory beneath.
        self.directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        self.place = Path(f"/proc/self/fd/{self.directory}")
        self.draw = random.Random(seed)
        self.acked = 0

    def end(self) -> None:
        try:
            super().end()
        finally:
            os.close(self.directory)

    def step(self) -> None:
        name = f"w{self.number}-{self.draw.randrange(12)}"
        entry = self.noted.setdefault(name, Noted())
        if entry.acked is None or self.draw.random() < 0.4:
            self.replace(name, entry)
        elif self.draw.random() < 0.3:
            self.append(name, entry)
        elif self.draw.random() < 0.5:
            self.change(name, entry, entry.acked)
        elif self.draw.random() < 0.3:
            self.remove(name, entry)
        elif (self.place / name).read_bytes() != entry.acked:
            raise AssertionError(f"{name} does not read as it was written")
        self.acked += 1

    def replace(self, name: str, entry: Noted) -> None:
        content = self.draw.randbytes(self.draw.choice(SIZES))
        entry.under_way = [content]
        fresh = self.place / f".new-{self.number}"
        with open(fresh, "wb", buffering=0) as out:
            out.write(content)
            os.fsync(out.fileno())
        os.rename(fresh, self.place / name)
        self.sync_names()
        self.ack(entry, content)

    def append(self, name: str, entry: Noted) -> None:
        assert entry.acked is not None
        more = self.draw.randbytes(self.draw.choice(SIZES[:3]))
        entry.under_way = [entry.acked + more]
        with open(self.place / name, "ab", buffering=0) as out:
            out.write(more)
            os.fsync(out.fileno())
        self.ack(entry, entry.acked + more)

    def change(self, name: str, entry: Noted, content: bytes) -> None:
        """What is there, local or not, is written over in its middle, cut short, or emptied and written."""
        at, more = self.draw.randrange(len(content) + 1), self.draw.randbytes(self.draw.choice(SIZES[:3]))
        how = self.draw.choice(("over", "cut", "rewrite"))
        if how == "over":
            more = more[: len(content) - at]
            coming = content[:at] + more + content[at + len(more) :]
        else:
            coming = content[:at] if how == "cut" else more
        entry.under_way, entry.rewritten = [coming], how == "rewrite"
        flags = os.O_WRONLY | (os.O_TRUNC if how == "rewrite" else 0)
        with open(os.open(self.place / name, flags), "wb", buffering=0) as out:
            if how == "cut":
                out.truncate(at)
            else:
                os.pwrite(out.fileno(), more, at if how == "over" else 0)
            os.fsync(out.fileno())
        self.ack(entry, coming)

    def remove(self, name: str, entry: Noted) -> None:
        entry.under_way = [None]
        os.unlink(self.place / name)
        self.sync_names()
        self.ack(entry, None)

    def ack(self, entry: Noted, content: bytes | None) -> None:
        """It is synced. What answers while the power fails does not count: nobody would have seen it, and a
        filesystem that is being shut down may say that it has written what it has not."""
        if self.off.is_set():
            raise OSError("the power is gone")
        entry.acked, entry.under_way, entry.rewritten = content, [], False

    def sync_names(self) -> None:
        os.fsync(self.directory)


class Moves(Load):
    """Demotes and fetches everything, over and over."""

    def __init__(self, mounted: Volume, off: threading.Event) -> None:
        super().__init__(off)
        self.mounted = mounted
        self.turns = 0

    def step(self) -> None:
        self.mounted.order("fetch" if self.turns % 4 == 3 else "demote")
        self.turns += 1


def content_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def cut_off(mounted: Volume, disk: Disk, loads: list[Load], off: threading.Event) -> int:
    """Cut the power, and leave the machine as it is when it starts again.

    Returns how many punches and fetches the index knows of that were not at their end.
    """
    off.set()
    disk.cut()
    device = connection_of(mounted.mountpoint)
    pids = mounted.pids()
    for pid in pids:  # the oldest first: the supervisor would start the others again
        kill(pid)
    assert not wait_gone(pids, 20)
    if device is not None:
        detach(str(mounted.mountpoint), device, mounted.connections)
    mounted._unwatch()
    for load in loads:
        load.end()
    disk.umount()
    assert disk.mount()
    index = Index.open(str(mounted.state / "index"), readonly=True)
    try:
        return len(index.pending())
    finally:
        index.close()


def verify(mounted: Volume, noted: dict[str, Noted], where: str) -> None:
    for name, entry in noted.items():
        found = content_of(mounted.mountpoint / name)
        size = None if found is None else len(found)
        expected = None if entry.acked is None else len(entry.acked)
        raw = mounted.backing(mounted.mountpoint / name)
        beneath = (os.stat(raw), os.listxattr(raw)) if os.path.exists(raw) else None
        said = f"{where}: {name} has {size} bytes for {expected} that were synced; beneath: {beneath}"
        assert entry.allows(found), f"{said}\n{mounted.log()[-3000:]}"
        entry.acked, entry.under_way, entry.rewritten = found, [], False


def check(mounted: Volume) -> list[control.Finding]:
    """What `tierfs check --repair --read-data` finds, without a command being started. Nothing is left to be
    repaired: what the power cut has left is put right by the mount."""
    place = locate.locate(os.fspath(mounted.mountpoint))
    (*_, findings) = control.converse(place.mount, control.Check(repair=True, read_data=True))
    assert not findings.renewing and findings.files, findings
    return findings.findings


def cycles(mounted: Volume, disk: Disk, count: int, seed: int) -> dict[str, int]:
    """So many power cuts. What they hit, in numbers."""
    draw = random.Random(seed)
    noted: dict[str, Noted] = {}
    totals = {"acknowledged": 0, "under way": 0, "orders": 0, "stubs": 0, "cut short": 0}
    for turn in range(count):
        where = f"seed {seed}, cut {turn}"
        off = threading.Event()
        place = mounted.mountpoint
        writers = [Writer(n, place, noted, draw.randrange(1 << 30), off) for n in range(WRITERS)]
        moves = Moves(mounted, off)
        for load in (*writers, moves):
            load.start()
        time.sleep(draw.uniform(0.2, 1.6))
        totals["under way"] += sum(bool(entry.under_way) for entry in noted.values())
        totals["cut short"] += cut_off(mounted, disk, [*writers, moves], off)
        mounted.env["TIERFS_BOOT_ID"] = f"boot {turn} of {seed}"
        mounted.mount()
        totals["acknowledged"] += sum(writer.acked for writer in writers)
        totals["orders"] += moves.turns
        there = [mounted.mountpoint / name for name in os.listdir(mounted.mountpoint)]
        totals["stubs"] += sum(mounted.tier(path) != "resident" for path in there)
        verify(mounted, noted, where)
        found = check(mounted)
        assert not found, f"{where}: {found}\n{mounted.log()[-4000:]}"
        mounted.order("demote")
        Path("/proc/sys/vm/drop_caches").write_text("3")
        verify(mounted, noted, f"{where}, demoted and read again")
    return totals


@pytest.fixture
def on_disk(disk: Disk, volume: Callable[..., Volume]) -> Volume:
    made = volume(mount=False, limit=3000)
    (made.base / "store").mkdir()
    made.store, made.state = f"file://{made.base}/store", disk.place / "state"
    made.mount()
    made.configure(quiet="0s", min_age="0s", min_size="0", chunk_size="64K", replicate="all")
    return made


def test_a_few_power_cuts_lose_nothing(on_disk: Volume, disk: Disk) -> None:
    totals = cycles(on_disk, disk, 4, 20261123)
    on_disk.umount()
    assert totals["acknowledged"] > 20 and totals["under way"] and totals["orders"] and totals["stubs"], totals


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 21))
def test_many_power_cuts_lose_nothing(on_disk: Volume, disk: Disk, seed: int) -> None:
    totals = cycles(on_disk, disk, 100, seed)
    on_disk.umount()
    print(totals)
    assert all(totals.values()), totals
