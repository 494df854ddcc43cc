"""Demotion: large files beside the bare client's upload, and many small ones; what stubs and index take.

The goals: >= 0.7 of the bare client (>= 0.5 where every copy is read back); >= 300 files/s of 32 KiB to a
directory, >= 150 to a fast S3 server; <= 5% of the blocks of 4 KiB files left; <= 400 bytes of index a file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from common import (
    MIB,
    Volume,
    affinity,
    arguments,
    forms,
    median,
    new_volume,
    scratch,
    store_server,
    table,
    timed,
)

BLOCK = 512


def bare_upload(server: Any, path: Path, key: str) -> float:
    """Seconds. The object does not stay: the server keeps all of them in memory."""
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        server.bucket, endpoint=server.endpoint, region="us-east-1", virtual_hosted_style_request=False,
        access_key_id=server.env["AWS_ACCESS_KEY_ID"], secret_access_key=server.env["AWS_SECRET_ACCESS_KEY"],
        client_options={"allow_http": True, "timeout": "300s"},
    )  # fmt: skip
    how = {"chunk_size": 8 * MIB, "max_concurrency": 8, "use_multipart": True}
    took = timed(lambda: obstore.put(store, key, path, **how))
    obstore.delete(store, key)
    return took


def write_random(path: Path, size: int) -> None:
    with open(path, "wb") as out:
        for _ in range(max(1, size // MIB)):
            out.write(os.urandom(min(size, MIB)))


def large(area: Any, server: Any, form: str, size: int, rounds: int) -> list[str]:
    """Alternate: one file by the bare client, one by demoting it."""
    bare, demoted = [], []
    with new_volume(area, store=server.url_for(f"large-{form}")) as mounted:
        for number in range(rounds):
            plain, path = mounted.base / "plain", mounted.mountpoint / f"f{number}"
            for target in (plain, path):
                write_random(target, size)
            os.sync()
            bare.append(bare_upload(server, plain, f"bare/{form}{number}"))
            demoted.append(timed(lambda path=path: mounted.demote(path)))
            plain.unlink()
            path.unlink()
    speeds = [size / median(times) / 1e6 for times in (bare, demoted)]
    told = [f"{speed:.0f} MB/s" for speed in speeds]
    return [f"{size // MIB} MiB, {form}", *told, f"{speeds[1] / speeds[0]:.2f}"]


def fill(mounted: Volume, files: int, size: int) -> Path:
    place = mounted.mountpoint / "small"
    place.mkdir()
    for number in range(files):
        directory = place / f"d{number // 500}"
        if number % 500 == 0:
            directory.mkdir()
        (directory / f"f{number}").write_bytes(os.urandom(size))
    os.sync()
    return place


def small(area: Any, store: str, files: int, size: int) -> tuple[float, float, float]:
    """Files a second, share of blocks left, bytes of index a file."""
    with new_volume(area, store=store) as mounted:
        place = fill(mounted, files, size)
        before = blocks(mounted)
        took = timed(lambda: mounted.cli("demote", "--wait", place, timeout=900))
        left = blocks(mounted) / before
        index = sum(path.stat().st_blocks * BLOCK for path in (mounted.state / "index").iterdir())
    return files / took, left, index / files


def blocks(mounted: Volume) -> int:
    """Bytes that the files of the backing tree take."""
    tree = mounted.state / "tree"
    return sum(
        os.lstat(os.path.join(at, name)).st_blocks * BLOCK for at, _, names in os.walk(tree) for name in names
    )


def main() -> None:
    options = arguments(__doc__)
    size, rounds, files = (128 * MIB, 2, 1000) if options.quick else (1024 * MIB, 3, 10_000)
    with scratch() as area, store_server(area) as server:
        rows = []
        for form in forms:
            with affinity(form):
                rows.append(large(area, server, form, size, rounds))
        table(f"Demoting large files to {server.name}", ["", "bare client", "tierfs demote", "ratio"], rows)
        rows = []
        for where, store, each in (
            ("directory", "", 32 << 10),
            (server.name, server.url_for("small"), 32 << 10),
            ("directory", "", 4 << 10),
        ):
            rate, left, index = small(area, store, files, each)
            name = f"{files:,} files of {each >> 10} KiB to {where}"
            rows.append([name, f"{rate:.0f}/s", f"{left:.1%}", f"{index:.0f}"])
        table("Demoting small files", ["", "files a second", "blocks left", "bytes of index a file"], rows)


if __name__ == "__main__":
    main()
