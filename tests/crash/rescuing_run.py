"""Takes rescue copies in a process of its own, to be killed at a failpoint.

Arguments: the volume's directory, the day that it is. The store is a directory beside the tree, so that it
outlives the process.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from collecting_run import DAY, Dated
from journals import Journalled

from tierfs.collecting import Collector

CHUNK = 64 * 1024
NAMES = ("small", "large")


def open_home(base: str, day: float = 0.0) -> Journalled:
    store = Dated(str(Path(base) / "store"), create=True)
    store.day = 1000 + day
    home = Journalled(base, store, keep_versions=3 * DAY, grace=DAY, chunk_size=CHUNK)
    home.collector = Collector(home.volume.tier.kit, lambda: ((1 + day) * DAY, "boot"))
    return home


def content_of(name: str, turn: int) -> bytes:
    """What stands in it when its copy of that turn is taken."""
    begin = f"{name} {turn}".encode()
    return begin + b"." * ((5 * CHUNK + 777 if name == "large" else 20_000) - len(begin))


def rescue(home: Journalled, name: str) -> bool:
    return home.volume.tier.rescue(home.volume.record(name), threading.Event())


def main() -> None:
    home = open_home(sys.argv[1])
    handles = {name: home.volume.server.open(home.volume.path(name), os.O_RDWR) for name in NAMES}
    for turn in range(1, 3):
        for name, handle in handles.items():
            content = content_of(name, turn)
            write = home.volume.server.gate.contents.write
            home.volume.server.run(lambda fh=handle, new=content, write=write: write(fh, 0, new))
            assert rescue(home, name)
        home.journal.flush()
    for handle in handles.values():
        home.volume.server.release(handle)
    home.close()


if __name__ == "__main__":
    main()
