"""What the kernel has been told lasts where edits behind the mount are seen, and what is not so it forgets."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Scratch, Volume, linux, wait_gone

from tierfs import volume as volumes
from tierfs.fuse import watching
from tierfs.fuse.mounting import filesystem_of

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("tiers", "needs_root")]

EXPIRED = 1.3  # seconds, after which what is not lasting is asked for anew
WITHIN = 2.0
SLACK = 8.0

# Writes through a mapping without a descriptor whenever it is told to, and says so.
MAPPER = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
fd = os.open(sys.argv[1], os.O_RDWR)
address = libc.mmap(None, 4096, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
if sys.argv[2] == "closed":
    os.close(fd)
print("mapped", flush=True)
for line in sys.stdin:
    ctypes.memmove(address, line[:1].encode(), 1)
    libc.msync(address, 4096, 4)  # so that the next write is seen again
    print("written", flush=True)
"""


# Lists and looks at a directory whenever it is told to, and is hardly ever given a processor.
IDLER = """
import os, sys
idler = os.getpid()
if not os.fork():
    os.sched_setaffinity(0, {0})
    while os.getppid() == idler:
        pass
    os._exit(0)
os.sched_setaffinity(0, {0})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
for line in sys.stdin:
    os.listdir(sys.argv[1])
    print("looks", flush=True)
    os.stat(sys.argv[1])
    print("has looked", flush=True)
"""


@pytest.fixture(autouse=True)
def _watched(area: Scratch) -> None:
    if filesystem_of(os.stat(area.path).st_dev) not in watching._FILESYSTEMS:
        pytest.skip("edits behind the mount are not watched on this filesystem")
    if linux() < watching.OLDEST:
        pytest.skip("edits behind the mount are not watched by so old a Linux")


class Mapper:
    """A process that has a file mapped."""

    def __init__(self, path: Path, descriptor: str) -> None:
        command = [sys.executable, "-c", MAPPER, str(path), descriptor]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._said("mapped")

    def _said(self, word: str) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == word

    def write(self, letter: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{letter}\n")
        self._process.stdin.flush()
        self._said("written")

    def close(self) -> None:
        self._process.communicate(timeout=20)


@pytest.fixture
def mapper() -> Iterator[Callable[[Path, str], Mapper]]:
    made: list[Mapper] = []

    def make(path: Path, descriptor: str) -> Mapper:
        made.append(Mapper(path, descriptor))
        return made[-1]

    yield make
    for each in made:
        each.close()


def modified(path: Path) -> str:
    """The time of its last change, and nothing else: such a question does not ask whether it was read since."""
    return subprocess.run(["stat", "-c", "%y", path], check=True, capture_output=True, text=True).stdout


def beneath(made: Volume, path: Path) -> Path:
    return Path(made.backing(path))


def server(made: Volume) -> int:
    """The process that answers the kernel."""
    return int(volumes.read_runtime(str(made.state))["pids"]["server"])


def becomes(seen: Callable[[], bool]) -> None:
    until = time.monotonic() + WITHIN + SLACK
    while not seen():
        assert time.monotonic() < until, "it does not show"
        time.sleep(0.02)


def answered_without(made: Volume, look: list[object]) -> bool:
    """Whether the kernel answers this while the server is stopped: who asks that waits for it."""
    for _ in range(2):  # reading a link changes when it was read
        subprocess.run(look, check=True, capture_output=True)
    time.sleep(EXPIRED)
    pid = server(made)
    os.kill(pid, signal.SIGSTOP)
    try:
        asked = subprocess.Popen(look, stdout=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            asked.wait(WITHIN)
    finally:
        os.kill(pid, signal.SIGCONT)
        answered = asked.returncode == 0
        asked.wait(SLACK)
    return answered


def test_what_is_known_is_not_asked_for_again(shared: Volume, work: Path) -> None:
    (work / "sub").mkdir()
    (work / "sub" / "file").write_bytes(b"content")
    (work / "link").symlink_to("sub")
    time.sleep(EXPIRED)  # what making them has told
    look = ["stat", work, work / "sub", work / "sub" / "file", work / "link"]
    # More than once: what the mover does with files is an edit behind the mount, too.
    assert any(answered_without(shared, look) for _ in range(5))


def test_an_answer_that_was_on_its_way_when_something_changed(shared: Volume, work: Path) -> None:
    """Who has it takes it in after the change: the kernel must know that it is no news."""
    top = work / "dir"
    top.mkdir()
    command = [sys.executable, "-c", IDLER, str(top)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as idler:
        assert idler.stdin is not None and idler.stdout is not None
        for number in range(10):
            top.stat()
            idler.stdin.write("look\n")
            idler.stdin.flush()
            assert idler.stdout.readline() == "looks\n"
            time.sleep(0.002)
            (top / str(number)).mkdir()
            assert idler.stdout.readline() == "has looked\n"
            seen, is_so = top.stat(), beneath(shared, top).stat()
            assert (seen.st_nlink, seen.st_mtime_ns) == (is_so.st_nlink, is_so.st_mtime_ns)
        idler.kill()


def test_a_mapping_that_outlives_its_descriptor(work: Path, mapper: Callable[[Path, str], Mapper]) -> None:
    path = work / "file"
    path.write_bytes(bytes(4096))
    writer = mapper(path, "closed")
    for letter in "abc":
        time.sleep(EXPIRED)
        before = modified(path), path.stat()
        time.sleep(EXPIRED)
        writer.write(letter)
        assert path.stat().st_mtime_ns > before[1].st_mtime_ns
        assert modified(path) > before[0]
    writer.close()
    assert path.read_bytes()[:1] == b"c"


def test_a_mapping_of_what_was_known_before(work: Path, mapper: Callable[[Path, str], Mapper]) -> None:
    """No read, no write by a descriptor: the kernel is told nothing but that it was opened."""
    path = work / "file"
    path.write_bytes(bytes(4096))
    time.sleep(EXPIRED)
    before = modified(path), path.stat()
    writer = mapper(path, "kept")
    for letter in "abc":
        writer.write(letter)
        now = modified(path)
        assert now > before[0]
        before = now, before[1]


def test_a_file_that_is_written_behind_the_mount_when_it_is_first_seen(shared: Volume, work: Path) -> None:
    """Nobody closes it, so that no event tells: but for the proof it would be believed for a minute."""
    path = beneath(shared, work) / "file"
    with path.open("wb", buffering=0) as file:
        assert (work / "file").stat().st_size == 0
        file.write(b"content")
        becomes(lambda: (work / "file").stat().st_size == len(b"content"))
        file.write(b" and more")
        becomes(lambda: (work / "file").stat().st_size == len(b"content and more"))


@contextlib.contextmanager
def without_a_server(made: Volume) -> Iterator[None]:
    """The server is killed, and another takes over afterwards."""
    runtime = volumes.read_runtime(str(made.state))["pids"]
    os.kill(runtime["supervisor"], signal.SIGSTOP)
    try:
        os.kill(runtime["server"], signal.SIGKILL)
        yield
    finally:
        os.kill(runtime["supervisor"], signal.SIGCONT)


def test_edits_while_there_is_no_server_show(volume: Callable[..., Volume]) -> None:
    made = volume()
    top = made.mountpoint
    for name in ("moved", "removed", "changed"):
        (top / name).write_bytes(b"content")
    (top / "dir").mkdir()
    time.sleep(EXPIRED)
    for name in ("moved", "removed", "changed", "dir"):
        (top / name).stat()
    os.listdir(top)
    place = beneath(made, top)
    with without_a_server(made):
        os.rename(place / "moved", place / "elsewhere")
        (place / "removed").unlink()
        (place / "changed").chmod(0o600)
        (place / "dir" / "new").touch()
    becomes(lambda: not (top / "moved").exists() and (top / "elsewhere").exists())
    becomes(lambda: not (top / "removed").exists())
    becomes(lambda: (top / "changed").stat().st_mode & 0o777 == 0o600)
    becomes(lambda: os.listdir(top / "dir") == ["new"] and sorted(os.listdir(top))[-1] == "elsewhere")
    assert made.log().count("took over") == 1 and "mounting anew" not in made.log()


def test_a_first_of_two_names_that_went_while_there_was_no_server(
    volume: Callable[..., Volume], opened: Callable[..., int]
) -> None:
    """The kernel has been told of it while it was the only one, and of the other since."""
    made = volume()
    first, second = made.mountpoint / "first", made.mountpoint / "second"
    first.write_bytes(b"content")
    time.sleep(EXPIRED)
    opened(first, os.O_PATH)  # so that the kernel does not forget it for want of memory
    os.link(first, second)
    time.sleep(EXPIRED)
    with without_a_server(made):
        beneath(made, first).unlink()
    becomes(lambda: not first.exists())
    assert second.read_bytes() == b"content"


def test_what_is_mounted_in_it_stays_mounted(volume: Callable[..., Volume]) -> None:
    """Neither a directory that was moved away and back nor another server is a reason to detach it."""
    made = volume()
    inner = made.mountpoint / "dir" / "inner"
    inner.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tierfs-tests", inner], check=True)
    try:
        (inner / "file").touch()
        place = beneath(made, made.mountpoint)
        os.rename(place / "dir", place / "away")
        os.rename(place / "away", place / "dir")
        (place / "other").touch()
        becomes(lambda: (made.mountpoint / "other").exists())
        assert (inner / "file").exists()
        before = server(made)
        os.kill(before, signal.SIGKILL)
        becomes(lambda: server(made) not in (0, before))
        time.sleep(EXPIRED)
        assert (inner / "file").exists()
    finally:
        subprocess.run(["umount", inner], check=True)


def stands(pid: int, state: str) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == state


def caught(teller: int, told: int, place: Path, directory: Path, number: int) -> subprocess.Popen[bytes] | None:
    """Who waits for the server with the lock of the directory, and so keeps the teller waiting. None: it had to
    ask for something before that."""
    os.kill(teller, signal.SIGSTOP)
    directory.stat()
    (place / str(number)).unlink()
    time.sleep(EXPIRED)  # that has been sent to the teller
    os.kill(told, signal.SIGSTOP)
    maker = subprocess.Popen(["mkdir", directory / f"new{number}"], stderr=subprocess.PIPE)
    time.sleep(EXPIRED)
    os.kill(teller, signal.SIGCONT)
    time.sleep(EXPIRED)
    if stands(teller, "D"):
        return maker
    os.kill(told, signal.SIGCONT)
    maker.communicate(timeout=SLACK)
    return None


def test_the_end_of_all_that_serve_while_the_kernel_waits_to_be_told(
    volume: Callable[..., Volume], tmp_path: Path
) -> None:
    """Whoever tells it would keep the mount from its end, and with it those who wait for the dead server."""
    made = volume(env={"TMPDIR": str(tmp_path)})
    directory, tries = made.mountpoint / "dir", range(10)
    directory.mkdir()
    for number in tries:
        (directory / str(number)).touch()
    pids, told = volumes.read_runtime(str(made.state))["pids"], server(made)
    (teller,) = map(int, Path(f"/proc/{told}/task/{told}/children").read_text().split())
    try:
        place = beneath(made, directory)
        maker = next(filter(None, (caught(teller, told, place, directory, number) for number in tries)))
        for name in ("supervisor", "server"):
            os.kill(pids[name], signal.SIGKILL)
        _, said = maker.communicate(timeout=WITHIN + SLACK)
        assert maker.returncode and (b"not connected" in said or b"abort" in said)
    finally:
        for pid in (teller, told):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    with pytest.raises(OSError, match="not connected"):
        os.statvfs(directory)
    assert not wait_gone([teller], WITHIN + SLACK)
    assert os.listdir(tmp_path) == [], "what it was aborted by is left"
