"""The life of a daemon: starting, what dies and comes back, stopping, and directories adopted and left."""

import os
import signal
import socket
import stat
import subprocess
import threading
import time
from pathlib import Path

import pytest
from harness import LET_GO

from tierfs.fuse import compiled
from tierfs.volume import read_runtime

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("tiers")]


def until(condition, seconds=20.0):
    """Wait for a condition that no event announces."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if value := condition():
                return value
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError("did not come about in time")


def test_mounting_is_quick_and_says_nothing(volume):
    made = volume(mount=False)
    made.mount()
    made.umount()
    began = time.monotonic()
    done = made.mount()
    assert (done.stdout, done.stderr) == ("", "")
    assert time.monotonic() - began < 3  # well below a second on a machine that does nothing else
    assert stat.S_IMODE(os.stat(made.state).st_mode) == 0o700


def test_status_says_which_form_of_the_server_is_in_use(volume, monkeypatch):
    made = volume(mount=False)
    monkeypatch.delenv(compiled.PURE, raising=False)
    made.mount()
    assert made.status()["binding"]["form"] == ("pure" if compiled.find()[0] is None else "compiled")
    made.umount()
    monkeypatch.setenv(compiled.PURE, "1")
    made.mount()
    assert made.status()["binding"]["form"] == "pure"
    (made.mountpoint / "f").write_text("x")
    assert (made.mountpoint / "f").stat().st_size == 1


def test_a_second_mount_is_refused(volume):
    made = volume()
    again = made.cli("mount", "--state", made.state, made.mountpoint, check=False)
    assert again.returncode == 1
    assert "is already mounted" in again.stderr
    other = made.base / "other"
    other.mkdir()
    again = made.cli("mount", "--state", made.state, other, check=False)
    assert again.returncode == 1
    assert f"in use by the mount at {made.mountpoint}" in again.stderr


def test_a_mount_follows_an_umount_8_at_once(volume):
    """That returns when the mount is gone, and the daemon ends a moment later: here, after two seconds."""
    made = volume()
    (made.mountpoint / "f").write_text("x")
    supervisor = read_runtime(made.state)["pids"]["supervisor"]
    ending = threading.Timer(2, os.kill, [supervisor, signal.SIGCONT])
    os.kill(supervisor, signal.SIGSTOP)
    ending.start()
    try:
        subprocess.run(["umount", "-i", made.mountpoint], check=True, timeout=30)
        made.mount()
    finally:
        ending.join()
    assert read_runtime(made.state)["pids"]["supervisor"] != supervisor
    assert (made.mountpoint / "f").read_text() == "x"


def test_a_killed_mover_is_replaced_and_files_do_not_notice(volume):
    made = volume()
    (made.mountpoint / "f").write_text("x")
    before = made.mover()
    os.kill(before, signal.SIGKILL)
    assert (made.mountpoint / "f").read_text() == "x"
    after = until(lambda: made.mover() not in (0, before) and made.mover())
    assert after != before
    (made.mountpoint / "g").write_text("y")
    made.demote(made.mountpoint / "g")
    assert made.tier(made.mountpoint / "g") == "stub"
    assert (made.mountpoint / "g").read_text() == "y"


def test_of_a_mover_that_dies_again_and_again_whoever_asks_is_told(volume):
    """Not before it dies for the fifth time: until then the next one comes soon."""
    made = volume()
    (made.mountpoint / "f").write_text("x")
    supervisor = read_runtime(made.state)["pids"]["supervisor"]

    def movers():
        listed = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        return [int(pid) for pid in listed if b"tierfsd.mover" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def killed():
        for pid in movers():
            os.kill(pid, signal.SIGKILL)
        return "starting another in 10.0 s" in made.log()

    until(killed)
    refused = made.cli("status", made.mountpoint, check=False, timeout=9)
    assert refused.returncode == 1
    assert f"{made.mountpoint}: the mover was killed by SIGKILL, for the 5th time: another is" in refused.stderr
    assert (made.mountpoint / "f").read_text() == "x"


def test_a_killed_server_is_replaced(volume):
    made = volume()
    (made.mountpoint / "f").write_text("x" * 5000)
    os.sync()
    pids = made.status()["pids"]
    os.kill(pids["server"], signal.SIGKILL)
    until(lambda: made.mountpoint.is_mount() and (made.mountpoint / "f").read_text() == "x" * 5000)
    after = until(lambda: made.status()["pids"])
    assert after["supervisor"] == pids["supervisor"] and after["server"] != pids["server"]
    assert "mount server was killed by SIGKILL" in made.log()


def test_a_busy_mount_is_not_unmounted(volume, opened):
    made = volume()
    fd = opened(made.mountpoint / "f", os.O_CREAT | os.O_RDWR)
    refused = made.umount(check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"tierfs: {made.mountpoint}: is busy")
    os.write(fd, b"still here")
    assert (made.mountpoint / "f").read_bytes() == b"still here"
    os.close(os.dup(fd))


def test_umount_wait_leaves_nothing_behind_in_the_queue(volume, tmp_path):
    made = volume(store=f"file://{tmp_path}/store")
    for number in range(20):
        (made.mountpoint / f"f{number}").write_bytes(os.urandom(5000))
    made.umount("--wait")
    data = [path for path in (tmp_path / "store" / "data").rglob("*") if path.is_file()]
    assert len(data) >= 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_in_order(volume, number):
    made = volume()
    (made.mountpoint / "f").write_text("x")
    os.kill(made.status()["pids"]["supervisor"], number)
    until(lambda: not made.pids())
    assert not made.mountpoint.is_mount()
    assert list(made.mountpoint.iterdir()) == []
    made.mount()
    assert (made.mountpoint / "f").read_text() == "x"


def test_umount8_ends_the_daemon_too(volume, needs_root):
    made = volume()
    subprocess.run(["umount", made.mountpoint], check=True, timeout=30)
    until(lambda: not made.pids())


def test_a_reload_by_signal_and_a_bad_configuration_are_told(volume):
    made = volume()
    config = made.state / "config.toml"
    config.write_text('quite = "1s"\n')
    os.kill(made.status()["pids"]["supervisor"], signal.SIGHUP)
    until(lambda: any("did you mean 'quiet'" in note for note in made.status()["notes"]))
    config.write_text('local_limit = "3G"\n')
    until(lambda: made.status()["local_limit"] == 3 * 2**30)
    assert not any("quiet" in note for note in made.status()["notes"])


def test_the_foreground_tells_the_service_manager(volume):
    made = volume(mount=False)
    made.mountpoint.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(made.base / "notify"))
        manager.settimeout(30)
        process = subprocess.Popen(
            [*made.program, "mount", "--foreground", "--state", made.state, made.mountpoint],
            env={**made.environment, "NOTIFY_SOCKET": str(made.base / "notify")},
            stderr=subprocess.PIPE,
        )
        assert manager.recv(100) == b"READY=1"
        made.watch()
        assert made.mountpoint.is_mount()
        process.terminate()
        assert manager.recv(100) == b"STOPPING=1"
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert b"INFO supervisor: volume " in err


def test_a_volume_whose_store_is_gone_mounts_and_works(volume, tmp_path):
    made = volume(store=f"file://{tmp_path}/store")
    (made.mountpoint / "f").write_text("x")
    made.umount()
    os.rename(tmp_path / "store", tmp_path / "away")
    made.mount()
    assert (made.mountpoint / "f").read_text() == "x"
    assert not (tmp_path / "store").exists(), "a store that is down is not made again"


def test_a_directory_is_adopted_and_given_back(volume):
    made = volume(mount=False)
    home = made.mountpoint
    home.mkdir(0o750)
    (home / "d").mkdir()
    (home / "d" / "f").write_bytes(b"z" * 100_000)
    os.utime(home / "d" / "f", ns=(1_500_000_000_000_000_000, 1_600_000_000_123_456_789))
    inode, before = home.stat().st_ino, os.lstat(home / "d" / "f")
    made.cli("adopt", home)
    made.watch()
    made.state = home.parent / os.path.basename(made.status()["state"])
    assert made.state.name.startswith(".tierfs-")
    assert home.is_mount() and (home / "d" / "f").read_bytes() == b"z" * 100_000
    made.demote(home / "d" / "f")
    assert made.tier(home / "d" / "f") == "stub"
    made.cli("leave", home)
    assert not home.is_mount() and not made.state.exists()
    after = os.lstat(home / "d" / "f")
    assert home.stat().st_ino == inode and stat.S_IMODE(home.stat().st_mode) == 0o750
    for name in ("st_ino", "st_mtime_ns", "st_blocks"):
        assert getattr(after, name) == getattr(before, name), name
    assert (home / "d" / "f").read_bytes() == b"z" * 100_000


def test_leaving_is_refused_while_something_is_only_in_a_store_that_is_gone(volume, tmp_path):
    made = volume(mount=False)
    home = made.mountpoint
    home.mkdir()
    (home / "f").write_bytes(b"z" * 100_000)
    made.cli("adopt", "--store", f"file://{tmp_path}/store", home)
    made.watch()
    made.state = home.parent / os.path.basename(made.status()["state"])
    (made.state / "config.toml").write_text(f'store = "file://{tmp_path}/store"\nfetch_timeout = "2s"\n')
    made.demote(home / "f")
    os.rename(tmp_path / "store", tmp_path / "away")
    refused = made.cli("leave", home, check=False)
    assert refused.returncode == 1
    assert "still only in the store" in refused.stderr
    assert home.is_mount() and made.tier(home / "f") == "stub"
    os.rename(tmp_path / "away", tmp_path / "store")
    made.cli("leave", home)
    assert (home / "f").read_bytes() == b"z" * 100_000


def test_a_dead_mount_is_cleared_away_by_mounting_again(volume, needs_root):
    made = volume()
    (made.mountpoint / "f").write_text("x")
    pids = made.status()["pids"]
    for name in ("supervisor", "mover", "server"):
        os.kill(pids[name], signal.SIGKILL)
    until(lambda: not made.pids())
    made.mount()
    assert (made.mountpoint / "f").read_text() == "x"


def test_a_mark_log_that_a_power_cut_took_away_hides_nothing(volume):
    made = volume()
    for number in range(50):
        (made.mountpoint / f"f{number}").write_text("x")
    before = until(lambda: made.status(made.mountpoint / "f49")["generation"])
    made.umount()
    for segment in (made.state / "marks").glob("marks-*"):
        segment.unlink()  # it is never synced, and the index is
    made.mount()
    (made.mountpoint / "new").write_text("y")
    (made.mountpoint / "f49").write_text("y")
    until(lambda: made.status(made.mountpoint / "new")["generation"] > before)
    until(lambda: made.status(made.mountpoint / "f49")["generation"] > before)


@pytest.mark.usefixtures("needs_root")
def test_a_volume_and_a_part_of_it_bound_to_other_places(volume):
    made = volume()
    (made.mountpoint / "d").mkdir()
    (made.mountpoint / "d" / "file").write_bytes(b"x" * 10_000)
    part, whole = made.base / "part", made.base / "whole"
    for place in (part, whole):
        place.mkdir()
    subprocess.run(["mount", "--bind", made.mountpoint / "d", part], check=True)
    try:
        made.demote(part / "file")
        assert made.tier(made.mountpoint / "d" / "file") == "stub"
        assert [item["path"] for item in made.json("ls", "--json", part)] == [str(part / "file")]
        assert made.status(part / "file")["tier"] == "stub"
        done = made.cli("umount", part, check=False)
        assert done.returncode == 1 and "use umount(8)" in done.stderr
    finally:
        subprocess.run(["umount", part], check=True)
    subprocess.run(["mount", "--bind", made.mountpoint, whole], check=True)
    made.cli("umount", whole, timeout=60)  # does not wait for a daemon that has a mount left
    assert (made.mountpoint / "d" / "file").read_bytes() == b"x" * 10_000


def test_a_copy_of_the_mount_in_another_namespace_keeps_the_daemon(volume, needs_root):
    made = volume()
    supervisor, ours = read_runtime(made.state)["pids"]["supervisor"], os.readlink("/proc/self/ns/mnt")
    # Those of other tests must not be kept.
    others = "grep fuse.tierfs /proc/self/mountinfo | cut -d' ' -f5 | grep -vxF \"$0\" | xargs -rn1 umount -l"
    script = f"{others}; exec sleep 300"
    command = ["unshare", "-m", "--propagation", "private", "sh", "-c", script, made.mountpoint]
    with subprocess.Popen(command) as other:
        try:
            until(lambda: Path(f"/proc/{other.pid}/comm").read_text() == "sleep\n")
            assert os.readlink(f"/proc/{other.pid}/ns/mnt") != ours
            assert str(made.mountpoint) in Path(f"/proc/{other.pid}/mountinfo").read_text()
            done = made.cli("umount", made.mountpoint, timeout=30)
            who = f"process {other.pid} (sleep)"
            assert done.stderr == (
                f"tierfs: {made.mountpoint}: is unmounted here; {who} has it in another mount namespace:"
                " its daemon ends with that\n"
            )
            assert not os.path.ismount(made.mountpoint) and os.path.exists(f"/proc/{supervisor}")
            refused = made.cli("mount", "--state", made.state, made.mountpoint, check=False)
            assert refused.returncode == 1 and refused.stderr.count("\n") == 1
            assert f"in another mount namespace, by {who}: end that first" in refused.stderr
        finally:
            other.kill()
    until(lambda: not os.path.exists(f"/proc/{supervisor}"), 60)
    made.mount()


def test_a_namespace_of_a_test_holds_no_mount_of_another(volume, needs_root):
    made = volume()
    argv = ["unshare", "-m", "--propagation", "private", "sh", "-c", f"{LET_GO}cat /proc/self/mountinfo"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout and str(made.mountpoint) not in done.stdout
    assert os.path.ismount(made.mountpoint)
