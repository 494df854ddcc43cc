"""`tierfs restart`: another version takes a mounted volume over, and whatever is open stays of use."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tierfsd
from harness import REPO, wait_gone

import tierfs
from tierfs import locate
from tierfs import volume as volumes

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("tiers", "needs_root", "handed_on")]

# The command of that version: its interpreter is a script that puts its modules before ours.
AS_THAT = "import sys; sys.executable = sys.argv.pop(1); from tierfs.cli import main; main()"


def facts(made):
    return volumes.read_runtime(str(made.state))


def version(made, edits):
    """An interpreter of another version: a copy of ours in which a module's line is another."""
    base = made.base / f"version-{len(list(made.base.glob('version-*')))}"
    shutil.copytree(Path(tierfs.__file__).parent, base / "tierfs")
    shutil.copytree(Path(tierfsd.__file__).parent, base / "tierfsd")
    for name, (old, new) in edits.items():
        path = base / f"{name}.py"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
    script = base / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={base} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return script


def restart(made, interpreter=None, **more):
    if interpreter is None:
        return made.cli("restart", made.mountpoint, **more)
    made.program, before = [sys.executable, "-c", AS_THAT, str(interpreter)], made.program
    try:
        return made.cli("restart", made.mountpoint, **more)
    finally:
        made.program = before


def test_another_version_goes_on_under_open_files(volume, opened):
    made = volume()
    top, before = made.mountpoint, facts(made)
    plain = opened(top / "plain", os.O_RDWR | os.O_CREAT)
    os.write(plain, b"plain")
    unlinked = opened(top / "unlinked", os.O_RDWR | os.O_CREAT)
    os.write(unlinked, b"unlinked")
    os.unlink(top / "unlinked")
    locked, other = (opened(top / "plain", os.O_RDWR) for _ in range(2))
    fcntl.flock(locked, fcntl.LOCK_EX)
    (top / "cold").write_bytes(b"cold" * 5000)
    made.demote(top / "cold")
    restart(made, version(made, {"tierfs/__init__": ('"0.1.0"', '"9.9.9"')}))
    now = facts(made)
    assert now["version"] == "9.9.9" and now["restarts"] == 1 and now["server_deaths"] == 0
    assert now["pids"]["supervisor"] == before["pids"]["supervisor"]
    assert now["pids"]["server"] != before["pids"]["server"] != now["pids"]["mover"]
    assert os.pread(plain, 9, 0) == b"plain" and os.pwrite(plain, b"P", 0) == 1
    assert os.pread(unlinked, 9, 0) == b"unlinked" and os.fstat(unlinked).st_nlink == 0
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert (top / "cold").read_bytes() == b"cold" * 5000
    restart(made, version(made, {"tierfs/__init__": ('"0.1.0"', '"8.8.8"')}))
    assert facts(made)["version"] == "8.8.8" and facts(made)["restarts"] == 2
    assert os.pread(plain, 9, 0) == b"Plain" and os.pread(unlinked, 9, 0) == b"unlinked"
    assert "mounting anew" not in made.log() and "ERROR" not in made.log(), made.log()[-3000:]
    os.kill(now["pids"]["supervisor"], signal.SIGHUP)  # it hears as before
    assert made.status()["files"] >= 2 and made.status()["restarts"] == 2


@pytest.fixture
def absent(volume):
    """A volume that is just being mounted anew. For a moment it is in no mount table: here for one and a half
    seconds. With the pids from before."""
    made = volume()
    (made.mountpoint / "f").write_bytes(b"content")
    made.umount()
    pause = "        __import__('time').sleep(1.5)\n        return was_there"
    slow = {
        "tierfsd/supervisor": ("        lasting = self._channel.lasting or", "        lasting = False and"),
        "tierfsd/attachment": ("        return was_there", pause),
    }
    made.program, before = [sys.executable, "-c", AS_THAT, str(version(made, slow))], made.program
    try:
        made.mount()
    finally:
        made.program = before
    pids, top = facts(made)["pids"], str(made.mountpoint)
    os.kill(pids["server"], signal.SIGKILL)
    until = time.monotonic() + 20
    while locate.mount_at(top, locate.read_mounts()) is not None:
        assert time.monotonic() < until, made.log()
        time.sleep(0.01)
    return made, pids


def test_who_unmounts_while_it_is_mounted_anew_has_it_unmounted(absent):
    made, pids = absent
    top = str(made.mountpoint)
    done = made.cli("umount", top, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert locate.mount_at(top, locate.read_mounts()) is None
    assert not wait_gone([pids["supervisor"]], 20), "it would mount it anew"
    assert "mounting anew" in made.log() and "unmounted" in made.log().splitlines()[-1]
    done = made.cli("umount", top, check=False)
    assert done.returncode == 1 and "is no mounted TierFS volume" in done.stderr


def test_who_restarts_it_meanwhile_has_it_restarted(absent):
    made, pids = absent
    restart(made)
    assert facts(made)["restarts"] == 1 and facts(made)["pids"]["supervisor"] == pids["supervisor"]
    assert (made.mountpoint / "f").read_bytes() == b"content"


def test_who_leaves_it_meanwhile_has_a_plain_directory(absent):
    made, pids = absent
    made.cli("leave", "--state", made.state, made.mountpoint)
    assert not made.state.exists() and not wait_gone([pids["supervisor"]], 20)
    assert (made.mountpoint / "f").read_bytes() == b"content" and not os.path.ismount(made.mountpoint)


def test_it_ends_in_order_afterwards(volume):
    made = volume()
    restart(made)
    (made.mountpoint / "f").write_bytes(b"x")
    made.umount()
    assert "unmounted" in made.log().splitlines()[-1]
    made.mount()
    restart(made)
    supervisor = facts(made)["pids"]["supervisor"]
    os.kill(supervisor, signal.SIGTERM)
    assert not wait_gone([supervisor], 20)
    assert not os.path.ismount(made.mountpoint)


def test_who_asks_meanwhile_waits(volume):
    made = volume()
    worker = subprocess.Popen(
        [sys.executable, "-c", LOAD, str(made.mountpoint)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        time.sleep(0.3)  # some load before it
        restart(made)
        out, err = worker.communicate("end", timeout=60)
    finally:
        worker.kill()
        worker.wait()
    assert worker.returncode == 0 and int(out) > 20, err
    assert facts(made)["restarts"] == 1 and "mounting anew" not in made.log()


LOAD = """
import os, select, sys
done = 0
while not select.select([sys.stdin], [], [], 0)[0]:
    path = f"{sys.argv[1]}/f{done % 20}"
    with open(path, "xb") as file: file.write(b"%d" % done)
    os.rename(path, path + "r")
    with open(path + "r", "rb") as file: assert file.read() == b"%d" % done
    os.unlink(path + "r")
    done += 1
print(done)
"""


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        ({"tierfs/ledger": ("\nFORMAT = 2\n", "\nFORMAT = 3\n")}, "a session of form 2; this version reads 3"),
        ({"tierfsd/handover": ("\nFORMAT = 1\n", "\nFORMAT = 2\n")}, "in form 1, this one reads 2"),
        ({"tierfsd/mover": ("\nimport ", "\nimport absent_module, ")}, "is not whole"),
    ],
    ids=["other ledger", "other handover", "broken"],
)
def test_a_version_that_cannot_go_on_is_refused(volume, opened, edits, said):
    made = volume()
    fd = opened(made.mountpoint / "f", os.O_RDWR | os.O_CREAT)
    before = facts(made)["pids"]
    done = restart(made, version(made, edits), check=False)
    assert done.returncode == 1 and "not restarted, all goes on as before" in done.stderr, done.stderr
    assert said in done.stderr and len(done.stderr.splitlines()) == 1
    assert facts(made)["pids"] == before and os.write(fd, b"x") == 1


def test_what_cannot_be_restarted_is_said(volume, tmp_path):
    made = volume()
    made.umount()
    done = restart(made, check=False)
    assert done.returncode == 1 and "is no mounted TierFS volume" in done.stderr
    made.mount("--binding", "fusepy")
    done = restart(made, check=False)
    assert done.returncode == 1 and "only for root, with the kernel binding" in done.stderr
    assert (made.mountpoint / "f").write_bytes(b"x") == 1


def test_stopped_while_it_restarts(volume):
    """SIGTERM at any moment of it ends the volume in order."""
    made = volume()
    for pause in (0.0, 0.2, 0.4, 0.6):
        supervisor = facts(made)["pids"]["supervisor"]
        asking = threading.Thread(target=restart, args=(made,), kwargs={"check": False})
        asking.start()
        time.sleep(pause)  # the moment within the restart is what is tried
        os.kill(supervisor, signal.SIGTERM)
        assert not wait_gone([supervisor], 30), made.log()[-3000:]
        asking.join()
        assert not os.path.ismount(made.mountpoint)
        made.mount()


KILLED_AT = {  # the line of which step is the last that the former or the new version runs
    "before": ("tierfsd/supervisor", "            self._end_mover()\n            signal.pthread"),
    "server dead": ("tierfsd/supervisor", "            self._log.drain()\n            handover.become"),
    "execve": ("tierfsd/handover", "        os.execv(python"),
    "after execve": ("tierfsd/supervisor", "        self._listen_to_all()\n        signal.pthread_sigmask"),
    "resumed": ("tierfsd/supervisor", "        if not self._take_over() and not self._mount_anew():\n     "),
}
DIE = "__import__('os').kill(__import__('os').getpid(), 9) if __import__('os').path.exists({!r}) else 0\n"


@pytest.mark.parametrize("step", KILLED_AT)
def test_the_steps_of_a_restart_stand_where_they_are_killed(step):
    module, line = KILLED_AT[step]
    assert (REPO / "daemon" / f"{module}.py").read_text().count(line) == 1


@pytest.mark.soak
@pytest.mark.parametrize("step", KILLED_AT)
def test_killed_at_each_step_of_a_restart(volume, step):
    """The supervisor holds the session: what ends with it ends cleanly, and the next mount has everything."""
    made = volume()
    armed = str(made.base / "armed")
    module, line = KILLED_AT[step]
    indent = line[: len(line) - len(line.lstrip())]
    mined = version(made, {module: (line, indent + DIE.format(armed) + line)})
    restart(made, mined)
    top = made.mountpoint
    (top / "synced").write_bytes(b"synced" * 3000)
    (top / "cold").write_bytes(b"cold" * 5000)
    made.demote(top / "cold")
    pids = list(facts(made)["pids"].values())
    Path(armed).touch()
    done = restart(made, mined, check=False, timeout=60)
    Path(armed).unlink()
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    if step == "before":  # server and mover go on
        assert (top / "synced").read_bytes() == b"synced" * 3000
        made.umount()
    assert not wait_gone(pids, 30), made.log()[-2000:]
    made.mount()
    assert (top / "synced").read_bytes() == b"synced" * 3000 and (top / "cold").read_bytes() == b"cold" * 5000
    checked = made.cli("check", top, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    made.umount()
