"""A volume of 200,000 files: how soon its mount answers, and the server's memory after a walk of them all.

The goals: 1 s, and 100 MB.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from common import Volume, arguments, new_volume, scratch, table, timed

PER_DIRECTORY = 200


def populate(root: Path, files: int) -> None:
    for number in range(files // PER_DIRECTORY):
        directory = root / f"d{number // 100}" / f"d{number}"
        directory.mkdir(parents=True)
        fd = os.open(directory, os.O_RDONLY)
        for name in range(PER_DIRECTORY):
            os.close(os.open(f"file-{name}", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=fd))
        os.close(fd)


def walk(root: Path) -> int:
    count = 0
    for at, _, names in os.walk(root):
        for name in names:
            os.lstat(os.path.join(at, name))
            count += 1
    return count


def answers(mounted: Volume) -> float:
    """Seconds from the command to the first answer of the mount."""

    def mount_and_look() -> None:
        mounted.mount(timeout=120)
        os.stat(mounted.mountpoint)
        os.listdir(mounted.mountpoint)

    return timed(mount_and_look)


def memory(mounted: Volume, process: str) -> str:
    """MB of one of the volume's processes: its own, and what it has mapped of files.

    The latter are pages of the index in the page cache, which both processes share and the kernel takes back.
    """
    pid = mounted.status()["pids"][process]
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1000 for line in lines if line.startswith("Rss")}
    return f"{sizes['RssAnon']:.0f} MB and {sizes['RssFile'] + sizes['RssShmem']:.0f} MB of mapped files"


def indexed(mounted: Volume, files: int, seconds: float) -> int:
    """Wait until the index knows the files, and stop when it does not; how many it knows."""
    deadline = time.monotonic() + seconds
    while (known := mounted.status()["files"]) < files and time.monotonic() < deadline:
        time.sleep(0.5)
    return int(known)


def main() -> None:
    options = arguments(__doc__)
    files = 20_000 if options.quick else 200_000
    rows = []
    with scratch() as area, new_volume(area, mount=False) as mounted:
        mounted.mountpoint.mkdir()
        populate(mounted.mountpoint, files)
        state = ("--state", mounted.state)
        rows.append(["adopt", f"{timed(lambda: mounted.cli('adopt', *state, mounted.mountpoint)):.2f} s"])
        mounted.watch()
        known = indexed(mounted, files, 300)
        rows.append(["files in the index", f"{known:,}"])
        mounted.umount()
        rows.append(["mount answers after", f"{answers(mounted):.2f} s"])
        rows.append(["memory of the server before", memory(mounted, "server")])
        took = [timed(lambda: walk(mounted.mountpoint)) for _ in range(2)]
        rows.append(["first walk, every file looked at", f"{took[0]:.1f} s"])
        rows.append(["second walk", f"{took[1]:.1f} s"])
        rows.append(["walk of the filesystem beneath", f"{timed(lambda: walk(mounted.state / 'tree')):.1f} s"])
        rows.append(["memory of the server after", memory(mounted, "server")])
        rows.append(["memory of the mover", memory(mounted, "mover")])
    table(f"A volume of {files:,} files", ["", ""], rows)


if __name__ == "__main__":
    main()
