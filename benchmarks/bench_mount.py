"""A volume of many files: how soon its mount answers, the server's memory after walks of them all, and what its
processes do while nobody asks for anything.

The goals: 1 s; 250 bytes of memory for each inode that the kernel knows, 100 MB with 200,000 files and 350 MB
with 1,000,000; next to no processor time.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from common import Volume, arguments, new_volume, scratch, table, timed, used

PER_DIRECTORY = 200
QUIET = 6  # times of five seconds in a row: longer than names wait to go to the store


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


def memory(mounted: Volume, process: str) -> dict[str, float]:
    """Bytes of one of the volume's processes, by kind."""
    pid = mounted.status()["pids"][process]
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}


def told(sizes: dict[str, float]) -> str:
    """The ledger outlives the process and is memory all the same. What is mapped of files is not: pages of the
    index in the page cache, which both processes share and the kernel takes back."""
    own, ledger, mapped = (sizes[kind] / 1e6 for kind in ("RssAnon", "RssShmem", "RssFile"))
    return f"{own:.0f} MB, with its ledger {own + ledger:.0f} MB; mapped of files {mapped:.0f} MB"


def each(before: dict[str, float], after: dict[str, float], files: int) -> str:
    """Growth for each inode."""
    own, ledger = ((after[kind] - before[kind]) / files for kind in ("RssAnon", "RssShmem"))
    return f"{own:.0f} bytes, with its ledger {own + ledger:.0f}"


def busy(mounted: Volume, seconds: float) -> dict[str, float]:
    """Share of a processor that each process takes while nothing is asked of the mount."""
    pids = {name: pid for name, pid in mounted.status()["pids"].items() if pid}
    before = {name: used(pid) for name, pid in pids.items()}
    time.sleep(seconds)
    return {name: (used(pid) - before[name]) / seconds for name, pid in pids.items()}


def settled(mounted: Volume, seconds: float) -> float:
    """Wait, for so long at most, until the work that a mount begins with is done; how long it took.

    After the look through the tree there is a pause until all names go to the store.
    """
    began, quiet = time.monotonic(), 0
    while quiet < QUIET and time.monotonic() - began < seconds:
        quiet = quiet + 1 if sum(busy(mounted, 5).values()) <= 0.02 else 0
    return time.monotonic() - began - quiet * 5


def indexed(mounted: Volume, files: int, seconds: float) -> int:
    """Wait until the index knows the files, and stop when it does not; how many it knows."""
    deadline = time.monotonic() + seconds
    while (known := mounted.status()["files"]) < files and time.monotonic() < deadline:
        time.sleep(0.5)
    return int(known)


def main() -> None:
    options = arguments(__doc__, ("--files", {"type": int, "default": 200_000}))
    files = options.files // 10 if options.quick else options.files
    rows = []
    with scratch() as area, new_volume(area, mount=False) as mounted:
        mounted.mountpoint.mkdir()
        populate(mounted.mountpoint, files)
        state = ("--state", mounted.state)
        rows.append(["adopt", f"{timed(lambda: mounted.cli('adopt', *state, mounted.mountpoint)):.2f} s"])
        mounted.watch()
        took = timed(lambda: indexed(mounted, files, 1800))
        rows.append(["files in the index", f"{mounted.status()['files']:,} after {took:.0f} s"])
        mounted.umount()
        size = (mounted.state / "index" / "data.mdb").stat().st_size
        rows.append(["index", f"{size / 1e6:.0f} MB, {size / files:.0f} bytes a file"])
        rows.append(["mount answers after", f"{answers(mounted):.2f} s"])
        before = memory(mounted, "server")
        rows.append(["memory of the server before", told(before)])
        walks = [timed(lambda: walk(mounted.mountpoint)) for _ in range(2)]
        rows.append(["first walk, every file looked at", f"{walks[0]:.1f} s"])
        rows.append(["second walk", f"{walks[1]:.1f} s"])
        rows.append(["walk of the filesystem beneath", f"{timed(lambda: walk(mounted.state / 'tree')):.1f} s"])
        after = memory(mounted, "server")
        known = files + files // PER_DIRECTORY
        rows.append(["memory of the server after", told(after)])
        rows.append(["for each inode", each(before, after, known)])
        rows.append(["memory of the mover", told(memory(mounted, "mover"))])
        seconds = 6 if options.quick else 60
        rows.append(["at work by itself after the walks", f"{settled(mounted, 600):.0f} s"])
        shares = [f"{name} {share:.2%}" for name, share in busy(mounted, seconds).items()]
        rows.append([f"idle, over {seconds} s", ", ".join(shares)])
    table(f"A volume of {files:,} files", ["", ""], rows)


if __name__ == "__main__":
    main()
