"""Copies read back: by `tierfs check --read-data`, which may be stopped, and by a scrub."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import TIERFS, Volume

pytestmark = pytest.mark.usefixtures("tiers", "needs_root")
Make = Callable[..., Volume]
MIB = 1 << 20


def object_of(volume: Volume, name: str) -> Path:
    return volume.state / "store" / volume.status(volume.mountpoint / name)["copy"]


def spoil(path: Path) -> None:
    """Flip a bit in the middle of an object."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x20
    path.chmod(0o600)
    path.write_bytes(raw)


def test_a_check_stopped_by_ctrl_c_goes_on_there_and_ends_with_all_findings(volume: Make) -> None:
    made = volume()
    made.configure(min_age="0s", min_size="0", replicate="cold")
    first, second = made.mountpoint / "first", made.mountpoint / "second"
    first.touch()
    second.touch()
    small, large = made.mountpoint / "small", made.mountpoint / "large"
    for path, name in zip(sorted((first, second), key=lambda path: path.stat().st_ino), (small, large)):
        path.rename(name)  # copies are read in the order of inode numbers
    small.write_bytes(os.urandom(5000))
    large.write_bytes(os.urandom(24 * MIB))
    made.demote(small)
    made.demote(large)
    assert made.cli("check", "--read-data", made.mountpoint).returncode == 0
    spoil(object_of(made, "small"))
    argv = [TIERFS, "check", "--read-data", "--rate", "6M", made.mountpoint]
    stopped = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=made.environment)
    place = made.state / "check.json"
    try:
        deadline = time.monotonic() + 60
        while not (place.exists() and json.loads(place.read_bytes())["bad"]):
            assert time.monotonic() < deadline and stopped.poll() is None
            time.sleep(0.02)
        stopped.send_signal(signal.SIGINT)
        _, words = stopped.communicate(timeout=60)
    finally:
        if stopped.poll() is None:
            stopped.kill()
            stopped.wait()
    assert stopped.returncode == 130 and b"the same command goes on where it was" in words
    done = made.cli("check", "--read-data", "--json", made.mountpoint, check=False)
    document = json.loads(done.stdout)
    assert done.returncode == 1 and document["read_bytes"] > document["resumed_bytes"] >= 5000
    assert [finding["path"] for finding in document["findings"]] == ["small"]
    assert not place.exists()
    for wrong in (["--rate", "6M"], ["--from-start"], ["--read-data", "--rate", "quick"]):
        assert made.cli("check", *wrong, made.mountpoint, check=False).returncode == 2


def test_the_scrub_finds_what_is_bad_copies_it_again_and_names_what_is_lost(volume: Make) -> None:
    made = volume()
    made.configure(min_age="0s", min_size="0", quiet="0s", replicate="all")
    data = os.urandom(70_000)
    for name in ("whole", "lost", "here"):
        made.mountpoint.joinpath(name).write_bytes(data)
    made.cli("umount", "--wait", made.mountpoint)
    made.mount()
    made.demote(made.mountpoint / "whole", made.mountpoint / "lost")
    bad = object_of(made, "here")
    spoil(bad)
    object_of(made, "lost").unlink()
    made.umount()
    # The last pass began a long time ago.
    (made.state / "scrub.json").write_text(json.dumps({"began": 1.0, "ended": 2.0}))
    made.mount()
    deadline = time.monotonic() + 60
    fallen = (bad, made.state / "store")  # the latter: it has no copy now
    while (status := made.status())["scrub"]["ended"] < 3 or object_of(made, "here") in fallen:
        assert time.monotonic() < deadline, (status, made.log())
        time.sleep(0.1)
    assert status["scrub"]["damaged"] == 1 and status["scrub"]["files"] == 3
    assert ["'lost'" in error["what"] for error in status["errors"]] == [True]
    assert "CANNOT BE HAD BACK" in made.cli("status", made.mountpoint).stdout
    assert "'lost': its object is not in the store" in made.log()
    assert "'here': its object does not have the recorded digest" in made.log()
    made.demote(made.mountpoint / "here")
    assert (made.mountpoint / "here").read_bytes() == (made.mountpoint / "whole").read_bytes() == data
