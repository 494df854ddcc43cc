"""Resident files: through the mount against the filesystem beneath, side by side.

Each figure is the median of interleaved rounds; below a ratio of 1 the mount is slower. The goal is >= 0.9.
Beside it is the least that a mount with passthrough can be (floor.c), which does nothing else: what that loses,
the kernel takes.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from common import (
    MIB,
    Volume,
    affinity,
    arguments,
    build_load,
    compile_c,
    forms,
    load,
    median,
    new_volume,
    scratch,
    table,
)  # fmt: skip
from peers import mounted

# name -> (mode of the load program, bytes of the file, operations, unit, amount of one operation in that unit)
WORK = {
    "sequential write, 1 MiB": ("write", 256 * MIB, 256, "MB/s", 1.048576),
    "sequential read, 1 MiB": ("read", 256 * MIB, 1024, "MB/s", 1.048576),
    "buffered writes of 4 KiB": ("write4k", 64 * MIB, 200_000, "k/s", 0.001),
    "random reads of 4 KiB": ("randomread4k", 256 * MIB, 300_000, "k/s", 0.001),
    "mmap, random pages read": ("mmapread", 256 * MIB, 8_000_000, "k/s", 0.001),
    "mmap, random pages written": ("mmapwrite", 64 * MIB, 4_000_000, "k/s", 0.001),
}


@contextlib.contextmanager
def least_mount(program: Path, backing: Path) -> Iterator[Path]:
    """A mount that shows the file of an existing directory, and can do no more."""
    mountpoint = backing.with_name(backing.name + "-mnt")
    mountpoint.mkdir()
    process = subprocess.Popen([program, backing, mountpoint], stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not mounted(mountpoint):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("floor does not mount here: it needs root, and Linux 6.9 or newer")
            time.sleep(0.01)
        yield mountpoint
    finally:
        if mounted(mountpoint):
            subprocess.run(["umount", "-l", mountpoint], check=False)
        process.kill()
        process.wait()


def measure(
    program: Path, volume: Volume, backing: Path, least: Path, rounds: int, quick: bool
) -> list[list[str]]:
    rows = []
    for name, (mode, size, count, unit, amount) in WORK.items():
        files = [volume.base / "plain" / "file", volume.mountpoint / "file", least / "file"]
        (backing / "file").touch()
        for file in files:
            load(program, "write", file, size, size // MIB)
        count = count // 4 if quick else count
        took: list[list[float]] = [[] for _ in files]
        for turn in range(rounds):
            for step in range(len(files)):
                which = (turn + step) % len(files)
                took[which].append(load(program, mode, files[which], size, count)[0])
        native, ours, floor = (count * amount / median(times) for times in took)
        cells = [f"{figure:,.0f} {unit}" for figure in (native, ours, floor)]
        rows.append([name, *cells, f"{ours / native:.2f}", f"{floor / native:.2f}"])
        for file in (*files[:2], backing / "file"):
            file.unlink()
    return rows


def main() -> None:
    options = arguments(__doc__)
    head = ["", "filesystem", "TierFS", "least mount", "TierFS / filesystem", "least / filesystem"]
    with scratch() as area:
        program, floor = build_load(area), compile_c(area, "floor.c")
        for form in forms:
            with contextlib.ExitStack() as stack:
                stack.enter_context(affinity(form))
                volume = stack.enter_context(new_volume(area))
                backing = volume.base / "least"
                for directory in (volume.base / "plain", backing):
                    directory.mkdir()
                least = stack.enter_context(least_mount(floor, backing))
                rows = measure(program, volume, backing, least, 3 if options.quick else 7, options.quick)
            table(f"Resident files, {form}", head, rows)


if __name__ == "__main__":
    main()
