"""Times that no i64 of nanoseconds holds: an ext4 file may have one, up to the year 2446."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from harness import Volume

pytestmark = pytest.mark.usefixtures("tiers", "needs_root")
Make = Callable[..., Volume]
LATE = 10_500_000_000 * 10**9  # in the year 2302
LATEST = (1 << 63) - 1  # what records and marks hold


@pytest.fixture
def made(volume: Make) -> Volume:
    made = volume()
    made.configure(min_age="0s", quiet="0s", replicate="cold")
    return made


def test_a_file_of_a_late_time_stays_and_says_why(made: Volume) -> None:
    path = made.mountpoint / "file"
    path.write_bytes(b"late" * 10_000)
    os.utime(path, ns=(LATE, LATE))
    refused = made.cli("demote", "--wait", path, check=False)
    assert refused.returncode == 1
    assert "after the year 2262" in refused.stderr
    assert path.stat().st_mtime_ns == LATE
    assert path.read_bytes() == b"late" * 10_000
    os.utime(path, ns=(1, 1))
    made.demote(path)
    assert path.read_bytes() == b"late" * 10_000


def test_a_stub_given_one_has_the_last_time_of_2262_when_it_is_back(made: Volume) -> None:
    data = os.urandom(9 << 20)
    for name in ("stub", "part"):
        (made.mountpoint / name).write_bytes(data)
        made.demote(made.mountpoint / name)
    with open(made.mountpoint / "part", "rb") as part:
        part.read(100)
        for name in ("stub", "part"):
            os.utime(made.mountpoint / name, ns=(LATE, LATE))
            assert (made.mountpoint / name).stat().st_mtime_ns == LATE
    for name in ("stub", "part"):
        made.fetch(made.mountpoint / name)
        assert (made.mountpoint / name).read_bytes() == data
    made.remount()
    for name in ("stub", "part"):
        assert (made.mountpoint / name).stat().st_mtime_ns in (LATE, LATEST)
        assert (made.mountpoint / name).read_bytes() == data
    assert not made.json("check", "--json", made.mountpoint)["findings"]
