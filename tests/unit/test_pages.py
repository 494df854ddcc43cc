"""Looking at an LMDB file page by page: silent on whole ones of every shape; what holds the pages together is
found where it is damaged, while LMDB itself would crash, hang or give other values."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import lmdb
import pytest

from tierfs import datafile, pages
from tierfs.errors import IndexDamagedError

PAGE = 4096


def fill(path, *, files=3000, seed=1, rounds=6):
    """Tables of small entries, long keys and values of several pages; a part of them is removed again."""
    rng = random.Random(seed)
    with lmdb.open(str(path), map_size=1 << 30, max_dbs=8) as env:
        small, big, empty = (env.open_db(name) for name in (b"small", b"big", b"empty"))
        for _ in range(rounds):
            with env.begin(write=True) as txn:
                for _ in range(files // rounds):
                    key = struct.pack(">Q", rng.randrange(files))
                    txn.put(key + bytes(rng.randrange(200)), rng.randbytes(rng.randrange(300)), db=small)
                for _ in range(20):
                    txn.put(b"big%d" % rng.randrange(100), rng.randbytes(rng.randrange(1, 40_000)), db=big)
            with env.begin(write=True) as txn:
                with txn.cursor(db=small) as cursor:
                    kept = 0
                    cursor.first()
                    while cursor.key():
                        kept += 1
                        if kept % 3 and not cursor.delete():
                            break
                        if kept % 3 == 0 and not cursor.next():
                            break
                txn.delete(b"big%d" % rng.randrange(100), db=big)
        assert empty
    return Path(path) / "data.mdb"


@pytest.fixture
def file(tmp_path):
    return fill(tmp_path)


def page_kinds(file):
    """Page number -> what it is, of all pages that are in use."""
    kinds = {0: "meta", 1: "meta"}

    class Noting(pages._Walk):
        def _page(self, name, number):
            page, flags = super()._page(name, number)
            kinds[number] = "branch" if flags == 1 else "free list" if "free" in name else "leaf"
            return page, flags

        def _overflow(self, name, number, size, counts):
            kinds[number] = "overflow"
            return super()._overflow(name, number, size, counts)

    with open(file, "rb") as opened:
        metas = pages.read_metas(opened.fileno(), str(file))
        Noting(opened.fileno(), str(file), metas[-1]).run()
    return kinds


@pytest.mark.parametrize("seed", range(8))
def test_whole_files_of_every_shape_are_whole(tmp_path, seed):
    file = fill(tmp_path, files=[0, 10, 200, 1000, 3000, 5000, 8000, 2000][seed], seed=seed, rounds=1 + seed)
    walked = pages.verify(str(file))
    assert walked.used + walked.free <= walked.total
    assert walked.total * PAGE <= file.stat().st_size + 64 * PAGE


def test_as_of_a_transaction_that_a_reader_holds(tmp_path):
    file = fill(tmp_path)
    with lmdb.open(str(tmp_path), map_size=1 << 30, max_dbs=8) as env:
        small = env.open_db(b"small", create=False)
        held = env.begin()
        pages.verify(str(file), held.id())
        with env.begin(write=True) as txn:
            for number in range(2000):
                txn.put(b"new%d" % number, bytes(100), db=small)
        pages.verify(str(file), held.id())
        pages.verify(str(file))
        with env.begin(write=True) as txn:
            txn.put(b"one more", b"", db=small)
        with pytest.raises(LookupError):
            pages.verify(str(file), held.id())
        held.abort()


def damaged(file, at, value):
    with open(file, "r+b") as opened:
        opened.seek(at)
        opened.write(value)


def words_of(kind, page):
    """(offset in the page, bytes) of numbers that hold the structure together, each made wrong."""
    yield 0, struct.pack("<Q", 1 << 40)  # its own number
    yield 10, struct.pack("<H", 0x77)  # flags
    if kind in ("leaf", "branch", "free list"):
        yield 12, struct.pack("<H", 0xFFF0)  # lower
        yield 14, struct.pack("<H", 0x0004)  # upper
        yield 16, struct.pack("<H", 0xFFF0)  # the first entry's place
        (node,) = struct.unpack_from("<H", page, 16)
        yield node + 6, struct.pack("<H", 0xFFFF)  # its key's length
        yield node + 4, struct.pack("<H", 0x80)  # its kind, or the page below
    if kind == "overflow":
        yield 12, struct.pack("<I", 1 << 20)


@pytest.mark.parametrize("kind", ["leaf", "branch", "free list", "overflow"])
def test_each_damaged_word_of_a_page_is_found(file, kind):
    content = file.read_bytes()
    found = [number for number, what in page_kinds(file).items() if what == kind]
    assert found, f"the file has no {kind}"
    for number in found[:3]:
        page = content[number * PAGE : (number + 1) * PAGE]
        for at, value in words_of(kind, page):
            damaged(file, number * PAGE + at, value)
            with pytest.raises(IndexDamagedError):
                pages.verify(str(file))
            file.write_bytes(content)
    pages.verify(str(file))


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    ("at", "value"),
    [(0, b"\7"), (10, b"\0\0"), (16, bytes(4)), (20, b"\7"), (40, bytes(4)), (40, b"\1\2\3\4"),
     (144, b"\xff" * 8), (80, b"\xff\xff\xff\0"), (128, b"\xff\xff\xff\0"), (94, b"\x63"), (136, bytes(8))],
)  # fmt: skip
def test_damaged_meta_pages(file, number, at, value):
    with open(file, "rb") as opened:
        metas = pages.read_metas(opened.fileno(), "")
    newest = metas[-1].transaction & 1
    damaged(file, number * PAGE + at, value)
    if newest != number and 40 < at < 136:
        pages.verify(str(file))  # nobody reads that of the older one
        return
    with pytest.raises(IndexDamagedError):
        pages.verify(str(file))


def test_pages_that_lead_in_a_circle(file):
    """Where LMDB goes down until its stack is full, or walks for ever."""
    content = file.read_bytes()
    branch = next(number for number, what in page_kinds(file).items() if what == "branch")
    (node,) = struct.unpack_from("<H", content, branch * PAGE + 16)
    damaged(file, branch * PAGE + node, struct.pack("<IH", branch, 0))
    with pytest.raises(IndexDamagedError, match="used twice"):
        pages.verify(str(file))


def test_a_page_in_use_that_is_listed_as_free(file):
    """It would be given away at the next commit, and overwritten."""
    kinds = page_kinds(file)
    content = bytearray(file.read_bytes())
    leaves = sorted(number for number, what in kinds.items() if what == "leaf")
    for start in (number * PAGE for number, what in kinds.items() if what == "free list"):
        (lower,) = struct.unpack_from("<H", content, start + 12)
        for node in struct.unpack_from(f"<{(lower - 16) // 2}H", content, start + 16):
            size, _, kind, length = struct.unpack_from("<HHHH", content, start + node)
            first = start + node + 8 + length
            if kind:
                continue  # a list in pages of its own
            count, _, *more = struct.unpack_from(f"<{size // 8}Q", content, first)
            used = [leaf for leaf in leaves if leaf > (more[0] if count > 1 else 1)]
            if count and used:
                struct.pack_into("<Q", content, first + 8, used[0])
                file.write_bytes(content)
                with pytest.raises(IndexDamagedError, match="free"):
                    pages.verify(str(file))
                return
    raise AssertionError("the file has no list of free pages to damage")


@pytest.mark.parametrize("seed", range(60))
def test_no_damage_makes_it_hang_or_fail_otherwise(tmp_path, seed):
    """Random bytes anywhere: found, or of no consequence to the structure; never another exception."""
    file = fill(tmp_path, files=1500, rounds=3)
    rng, size = random.Random(seed), file.stat().st_size
    for _ in range(rng.randrange(1, 30)):
        damaged(file, rng.randrange(size), rng.randbytes(rng.choice((1, 2, 8, 64))))
    if rng.random() < 0.3:
        os.truncate(file, rng.randrange(size))
    for look in (lambda: pages.verify(str(file)), lambda: datafile.check_file(str(tmp_path))):
        try:
            look()
        except IndexDamagedError as error:
            assert str(error)
