"""What the mover's work costs those who only look: `stat` of resident files, idle and under full load.

Every stat crosses the mount server. The goal: p99 under load <= 3 times the idle p99. Then, what it costs that
the server waits awake for the next request for a moment where requests come one after another: its share of a
processor while they come with a pause of so long between them.
"""

from __future__ import annotations

import os
import threading
import time
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
PAUSES = (0, 50, 100, 200, 400, 1000, 10_000)  # microseconds


def prepare(mounted: Volume, big: int, small: int) -> Path:
    looked_at = mounted.mountpoint / "resident"
    looked_at.mkdir()
    for number in range(FILES):
        (looked_at / str(number)).write_bytes(b"x")
    moved = mounted.mountpoint / "moved"
    moved.mkdir()
    for number in range(big):
        with open(moved / f"big{number}", "wb") as out:
            for _ in range(256):
                out.write(os.urandom(MIB))
    for number in range(small):
        (moved / f"small{number}").write_bytes(os.urandom(32 << 10))
    return looked_at


def percentiles(program: Path, place: Path, rounds: int, count: int) -> tuple[float, float]:
    """Median over rounds of (median, p99) in microseconds."""
    found = [load(program, "stat", place, FILES, count) for _ in range(rounds)]
    return median([item[0] for item in found]), median([item[1] for item in found])


def busy(mounted: Volume, stop: threading.Event) -> None:
    """Demote and fetch the same files over and over."""
    moved = mounted.mountpoint / "moved"
    while not stop.is_set():
        mounted.cli("demote", "--wait", moved, check=False, timeout=300)
        if not stop.is_set():
            mounted.cli("fetch", "--wait", moved, check=False, timeout=300)
        # Touched, so that the next turn uploads again.
        for path in moved.iterdir():
            with open(path, "r+b") as out:
                out.write(os.urandom(16))


def measure(program: Path, mounted: Volume, quick: bool) -> list[list[str]]:
    place = prepare(mounted, 1 if quick else 4, 200 if quick else 2000)
    rounds, count = (5, 2000) if quick else (15, 5000)
    idle = percentiles(program, place, rounds, count)
    stop = threading.Event()
    worker = threading.Thread(target=busy, args=(mounted, stop))
    worker.start()
    try:
        loaded = percentiles(program, place, rounds, count)
    finally:
        stop.set()
        worker.join()
    return [
        [name, f"{idle[which]:.0f} us", f"{loaded[which]:.0f} us", f"{loaded[which] / idle[which]:.2f}"]
        for which, name in enumerate(("median", "p99"))
    ]


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
                rows = measure(program, mounted, options.quick)
                place = mounted.mountpoint / "resident"
                seconds = 1 if options.quick else 4
                shares = [share(program, mounted, place, each, seconds) for each in PAUSES]
            table(f"stat of a resident file, {form}", ["", "idle", "mover at work", "ratio"], rows)
            table(f"One request after another, {form}", ["pause between", "stat", "the server's share"], shares)


if __name__ == "__main__":
    main()
