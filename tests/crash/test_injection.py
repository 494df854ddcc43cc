"""Each system call that the mover's work makes fails, or is the process's last: nothing is lost by that.

strace lets the n-th call of its kind in a thread answer EIO or ENOSPC, or kills the process before it is made.
Whatever the process makes of it: the next one recovers, and every byte, mode and time is as it was. Bytes that
were written and not synced survive here, as after a crash of the process; test_power_cut.py takes them away.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys

import pytest
from test_crash_tier import NAMES, SCRIPT, check_whole, make, run

from tierfs import failpoints

pytestmark = pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")

FAULTS = ("signal=KILL", "error=EIO", "error=ENOSPC")
CALLS = {
    "demote": ("fsync", "fdatasync", "pwrite64", "writev", "fallocate", "setxattr", "renameat", "utimensat"),
    "read-part": ("fsync", "fdatasync", "pwrite64", "writev", "fallocate", "removexattr", "utimensat"),
    "replicate": ("fsync", "fdatasync", "pwrite64", "writev", "renameat"),
    "drain": ("fdatasync", "pwrite64", "writev"),
    "recover": ("fsync", "fdatasync", "pwrite64", "writev", "removexattr", "utimensat"),
}
LEFT = {"read-part": 0, "recover": -signal.SIGKILL}  # how the demotion before it ends
MOST = 40  # calls of one kind in one thread; no thread here makes more


def inject(base, action, call, fault, when):
    """Whether the fault was met; with how the process took it, for a message."""
    said, faulty = base / "strace", f"inject={call}:{fault}:when={when}"
    command = [
        "strace", "-f", "-qq", "-o", str(said), "-e", f"trace={call}", "-e", faulty,
        sys.executable, str(SCRIPT), str(base), action, *NAMES,
    ]  # fmt: skip
    done = subprocess.run(command, timeout=100, check=False, capture_output=True, text=True)
    met = "(INJECTED)" in said.read_text() or done.returncode == -9
    return met, f"{call} {fault} {when}: {done.returncode} {done.stderr[-1500:]}"


def begin(base, action):
    made = make(base)
    if action in LEFT:
        point = failpoints.PUNCHED if action == "recover" else None
        assert run(base, "demote", point).returncode == LEFT[action]
    return made


@pytest.mark.parametrize(
    ("action", "call", "fault", "when"),
    [
        ("demote", "fsync", "error=EIO", 2),
        ("demote", "pwrite64", "error=ENOSPC", 3),
        ("demote", "setxattr", "error=ENOSPC", 1),
        ("demote", "fallocate", "signal=KILL", 1),
        ("demote", "renameat", "error=EIO", 1),
        ("read-part", "fdatasync", "error=EIO", 2),
        ("read-part", "pwrite64", "error=ENOSPC", 3),
        ("read-part", "removexattr", "error=EIO", 1),
        ("read-part", "utimensat", "error=EIO", 1),
    ],
)
def test_a_call_that_fails(tmp_path, action, call, fault, when):
    made = begin(tmp_path, action)
    met, how = inject(tmp_path, action, call, fault, when)
    assert met, how
    check_whole(*made)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("action", "call"), [(action, call) for action in CALLS for call in CALLS[action]])
def test_each_call_that_fails(tmp_path, action, call, fault):
    for when in range(1, MOST):
        base = tmp_path / str(when)
        base.mkdir()
        made = begin(base, action)
        met, how = inject(base, action, call, fault, when)
        try:
            check_whole(*made)
        except Exception as error:  # ^C ends the run
            raise AssertionError(how) from error
        shutil.rmtree(base)
        if not met:
            break
    assert 1 < when < MOST
    print(f"\n{when - 1} times {call} {fault} in {action}")
