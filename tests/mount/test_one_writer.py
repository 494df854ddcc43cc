"""Two machines and one store: a clone of a volume is refused, a takeover fences who had it, of two one wins.

The other machine is a namespace with a host name and control sockets of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import s3servers
from harness import LET_GO, TIERFS, Scratch, Volume

pytestmark = pytest.mark.usefixtures("tiers", "needs_root")
S3, SOAK = pytest.mark.s3, pytest.mark.soak
MOTO, RCLONE = pytest.param("moto", marks=S3), pytest.param("rclone", marks=[S3, SOAK])
RGW = pytest.param("rgw", marks=[S3, SOAK, pytest.mark.rgw])
Store = tuple[Callable[[], str], dict[str, str], bool]
OTHER = f"""set -e
{LET_GO}
mkdir -p /run/tierfs
mount -t tmpfs -o mode=755 none /run/tierfs
hostname other-machine
echo ready
exec sleep 200
"""


class Machines(NamedTuple):
    """A volume here, and where its clone is used; `enter` runs a command there."""

    here: Volume
    there: Volume
    enter: Callable[..., subprocess.CompletedProcess]
    locks: bool  # the store can refuse

    def clone(self) -> None:
        shutil.rmtree(self.there.state, ignore_errors=True)
        subprocess.run(["cp", "-a", self.here.state, self.there.state], check=True)


@pytest.fixture(scope="module")
def store(request: pytest.FixtureRequest, area: Scratch) -> Iterator[Store]:
    """Makes URLs of unused places in one store; the environment it needs; whether it can refuse."""
    numbers = iter(range(1000))
    if request.param == "directory":

        def directory() -> str:
            path = area.path / f"shared-{next(numbers)}"
            path.mkdir()
            return f"file://{path}"

        yield directory, {}, True
        return
    try:
        with s3servers.SERVERS[request.param](area.path / f"one-{request.param}") as server:
            yield (
                lambda: server.url_for(f"p{next(numbers)}"), server.env, request.param != "rclone",
            )  # fmt: skip
    except s3servers.Unavailable as exc:
        pytest.skip(str(exc))


@pytest.fixture
def machines(store: Store, volume: Callable[..., Volume]) -> Iterator[Machines]:
    url, env, locks = store
    holder = subprocess.Popen(
        ["unshare", "--mount", "--uts", "--propagation", "private", "sh", "-c", OTHER],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    inside = ("nsenter", "--mount", "--uts", "--target", str(holder.pid), "--")
    try:
        if holder.stdout.readline() != "ready\n":
            pytest.skip(f"no namespaces here: {holder.stderr.read()}")
        here = volume(mount=False, store=url(), env=env)
        there = volume(mount=False, store=here.store, env=env, program=(*inside, str(TIERFS)))

        def enter(*argv: str) -> subprocess.CompletedProcess:
            return subprocess.run([*inside, *argv], capture_output=True, text=True, timeout=60)

        try:
            yield Machines(here, there, enter, locks)
        finally:
            if there.mountpoint.exists() and enter("mountpoint", "-q", str(there.mountpoint)).returncode == 0:
                there.cli("umount", there.mountpoint, check=False, timeout=60)
                enter("umount", "-l", str(there.mountpoint))
    finally:
        holder.kill()
        holder.communicate()


def notes(volume: Volume) -> str:
    return " ".join(volume.status()["notes"])


def notes_say(volume: Volume, text: str) -> bool:
    deadline = time.monotonic() + 30
    while text not in notes(volume) and time.monotonic() < deadline:
        time.sleep(0.1)
    return text in notes(volume)


def new_file(machine: Volume, enter: Callable | None, name: str) -> Path:
    path = machine.mountpoint / name
    if enter is None:
        path.write_bytes(os.urandom(20_000))
    else:
        enter("sh", "-c", f"head -c 20000 /dev/urandom > '{path}'")
    return path


@pytest.mark.parametrize("store", [MOTO, pytest.param("directory", marks=SOAK), RCLONE, RGW], indirect=True)
def test_a_clone_is_refused_and_a_takeover_fences_the_first(machines: Machines) -> None:
    here, there = machines.here, machines.there
    here.mount()
    here.demote(new_file(here, None, "first"))
    here.umount()
    machines.clone()
    said = here.mount().stderr
    assert ("mount it on one only" in said) is not machines.locks
    assert notes_say(here, "mount this volume on one only") if not machines.locks else True
    here.demote(new_file(here, None, "second"))

    there.mountpoint.mkdir(exist_ok=True)
    refused = there.mount(check=False)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1, refused.stderr
    assert f"is used by host {os.uname().nodename!r} since 20" in refused.stderr
    assert "--force" in refused.stderr
    here.demote(new_file(here, None, "third"))

    there.mount("--force")
    there.demote(new_file(there, machines.enter, "theirs"))
    deadline = time.monotonic() + 60  # an answer that the store is ours is believed for some seconds
    for number in range(10_000):
        stays = new_file(here, None, f"later{number}")
        done = here.cli("demote", "--wait", stays, check=False)
        if done.returncode or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert done.returncode == 1 and "'other-machine'" in done.stderr, done.stderr
    assert here.tier(stays) == "resident"
    assert notes_say(here, "nothing is copied out") and "--force" in notes(here)
    assert here.cli("gc", here.mountpoint, check=False).returncode == 1
    # Local work goes on, and what is only in the store can be read.
    assert len((here.mountpoint / "first").read_bytes()) == 20_000
    there.demote(new_file(there, machines.enter, "theirs too"))

    there.cli("umount", there.mountpoint)
    here.umount()
    assert "'other-machine'" in here.mount(check=False).stderr
    here.mount("--force")
    here.demote(stays)


def test_a_copy_of_a_state_directory_in_use_is_refused(volume: Callable[..., Volume]) -> None:
    """It has the same claim on the store as the original, whose place it would take."""
    here = volume(mount=False)
    shared = here.base / "shared"
    shared.mkdir()
    here.store = f"file://{shared}"
    here.mount()
    path = new_file(here, None, "first")
    here.demote(path)
    deadline = time.monotonic() + 30
    while not (shared / "alive.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    there = volume(mount=False)
    there.store = here.store
    subprocess.run(["cp", "-a", here.state, there.state], check=True)
    refused = there.mount(check=False)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1, refused.stderr
    assert "is mounted on this machine by process" in refused.stderr and "--force" in refused.stderr
    here.umount()
    there.mount()
    assert (there.mountpoint / "first").read_bytes()


@pytest.mark.parametrize(
    "store", ["directory", pytest.param("moto", marks=[S3, SOAK]), RCLONE, RGW], indirect=True
)
def test_of_two_that_mount_at_the_same_moment_one_writes(machines: Machines) -> None:
    here, there = machines.here, machines.there
    here.mount()
    here.umount()
    machines.clone()
    there.mountpoint.mkdir(exist_ok=True)
    mounted: dict[str, bool] = {}
    start = threading.Barrier(2)

    def mount(name: str, machine: Volume) -> None:
        start.wait()
        done = machine.mount(check=False)
        mounted[name] = done.returncode == 0
        assert mounted[name] or "is used by host" in done.stderr, done.stderr

    threads = [threading.Thread(target=mount, args=pair) for pair in (("here", here), ("there", there))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(mounted.values())
    time.sleep(5.5)
    wrote = []
    for name, machine, enter in (("here", here, None), ("there", there, machines.enter)):
        if mounted[name]:
            path = new_file(machine, enter, "mine")
            done = machine.cli("demote", "--wait", path, check=False)
            wrote.append(done.returncode == 0)
            assert wrote[-1] or "machine" in done.stderr, done.stderr
    assert wrote.count(True) == 1, "exactly one has the store"
    with contextlib.suppress(AssertionError):
        there.cli("umount", there.mountpoint)
