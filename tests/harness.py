"""Volumes for tests and benchmarks: mounted by the command in a process of its own, and gone without a trace.

Nothing here trusts a mount to answer. Each one has a shell beside it that aborts the FUSE connection when its
time is up, so that a server that hangs ends a test with ENOTCONN, not the run with an unkillable process. Our
processes are known by a variable in their environment, and are ended by pid.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from ctypes.util import find_library
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
TIERFS = Path(sys.executable).parent / "tierfs"
SESSION = "TIERFS_TEST_SESSION"
VOLUME = "TIERFS_TEST_VOLUME"
session_id = uuid.uuid4().hex
BLOCK = 512  # the unit of st_blocks
CONNECTIONS = Path("/sys/fs/fuse/connections")
_PREFIX = "tierfs-tests-"
_NAME = "session"  # in such a directory, says whose processes are meant
_YOUNG = 10.0  # seconds in which a new directory gets its lock

Done = subprocess.CompletedProcess
Path_ = str | bytes | os.PathLike


class Scratch:
    """A directory that every user may enter, and a private fusectl, for one run.

    It is locked as long as the run lives: what a run that was killed has left is cleared away by the next.
    """

    def __init__(self) -> None:
        os.environ[SESSION] = session_id
        clear_abandoned(Path(tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = _locked(self.path)
        (self.path / _NAME).write_text(session_id)
        self.path.chmod(0o755)
        self.connections = CONNECTIONS
        if os.geteuid() == 0 and not os.path.ismount(self.connections):
            self.connections = self.path / "fusectl"
            self.connections.mkdir()
            subprocess.run(["mount", "-t", "fusectl", "none", self.connections], capture_output=True)

    def leftovers(self) -> list[str]:
        """What of ours is still mounted or running."""
        found = [f"mount {where}" for where, _ in mounts() if where.startswith(f"{self.path}/")]
        found += [f"process {pid}: {command(pid)}" for pid in pids_with(SESSION, session_id)]
        # multiprocessing's own watcher lives as long as this very process.
        return [line for line in found if not line.endswith("/fusectl") and "resource_tracker" not in line]

    def close(self) -> list[str]:
        """Remove everything; what should have been gone already is returned, in words."""
        deadline = time.monotonic() + 5
        while (left := self.leftovers()) and time.monotonic() < deadline:
            time.sleep(0.05)
        _clear(self.path, session_id)
        if self._lock is not None:
            os.close(self._lock)
        return left


def _locked(path: Path) -> int | None:
    """A descriptor that holds the directory's lock; None where another has it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _clear(path: Path, session: str) -> None:
    """Unmount what is mounted below a run's directory, end the run's processes, and remove the directory."""
    own = path / "fusectl"
    connections = own if os.path.ismount(own) else CONNECTIONS
    for where, device in mounts():
        if where.startswith(f"{path}/") and where != str(own):
            detach(where, device, connections)
    for pid in pids_with(SESSION, session):
        kill(pid)
    if connections == own:
        subprocess.run(["umount", "-l", own], check=True)
    if not any(where.startswith(f"{path}/") for where, _ in mounts()):
        remove(path)


def clear_abandoned(place: Path, young: float = _YOUNG) -> None:
    """What runs have left that were killed: mounts that nobody serves, and gigabytes."""
    for path in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another run's, or just removed by one
            about = path.stat()
            if about.st_uid != os.geteuid() or time.time() - about.st_ctime < young:
                continue
            lock = _locked(path)
            if lock is not None:
                try:
                    _clear(path, (path / _NAME).read_text())
                finally:
                    os.close(lock)


def needs_libfuse() -> None:
    """Skip where the portable binding has none to go through: Debian has no libfuse 2 after its 13."""
    if not find_library("fuse"):
        import pytest  # benchmarks do without

        pytest.skip("there is no libfuse 2 here", allow_module_level=True)


def remove(path: Path) -> None:
    """Remove a directory with all that is in it, however deep; what is mounted there stays."""
    subprocess.run(["rm", "-rf", "--one-file-system", path], capture_output=True, timeout=100)


def mounts() -> list[tuple[str, int]]:
    """(mountpoint, minor device number) of every mount, read without touching one."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        where = fields[4].encode("utf-8", "surrogateescape").decode("unicode_escape")
        found.append((where, int(fields[2].split(":")[1])))
    return found


def connection_of(mountpoint: Path_) -> int | None:
    """The minor device number of the mount at a path: the name of its FUSE connection."""
    parent, name = os.path.split(os.fspath(mountpoint))
    where = os.path.join(os.path.realpath(parent), name)
    return next((device for at, device in reversed(mounts()) if at == where), None)


def detach(mountpoint: str, device: int, connections: Path) -> None:
    """The last resort for one mount: abort its connection, then unmount lazily.

    In this order, and only while it is mounted: its number is another mount's as soon as it is gone.
    """
    if connection_of(mountpoint) == device:
        with contextlib.suppress(OSError):
            (connections / str(device) / "abort").write_text("1")
    subprocess.run(["umount", "-l", mountpoint], capture_output=True, timeout=20)


# For a shell in a new mount namespace: what others have mounted would not end before that does.
LET_GO = "grep ' - fuse.tierfs ' /proc/self/mountinfo | cut -d' ' -f5 | xargs -rn1 umount -l || true\n"


def pids_with(variable: str, value: str) -> list[int]:
    """Processes, other than this one, that have the variable with that value in their environment.

    The oldest first: who ends a supervisor before its children is not offered new ones. Numbers say nothing
    about age, since they begin again.
    """
    needle = f"\0{variable}={value}\0".encode()
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                if needle in b"\0" + Path("/proc", entry, "environ").read_bytes() + b"\0":
                    began = int(Path("/proc", entry, "stat").read_bytes().rpartition(b")")[2].split()[19])
                    found.append((began, int(entry)))
    return [pid for _, pid in sorted(found)]


def command(pid: int) -> str:
    with contextlib.suppress(OSError):
        words = Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ")
        return words.decode(errors="replace")[:200]
    return "?"


def linux() -> tuple[int, int]:
    """The version of the kernel."""
    major, minor = re.findall(r"\d+", os.uname().release)[:2]
    return int(major), int(minor)


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@contextlib.contextmanager
def mapped(path: Path_, size: int) -> Iterator[int]:
    """The address of a shared mapping without a descriptor; the mmap module would keep one."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    fd = os.open(path, os.O_RDWR)
    address = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    os.close(fd)
    try:
        yield address
    finally:
        libc.munmap(address, size)


def wait_gone(pids: Sequence[int], seconds: float) -> list[int]:
    """Wait until these processes have ended; those that have not are returned."""
    deadline = time.monotonic() + seconds
    left = []
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        with open(fd, "rb"):
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                left.append(pid)
    return left


@dataclass
class Volume:
    """One volume under a directory of its own: `mountpoint`, `state`, and the command to work on them."""

    base: Path
    connections: Path
    store: str = ""
    env: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    limit: float = 110.0  # seconds until a mount is aborted
    program: tuple[str, ...] = (str(TIERFS),)
    user: int | None = None
    group: int | None = None
    mountpoint: Path = Path()
    state: Path = Path()

    def __post_init__(self) -> None:
        self.mountpoint = self.base / "mnt"
        self.state = self.base / "state"
        self._guard: subprocess.Popen | None = None

    # --- the command ---------------------------------------------------------------------------------------

    @property
    def identity(self) -> dict[str, Any]:
        """Who runs the command, for `subprocess.run`."""
        return {} if self.user is None else {"user": self.user, "group": self.group, "extra_groups": []}

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, **self.env, SESSION: session_id, VOLUME: str(self.base)}

    def cli(self, *args: Path_, check: bool = True, timeout: float = 100, **more: Any) -> Done:
        """Run `tierfs ARGS`; with `check` a failure is an AssertionError with what it said."""
        more = {**self.identity, "env": self.environment, "cwd": self.base, **more}
        argv = [*self.program, *(os.fspath(arg) for arg in args)]
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="surrogateescape", timeout=timeout, **more
        )
        if check:
            said = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}\n{self.log()[-4000:]}"
            assert done.returncode == 0, f"tierfs {args}: exit code {done.returncode}\n{said}"
        return done

    def json(self, *args: Path_, **more: Any) -> Any:
        """What a command says with `--json`."""
        return json.loads(self.cli(*args, **more).stdout)

    def mount(self, *args: Path_, check: bool = True, timeout: float = 90) -> Done:
        with contextlib.suppress(FileExistsError):  # no look at it: a mount there may be dead
            os.mkdir(self.mountpoint)
        given = ("--store", self.store) if self.store else ()
        given += ("--state", self.state, *self.options, *args)
        if "fusepy" in given:
            needs_libfuse()
        done = self.cli("mount", *given, self.mountpoint, check=check, timeout=timeout)
        self.watch()
        return done

    def watch(self) -> None:
        """Put a guard beside the mount that aborts its connection when `limit` has passed."""
        device = connection_of(self.mountpoint)
        if device is not None and self._guard is None:
            # Another mount may have got the number since: then this one is gone.
            still = f"grep -q '^[0-9]* [0-9]* 0:{device} / {self.mountpoint} ' /proc/self/mountinfo"
            script = f"sleep {self.limit:.0f}; {still} && echo 1 > '{self.connections}/{device}/abort'"
            argv, path = ["sh", "-c", script], {"PATH": os.defpath}
            self._guard = subprocess.Popen(argv, start_new_session=True, env=path)

    def _unwatch(self) -> None:
        if self._guard is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._guard.pid, signal.SIGKILL)
            self._guard.wait()
            self._guard = None

    def umount(self, *args: Path_, check: bool = True) -> Done:
        """`tierfs umount`, and wait until the daemon has ended."""
        done = self.cli("umount", *args, self.mountpoint, check=check)
        if done.returncode == 0:
            left = wait_gone(self.pids(), 20)
            assert not left, f"still running after umount: {[command(pid) for pid in left]}"
            self._unwatch()
        return done

    def remount(self, *args: Path_) -> None:
        self.umount()
        self.mount(*args)

    def configure(self, **keys: str) -> None:
        """Set keys of the configuration; they are in force when this returns, if the volume is mounted."""
        from tierfs import config, control, locate

        for key, value in keys.items():
            config.set_key(str(self.state / config.FILE_NAME), key, value)
        if connection_of(self.mountpoint) is not None:
            place = locate.locate(os.fspath(self.mountpoint))
            assert list(control.converse(place.mount, control.Reload())) == [control.Done()]

    def close(self) -> None:
        """Unmount whatever the state; AssertionError where that needed force."""
        forced = said = ""
        device = connection_of(self.mountpoint)
        try:
            if device is not None:
                done = self.cli("umount", self.mountpoint, check=False, timeout=75)
                said = done.stderr  # also without an error: who has the mount in another namespace
                forced = said if done.returncode else ""
        except subprocess.TimeoutExpired:
            forced = "umount hung"
        if (forced or connection_of(self.mountpoint) is not None) and device is not None:
            forced = forced or "umount left a mount behind"
            detach(str(self.mountpoint), device, self.connections)
        self._unwatch()
        for pid in wait_gone(self.pids(), 1 if forced else 15):
            forced = forced or f"{command(pid)} ran on after umount. {said}"
            kill(pid)
        assert not forced, f"{self.base}: {forced}\n{self.log()[-4000:]}"

    def discard(self) -> None:
        """Close it, and remove what it has on the disk: a volume keeps a reserve of up to 1 GiB there."""
        self.close()
        remove(self.base)

    # --- facts ---------------------------------------------------------------------------------------------

    def pids(self) -> list[int]:
        return pids_with(VOLUME, str(self.base))

    def log(self) -> str:
        with contextlib.suppress(OSError):
            return (self.state / "log" / "tierfs.log").read_text(errors="replace")
        return ""

    def status(self, *paths: Path_) -> Any:
        return self.json("status", "--json", *(paths or (self.mountpoint,)))

    def mover(self) -> int:
        return int(self.status()["pids"]["mover"])

    def backing(self, path: Path_) -> str:
        """The file of the backing tree that is shown at a path of the mount."""
        return os.path.join(self.state, "tree", os.path.relpath(os.fsdecode(path), self.mountpoint))

    def objects(self) -> list[Path]:
        """The objects that hold content, in an embedded store."""
        data = self.state / "store" / "data"
        names = (path for path in data.rglob("*") if path.is_file() and "." not in path.name)
        return sorted(path for path in names if "-" in path.name)

    # --- tiers ---------------------------------------------------------------------------------------------

    def demote(self, *paths: Path_) -> None:
        """Demote files, or everything; all that is named must become stubs."""
        self.cli("demote", "--wait", *(paths or (self.mountpoint,)))

    def fetch(self, *paths: Path_) -> None:
        self.cli("fetch", "--wait", *(paths or (self.mountpoint,)))

    def order(self, verb: str, *paths: Path_) -> list[str]:
        """`demote` or `fetch` without starting the command; the reasons of what stayed as it was."""
        from tierfs import control, locate

        place = locate.locate(os.fspath(self.mountpoint))
        relative = [os.fsencode(os.path.relpath(os.fsdecode(path), self.mountpoint)) for path in paths]
        request = (control.Demote if verb == "demote" else control.Fetch)(relative or [b""], True)
        answers = list(control.converse(place.mount, request))
        return [item.reason for item in answers[-1].stayed]

    def tier(self, path: Path_) -> str:
        return os.getxattr(path, "user.tierfs.tier").decode()

    def tier_becomes(self, path: Path_, *tiers: str, seconds: float = 40) -> bool:
        """Wait until the file has one of these tiers: chunks that were fetched are counted in batches."""
        # Looks are counted, as a machine that is stopped for a while finds the time over when it goes on.
        for _ in range(round(seconds / 0.05)):
            if self.tier(path) in tiers:
                return True
            time.sleep(0.05)
        return self.tier(path) in tiers


class PlainVolume(Volume):
    """A plain directory in a volume's place: shows that a workload itself is right. Nothing is ever demoted."""

    def mount(self, *args: Path_, check: bool = True, timeout: float = 90) -> Done:
        self.mountpoint.mkdir(exist_ok=True)
        return Done([], 0, "", "")

    def umount(self, *args: Path_, check: bool = True) -> Done:
        return Done([], 0, "", "")

    def configure(self, **keys: str) -> None:
        pass

    def close(self) -> None:
        pass

    def demote(self, *paths: Path_) -> None:
        pass

    def fetch(self, *paths: Path_) -> None:
        pass

    def order(self, verb: str, *paths: Path_) -> list[str]:
        return []

    def backing(self, path: Path_) -> str:
        return os.fsdecode(path)


@contextlib.contextmanager
def scratch() -> Iterator[Scratch]:
    """A Scratch for a benchmark; what is left at the end is an error."""
    area = Scratch()
    try:
        yield area
    finally:
        left = area.close()
        if left:
            raise RuntimeError("left behind: " + "; ".join(left))
