"""What a lost machine costs: how long `tierfs restore` takes, and what the journal writes for a change.

    bench_restore.py [--quick] [--files N]

The store is a directory with the journal of a made-up tree of N files (one in fifty with a hard link, one in
ten with an attribute) in directories of fifty; their content is not there, as nothing reads it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from harness import SESSION, TIERFS, VOLUME, Scratch, scratch, session_id
from harness import Volume as Mounted

from tierfs import manifest
from tierfs.store.directory import DirectoryStore

IDENT = "ab" * 16
IN_EACH = 50
NOW = time.time_ns()


def lines(files: int):
    """A snapshot's lines."""
    common = {"uid": 0, "gid": 0, "mtime": NOW - 10**15, "ctime": NOW - 10**15}
    yield manifest.Directory("root", 0o755, **common, root=True)
    directories = -(-files // IN_EACH)
    parents = {}
    for number in range(directories):
        # A hundred directories below each; ids look like those of file handles.
        above = "root" if number < 100 else parents[number // 100]
        parents[number] = f"AQAAAD{number:010d}"
        yield manifest.Directory(
            parents[number], 0o755, **common, dir=above, name=f"some directory {number % 100}"
        )
        for at in range(number * IN_EACH, min((number + 1) * IN_EACH, files)):
            digest = hashlib.sha256(str(at).encode()).hexdigest()
            copy = manifest.CopyLine(
                (1 << 28) + at, digest[:16], digest, 5000 + at, NOW - 10**15, NOW - 10**15, 22
            )
            file = manifest.File(
                f"AQAAAF{at:010d}", 0o644, **common, dir=parents[number], name=f"a file of the {at}th kind.txt",
                size=5000 + at, blocks=16, fid=digest[16:48], generation=(1 << 28) + at, copy=copy,
                xattrs={"user.origin": "aHR0cDovL2V4YW1wbGUub3Jn"} if at % 10 == 0 else None,
            )  # fmt: skip
            yield file
            if at % 50 == 7:
                yield manifest.msgspec.structs.replace(file, name=f"{at} again")


def make_store(path: Path, files: int) -> int:
    """The journal of such a tree; its size."""
    store = DirectoryStore(str(path), create=True)
    claim = {"format": 1, "volume": IDENT, "host": "lost", "created": 1.0, "epoch": 1, "nonce": "aa"}
    store.put("volume.json", json.dumps(claim).encode(), len(json.dumps(claim)))
    alive = json.dumps({"host": "lost", "epoch": 1, "mounted": False, "at": 1.0}).encode()
    store.put("alive.json", alive, len(alive))
    total, part, previous, packer = 0, 0, "", None
    for line in lines(files):
        if packer is None:
            head = manifest.Head(1, "snapshot", IDENT, 1, 0, "chain", previous, NOW, part=part, base="chain")
            packer = manifest.Packer(head)
        packer.add(line)
        if packer.size > 4 << 20:
            data, packer = packer.finish(NOW), None
            store.put(str(manifest.Key(1, 0, "00" * 8, part)), data, len(data))
            total, part, previous = total + len(data), part + 1, manifest.digest_of(data)
    assert packer is not None
    data = packer.finish(NOW, last=True)
    store.put(str(manifest.Key(1, 0, "00" * 8, part)), data, len(data))
    return total + len(data)


def restore(area: Scratch, files: int) -> None:
    """One row."""
    base = area.path / f"restore-{files}"
    base.mkdir()
    size = make_store(base / "store", files)
    volume = Mounted(base, area.connections, limit=3600)
    environment = {**os.environ, SESSION: session_id, VOLUME: str(base)}
    url, state = f"file://{base}/store", base / "state"
    argv = [TIERFS, "restore", "--json", "--store", url, "--state", state, base / "mnt"]
    begun = time.monotonic()
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
    seconds = time.monotonic() - begun
    if done.returncode:
        raise SystemExit(done.stderr)
    volume.watch()
    made = json.loads(done.stdout)["files"]
    assert made == files
    each = size / files
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(
        f"| {files:,} files | {each:.0f} bytes a file in the store | {seconds:.1f} s"
        f" | {files / seconds:,.0f} files/s | {memory:.0f} MiB at most |"
    )
    volume.close()


def change(area: Scratch, files: int) -> None:
    """What one changed file costs in a tree of so many, by the objects that appear in the store."""
    base = area.path / "change"
    base.mkdir()
    volume = Mounted(base, area.connections, limit=3600)
    volume.mount()
    volume.configure(journal="1s")
    for number in range(files // 1000):
        directory = volume.mountpoint / str(number)
        directory.mkdir()
        for at in range(1000):
            os.mknod(directory / str(at))

    def written() -> int:
        deadline = time.monotonic() + 120
        while volume.status()["journal_behind_seconds"] and time.monotonic() < deadline:
            time.sleep(0.2)
        return sum(path.stat().st_size for path in (volume.state / "store" / "meta").iterdir())

    before = written()
    (volume.mountpoint / "0" / "new").write_bytes(b"x")
    os.chmod(volume.mountpoint / "0" / "5", 0o600)
    print(f"| a new file and a chmod among {files:,} | {written() - before} bytes |")
    volume.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--files", type=int, default=0)
    arguments = parser.parse_args()
    counts = [arguments.files] if arguments.files else [10_000] if arguments.quick else [10_000, 100_000]
    with scratch() as area:
        for count in counts:
            restore(area, count)
        change(area, 2_000 if arguments.quick else 20_000)


if __name__ == "__main__":
    main()
