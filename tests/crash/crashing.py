"""Runs a demotion or a fetch in a process of its own, to be killed at a failpoint.

Arguments: the volume's directory, what to do, names. The store is a directory beside the tree, so that it
outlives the process; server and tier live in the same process and die together, as in a crash of the machine
that loses nothing of the page cache.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiering import Volume

from tierfs.recovery import finish_pending
from tierfs.store.directory import DirectoryStore
from tierfs.tree import Tree

CHUNK = 64 * 1024
UNPRIVILEGED = "TIERFS_TEST_UNPRIVILEGED"


def open_volume(base: str) -> Volume:
    return Volume(base, DirectoryStore(str(Path(base) / "store"), create=True), chunk_size=CHUNK)


def main() -> None:
    base, action, *names = sys.argv[1:]
    if os.environ.get(UNPRIVILEGED):
        Tree._is_privileged = lambda tree: False
    volume = open_volume(base)
    if action in ("demote", "replicate"):
        # A file of this very moment may be told to come again; the failpoints count files that go.
        for _ in range(20):
            items = volume.demote(*names, punch=action == "demote")
            names = [item.name.decode() for item in items if item.reason]
            if not names:
                break
    elif action == "fetch":
        volume.fetch(*names)
    elif action == "read-part":
        for name in names:
            volume.server.read(volume.path(name), 0, 4096)
        volume.tier._settler.commit_bits(everything=True)
        volume.fetch(*names)
    elif action == "drain":
        volume.tier.drain()
    elif action == "recover":
        finish_pending(volume.tier)
    volume.stop()


if __name__ == "__main__":
    main()
