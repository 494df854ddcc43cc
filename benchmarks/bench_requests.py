"""Requests: what the kernel asks of the server for each of 10,000 operations, counted by its own tracepoint.

What is not asked costs nothing, in whatever language the server is written. The operations are those of
bench_metadata.py. Needs Linux 6.11 or later with event tracing, and root.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench_metadata import ROWS, Bindfs, Kernel, Plain, fresh_ext4
from common import Scratch, affinity, arguments, compile_c, scratch, table
from peers import Missing

EVENT = "events/fuse/fuse_request_send"
BUFFER = 16 << 10  # KiB for each CPU


class Trace:
    """Requests sent to one connection, in a trace of our own beside whatever others trace."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def _write(self, name: str, text: str) -> None:
        (self._place / name).write_text(text)

    @contextlib.contextmanager
    def of(self, directory: Path) -> Iterator[collections.Counter[str]]:
        """Count, in the block, what is sent to the filesystem of this directory."""
        found: collections.Counter[str] = collections.Counter()
        self._write(f"{EVENT}/filter", f"connection == {os.minor(os.stat(directory).st_dev)}")
        self._write("trace", "")
        self._write(f"{EVENT}/enable", "1")
        try:
            yield found
        finally:
            self._write(f"{EVENT}/enable", "0")
        for stats in self._place.glob("per_cpu/*/stats"):
            if int(re.findall(r"^overrun: (\d+)$", stats.read_text(), re.MULTILINE)[0]):
                sys.exit("the kernel's trace has overflowed: try --quick")
        found.update(re.findall(r"\bFUSE_(\w+)", (self._place / "trace").read_text()))


@contextlib.contextmanager
def tracing(area: Scratch) -> Iterator[Trace]:
    """A trace that is gone with the block."""
    mounted = area.path / "tracing"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tracefs", "tierfs-bench", mounted], check=True)
    try:
        place = mounted / "instances" / f"tierfs-{os.getpid()}"
        place.mkdir()
        try:
            if not (place / EVENT).exists():
                sys.exit("this kernel does not trace FUSE requests: Linux 6.11 or later does")
            (place / "buffer_size_kb").write_text(str(BUFFER))
            yield Trace(place)
        finally:
            place.rmdir()
    finally:
        subprocess.run(["umount", mounted], check=True)


def measure(program: Path, contender: Plain, trace: Trace, count: int) -> dict[str, str]:
    """The requests of each operation, in words."""
    found = {}
    for title, mode, first in ROWS:
        if first:
            contender.again()
        where = contender.directory / "work"
        where.mkdir(exist_ok=True)
        with trace.of(contender.directory) as requests:
            argv = [str(program), mode, str(where), str(count)]
            subprocess.run(argv, check=True, capture_output=True, timeout=600)
        each = [(name, sent / count) for name, sent in requests.most_common() if sent * 200 > count]
        words = [name if round(part, 2) == 1 else f"{part:.2f} {name}" for name, part in each]
        found[title] = ", ".join(words) or "none"
    return found


def main() -> None:
    count = 2000 if arguments(__doc__).quick else 10_000
    with scratch() as area, affinity("pinned"), tracing(area) as trace:
        program = compile_c(area, "metadata.c")
        found = {}
        for kind in (Kernel, Bindfs):
            place = area.path / kind.__name__
            try:
                with contextlib.ExitStack() as stack:
                    root = stack.enter_context(fresh_ext4(place))
                    found[kind.name] = measure(program, kind(area, place, root, stack), trace, count)
            except Missing as exc:
                print(f"({kind.name}: {exc})")
        rows = [[title, *(found[name][title] for name in found)] for title, _, _ in ROWS]
        table(f"Requests for each operation, {count:,} files, pinned", ["", *found], rows)


if __name__ == "__main__":
    sys.exit(main())
