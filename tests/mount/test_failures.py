"""What a person meets when the store or the mover fails: an error in time, never zeros, and nothing lost."""

from __future__ import annotations

import errno
import os
import random
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3servers
from harness import Volume, kill, wait_gone

pytestmark = pytest.mark.usefixtures("tiers")
SMALL = random.Random(1).randbytes(40_000)
LARGE = random.Random(2).randbytes(9 << 20)
Make = Callable[..., Volume]


@pytest.fixture
def stopped() -> Iterator[Callable[[int], None]]:
    """`stopped(pid)` halts a process until the test ends."""
    pids: list[int] = []

    def stop(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        pids.append(pid)

    yield stop
    for pid in pids:
        kill(pid, signal.SIGCONT)


def demoted(mounted: Volume, **contents: bytes) -> list[Path]:
    paths = []
    for name, content in contents.items():
        paths.append(mounted.mountpoint / name)
        paths[-1].write_bytes(content)
    mounted.demote(*paths)
    return paths


def read_error(path: Path, offset: int = 0, size: int = 4096) -> int:
    """The errno of a read; 0 when it gave something."""
    try:
        with open(path, "rb", buffering=0) as file:
            os.pread(file.fileno(), size, offset)
    except OSError as exc:
        return exc.errno or -1
    return 0


def test_store_gone_is_eio_in_time(volume: Make) -> None:
    mounted = volume(mount=False)
    mounted.mount()
    mounted.configure(fetch_timeout="3s")
    small, large = demoted(mounted, small=SMALL, large=LARGE)
    (mounted.mountpoint / "resident").write_bytes(b"untouched")
    store = mounted.state / "store"
    store.rename(mounted.state / "store-away")
    for path in (small, large):
        began = time.monotonic()
        assert read_error(path) == errno.EIO
        assert time.monotonic() - began < 8
    assert (mounted.mountpoint / "resident").read_bytes() == b"untouched"
    assert os.listdir(mounted.mountpoint)
    assert small.stat().st_size == len(SMALL)
    os.rename(small, mounted.mountpoint / "renamed")
    errors = mounted.status()["errors"]
    assert any("renamed" in str(error) or "small" in str(error) for error in errors), errors
    (mounted.state / "store-away").rename(store)
    assert (mounted.mountpoint / "renamed").read_bytes() == SMALL
    assert large.read_bytes() == LARGE


def test_a_store_that_is_down_does_not_stop_a_mount(volume: Make, rclone_s3: s3servers.Server) -> None:
    mounted = volume(store=rclone_s3.url_for("down"), env=rclone_s3.env)
    (path,) = demoted(mounted, small=SMALL)
    mounted.configure(fetch_timeout="2s")
    mounted.umount()
    server = rclone_s3.processes[0].pid
    os.kill(server, signal.SIGSTOP)
    try:
        mounted.mount()
        assert path.stat().st_size == len(SMALL)
        assert read_error(path) == errno.EIO
        (mounted.mountpoint / "new").write_bytes(b"work goes on")
    finally:
        os.kill(server, signal.SIGCONT)
    assert path.read_bytes() == SMALL


def nice_of_group(pid: int) -> int:
    return int(Path(f"/proc/{pid}/autogroup").read_text().split()[-1])


@pytest.mark.skipif(not os.path.exists("/proc/self/autogroup"), reason="this kernel has no autogroups")
def test_a_mover_that_begins_or_ends_is_not_held_back(
    volume: Make, rclone_s3: s3servers.Server, stopped: Callable[[int], None]
) -> None:
    """Somebody waits for it then, an order or an unmount: beside busy programs it would not get on."""
    mounted = volume(store=rclone_s3.url_for("begins"), env=rclone_s3.env)
    mounted.umount()
    server = rclone_s3.processes[0].pid
    os.kill(server, signal.SIGSTOP)
    try:
        mounted.mount()
        mover = mounted.mover()
        for _ in range(25):  # longer than a question is remembered
            assert nice_of_group(mover) == 0, "the store has yet to answer"
            time.sleep(0.1)
    finally:
        os.kill(server, signal.SIGCONT)
    while nice_of_group(mover) != 19:
        time.sleep(0.1)
    stopped(mover)  # so that it cannot help itself
    with subprocess.Popen(
        [*mounted.program, "umount", mounted.mountpoint], env=mounted.environment
    ) as unmounting:
        while nice_of_group(mover) != 0:
            assert unmounting.poll() is None
            time.sleep(0.05)
        kill(mover, signal.SIGCONT)
    assert unmounting.returncode == 0


def test_no_s3_client_is_in_the_process_that_supervises(volume: Make, rclone_s3: s3servers.Server) -> None:
    """What it forks to look whose the store is would wait in vain for the threads of one."""
    mounted = volume(store=rclone_s3.url_for("apart"), env=rclone_s3.env)
    maps = Path(f"/proc/{mounted.status()['pids']['supervisor']}/maps").read_text()
    assert "_obstore" not in maps


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
def test_ctrl_c_ends_a_cold_read_at_once(
    volume: Make, rclone_s3: s3servers.Server, stopped: Callable[[int], None], content: bytes
) -> None:
    mounted = volume(store=rclone_s3.url_for(f"hang{len(content)}"), env=rclone_s3.env)
    (path,) = demoted(mounted, file=content)
    stopped(rclone_s3.processes[0].pid)
    with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as cat:
        assert cat.stdout is not None
        assert not select.select([cat.stdout], [], [], 0.5)[0], "the store hangs: nothing may come"
        began = time.monotonic()
        cat.send_signal(signal.SIGINT)
        assert not wait_gone([cat.pid], 5)
        assert time.monotonic() - began < 1
        assert cat.stdout.read() == b""
    rclone_s3.processes[0].send_signal(signal.SIGCONT)
    assert path.read_bytes() == content


def test_a_killed_mover_is_restarted(volume: Make) -> None:
    mounted = volume()
    small, large = demoted(mounted, small=SMALL, large=LARGE)
    resident = mounted.mountpoint / "resident"
    resident.write_bytes(b"there")
    old = mounted.mover()
    kill(old)
    assert resident.read_bytes() == b"there"
    assert small.read_bytes() == SMALL
    assert large.read_bytes() == LARGE
    assert mounted.mover() != old
    mounted.demote(resident)
    assert resident.read_bytes() == b"there"


def test_a_mover_killed_under_a_cold_read(volume: Make) -> None:
    """The reader waits for the next mover and gets the right bytes."""
    mounted = volume()
    (path,) = demoted(mounted, large=LARGE * 4)
    mover = mounted.mover()
    os.kill(mover, signal.SIGSTOP)
    with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as cat:
        assert cat.stdout is not None
        assert not select.select([cat.stdout], [], [], 0.3)[0]
        kill(mover)
        assert cat.stdout.read() == LARGE * 4
    assert cat.returncode == 0


def test_a_stopped_mover_stops_no_local_work(volume: Make, stopped: Callable[[int], None]) -> None:
    mounted = volume()
    demoted(mounted, small=SMALL)
    stopped(mounted.mover())
    for number in range(300):
        path = mounted.mountpoint / f"f{number}"
        path.write_bytes(b"x")
        path.rename(mounted.mountpoint / f"g{number}")
        (mounted.mountpoint / f"g{number}").unlink()
    assert os.listdir(mounted.mountpoint) == ["small"]


@pytest.mark.parametrize("point", ["stub-written", "stub-committed", "punched"])
def test_a_mover_that_stands_still_in_a_punch_is_replaced(volume: Make, point: str) -> None:
    """The file is shut while it is punched: whoever wants it gets it from the next mover, whole."""
    mounted = volume(mount=False)
    mounted.env |= {"TIERFS_FAILPOINT": f"{point}:1:STOP", "TIERFS_SILENCE_SECONDS": "1"}
    mounted.mount()
    path = mounted.mountpoint / "f"
    path.write_bytes(LARGE)
    mover = mounted.mover()
    with subprocess.Popen(
        [*mounted.program, "demote", path], env=mounted.environment, stderr=subprocess.DEVNULL
    ) as order:
        deadline = time.monotonic() + 60
        while Path(f"/proc/{mover}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline, mounted.log()[-2000:]
            time.sleep(0.02)
        began = time.monotonic()
        with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as cat:
            assert cat.communicate(timeout=60)[0] == LARGE
        assert time.monotonic() - began < 30
        order.wait(60)
    assert mounted.mover() != mover
    assert "while somebody waits: it is killed" in mounted.log()
    done = mounted.cli("check", mounted.mountpoint, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing", "longer"])
@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
def test_a_damaged_object_is_never_taken_for_content(volume: Make, damage: str, content: bytes) -> None:
    mounted = volume()
    mounted.configure(fetch_timeout="3s")
    (path,) = demoted(mounted, precious=content)
    (victim,) = (item for item in mounted.objects() if item.stat().st_size == len(content))
    victim.chmod(0o600)
    middle = len(content) // 2
    if damage == "flip":
        victim.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage in ("cut", "empty"):
        os.truncate(victim, middle if damage == "cut" else 0)
    elif damage == "longer":
        victim.write_bytes(content[:middle] + b"!" + content[middle:])
    else:
        victim.unlink()
    assert read_error(path, middle) == errno.EIO
    with pytest.raises(OSError):
        path.read_bytes()
    assert mounted.tier(path) != "resident"
    assert path.stat().st_size == len(content)
    errors = mounted.status()["errors"]
    assert any("precious" in str(error) for error in errors), errors
    victim.unlink(missing_ok=True)
    victim.write_bytes(content)
    assert path.read_bytes() == content, "once the object is whole again so is the file"


def test_what_is_whole_of_a_damaged_object_is_readable(volume: Make) -> None:
    mounted = volume()
    (path,) = demoted(mounted, file=LARGE)
    (victim,) = (item for item in mounted.objects() if item.stat().st_size == len(LARGE))
    victim.chmod(0o600)
    victim.write_bytes(LARGE[:-1] + bytes([LARGE[-1] ^ 1]))
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        assert os.pread(file.fileno(), 4096, 0) == LARGE[:4096]
        with pytest.raises(OSError) as caught:
            os.pread(file.fileno(), 4096, len(LARGE) - 4096)
    assert caught.value.errno == errno.EIO


def test_writing_to_a_stub_that_cannot_be_fetched(volume: Make) -> None:
    """The write fails; what was there is not half overwritten."""
    mounted = volume()
    mounted.configure(fetch_timeout="2s")
    (path,) = demoted(mounted, file=LARGE)
    store = mounted.state / "store"
    store.rename(mounted.state / "store-away")
    with pytest.raises(OSError) as caught, open(path, "r+b", buffering=0) as out:
        out.write(b"lost?")
    assert caught.value.errno == errno.EIO
    (mounted.state / "store-away").rename(store)
    assert path.read_bytes() == LARGE


def test_ctrl_c_cancels_a_demotion(
    volume: Make, rclone_s3: s3servers.Server, stopped: Callable[[int], None]
) -> None:
    mounted = volume(store=rclone_s3.url_for("cancel"), env=rclone_s3.env)
    path = mounted.mountpoint / "file"
    path.write_bytes(SMALL)
    stopped(rclone_s3.processes[0].pid)
    argv = [*mounted.program, "demote", "--wait", str(path)]
    with subprocess.Popen(argv, env=mounted.environment, stderr=subprocess.PIPE) as demotion:
        assert wait_gone([demotion.pid], 1.5), "the store hangs: it cannot be done"
        demotion.send_signal(signal.SIGINT)
        assert not wait_gone([demotion.pid], 5)
    assert demotion.returncode == 130
    import sys

    sys.stderr.write(mounted.log())
    assert path.read_bytes() == SMALL
    assert mounted.tier(path) == "resident"
    rclone_s3.processes[0].send_signal(signal.SIGCONT)
    mounted.demote(path)
    import sys

    sys.stderr.write(mounted.log())
    assert path.read_bytes() == SMALL
