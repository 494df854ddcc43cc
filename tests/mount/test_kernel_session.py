"""The kernel session by itself: a real mount and mount server, no supervisor, a mover that the tests play."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bare import Bare, bare, until
from harness import Scratch, linux

from tierfs import wire
from tierfs.fuse import mounting

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root and a mount")
_numbers = itertools.count()


@pytest.fixture
def mounted(area: Scratch) -> Iterator[Bare]:
    base = area.path / f"bare{next(_numbers)}"
    with bare(base, area.connections) as made:
        yield made
        assert "unexpectedly" not in made.log_path.read_text(), made.log_path.read_text()


def _cat(path: Path) -> subprocess.Popen:
    """A reader in a process of its own: it may hang, we may not."""
    return subprocess.Popen(["cat", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_mount_table_and_clean_end(mounted: Bare) -> None:
    table = Path("/proc/self/mountinfo").read_text().splitlines()
    line = next(line for line in table if str(mounted.mountpoint) in line)
    assert "fuse.tierfs tierfs#" in line.replace("\\043", "#")
    assert "nosuid,nodev" in line
    (mounted.mountpoint / "file").write_bytes(b"content")
    assert (mounted.tree / "file").read_bytes() == b"content"
    # The kernel does not wait for the answer to RELEASE; what is asked behind it is answered behind it.
    os.statvfs(mounted.mountpoint)
    assert mounted.umount() is True


def test_busy_mount_stays(mounted: Bare) -> None:
    with (mounted.mountpoint / "file").open("wb"), pytest.raises(OSError) as caught:
        mounting.unmount(str(mounted.mountpoint))
    assert caught.value.errno == errno.EBUSY
    assert (mounted.mountpoint / "file").exists()


def test_abort_is_no_clean_end(mounted: Bare) -> None:
    file = (mounted.mountpoint / "file").open("wb")
    mounting.abort(mounting.device_of(str(mounted.mountpoint)) or "")
    assert mounted.stopped() is False
    with contextlib.suppress(OSError):  # without passthrough the server is told of a close, and is not there
        file.close()


def test_sigterm_ends_at_once_and_not_cleanly(mounted: Bare) -> None:
    mounted.server.send_signal(signal.SIGTERM)
    assert mounted.stopped() is False


def test_stub_waits_for_the_mover_and_becomes_passthrough(mounted: Bare) -> None:
    mover = mounted.mover()
    path = mounted.stub("cold", 10_000)
    reader = _cat(path)
    fetch = mover.fetch()
    assert fetch.size == 10_000
    assert reader.poll() is None
    assert path.stat().st_size == 10_000  # others are served meanwhile
    content = os.urandom(10_000)
    mover.deliver(fetch, mounted.tree / "cold", content)
    assert reader.communicate(timeout=10)[0] == content
    assert path.read_bytes() == content
    mover.close()


def test_failed_fetch_is_eio_with_its_reason_in_the_log(mounted: Bare) -> None:
    mover = mounted.mover()
    reader = _cat(mounted.stub("cold", 10_000))
    fetch = mover.fetch()
    mover.send(wire.FetchEnd(fetch.id, fetch.ino, errno.EIO, "the store is on fire"))
    assert b"Input/output error" in reader.communicate(timeout=10)[1]
    assert until(lambda: "the store is on fire" in mounted.log_path.read_text())


def test_interrupted_open_returns_at_once(mounted: Bare) -> None:
    mover = mounted.mover()
    reader = _cat(mounted.stub("cold", 10_000))
    mover.fetch()
    reader.send_signal(signal.SIGINT)
    begun = time.monotonic()
    assert reader.wait(10) == -signal.SIGINT
    assert time.monotonic() - begun < 1
    # Answered once: a late arrival must not answer it again.
    assert sorted(os.listdir(mounted.mountpoint)) == ["cold"]


_HARMLESS = {
    "SIGCHLD": "signal.signal(number, lambda *_: None)",
    "SIGALRM": "signal.signal(number, lambda *_: None)",  # PostgreSQL's timeouts, and what wakes its processes:
    "SIGUSR1": "signal.signal(number, lambda *_: None)",
    "SIGRTMIN": "signal.signal(number, lambda *_: None)",
    "SIGHUP": "signal.signal(number, lambda *_: None)",
    "SIGINT": "signal.pthread_sigmask(signal.SIG_BLOCK, [number])",  # a program that takes it from a signalfd
}


@pytest.mark.parametrize("name", _HARMLESS)
def test_harmless_signals_interrupt_nothing(mounted: Bare, name: str) -> None:
    """What a disk would not answer with EINTR for must not see one here either; a signal that ends it does."""
    mover = mounted.mover()
    path = mounted.stub("cold", 10_000)
    # Not os.open, which would ask again.
    code = (
        f"import ctypes, signal; number = signal.{name}; {_HARMLESS[name]}\n"
        "signal.signal(signal.SIGCHLD, lambda *_: None)\n"
        f"raise SystemExit(ctypes.CDLL(None).open({os.fsencode(path)!r}, 0) < 0)"
    )
    reader = subprocess.Popen([sys.executable, "-c", code])
    mover.fetch()
    reader.send_signal(getattr(signal, name))
    reader.send_signal(signal.SIGCHLD)
    with pytest.raises(subprocess.TimeoutExpired):
        reader.wait(0.7)
    reader.send_signal(signal.SIGTERM)
    assert reader.wait(1.5) == -signal.SIGTERM


_HANDLING_CTRL_C = (
    "import ctypes, os, signal, sys; signal.signal(signal.SIGINT, lambda *_: sys.argv[2] and os._exit(7))\n"
    "raise SystemExit(ctypes.CDLL(None).open(os.fsencode(sys.argv[1]), 0) < 0)"
)


def test_a_handler_of_ctrl_c_runs_at_once(mounted: Bare) -> None:
    mover = mounted.mover()
    reader = subprocess.Popen([sys.executable, "-c", _HANDLING_CTRL_C, mounted.stub("cold", 10_000), "end"])
    mover.fetch()
    reader.send_signal(signal.SIGINT)
    assert reader.wait(1.5) == 7


def test_who_handles_ctrl_c_gets_what_comes_at_once(mounted: Bare) -> None:
    """PostgreSQL's processes are asked by SIGINT for a checkpoint: the file must not seem broken to them."""
    mover = mounted.mover()
    reader = subprocess.Popen([sys.executable, "-c", _HANDLING_CTRL_C, mounted.stub("cold", 10_000), ""])
    fetch = mover.fetch()
    reader.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert reader.poll() is None
    mover.deliver(fetch, mounted.tree / "cold", bytes(10_000))
    assert reader.wait(5) == 0


def test_write_parked_on_a_stub_is_carried_out_once(mounted: Bare) -> None:
    """The bytes of a WRITE lie in a buffer that the next request overwrites."""
    mover = mounted.mover()
    size = 8 << 20
    path = mounted.stub("large", size)
    code = f"import os; fd = os.open({str(path)!r}, os.O_WRONLY); os.pwrite(fd, b'new' * 1000, 1)"
    writer = subprocess.Popen([sys.executable, "-c", code])
    fetch = mover.fetch()
    for number in range(50):
        (mounted.mountpoint / f"other{number}").write_bytes(b"x" * 3000)
    content = os.urandom(size)
    mover.deliver(fetch, mounted.tree / "large", content)
    assert writer.wait(10) == 0
    assert (mounted.tree / "large").read_bytes() == content[:1] + b"new" * 1000 + content[3001:]


def test_new_mover_is_asked_again(mounted: Bare) -> None:
    first = mounted.mover()
    path = mounted.stub("cold", 10_000)
    reader = _cat(path)
    first.fetch()
    first.close()
    second = mounted.mover()
    second.deliver(second.fetch(), mounted.tree / "cold", b"y" * 10_000)
    assert reader.communicate(timeout=10)[0] == b"y" * 10_000


def test_serves_on_without_a_supervisor(mounted: Bare) -> None:
    mounted._channel.close()
    assert until(lambda: "supervisor is gone" in mounted.log_path.read_text())
    (mounted.mountpoint / "file").write_bytes(b"content")
    mounting.unmount(str(mounted.mountpoint))
    assert mounted.server.wait(10) == 0


def test_listing_far_larger_than_one_reply(mounted: Bare) -> None:
    names = {f"{number:04d}-" + "n" * 200 for number in range(1500)}
    for name in names:
        (mounted.tree / name).touch()
    assert set(os.listdir(mounted.mountpoint)) == names
    with os.scandir(mounted.mountpoint) as entries:
        assert {entry.name for entry in entries if entry.stat().st_size == 0} == names


def test_times_before_1970_and_after_2106(mounted: Bare) -> None:
    path = mounted.mountpoint / "file"
    path.touch()
    for nanoseconds in (-1, -86400 * 10**9 + 5, 5_000_000_000 * 10**9 + 7):
        os.utime(path, ns=(nanoseconds, nanoseconds))
        assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (nanoseconds, nanoseconds)
        assert (mounted.tree / "file").stat().st_mtime_ns == nanoseconds


@pytest.mark.skipif(linux() < (6, 6), reason="before 6.6 Linux asks no FUSE filesystem for it")
def test_birth_time_is_told(mounted: Bare) -> None:
    (mounted.mountpoint / "file").touch()
    command = ["stat", "-c", "%W", str(mounted.mountpoint / "file")]
    born = int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert abs(born - time.time()) < 60


def test_ioctls_are_refused_as_such(mounted: Bare) -> None:
    (mounted.mountpoint / "file").touch()
    done = subprocess.run(["lsattr", mounted.mountpoint / "file"], capture_output=True)
    assert b"Inappropriate ioctl" in done.stderr or b"not supported" in done.stderr


def test_nothing_to_do_costs_nothing(mounted: Bare) -> None:
    for _ in range(200):
        (mounted.mountpoint / "missing").exists()
    time.sleep(6)  # heat of before has been reported by then
    before = _cpu_ticks(mounted.server.pid)
    time.sleep(2)
    assert _cpu_ticks(mounted.server.pid) - before <= 1


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
