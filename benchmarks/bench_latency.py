"""What the mover's work costs those who only look: `stat` of resident files, idle and while it works flat out.

Every stat crosses the mount server. The goal: p99 under load <= 3 times the idle p99. What nobody waits for has
next to none of a busy processor; an order, a usual share for a while, and then a small one. Then, what it costs
that the server waits awake for the next request for a moment where requests come one after another: its share
of a processor while they come with a pause of so long between them.
"""

from __future__ import annotations

import contextlib
import os
import signal
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
    forms,
    load,
    median,
    new_volume,
    scratch,
    store_server,
    table,
    used,
)  # fmt: skip

FILES = 2000
QUIET = 1.0  # seconds until what has changed is copied
PAUSES = (0, 50, 100, 200, 400, 1000, 10_000)  # microseconds


def prepare(mounted: Volume, big: int, small: int) -> tuple[Path, Path]:
    """What is moved, and what is looked at."""
    moved, looked_at = mounted.mountpoint / "moved", mounted.mountpoint / "resident"
    for place in (moved, looked_at):
        place.mkdir()
    for number in range(FILES):
        (looked_at / str(number)).write_bytes(b"x")
    for number in range(big):
        with open(moved / f"big{number}", "wb") as out:
            for _ in range(256):
                out.write(os.urandom(MIB))
    for number in range(small):
        (moved / f"small{number}").write_bytes(os.urandom(32 << 10))
    return moved, looked_at


def percentiles(program: Path, place: Path, rounds: int, count: int) -> tuple[float, float]:
    """Median over rounds of (median, p99) in microseconds."""
    found = [load(program, "stat", place, FILES, count) for _ in range(rounds)]
    return median([item[0] for item in found]), median([item[1] for item in found])


def touch(moved: Path) -> None:
    """Have all of it copied anew."""
    for path in moved.iterdir():
        with open(path, "r+b") as out:
            out.write(os.urandom(16))


@contextlib.contextmanager
def copying(mounted: Volume, moved: Path) -> Iterator[None]:
    """The mover copies what has changed, and nobody waits."""
    touch(moved)
    time.sleep(2 * QUIET)
    yield


@contextlib.contextmanager
def ordered(mounted: Volume, moved: Path, seconds: float) -> Iterator[None]:
    """An order has gone on for so long."""
    touch(moved)
    argv = [*mounted.program, "demote", "--wait", moved]
    with subprocess.Popen(argv, env=mounted.environment, stderr=subprocess.DEVNULL) as order:
        time.sleep(seconds)
        yield
        order.send_signal(signal.SIGINT)


def measure(program: Path, mounted: Volume, quick: bool) -> list[list[str]]:
    moved, place = prepare(mounted, 2, 4000)
    mover = mounted.status()["pids"]["mover"]
    rounds, count, rows = 5 if quick else 15, 5000, []
    time.sleep(2 * QUIET if quick else 30)
    idle = percentiles(program, place, rounds, count)
    rows.append(["nobody", f"{idle[0]:.0f} us", f"{idle[1]:.0f} us", "", ""])
    works = {
        "copies what has changed": copying(mounted, moved),
        "an order, in its first second": ordered(mounted, moved, 1.0),
        "an order, later": ordered(mounted, moved, 5.0),
    }
    for title, work in works.items():
        with work:
            began, before = time.monotonic(), used(mover)
            found = percentiles(program, place, rounds, count)
            busy = (used(mover) - before) / (time.monotonic() - began)
        rows.append(
            [title, f"{found[0]:.0f} us", f"{found[1]:.0f} us", f"{found[1] / idle[1]:.2f}", f"{busy:.0%}"]
        )
    return rows


def share(program: Path, mounted: Volume, place: Path, pause: int, seconds: float) -> list[str]:
    """With so many microseconds between two requests: the median of a stat, and the server's share."""
    server, count = mounted.status()["pids"]["server"], int(seconds * 1e6 / (pause + 100))
    time.sleep(2)
    began, before = time.monotonic(), used(server)
    middle, _ = load(program, f"stat+{pause}" if pause else "stat", place, FILES, count)
    took = (used(server) - before) / (time.monotonic() - began)
    return [f"{pause} us" if pause else "none", f"{middle:.0f} us", f"{took:.1%}"]


def main() -> None:
    options = arguments(__doc__)
    with scratch() as area, store_server(area) as server:
        program = build_load(area)
        for form in forms:
            with affinity(form), new_volume(area, store=server.url_for(f"latency-{form}")) as mounted:
                mounted.configure(quiet=f"{QUIET:g}s")
                rows = measure(program, mounted, options.quick)
                place = mounted.mountpoint / "resident"
                seconds = 1 if options.quick else 4
                shares = [share(program, mounted, place, each, seconds) for each in PAUSES]
            heads = ["the mover works for", "median", "p99", "to idle", "the mover's share"]
            table(f"stat of a resident file, {form}", heads, rows)
            table(f"One request after another, {form}", ["pause between", "stat", "the server's share"], shares)


if __name__ == "__main__":
    main()
