"""Cold reads at 20 ms of round trip, beside other mounts and the bare client, all from one S3 server.

Every figure is taken with an empty cache and a connection that has been used (one small file is read first).
The bare client's sequential read is taken before each of TierFS's: the machine's own speed varies.
The goals: first 4 KiB <= 2 round trips + 20 ms; random 4 KiB <= 1 round trip + 20 ms; sequential >= 0.7 of the
bare client's parallel ranges; small files <= 25 ms each; first in every column among the mounts.

Small files are read in two ways: those of one directory in turn, as who goes through a directory does; and one
in each directory, of which nothing tells that it will be next.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peers
from common import (
    MIB,
    Volume,
    affinity,
    arguments,
    drop_caches,
    forms,
    median,
    new_volume,
    scratch,
    store_server,
    table,
    warm_memory,
)

RTT = 20.0  # ms
SMALL = 16 << 10
APART = 5  # of so many files one more, in a directory of its own
HEAD = ["", "first 4 KiB", "random 4 KiB", "sequential", "in turn, each", "far apart, each"]


class Ours:
    """TierFS: cold again by demoting."""

    name = "TierFS"

    def __init__(self, mounted: Volume) -> None:
        self.mounted = mounted

    def path(self, name: str) -> Path:
        return self.mounted.mountpoint / name

    def load(self, files: dict[str, Path]) -> None:
        for name, source in files.items():
            self.path(name).parent.mkdir(parents=True, exist_ok=True)
            self.path(name).write_bytes(source.read_bytes())
        self.mounted.demote()

    def start(self) -> None:
        self.mounted.demote()
        drop_caches()

    def stop(self) -> None:
        """Stays mounted: that is how it is used."""


def make_files(place: Path, size: int, count: int) -> dict[str, Path]:
    place.mkdir()
    files = {"big": place / "big", "warm": place / "warm"}
    with open(files["big"], "wb") as out:
        for _ in range(size // MIB):
            out.write(os.urandom(MIB))
    for number in range(count):
        files[f"small/{number}"] = place / f"small{number}"
    for number in range(count // APART):
        files[f"apart/{number}/file"] = place / f"apart{number}"
    for name, path in files.items():
        if name != "big":
            path.write_bytes(os.urandom(SMALL))
    return files


def cold(mount: Any, work: Callable[[], float]) -> float:
    """Run on an empty cache and a warm connection."""
    mount.start()
    try:
        mount.path("warm").read_bytes()
        warm_memory()
        return work()
    finally:
        mount.stop()


def read_at(path: Path, offset: int) -> float:
    """Milliseconds of one read of 4 KiB."""
    began = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        got = os.pread(file.fileno(), 4096, offset)
    took = (time.perf_counter() - began) * 1e3
    if len(got) != 4096:
        raise RuntimeError(f"{path}: {len(got)} bytes at {offset}")
    return took


def sequential(path: Path, size: int) -> float:
    """MB/s of reading it all."""
    buffer, done = bytearray(MIB), 0
    began = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while got := file.readinto(buffer):
            done += got
    if done != size:
        raise RuntimeError(f"{path}: {done} bytes instead of {size}")
    return done / (time.perf_counter() - began) / 1e6


def random_places(path: Path, size: int, count: int) -> float:
    draw = random.Random(count)
    return median([read_at(path, draw.randrange(size // MIB) * MIB + 8192) for _ in range(count)])


def each_small(mount: Any, names: list[str]) -> float:
    """Milliseconds of reading a small file, on average."""
    began = time.perf_counter()
    for name in names:
        mount.path(name).read_bytes()
    return (time.perf_counter() - began) * 1e3 / len(names)


def in_turn(count: int) -> list[str]:
    return [f"small/{number}" for number in range(count)]


def far_apart(count: int) -> list[str]:
    return [f"apart/{number}/file" for number in range(count // APART)]


class Bare:
    """obstore alone: single ranges, and 16 ranges of 8 MiB at once."""

    name = "bare client (obstore)"

    def __init__(self, server: Any, endpoint: str) -> None:
        import obstore
        from obstore.store import S3Store

        self._get = obstore.get_range
        self._store = S3Store(
            server.bucket, endpoint=endpoint, region="us-east-1", virtual_hosted_style_request=False,
            access_key_id=server.env["AWS_ACCESS_KEY_ID"],
            secret_access_key=server.env["AWS_SECRET_ACCESS_KEY"],
            client_options={"allow_http": True, "timeout": "300s"},
        )  # fmt: skip
        self.milliseconds("warm", 0, SMALL)

    def milliseconds(self, name: str, start: int, length: int) -> float:
        began = time.perf_counter()
        self._get(self._store, f"{peers.BUCKET_PREFIX}/{name}", start=start, length=length)
        return (time.perf_counter() - began) * 1e3

    def sequential(self, size: int) -> float:
        """MB/s."""
        piece = 8 * MIB
        warm_memory()
        began = time.perf_counter()
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda start: self.milliseconds("big", start, piece), range(0, size, piece)))
        return size / (time.perf_counter() - began) / 1e6

    def measure(self, size: int, count: int) -> list[float]:
        places = random.Random(5)
        at_random = [self.milliseconds("big", places.randrange(size // MIB) * MIB, 4096) for _ in range(5)]
        small = [
            sum(self.milliseconds(name, 0, SMALL) for name in names) / len(names)
            for names in (in_turn(count), far_apart(count))
        ]
        first = median([self.milliseconds("big", 0, 4096) for _ in range(3)])
        return [first, median(at_random), 0.0, *small]


def measure(mount: Any, size: int, count: int, rounds: int, between: Callable[[], None]) -> list[float]:
    """`between` is called before each sequential read."""
    big, speeds = mount.path("big"), []
    first = median([cold(mount, lambda: read_at(big, 0)) for _ in range(rounds)])
    at_random = cold(mount, lambda: random_places(big, size, 5))
    for _ in range(rounds):
        between()
        speeds.append(cold(mount, lambda: sequential(big, size)))
    turn = cold(mount, lambda: each_small(mount, in_turn(count)))
    return [first, at_random, median(speeds), turn, cold(mount, lambda: each_small(mount, far_apart(count)))]


def row(name: str, figures: list[float]) -> list[str]:
    first, at_random, speed, *small = figures
    each = [f"{milliseconds:.1f} ms" for milliseconds in small]
    return [name, f"{first:.0f} ms", f"{at_random:.0f} ms", f"{speed:.0f} MB/s", *each]


def run(area: Any, server: Any, network: Any, form: str, options: Any) -> None:
    size, count, rounds = (128 * MIB, 40, 1) if options.quick else (1024 * MIB, 200, 3)
    place = area.path / f"cold-{form}"
    files = make_files(area.path / f"files-{form}", size, count)
    url = server.url_for(f"cold-{form}", network.endpoint)
    rows, missing = [], []
    with new_volume(area, store=url) as mounted:
        mounts: list[Any] = [Ours(mounted)]
        for kind in peers.PEERS:
            try:
                mounts.append(kind(place / kind.__name__, server, network.endpoint))
            except peers.Missing as exc:
                missing.append(str(exc))
        network.set(rtt_ms=0)
        peers.Peer.load(peers.Peer(place / "bucket", server, network.endpoint), files)
        for mount in mounts:
            if isinstance(mount, Ours | peers.Juicefs):
                mount.load(files)
        network.set(rtt_ms=RTT)
        client = Bare(server, network.endpoint)
        speeds: list[float] = []
        figures = client.measure(size, count)
        rows.append(row(client.name, figures))
        for mount in mounts:
            ours = isinstance(mount, Ours)
            between = (lambda: speeds.append(client.sequential(size))) if ours else (lambda: None)
            try:
                found = measure(mount, size, count, rounds, between)
            except (OSError, RuntimeError) as exc:
                missing.append(f"{mount.name} failed: {exc}")
                continue
            rows.append(row(mount.name, found))
            if ours:
                figures[2] = median(speeds)
                rows[0] = row(client.name, figures)
                rows.append(["TierFS to bare client", "", "", f"{found[2] / figures[2]:.2f}", "", ""])
    what = f"{size // MIB} MiB and {count} small files"
    table(f"Cold reads, {what}, {server.name}, {RTT:.0f} ms, {form}", HEAD, rows)
    for line in missing:
        print(f"({line})")


def main() -> None:
    import netproxy

    options = arguments(__doc__, ("--form", {"choices": [*forms, "both"], "default": "both"}))
    with scratch() as area, store_server(area) as server, netproxy.proxy(server.address, rtt_ms=RTT) as network:
        for form in forms if options.form == "both" else (options.form,):
            with affinity(form):
                run(area, server, network, form, options)


if __name__ == "__main__":
    main()
