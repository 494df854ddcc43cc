"""Works on a journalled volume in a process of its own, to be killed at a failpoint of the journal.

Arguments: the volume's directory. The store is a directory beside the tree, so that it outlives the process.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from journals import Journalled

from tierfs.store.directory import DirectoryStore


def open_home(base: str) -> Journalled:
    return Journalled(base, DirectoryStore(str(Path(base) / "store"), create=True))


def storm(home: Journalled, turn: int) -> None:
    """Names come, go and change, in every way."""
    home.mkdir(f"d{turn}")
    for number in range(12):
        home.write(f"d{turn}/f{number}", b"x" * number)
    home.run("rename", *home.above(f"d{turn}/f1"), *home.above(f"moved{turn}"))
    home.run("link", home.node(f"d{turn}/f2"), *home.above(f"linked{turn}"))
    home.run("unlink", *home.above(f"d{turn}/f3"))
    home.run("setattr", home.node(f"d{turn}"), mode=0o700 + turn)
    home.volume.demote(f"d{turn}/f9", f"d{turn}/f10")
    if turn:
        with contextlib.suppress(FileNotFoundError):
            home.run("rename", *home.above(f"d{turn - 1}"), *home.above(f"d{turn}/former"))
        with contextlib.suppress(FileNotFoundError):
            home.run("unlink", *home.above(f"moved{turn - 1}"))


def main() -> None:
    home = open_home(sys.argv[1])
    for turn in range(4):
        storm(home, turn)
        home.journal.flush()
        if turn % 2:
            home.snapshots.take()
    home.close()


if __name__ == "__main__":
    main()
