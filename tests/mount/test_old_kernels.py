"""Linux before 6.9 asks nobody again what a mount server has left unanswered.

Played by a version of ours that does not take the kernel's offer.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable

import pytest
from harness import Volume
from test_restart import AS_THAT, facts, version

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("tiers", "needs_root")]

TAKEN = "if feature is not Feature.PASSTHROUGH)"
NOT_TAKEN = "if feature not in (Feature.PASSTHROUGH, Feature.HAS_RESEND))"


@pytest.fixture
def made(volume: Callable[..., Volume]) -> Volume:
    made = volume()
    (made.mountpoint / "file").write_bytes(b"content")
    made.umount()
    script = version(made, {"tierfs/fuse/protocol": (TAKEN, NOT_TAKEN)})
    made.program, before = (sys.executable, "-c", AS_THAT, str(script)), made.program
    try:
        made.mount()
    finally:
        made.program = before
    return made


def test_a_restart_is_refused(made: Volume) -> None:
    """Whoever has a file open would lose it."""
    before = facts(made)["pids"]
    with open(made.mountpoint / "file", "rb") as file:
        done = made.cli("restart", made.mountpoint, check=False)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
        assert "on Linux 6.9 or later: unmount, then mount again" in done.stderr
        assert file.read() == b"content"
    assert facts(made)["pids"] == before


def test_a_killed_server_is_followed_by_another_mount(made: Volume) -> None:
    """Nobody waits for ever for what the dead one had read; a file that is open is lost."""
    server = facts(made)["pids"]["server"]
    file = os.open(made.mountpoint / "file", os.O_RDWR)
    os.kill(server, signal.SIGKILL)
    until = time.monotonic() + 20
    while facts(made)["pids"]["server"] == server:
        assert time.monotonic() < until, made.log()
        time.sleep(0.02)
    with pytest.raises(OSError):
        os.fsync(file)
    with contextlib.suppress(OSError):  # without passthrough a close asks the server, too
        os.close(file)
    assert (made.mountpoint / "file").read_bytes() == b"content"
    assert "takes its session over" not in made.log() and "mounting anew" in made.log()
