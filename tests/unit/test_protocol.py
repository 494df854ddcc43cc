"""The layouts of the kernel's protocol, and what the binding does without a kernel."""

from __future__ import annotations

import errno
import math
import os
import socket
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from tierfs import locate
from tierfs.errors import UsageError, VolumeError
from tierfs.fuse import mounting
from tierfs.fuse import protocol as p
from tierfs.fuse.backing import KernelBacking
from tierfs.fuse.hot import pure
from tierfs.fuse.kernel import End, Session
from tierfs.fuse.operations import Operations
from tierfs.fuse.spinning import NEAR_SECONDS, Spinner
from tierfs.ledger import Ledger
from tierfs.waits import Blocked, Slow, Wait

# Sizes of the structs in include/uapi/linux/fuse.h, 7.45.
SIZES = {
    "INIT_OUT": 64, "ENTRY_OUT": 128, "ATTR_OUT": 104, "OPEN_OUT": 16, "WRITE_OUT": 8, "STATFS_OUT": 80,
    "STATX_OUT": 288, "DIRENT": 24, "SETATTR_IN": 88, "MKNOD_IN": 16, "MKDIR_IN": 8, "RENAME2_IN": 16,
    "OPEN_IN": 8, "CREATE_IN": 16, "READ_IN": 40, "RELEASE_IN": 24, "FSYNC_IN": 16, "SETXATTR_IN": 16,
    "GETXATTR_IN": 8, "FALLOCATE_IN": 32, "LSEEK_IN": 24, "COPY_IN": 56, "STATX_IN": 24, "BACKING_MAP": 16,
    "GETATTR_IN": 16, "FORGET_ONE": 16,
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    assert getattr(p, name).size == SIZES[name]


def test_attributes_of_a_file_with_strange_times(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    os.utime(path, ns=(-1, 5_000_000_000_000_000_003))
    fields = p.ENTRY_OUT.unpack(p.entry(7, path.stat(), 1))
    assert fields[0] == 7
    st = path.stat()
    assert fields[6:9] == (st.st_ino, 5, st.st_blocks)
    assert (fields[9], fields[12]) == (-1, 999_999_999)
    assert (fields[10], fields[13]) == (5_000_000_000, 3)
    assert p.attributes(st, 0)[16:] == p.entry(7, st, 1)[40:]


def test_statx_splits_the_device_number() -> None:
    names = "atime_ns mtime_ns ctime_ns ino size blocks nlink uid gid blksize"
    ones = {f"st_{name}": 1 for name in names.split()}
    st = SimpleNamespace(**ones, st_mode=0o20600, st_rdev=os.makedev(259, 70_000))
    packed = p.statx(st, 1_500_000_000, 1)
    body = packed[32:]
    assert struct.unpack_from("<II", body, 128) == (259, 70_000)
    assert struct.unpack_from("<qI", body, 80) == (1, 500_000_000)
    assert struct.unpack_from("<I", body)[0] & 0x800
    assert not struct.unpack_from("<I", p.statx(st, None, 1), 32)[0] & 0x800


def test_dirents_are_padded() -> None:
    for length in range(1, 20):
        name = b"n" * length
        assert len(p.dirent(1, 2, 8, name)) == 24 + (length + 7 & ~7)
        assert len(p.dirent_plus(None, 1, 2, 8, name)) == p.DIRENT_PLUS_SIZE + (length + 7 & ~7)


def test_groups_are_found_among_extensions() -> None:
    other = struct.pack("<II8x", 16, 1)
    groups = struct.pack("<IIIII4x", 24, p.EXT_GROUPS, 2, 100, 2000)
    assert p.groups(b"request\0" + other + groups, 40) == (100, 2000)
    assert p.groups(b"request\0" + other, 16) is None
    more = struct.pack("<IIII", 16, p.EXT_GROUPS, 2, 100)  # than there are
    assert p.groups(b"request\0" + more, 16) is None
    assert p.groups(b"request\0" + groups, 1 << 16) is None
    assert p.groups(bytes(16), 16) is None


def test_init_agrees_on_what_both_know() -> None:
    offered = (1 << 64) - 1
    reply, agreed = p.init_reply(99, 4096, offered, True, 1)
    assert agreed & p.Feature.PASSTHROUGH.bit
    assert not agreed & (1 << 16 | 1 << 1 | 1 << 10 | 1 << 41 | 1 << 42)  # see WANTED
    fields = p.INIT_OUT.unpack(reply)
    assert fields[:2] == (7, p.MINOR)
    assert fields[6] == p.MAX_WRITE
    assert fields[-2] == 1
    assert not p.init_reply(33, 4096, offered, False, 1)[1] & p.Feature.PASSTHROUGH.bit
    old, agreed = p.init_reply(33, 4096, 0, True, 1)
    assert agreed == 0
    assert p.INIT_OUT.unpack(old)[6] == 1 << 17


def test_mount_options() -> None:
    assert mounting.parse_options([]).flags == 2 | 4
    assert mounting.parse_options(["suid", "dev", "ro"]).flags == 1
    assert mounting.parse_options(["allow_other", "defaults"]).allow_other
    with pytest.raises(UsageError, match=r"frobnicate: unknown mount option: use .*\bdev,.*\bsuid,"):
        mounting.parse_options(["frobnicate"])


@pytest.mark.parametrize("inside", [True, False])
def test_where_fusermount3_may_not_enter_its_users_own_mount_that_is_said(monkeypatch, inside):
    mounts = [locate.Mount("/", "ext4", "x", 0), locate.Mount("/home/me", "fuse.other", "y", 1000)]
    monkeypatch.setattr(locate, "read_mounts", lambda: mounts if inside else mounts[:1])
    said = b"/usr/bin/fusermount3: failed to access mountpoint /home/me/v: Permission denied\n"
    done = subprocess.CompletedProcess([], 1, b"", said)
    monkeypatch.setattr(mounting, "check_device", lambda: None)
    monkeypatch.setattr(mounting, "_open_device", lambda: os.open(os.devnull, os.O_RDONLY))
    monkeypatch.setattr(mounting, "_tool", lambda: "/usr/bin/fusermount3")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(subprocess, "run", lambda *args, **more: done)
    with pytest.raises(VolumeError) as caught:
        mounting.mount("/home/me/v", "0" * 32)
    refused = "/home/me/v: cannot be mounted: failed to access mountpoint /home/me/v: Permission denied"
    hint = ": it lies in /home/me, a mount in which only root can mount others: choose another place"
    assert str(caught.value) == refused + (hint if inside else "")


def test_only_root_may_mount_with_devices_and_set_id_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for name in ("suid", "dev"):
        with pytest.raises(UsageError, match=f"-o {name}: only root"):
            mounting.parse_options([name])
    mounting.parse_options(["nosuid", "ro"])


def test_a_device_that_is_closed_to_us_is_found_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(VolumeError, match="does not permit FUSE"):
        mounting.check_device()


def test_missing_device_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mounting, "_DEVICE", os.devnull)
    mounting.check_device()
    monkeypatch.setattr(mounting, "_DEVICE", str(tmp_path / "fuse"))
    with pytest.raises(VolumeError, match="modprobe fuse"):
        mounting.check_device()
    with pytest.raises(VolumeError, match="modprobe fuse"):
        mounting.mount(str(tmp_path), "0" * 32)


def test_spinning_follows_the_requests() -> None:
    spinner = Spinner(enabled=True)
    assert not spinner.patience
    spinner.slept(NEAR_SECONDS * 2)
    assert not spinner.patience
    spinner.slept(NEAR_SECONDS / 2)
    assert spinner.patience
    for _ in range(100):
        spinner.hit()
    misses = 0
    while spinner.patience:
        spinner.miss()
        misses += 1
    assert misses <= 8
    alone = Spinner(enabled=False)
    alone.slept(0)
    assert not alone.patience


def spins(spinner: Spinner, count: int, asleep: float) -> int:
    """How many spins are in vain where each of so many requests ends a sleep of this length."""
    found = 0
    for _ in range(count):
        if spinner.patience:
            found += 1
            spinner.miss()
        spinner.slept(asleep)
    return found


def test_what_comes_just_after_a_spin_is_seldom_waited_for_awake() -> None:
    spinner = Spinner(enabled=True)
    assert 0 < spins(spinner, 1000, NEAR_SECONDS / 2) < 40
    assert spins(spinner, 1000, NEAR_SECONDS / 2) < 20
    while not spinner.patience:  # and then it comes sooner
        spinner.slept(NEAR_SECONDS / 2)
    spinner.hit()
    assert spinner.patience


def test_the_end_of_a_burst_says_nothing_of_the_next() -> None:
    spinner = Spinner(enabled=True)
    for _ in range(10):
        spinner.slept(NEAR_SECONDS / 2)
        assert spinner.patience
        for _ in range(20):
            spinner.hit()
        assert spins(spinner, 20, NEAR_SECONDS * 2) <= 8


# --- a session over a packet socket instead of the device ---------------------------------------------------


class FakeVfs:
    """Answers UNLINK as told, and lists what it was asked."""

    def __init__(self) -> None:
        lasting = SimpleNamespace(watched=False)
        self.gate = SimpleNamespace(
            writers_open=lambda ino: False, states=SimpleNamespace(backing=None), lasting=lasting
        )
        self.ledger = Ledger()
        self.tree = SimpleNamespace(device=0)
        self.asked: list[bytes] = []
        self.answer: object = None

    def unlink(self, parent: int, name: bytes) -> None:
        self.asked.append(name)
        if isinstance(self.answer, BaseException):
            raise self.answer

    def write(
        self, fh: int, offset: int, data: memoryview, kill: bool, caller: object, flags: int
    ) -> Slow | int:
        self.asked.append(bytes(data))
        return Slow(lambda: len(data)) if flags & os.O_DSYNC else len(data)

    def fsync(self, fh: int, datasync: bool) -> Slow:
        def run() -> object:
            if isinstance(self.answer, BaseException):
                raise self.answer
            return self.answer

        return Slow(run)


class Kernel:
    """The other end."""

    def __init__(self) -> None:
        self.sock, self._device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(5)
        self.vfs = FakeVfs()
        fd = self._device.fileno()
        self.session = Session(fd, self.vfs, passthrough=False, receiver=pure)  # type: ignore[arg-type]

    def ask(self, opcode: int, unique: int, body: bytes) -> None:
        size = p.IN + len(body)
        self.sock.send(p.HEAD.pack(size, opcode, unique, 1) + bytes(16) + body)
        self.session.serve(1)

    def reply(self) -> tuple[int, int, bytes]:
        """(unique, errno, body)."""
        data = self.sock.recv(1 << 16)
        length, number, unique = p.OUT.unpack_from(data)
        assert length == len(data)
        return unique, -number, data[p.OUT_SIZE :]

    def silent(self) -> bool:
        self.sock.setblocking(False)
        try:
            return not self.sock.recv(1)
        except BlockingIOError:
            return True
        finally:
            self.sock.settimeout(5)

    def close(self) -> None:
        self.session.close()
        self.sock.close()
        self._device.close()


@pytest.fixture
def kernel():
    made = Kernel()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOTEMPTY, "x"), errno.ENOTEMPTY),
        (OSError("no number"), errno.EIO),
        (OSError(100_000, "beyond what the kernel takes"), errno.EIO),
        (VolumeError("busy"), errno.EBUSY),
        (KeyError("a bug"), errno.EIO),
    ],
)
def test_errors_become_numbers_once(kernel: Kernel, error: Exception, number: int) -> None:
    kernel.vfs.answer = error
    kernel.ask(p.Op.UNLINK, 5, b"name\0")
    assert kernel.reply() == (5, number, b"")


def test_a_bug_is_logged_with_its_place(kernel: Kernel, caplog: pytest.LogCaptureFixture) -> None:
    kernel.vfs.answer = KeyError("a bug")
    kernel.ask(p.Op.UNLINK, 5, b"name\0")
    assert "UNLINK of node 1 failed unexpectedly: KeyError('a bug')" in caplog.text
    assert "operations.py" in caplog.text


def test_unknown_requests_are_refused(kernel: Kernel) -> None:
    for opcode in (34, 37, 40, 31, 63, 64, 4096):
        kernel.ask(opcode, 9, b"")
        assert kernel.reply() == (9, errno.ENOSYS, b"")


def test_parked_request_runs_again_as_a_whole(kernel: Kernel) -> None:
    wait = Wait()
    kernel.vfs.answer = Blocked(wait)
    kernel.ask(p.Op.UNLINK, 5, b"name\0")
    kernel.vfs.answer = None
    kernel.ask(p.Op.UNLINK, 6, b"longer name\0")
    assert kernel.reply()[0] == 6
    wait.fire()
    assert kernel.silent()  # not from within the firing
    kernel.session.run_ready()
    assert kernel.reply() == (5, 0, b"")
    assert kernel.vfs.asked == [b"name", b"longer name", b"name"]


def test_failed_wait_is_not_run_again(kernel: Kernel) -> None:
    wait = Wait()
    kernel.vfs.answer = Blocked(wait)
    kernel.ask(p.Op.UNLINK, 5, b"name\0")
    wait.fire(errno.ETIMEDOUT, "too long")
    kernel.session.run_ready()
    assert kernel.reply() == (5, errno.ETIMEDOUT, b"")
    assert kernel.vfs.asked == [b"name"]


def test_an_interrupt_is_remembered_while_one_wait_follows_another(kernel: Kernel, monkeypatch):
    patience = math.inf
    monkeypatch.setattr("tierfs.fuse.kernel.patience", lambda _thread: patience)
    first, second = Wait(), Wait()
    kernel.vfs.answer = Blocked(first)
    kernel.ask(p.Op.UNLINK, 5, b"name\0")
    kernel.ask(p.Op.INTERRUPT, 6, p.U64.pack(5))
    kernel.vfs.answer = Blocked(second)
    first.fire()
    kernel.session.run_ready()
    kernel.session.look_after_interrupted()
    assert kernel.silent()
    patience = 0.0
    kernel.session.look_after_interrupted()
    assert kernel.reply() == (5, errno.EINTR, b"")


@pytest.mark.parametrize("fired", [False, True])
def test_interrupt_answers_once(kernel: Kernel, fired: bool) -> None:
    wait = Wait()
    kernel.vfs.answer = Blocked(wait)
    kernel.ask(p.Op.UNLINK, 5, b"name\0")
    if fired:
        wait.fire()
    kernel.ask(p.Op.INTERRUPT, 6, p.U64.pack(5))
    assert kernel.reply() == (5, errno.EINTR, b"")
    wait.fire()
    kernel.session.run_ready()
    kernel.ask(p.Op.INTERRUPT, 7, p.U64.pack(5))
    assert kernel.silent()
    assert kernel.vfs.asked == [b"name"]


def test_slow_operations_answer_from_a_thread(kernel: Kernel) -> None:
    kernel.vfs.answer = OSError(errno.ENOSPC, "full")
    kernel.ask(p.Op.FSYNC, 5, p.FSYNC_IN.pack(1, 0, 0))
    assert kernel.reply() == (5, errno.ENOSPC, b"")


def test_a_thread_whose_result_cannot_be_sent_answers_all_the_same(kernel: Kernel, monkeypatch) -> None:
    def reply(unique: int, body: bytes) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(kernel.session, "_reply", reply)
    kernel.ask(p.Op.FSYNC, 5, p.FSYNC_IN.pack(1, 0, 0))
    assert kernel.reply() == (5, errno.EIO, b"")


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_WRONLY | os.O_DSYNC])
def test_a_write_is_answered_when_it_is_as_durable_as_it_must_be(kernel: Kernel, flags: int) -> None:
    kernel.ask(p.Op.WRITE, 5, p.READ_IN.pack(1, 0, 7, 0, 0, flags, 0) + b"content")
    assert kernel.reply() == (5, 0, p.WRITE_OUT.pack(7, 0))
    assert kernel.vfs.asked == [b"content"]


def test_an_old_kernel_is_refused(kernel: Kernel) -> None:
    kernel.ask(p.Op.INIT, 1, p.INIT_IN_OLD.pack(7, 19, 0, 0))
    assert kernel.reply() == (1, errno.EPROTO, b"")
    assert kernel.session.end is End.ABORTED


def test_every_opcode_has_an_operation_or_is_the_sessions() -> None:
    table = Operations(FakeVfs()).table  # type: ignore[arg-type]
    assert {op for op in p.Op if table[op] is None} == {p.Op.INIT, p.Op.INTERRUPT, p.Op.DESTROY}


def test_a_registration_that_cannot_be_ended_is_told_to_the_log_alone(caplog):
    """Whoever asked for what led to it has had what he wanted: a rename over a file, say."""
    fd = os.open(os.devnull, os.O_RDWR)
    try:
        KernelBacking(fd).close(5)
    finally:
        os.close(fd)
    assert "stays registered with the kernel" in caplog.text
