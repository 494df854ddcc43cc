"""Resident files: through the mount against the filesystem beneath, side by side.

Each figure is the median of interleaved rounds; below a ratio of 1 the mount is slower. The goal is >= 0.9.
"""

from __future__ import annotations

from pathlib import Path

from common import MIB, Volume, affinity, arguments, build_load, forms, load, median, new_volume, scratch, table

# name -> (mode of the load program, bytes of the file, operations, unit, amount of one operation in that unit)
WORK = {
    "sequential write, 1 MiB": ("write", 256 * MIB, 256, "MB/s", 1.048576),
    "sequential read, 1 MiB": ("read", 256 * MIB, 1024, "MB/s", 1.048576),
    "buffered writes of 4 KiB": ("write4k", 64 * MIB, 200_000, "k/s", 0.001),
    "random reads of 4 KiB": ("randomread4k", 256 * MIB, 300_000, "k/s", 0.001),
    "mmap, random pages read": ("mmapread", 256 * MIB, 8_000_000, "k/s", 0.001),
    "mmap, random pages written": ("mmapwrite", 64 * MIB, 4_000_000, "k/s", 0.001),
}


def measure(program: Path, mounted: Volume, plain: Path, rounds: int, quick: bool) -> list[list[str]]:
    rows = []
    for name, (mode, size, count, unit, amount) in WORK.items():
        files = [plain / "file", mounted.mountpoint / "file"]
        for file in files:
            load(program, "write", file, size, size // MIB)
        count = count // 4 if quick else count
        took: list[list[float]] = [[], []]
        for turn in range(rounds):
            for which in (0, 1) if turn % 2 else (1, 0):
                took[which].append(load(program, mode, files[which], size, count)[0])
        native, through = (count * amount / median(times) for times in took)
        rows.append([name, f"{native:,.0f} {unit}", f"{through:,.0f} {unit}", f"{through / native:.2f}"])
        for file in files:
            file.unlink()
    return rows


def main() -> None:
    options = arguments(__doc__)
    with scratch() as area:
        program = build_load(area)
        for form in forms:
            with affinity(form), new_volume(area) as mounted:
                plain = mounted.base / "plain"
                plain.mkdir()
                rows = measure(program, mounted, plain, 3 if options.quick else 7, options.quick)
            table(f"Resident files, {form}", ["", "filesystem", "through the mount", "ratio"], rows)


if __name__ == "__main__":
    main()
