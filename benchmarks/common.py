"""What the benchmarks share: volumes, the load program, CPU affinity, tables."""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from harness import Scratch, Volume, scratch

__all__ = [
    "MIB", "Scratch", "Volume", "affinity", "arguments", "build_load", "compile_c", "drop_caches", "forms",
    "load", "median", "new_volume", "scratch", "store_server", "table", "timed", "used", "warm_memory",
]  # fmt: skip

MIB = 1 << 20
median = statistics.median
_ALL = os.sched_getaffinity(0)
_numbers = iter(range(1, 10_000))


def arguments(text: str | None, *extra: tuple[str, dict[str, Any]]) -> argparse.Namespace:
    """The command line of a benchmark; its own docstring is the help."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, for a look at the shape")
    for name, options in extra:
        parser.add_argument(name, **options)
    return parser.parse_args()


@contextlib.contextmanager
def affinity(form: str) -> Iterator[None]:
    """Run the block, and all that is started in it, on one CPU ("pinned") or wherever ("free")."""
    os.sched_setaffinity(0, {min(_ALL)} if form == "pinned" else _ALL)
    try:
        yield
    finally:
        os.sched_setaffinity(0, _ALL)


forms = ("pinned", "free")


@contextlib.contextmanager
def new_volume(area: Scratch, mount: bool = True, base: Path | None = None, **options: Any) -> Iterator[Volume]:
    """A volume, mounted, gone with the block; in `base`, an empty directory."""
    if base is None:
        base = area.path / f"b{next(_numbers)}"
        base.mkdir()
    made = Volume(base, area.connections, **{"limit": 1500, **options})
    try:
        if mount:
            made.mount()
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def store_server(area: Scratch, names: Sequence[str] = ("versitygw", "rclone")) -> Iterator[Any]:
    """The first of these S3 servers that can be had here. It keeps its objects in memory: its disk is not ours,
    nor do its files leave the cache when ours is dropped."""
    import s3servers

    for name in names:
        with contextlib.ExitStack() as stack:
            place = area.path / f"s3-{next(_numbers)}"
            place.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "tierfs-bench", place], check=True)
            stack.callback(subprocess.run, ["umount", "-l", place], check=True)
            try:
                server = stack.enter_context(s3servers.SERVERS[name](place))
            except s3servers.Unavailable as exc:
                print(f"({name}: {exc})")
                continue
            os.environ.update(server.env)
            yield server
            return
    sys.exit("no S3 server can be had here")


def compile_c(area: Scratch, name: str) -> Path:
    """The program of one of the sources beside this file."""
    source = Path(__file__).with_name(name)
    program = area.path / source.stem
    subprocess.run(["gcc", "-O2", "-Wall", "-o", program, source], check=True)
    return program


def build_load(area: Scratch) -> Path:
    return compile_c(area, "load.c")


def load(program: Path, mode: str, path: Path | str, size: int, count: int) -> list[float]:
    """The figures that the load program prints."""
    argv = [str(program), mode, str(path), str(size), str(count)]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=600)
    return [float(word) for word in done.stdout.split()]


def warm_memory(size: int = 4 << 30) -> None:
    """Touch free memory once. A virtual machine may have given it back to its host, and to get a page again
    costs more than to copy it: whoever runs first would pay for all."""
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE):
        pass


def drop_caches() -> None:
    """Forget clean pages, so that the next read is the disk's."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")


def used(pid: int) -> float:
    """Seconds of processor time, of all threads of a process."""
    runs = (path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))
    return sum(int(run.split()[0]) for run in runs) / 1e9


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows below each other, as Markdown, so that they can be put into the README."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    print(f"\n{title}\n")
    for number, row in enumerate((head, *rows)):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    sys.stdout.flush()
