"""The tests leave nothing behind, however they end."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import harness
import pytest
from tiering import Volume

RUN = """
import subprocess, time, harness
area = harness.Scratch()
left = subprocess.Popen(["sleep", "60"])
print(area.path, harness.session_id, left.pid, flush=True)
time.sleep(60)
"""


def test_what_a_killed_run_has_left_is_cleared_away_by_the_next(area: harness.Scratch) -> None:
    place = area.path / "runs"  # where a kill of this very test is seen to, too
    place.mkdir()
    env = {**os.environ, "TMPDIR": str(place), "PYTHONPATH": str(harness.REPO / "tests")}
    with subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True, env=env) as run:
        assert run.stdout is not None
        path, session, left = run.stdout.readline().split()
        harness.clear_abandoned(place, young=0)
        assert harness.pids_with(harness.SESSION, session) == [int(left)]  # a run that lives keeps all
        run.send_signal(signal.SIGKILL)
        run.wait()
    harness.clear_abandoned(place, young=60)
    assert os.path.isdir(path)  # it might be one that is about to be locked
    harness.clear_abandoned(place, young=0)
    assert not os.path.exists(path)
    assert harness.wait_gone([int(left)], 10) == []
    assert not any(where.startswith(f"{path}/") for where, _ in harness.mounts())


def test_a_volume_for_tests_works_however_many_descriptors_are_open(tmp_path: Path) -> None:
    """One process that ran all unit tests had so many after a while, and each volume hung from then on."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 2048:
        pytest.skip("so many are not to be had here")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(2048, before[0]), most))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1024)]
    try:
        volume = Volume(tmp_path)
        try:
            volume.server.create(volume.path("f"), b"content")
            assert [item.reason for item in volume.demote("f")] == [""]
            assert volume.server.read(volume.path("f")) == b"content"
        finally:
            volume.close()
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
