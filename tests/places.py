"""Places for conformance tests: both bindings, and the filesystem beneath, which proves what is expected."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import Scratch, Volume

PLAIN = bool(os.environ.get("TIERFS_TESTS_PLAIN"))
_numbers = itertools.count(1)
_BINDINGS = ("kernel", "fusepy")
RESIDENT = ["plain", *_BINDINGS]
STATES = ["plain", *(f"{name}-{state}" for name in _BINDINGS for state in ("resident", "demoted", "half"))]
CHUNK = 64 << 10
# What libfuse 2's high level cannot express: tests of it run on the other places.
_LACKS = {
    "fusepy": {"rename flags", "O_TMPFILE", "SEEK_HOLE", "copy_file_range", "default ACL", "invalidation"},
}


@dataclass
class Place:
    """An empty directory, and how files in it come into the state that the test runs for."""

    path: Path
    binding: str
    state: str
    volume: Volume | None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def settle(self, *paths: Path) -> None:
        """Bring files into that state. Half: all but a part in the middle is away."""
        if self.volume is None or self.state == "resident":
            return
        until = time.monotonic() + 20
        while stayed := self.volume.order("demote", *paths):
            # The kernel tells of a close some time after it.
            assert time.monotonic() < until, stayed
        for path in paths:
            assert self.volume.tier(path) == "stub"
            size = path.stat().st_size
            if self.state == "half" and size > CHUNK:
                with open(path, "rb", buffering=0) as file:
                    assert len(os.pread(file.fileno(), 10, size // 2)) == 10
                assert self.volume.tier(path) != "resident"

    def needs(self, what: str) -> None:
        """Skip where the binding lacks this."""
        if what in _LACKS.get(self.binding, ()):
            pytest.skip(f"libfuse 2 has no {what}")


def make(name: str, area: Scratch, volumes: dict[str, Volume]) -> Place:
    """An empty place of this name (see STATES); a volume is mounted where none is in `volumes` yet."""
    binding, _, state = name.partition("-")
    if PLAIN and binding != "plain":
        pytest.skip("plain directories have no tiers")
    volume = None
    if binding == "plain":
        base = area.path
    else:
        volume = volumes.get(binding) or _mounted(binding, area)
        volumes[binding] = volume
        base = volume.mountpoint
    path = base / f"p{next(_numbers)}"
    path.mkdir(mode=0o755)
    return Place(path, binding, state or "resident", volume)


def _mounted(binding: str, area: Scratch) -> Volume:
    base = area.path / f"c{os.getpid()}-{next(_numbers)}"
    base.mkdir(mode=0o755)
    volume = Volume(base, area.connections, options=("--binding", binding, "-o", "suid,dev"), limit=1500)
    volume.mount()
    volume.configure(quiet="0s", min_age="0s", min_size="0", chunk_size=str(CHUNK))
    return volume
