"""Run as a process: opens, reads and writes damaged copies of an index, each in a child of its own, and prints
what became of it, a line a seed: its number, the kind of damage, what became of the child (`fine`; `said`:
an error of ours about a value; `damaged`: one about the whole; `wrong`: it read what was never written;
`other`: an exception not ours; `hung`; `signal N`), and whether the supervisor finds something.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from pathlib import Path

from tierfs import pages
from tierfs.errors import IndexDamagedError, IndexError_
from tierfs.index import Index
from tierfs.model import Copy, Record, Residency

PAGE = 4096
SECONDS = 20


def a_record(ino: int, **changes: object) -> Record:
    generation = 1 << 28 | ino
    copy = Copy(generation, b"t" * 8, b"d" * 32, 1000, 11, 22, 1)
    handle = b"\1\0\0\0handle%d" % ino
    fid = ino.to_bytes(16, "big")
    return Record(ino, handle, fid, generation, Residency.STUB, 1000, 8, 0, 2, b"name", copy)


def make(path: Path) -> None:
    """An index with something in every table, and with free pages."""
    index = Index.open(str(path))
    index.begin_session("boot")
    for first in range(1, 2000, 400):
        with index.write() as w:
            w.begin_notes(True)
            for ino in range(first, first + 400):
                w.put(a_record(ino))
                w.note(2, b"name%d" % ino)
                w.put_dir(ino + 10_000, 2, b"directory")
                if not ino % 40:
                    w.put_pin(ino, 2, b"name")
                    w.put_leaves(ino.to_bytes(16, "big"), 1, os.urandom(32 * ino), [(0, 10)])
        with index.write() as w:
            for ino in range(first, first + 400, 3):
                w.delete(ino)
    index.end_session()
    index.close()


def use(path: str) -> None:
    """As a mover does: everything is read, some of it changed. What is read is right, or is not there."""
    index = Index.open(path)
    index.begin_session("boot")
    for ino in range(1, 2001):
        found = index.get(ino)
        assert found is None or found == a_record(ino), "a wrong record"
        bits = index.get_bits(ino)
        assert bits is None, "a bitmap that nobody has written"
        index.is_plain(ino, 5)
        index.get_dir(ino + 10_000)
        index.dirty_since(ino)
    list(index.records())
    index.notes(), index.pins(), index.pending(), index.quiet(1 << 63, 10_000)
    for ino in range(40, 2000, 40):
        leaves = index.get_leaves(ino.to_bytes(16, "big"), 1)
        assert leaves is None or len(leaves.digests) == 32 * ino
    index.commit(lambda w: w.recount(True)).result()
    for first in (1, 500, 5000):
        with index.write() as w:
            for ino in range(first, first + 300):
                w.put(a_record(ino))
                w.note(3, b"other%d" % ino)
    with index.write() as w:
        for ino in range(1, 2000, 2):
            w.delete(ino)
    index.end_session()
    index.close()


def damage(file: Path, kinds: dict[int, str], seed: int) -> str:
    """Change bytes of a page of some kind: single bits, single bytes, or many; or cut the file short."""
    rng = random.Random(seed)
    kind = rng.choice(["meta", "branch", "leaf", "overflow", "free list", "head", "cut"])
    if kind == "cut":
        os.truncate(file, rng.randrange(1, file.stat().st_size))
        return kind
    chosen = [number for number, what in kinds.items() if kind in (what, "head")]
    number = rng.choice(chosen)
    with open(file, "r+b") as opened:
        for _ in range(rng.choice((1, 1, 2, 20))):
            at = number * PAGE + rng.randrange({"meta": 160, "head": 32}.get(kind, PAGE))
            opened.seek(at)
            byte = opened.read(1)[0]
            opened.seek(at)
            opened.write(bytes([byte ^ 1 << rng.randrange(8) if rng.random() < 0.5 else rng.randrange(256)]))
    return kind


def page_kinds(file: Path) -> dict[int, str]:
    """Page number -> what it is, of all pages that are in use."""
    kinds = {0: "meta", 1: "meta"}

    class Noting(pages._Walk):
        def _page(self, name: str, number: int) -> tuple[bytes, int]:
            page, flags = super()._page(name, number)
            kinds[number] = "branch" if flags == 1 else "free list" if "free" in name else "leaf"
            return page, flags

        def _overflow(self, name: str, number: int, size: int, counts: list[int]) -> bytes:
            kinds[number] = "overflow"
            return super()._overflow(name, number, size, counts)

    with open(file, "rb") as opened:
        Noting(opened.fileno(), str(file), pages.read_metas(opened.fileno(), str(file))[-1]).run()
    return kinds


def in_a_child(path: str) -> str:
    """How a process ends that uses this index."""
    child = os.fork()
    if not child:
        signal.alarm(SECONDS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        code = 7
        try:
            use(path)
            code = 0
        except IndexDamagedError:
            code = 5
        except IndexError_:
            code = 8
        except AssertionError:
            code = 6
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    names = {0: "fine", 5: "damaged", 8: "said", 6: "wrong", 7: "other", -signal.SIGALRM: "hung"}
    return names.get(status, f"signal {-status}")


def verdict(file: Path) -> str:
    """What the supervisor's look says."""
    try:
        pages.verify(str(file))
        Index.open(str(file.parent)).close()
    except IndexDamagedError:
        return "found"
    return "whole"


def main() -> None:
    base, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    (base / "whole").mkdir()
    make(base / "whole")
    kinds = page_kinds(base / "whole" / "data.mdb")
    assert in_a_child_of_a_copy(base, None, kinds) == ("whole", "fine", "whole")
    for seed in range(first, last):
        print(seed, *in_a_child_of_a_copy(base, seed, kinds), sep="\t", flush=True)


def in_a_child_of_a_copy(base: Path, seed: int | None, kinds: dict[int, str]) -> tuple[str, str, str]:
    copy = base / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    shutil.copyfile(base / "whole" / "data.mdb", copy / "data.mdb")
    kind = "whole" if seed is None else damage(copy / "data.mdb", kinds, seed)
    before = verdict(copy / "data.mdb")
    return kind, in_a_child(str(copy)), before


if __name__ == "__main__":
    main()
