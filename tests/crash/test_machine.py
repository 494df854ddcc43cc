"""Any order of work, demotions, fetches, outages, remounts and kills leaves a tree equal to a plain directory.

Each step is done on the mount and in a plain directory beside it; both must answer alike, and after steps that
move content or end processes the two trees are compared: names, kinds, modes, sizes, attributes, links and
bytes; times where they are set. Files stay open over all of it, and one stays mapped.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import random
import shutil
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Volume
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tierfs import volume as volumes
from tierfs.errors import TierError

pytestmark = pytest.mark.usefixtures("tiers", "needs_root")
NAMES = st.sampled_from(["a", "b", "c", "d/a", "d/b", "e/a"])
DIRECTORIES = st.sampled_from(["d", "e", "d/f"])
SIZES = st.sampled_from([0, 1, 100, 5_000, 70_000, 300_000])
SEEDS = st.integers(0, 1 << 16)
MOST_PAUSE = 60.0  # seconds: a mover that was killed often comes back after 30
STEADY = (
    0.6  # a server that is killed sooner has died of its takeover, and after some of them it is mounted anew
)
_turns = iter(range(1 << 30))


def content(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def looked_at(root: Path) -> dict[str, Any]:
    """All that two trees are compared by. Hard links: the first path of each inode."""
    found: dict[str, Any] = {}
    first: dict[int, str] = {}
    for base, directories, files in os.walk(root):
        directories.sort()
        for name in sorted([*directories, *files]):
            path = os.path.join(base, name)
            relative, st_ = os.path.relpath(path, root), os.lstat(path)
            facts: list[Any] = [stat.filemode(st_.st_mode), st_.st_uid]
            facts.append({key: os.getxattr(path, key) for key in os.listxattr(path)})
            if stat.S_ISREG(st_.st_mode):
                data = Path(path).read_bytes()
                facts += [len(data), hashlib.sha256(data).hexdigest(), st_.st_nlink]
                facts.append(first.setdefault(st_.st_ino, relative))
                facts.append(st_.st_size)
            found[relative] = facts
    return found


class Machine(RuleBasedStateMachine):
    """`mounted` is set by the test: one volume for all examples, each in a directory of its own."""

    mounted: Volume
    reference: Path

    @initialize()
    def begin(self) -> None:
        name = f"example-{next(_turns)}"
        self.ours, self.theirs = self.mounted.mountpoint / name, self.reference / name
        self.files: list[tuple[int, int]] = []
        self.maps: list[tuple[mmap.mmap, mmap.mmap]] = []
        for root in (self.ours, self.theirs):
            root.mkdir()
            (root / "d").mkdir()

    def both(self, work: Callable[[Path], Any]) -> tuple[Any, Any] | None:
        """Do it in both places: results, or None where both say the same error."""
        answers: list[Any] = []
        for root in (self.ours, self.theirs):
            try:
                answers.append((work(root), 0))
            except OSError as error:
                answers.append((None, error.errno))
        (one, failed), (other, expected) = answers
        assert failed == expected, f"{failed}, expected {expected}\n{self.mounted.log()[-2000:]}"
        return None if failed else (one, other)

    def compare(self) -> None:
        ours, theirs = looked_at(self.ours), looked_at(self.theirs)
        assert ours == theirs, self.mounted.log()[-3000:]
        for fd, other in self.files:
            size = os.fstat(other).st_size
            assert os.pread(fd, size + 1, 0) == os.pread(other, size + 1, 0)

    # --- work ---------------------------------------------------------------------------------------------

    @rule(name=NAMES, size=SIZES, seed=SEEDS)
    def write(self, name: str, size: int, seed: int) -> None:
        self.both(lambda root: (root / name).write_bytes(content(seed, size)))

    @rule(name=NAMES, size=SIZES, seed=SEEDS)
    def replace(self, name: str, size: int, seed: int) -> None:
        def work(root: Path) -> None:
            (root / ".new").write_bytes(content(seed, size))
            try:
                os.rename(root / ".new", root / name)
            except OSError:
                os.unlink(root / ".new")
                raise

        self.both(work)

    @rule(name=NAMES, seed=SEEDS)
    def append(self, name: str, seed: int) -> None:
        def work(root: Path) -> None:
            fd = os.open(root / name, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(fd, content(seed, 700))
            finally:
                os.close(fd)

        self.both(work)

    @rule(name=NAMES, at=st.integers(0, 310_000), seed=SEEDS)
    def overwrite(self, name: str, at: int, seed: int) -> None:
        def work(root: Path) -> None:
            fd = os.open(root / name, os.O_RDWR)
            try:
                os.pwrite(fd, content(seed, 3000), at)
            finally:
                os.close(fd)

        self.both(work)

    @rule(name=NAMES, size=SIZES)
    def truncate(self, name: str, size: int) -> None:
        self.both(lambda root: os.truncate(root / name, size))

    @rule(old=NAMES, new=NAMES)
    def rename(self, old: str, new: str) -> None:
        self.both(lambda root: os.rename(root / old, root / new))

    @rule(old=NAMES, new=NAMES)
    def link(self, old: str, new: str) -> None:
        self.both(lambda root: os.link(root / old, root / new))

    @rule(name=NAMES)
    def unlink(self, name: str) -> None:
        self.both(lambda root: os.unlink(root / name))

    @rule(name=DIRECTORIES)
    def mkdir(self, name: str) -> None:
        self.both(lambda root: os.mkdir(root / name))

    @rule(name=DIRECTORIES)
    def rmdir(self, name: str) -> None:
        self.both(lambda root: os.rmdir(root / name))

    @rule(name=NAMES, value=st.binary(max_size=20))
    def set_attribute(self, name: str, value: bytes) -> None:
        self.both(lambda root: os.setxattr(root / name, "user.note", value))

    @rule(name=NAMES, mode=st.sampled_from([0o600, 0o644, 0o755]), when=st.integers(1, 2_000_000_000))
    def change_attributes(self, name: str, mode: int, when: int) -> None:
        self.both(lambda root: (os.chmod(root / name, mode), os.utime(root / name, (when, when)))[0])
        found = self.both(lambda root: os.stat(root / name).st_mtime_ns)
        assert found is None or found[0] == found[1]

    @rule(name=NAMES)
    def read(self, name: str) -> None:
        found = self.both(lambda root: (root / name).read_bytes())
        assert found is None or found[0] == found[1]

    # --- what stays open ----------------------------------------------------------------------------------

    @precondition(lambda self: len(self.files) < 3)
    @rule(name=NAMES)
    def open(self, name: str) -> None:
        opened = self.both(lambda root: os.open(root / name, os.O_RDWR))
        if opened is not None:
            self.files.append(opened)

    @precondition(lambda self: self.files)
    @rule(seed=SEEDS, at=st.integers(0, 80_000))
    def write_to_open(self, seed: int, at: int) -> None:
        for fd in self.files[seed % len(self.files)]:
            assert os.pwrite(fd, content(seed, 500), at) == 500

    @precondition(lambda self: self.files)
    @rule(which=SEEDS)
    def close(self, which: int) -> None:
        for fd in self.files.pop(which % len(self.files)):
            os.close(fd)

    @precondition(lambda self: not self.maps)
    @rule(name=NAMES)
    def map_and_close(self, name: str) -> None:
        """Nobody has it open any more, and yet it may be written."""

        def work(root: Path) -> mmap.mmap | None:
            fd = os.open(root / name, os.O_RDWR)
            try:
                return mmap.mmap(fd, 4096) if os.fstat(fd).st_size >= 4096 else None
            finally:
                os.close(fd)

        made = self.both(work)
        if made is not None and made[0] is not None:
            self.maps.append(made)

    @precondition(lambda self: self.maps)
    @rule(seed=SEEDS)
    def write_to_mapped(self, seed: int) -> None:
        with contextlib.suppress(IndexError, ValueError):
            if all(each.size() >= 4096 for each in self.maps[0]):
                for each in self.maps[0]:
                    each[seed % 4000 : seed % 4000 + 10] = content(seed, 10)

    @precondition(lambda self: self.maps)
    @rule()
    def unmap(self) -> None:
        for each in self.maps.pop():
            each.close()

    # --- what TierFS does meanwhile -----------------------------------------------------------------------

    def order(self, verb: str) -> None:
        until = time.monotonic() + MOST_PAUSE
        while True:
            try:
                self.mounted.order(verb, self.ours)
                return
            except TierError:  # the mover has just been killed, and not for the first time: the pauses grow
                assert time.monotonic() < until, self.mounted.log()[-3000:]
                time.sleep(0.1)

    @rule()
    def demote(self) -> None:
        self.order("demote")

    @rule()
    def demote_and_compare(self) -> None:
        self.order("demote")
        self.compare()

    @rule()
    def fetch(self) -> None:
        self.order("fetch")
        self.compare()

    @rule(verb=st.sampled_from(["1", "0"]))
    def pin(self, verb: str) -> None:
        os.setxattr(self.ours, "user.tierfs.pin", verb.encode())

    @rule(name=NAMES, seed=SEEDS)
    def outage(self, name: str, seed: int) -> None:
        """What is written meanwhile goes out when the store is back."""
        store, away = self.mounted.state / "store", self.mounted.state / "away"
        self.both(lambda root: (root / "resident").write_bytes(b"here"))
        store.rename(away)
        try:
            self.both(lambda root: (root / "resident").write_bytes(content(seed, 5000)))
            found = self.both(lambda root: (root / "resident").read_bytes())
            assert found is not None and found[0] == found[1]
        finally:
            away.rename(store)

    @precondition(lambda self: not self.files and not self.maps)
    @rule()
    def remount(self) -> None:
        self.mounted.remount()
        self.compare()

    def kill(self, which: str) -> None:
        pid = volumes.read_runtime(str(self.mounted.state))["pids"][which]
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @rule()
    def kill_mover(self) -> None:
        self.kill("mover")

    @rule()
    def kill_server(self) -> None:
        self.kill("server")
        self.compare()
        time.sleep(STEADY)

    @rule()
    def kill_both(self) -> None:
        self.kill("mover")
        self.kill("server")
        self.compare()
        time.sleep(STEADY)

    def teardown(self) -> None:
        if not hasattr(self, "files"):
            return
        self.compare()
        for pair in self.maps:
            for each in pair:
                each.close()
        for pair in self.files:
            for fd in pair:
                os.close(fd)
        self.order("demote")
        Path("/proc/sys/vm/drop_caches").write_text("3")
        self.files.clear()
        self.compare()
        assert "mounting anew" not in self.mounted.log()
        shutil.rmtree(self.ours)


def try_out(volume: Callable[..., Volume], base: Path, examples: int, steps: int, **more: Any) -> None:
    made = volume(limit=3000, mount=False)
    made.mount()
    made.configure(quiet="0s", min_age="0s", min_size="0", chunk_size="64K", replicate="all", journal="200ms")
    Machine.mounted, Machine.reference = made, base
    suppress = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    chosen = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=suppress, **more
    )
    run_state_machine_as_test(Machine, settings=chosen)
    done = made.cli("check", "--read-data", made.mountpoint, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    made.umount()


def test_any_order_of_work_and_mishaps(volume: Callable[..., Volume], tmp_path: Path) -> None:
    try_out(volume, tmp_path, 4, 30, derandomize=True, database=None)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_orders_of_work_and_mishaps(volume: Callable[..., Volume], tmp_path: Path) -> None:
    try_out(volume, tmp_path, 150, 60)
