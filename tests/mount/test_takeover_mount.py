"""The mount server is killed under load: nobody is told, nothing is lost and nothing is done twice."""

import ctypes
import fcntl
import hashlib
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from harness import connection_of, kill, mapped, wait_gone

from tierfs import failpoints
from tierfs import volume as volumes

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("tiers", "needs_root", "handed_on")]

LARGE = 24 << 20

# One worker: names, links, appends and attributes in a directory of its own. A second execution of an operation
# would be noticed: it fails, or leaves another length. Ends when its standard input does.
STORM = """
import os, random, select, sys
top, seed = sys.argv[1], int(sys.argv[2])
rng, done = random.Random(seed), 0
os.mkdir(top)
log = os.open(top + "/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
names, length = {}, 0
def path(name): return f"{top}/{name}"
while not select.select([sys.stdin], [], [], 0)[0]:
    done += 1
    kind, name = rng.randrange(9), f"n{rng.randrange(40)}"
    if name not in names:
        if kind % 3 == 0:
            os.mkdir(path(name)); names[name] = ("dir", None)
        elif kind % 3 == 1:
            fd = os.open(path(name), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
            os.write(fd, b"%d" % done); os.close(fd); names[name] = ("file", b"%d" % done)
        else:
            os.symlink(str(done), path(name)); names[name] = ("link", str(done))
    elif kind < 3:
        what, _ = names.pop(name)
        os.rmdir(path(name)) if what == "dir" else os.unlink(path(name))
    elif kind < 6:
        new = f"n{rng.randrange(40)}"
        if new != name and (new not in names or "dir" not in (names[name][0], names[new][0])):
            os.rename(path(name), path(new)); names[new] = names.pop(name)
    elif kind == 6 and names[name][0] == "file":
        os.setxattr(path(name), "user.x", b"v", os.XATTR_CREATE)
        os.removexattr(path(name), "user.x")
    elif kind == 7 and names[name][0] == "file":
        with open(path(name), "rb") as file: assert file.read() == names[name][1], name
        os.link(path(name), top + "/2nd"); assert os.stat(path(name)).st_nlink == 2; os.unlink(top + "/2nd")
    else:
        os.stat(path(name), follow_symlinks=False); assert name in os.listdir(top)
    length += os.write(log, b"x" * (done % 50 + 1))
assert os.fstat(log).st_size == length, (os.fstat(log).st_size, length)
assert sorted(os.listdir(top)) == sorted([*names, "log"])
for name, (what, content) in names.items():
    if what == "file":
        with open(path(name), "rb") as file: assert file.read() == content
    elif what == "link":
        assert os.readlink(path(name)) == content
    else:
        assert os.path.isdir(path(name))
print(done)
"""


def daemon(made):
    """What the supervisor has published: quicker than a command while there is load."""
    return volumes.read_runtime(str(made.state))


def replaced(made, before, seconds=20.0):
    """Wait until another server is published; its pid."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        now = daemon(made)["pids"]["server"]
        if now not in (0, before):
            return now
        time.sleep(0.02)
    raise AssertionError(made.log()[-4000:])


def kill_server(made):
    """Kill it, and return when another serves; how long a caller has waited, in seconds."""
    before = daemon(made)["pids"]["server"]
    os.kill(before, signal.SIGKILL)
    began = time.monotonic()
    os.statvfs(made.mountpoint)
    waited = time.monotonic() - began
    replaced(made, before)
    return waited


def storm(made, kills, seed):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", STORM, str(made.mountpoint / f"w{number}"), str(seed * 10 + number)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(3)
    ]  # fmt: skip
    rng, waits = random.Random(seed), []
    try:
        for _ in range(kills):
            time.sleep(0.6 + rng.random() / 2)  # the moment within the load is what is tried
            waits.append(kill_server(made))
        told = [worker.communicate("end", timeout=60) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0] * 3, (told, made.log()[-4000:])
    assert daemon(made)["server_deaths"] == kills
    return waits, sum(int(out) for out, _ in told)


def test_a_storm_does_not_notice_killed_servers(volume):
    made = volume()
    waits, operations = storm(made, 6, seed=1)
    assert max(waits) < 10 and operations > 100
    assert "mounting anew" not in made.log()
    done = made.cli("check", made.mountpoint, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    made.umount()


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2, 6))
def test_storms_do_not_notice_killed_servers(volume, seed):
    made = volume(limit=900)
    waits, operations = storm(made, 60, seed)
    print(f"\n60 kills, {operations} operations; waited {sorted(waits)[30]:.2f} s, at most {max(waits):.2f} s")
    assert "mounting anew" not in made.log()


def test_what_was_read_in_part_shows_its_own_times_right_after_a_kill(volume):
    """The index hears of the moved ones within two seconds; a mover that begins puts them right after one."""
    made = volume()
    path = made.mountpoint / "file"
    path.write_bytes(os.urandom(12 << 20))
    before = path.stat()
    made.demote(path)
    with open(path, "rb", buffering=0) as file:
        file.read(4096)
    os.kill(daemon(made)["pids"]["server"], signal.SIGKILL)
    until = time.monotonic() + 3
    while time.monotonic() < until:
        now = path.stat()
        assert (now.st_mtime_ns, now.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
        time.sleep(0.01)
    made.umount()


def test_whatever_is_open_stays_of_use(volume, opened):
    made = volume()
    top = made.mountpoint
    (top / "plain").write_bytes(b"plain")
    plain = opened(top / "plain", os.O_RDWR)
    mapped_fd = opened(top / "mapped", os.O_RDWR | os.O_CREAT)
    os.truncate(mapped_fd, 8192)
    mapped = mmap.mmap(mapped_fd, 8192)
    mapped[:5] = b"begun"
    unlinked = opened(top / "unlinked", os.O_RDWR | os.O_CREAT)
    os.write(unlinked, b"unlinked")
    os.unlink(top / "unlinked")
    nameless = opened(top, os.O_RDWR | os.O_TMPFILE)
    os.write(nameless, b"nameless")
    script = opened(top / "set-id", os.O_RDWR | os.O_CREAT, 0o4755)  # not in passthrough
    os.write(script, b"#!set-id")
    os.close(os.dup(script))
    cached = opened(top / "set-id", os.O_RDWR)
    os.chmod(top / "set-id", 0o4755)
    os.unlink(top / "set-id")
    (top / "locked").write_text("")
    locked, other = opened(top / "locked", os.O_RDWR), opened(top / "locked", os.O_RDWR)
    fcntl.flock(locked, fcntl.LOCK_EX)
    (top / "many").mkdir()
    for number in range(1500):
        (top / "many" / f"a-rather-long-name-{number:05}").touch()
    listing = os.scandir(top / "many")
    seen = [next(listing).name for _ in range(300)]
    os.chdir(top / "many")
    try:
        for _ in range(3):
            assert kill_server(made) < 10
            time.sleep(0.6)
        assert os.path.exists("a-rather-long-name-00001")
    finally:
        os.chdir("/")
    assert os.pread(plain, 9, 0) == b"plain" and os.pwrite(plain, b"P", 0) == 1
    mapped[4096:4100] = b"more"
    mapped.flush()
    assert (top / "plain").read_bytes() == b"Plain" and (top / "mapped").read_bytes()[4096:4100] == b"more"
    assert os.pread(unlinked, 9, 0) == b"unlinked" and os.fstat(unlinked).st_nlink == 0
    assert os.pread(nameless, 9, 0) == b"nameless"
    # With a directory's descriptor it is linkat(AT_SYMLINK_FOLLOW).
    os.link(f"/proc/self/fd/{nameless}", "named", dst_dir_fd=opened(top, os.O_RDONLY), follow_symlinks=True)
    assert (top / "named").read_bytes() == b"nameless"
    for fd in (script, cached):
        assert os.pread(fd, 9, 0) == b"#!set-id"
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(locked, fcntl.LOCK_UN)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    seen += [entry.name for entry in listing]
    assert len(seen) == len(set(seen)) == 1500
    mapped.close()
    assert "mounting anew" not in made.log() and "is lost to us" not in made.log()


def test_a_cold_file_that_is_being_read(volume, opened):
    made = volume()
    content = random.Random(7).randbytes(LARGE)
    path = made.mountpoint / "cold"
    path.write_bytes(content)
    os.utime(path, ns=(1_600_000_000 * 10**9, 1_600_000_000 * 10**9))
    made.demote(path)
    fd = opened(path, os.O_RDONLY)
    digest = hashlib.sha256(os.read(fd, 1 << 20))
    kill_server(made)
    assert os.fstat(fd).st_mtime == os.stat(path).st_mtime == 1_600_000_000
    at = 1 << 20
    killed = threading.Thread(target=kill_server, args=(made,))
    killed.start()
    while piece := os.pread(fd, 1 << 20, at):
        digest.update(piece)
        at += len(piece)
    killed.join()
    assert digest.digest() == hashlib.sha256(content).digest()
    assert os.stat(path).st_mtime == 1_600_000_000
    assert path.read_bytes() == content


def test_what_is_mapped_and_closed_is_not_demoted_by_the_next_server(volume):
    """A mapping outlives its descriptor, and the server that knew of it: the lease says so."""
    made = volume()
    path = made.mountpoint / "mapped"
    path.write_bytes(b"a" * 8192)
    with mapped(path, 8192) as where:
        kill_server(made)
        made.cli("demote", path, check=False)
        assert made.tier(path) == "resident"
        ctypes.memmove(where, b"bbbb", 4)
    assert path.read_bytes()[:5] == b"bbbba"
    made.demote(path)
    assert made.tier(path) == "stub" and path.read_bytes()[:5] == b"bbbba"


@pytest.mark.parametrize("point", failpoints.TAKEOVER_POINTS)
def test_a_server_that_is_killed_while_it_takes_over(volume, opened, point):
    made = volume(mount=False)
    once = made.base / "once"
    once.touch()
    made.env |= {"TIERFS_FAILPOINT": point, "TIERFS_FAILPOINT_ONCE": str(once)}
    made.mount()
    top = made.mountpoint
    fd = opened(top / "f", os.O_RDWR | os.O_CREAT)
    unlinked = opened(top / "unlinked", os.O_RDWR | os.O_CREAT)
    os.write(unlinked, b"unlinked")
    os.unlink(top / "unlinked")
    first = daemon(made)["pids"]["server"]
    # A change that is under way when the server is killed, and that two others are asked for again.
    os.kill(first, signal.SIGSTOP)
    maker = threading.Thread(target=os.mkdir, args=(top / "made",))
    maker.start()
    time.sleep(0.1)  # whether it has been sent by then is what is tried
    os.kill(first, signal.SIGKILL)
    maker.join(20)
    assert not maker.is_alive() and not once.exists()
    os.write(fd, b"still here")
    assert (top / "f").read_bytes() == b"still here" and (top / "made").is_dir()
    assert os.pread(unlinked, 9, 0) == b"unlinked"
    assert made.log().count("another takes its session over") == 2
    assert "mounting anew" not in made.log()


def test_who_waits_for_a_server_that_none_can_follow_is_told_although_its_teller_is_stuck(volume):
    """The teller has the session open as well, and may itself be waiting for who waits."""
    made = volume(env={"TIERFS_FAILPOINT": failpoints.TAKEOVER_BEGUN})
    server = daemon(made)["pids"]["server"]
    (teller,) = map(int, Path(f"/proc/{server}/task/{server}/children").read_text().split())
    waiting = made.connections / str(connection_of(made.mountpoint)) / "waiting"
    for pid in (server, teller):
        os.kill(pid, signal.SIGSTOP)
    with subprocess.Popen(["mkdir", made.mountpoint / "d"], stderr=subprocess.PIPE) as maker:
        try:
            while int(waiting.read_text()) == 0:
                time.sleep(0.02)
            os.kill(server, signal.SIGKILL)
            assert not wait_gone([maker.pid], 30), "it waits for a mount that is no more"
            said = maker.stderr.read()
            replaced(made, server)
            assert "mounting anew" in made.log()
            (made.mountpoint / "d").mkdir()
        finally:
            for pid in (server, teller):
                kill(pid, signal.SIGCONT)
    assert maker.returncode and (b"not connected" in said or b"abort" in said)


def test_two_killed_in_quick_succession(volume, opened):
    made = volume()
    fd = opened(made.mountpoint / "f", os.O_RDWR | os.O_CREAT)
    first = daemon(made)["pids"]["server"]
    os.kill(first, signal.SIGKILL)
    second = replaced(made, first)
    os.kill(second, signal.SIGKILL)
    os.write(fd, b"still here")
    replaced(made, second)
    assert (made.mountpoint / "f").read_bytes() == b"still here"
    assert "mounting anew" not in made.log()
    status = made.status()
    assert (status["server_deaths"], status["mover_deaths"], status["restarts"]) == (2, 0, 0)
    assert "replaced  the server ended by itself 2 times\n" in made.cli("status", made.mountpoint).stdout
