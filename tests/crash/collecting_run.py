"""Collects garbage in a process of its own, to be killed at a failpoint; time is what the caller says.

Arguments: the volume's directory, what to do, the day that it is.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiering import Volume

from tierfs.collecting import Collector
from tierfs.store.directory import DirectoryStore

DAY = 86400.0


class Dated(DirectoryStore):
    """Its clock shows `day`."""

    day = 0.0

    def head(self, key):
        return replace(super().head(key), modified=self.day * DAY)


def open_volume(base: str, day: float) -> Volume:
    store = Dated(str(Path(base) / "store"), create=True)
    store.day = 1000 + day
    volume = Volume(base, store, keep_versions=3 * DAY, grace=DAY, chunk_size=64 * 1024)
    volume.index.commit(lambda w: w.set_surveyed(True)).result()
    volume.collector = Collector(volume.tier.kit, lambda: ((1 + day) * DAY, "boot"))
    return volume


def copy_out(volume: Volume, *names: str) -> None:
    """A file of this very moment may be told to come again."""
    for _ in range(20):
        names = tuple(item.name.decode() for item in volume.demote(*names, punch=False) if item.reason)
        if not names:
            return
    raise AssertionError(f"{names} are not copied out")


def main() -> None:
    base, action, day = sys.argv[1], sys.argv[2], float(sys.argv[3])
    volume = open_volume(base, day)
    if action == "write":
        for name in ("a", "b"):
            volume.server.create(volume.path(name), os.urandom(100_000))
        copy_out(volume, "a", "b")
        volume.server.unlink(volume.path("a"))
        volume.server.write(volume.path("b"), b"newer")
        copy_out(volume, "b")
        volume.tier.drain()
    volume.collector.run(now=True)
    volume.index.commit(lambda w: w.note_snapshot(w.past.beat)).result()
    volume.stop()


if __name__ == "__main__":
    main()
