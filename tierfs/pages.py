"""Is an LMDB file whole? Read page by page without LMDB, which believes what it maps: a wrong number in a page
can crash a process or send it round in circles. Reading here ends, whatever the bytes are.

Checked is all that is reachable from the newest meta page, or from that of a given transaction: that each page
is within the file, is the page it says to be, and is reached once; that entries lie within their page and their
keys in order and between those of the pages above; that depths, numbers of pages and of entries are what each
table says; that what is listed as free is used by nothing. Pages of 64-bit LMDB 0.9 (its mdb.c):

    page    number u64, pad u16, flags u16, lower u16, upper u16 (or, of overflow pages: their count u32), then
            offsets of the entries, u16 each, up to `lower`
    entry   low u16, high u16, flags u16, length of the key u16, key, value. In a branch low, high and flags are
            the number of the page below; in a leaf low and high are the length of the value
    table   pad u32, flags u16, depth u16, branch pages, leaf pages, overflow pages, entries, root (u64 each)
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tierfs.errors import IndexDamagedError

HEAD = struct.Struct("<QHHHH")
_OVERFLOW = struct.Struct("<QHHI")
_NODE = struct.Struct("<HHHH")
_TABLE = struct.Struct("<IHHQQQQQ")
_META = struct.Struct("<16xIIQQ48s48sQQ")
_U64 = struct.Struct("<Q")
_MAGIC = 0xBEEFC0DE
_VERSION = 1
_BRANCH, _LEAF, _IS_OVERFLOW, _IS_META = 1, 2, 4, 8
_BIG, _SUB = 1, 2
_NONE = (1 << 64) - 1
_INTEGERS = 8  # flag of a table whose keys are integers of the machine: that of free pages
_NO_SUBDIRECTORY = 0x4000  # flag of the environment, which stands there too
_DEEPEST = 32
_LONGEST_KEY = 511
_METAS = 2
_BEYOND = 1 << 18  # pages that one transaction may have used and given back beyond the end of the file
_USED, _FREE, _TWICE = 1, 2, 3
Bounds = tuple[bytes, bytes | None]  # keys of a page: from the one, and below the other


@dataclass(frozen=True, slots=True)
class Meta:
    """A meta page: its transaction, the last page in use, the size of pages and the two tables it names."""

    transaction: int
    last: int
    page_size: int
    free: bytes
    main: bytes


@dataclass(slots=True)
class Walked:
    """What was found: pages reached, pages listed as free, and all pages up to the last in use."""

    used: int
    free: int
    total: int


def read_metas(fd: int, where: str) -> list[Meta]:
    """Both meta pages, the newest last; one that was never written in a new file is not among them.

    Raises IndexDamagedError where one is damaged: their transactions follow each other, each in its own page.
    """
    first = os.pread(fd, _META.size, 0)
    size = _TABLE.unpack(_META.unpack(first)[4])[0] if len(first) == _META.size else 0
    if size < 512 or size > 1 << 16 or size & (size - 1):
        raise IndexDamagedError(f"{where} is cut short or no index")
    metas = []
    most = os.fstat(fd).st_size // size + _BEYOND
    for number, raw in enumerate((first, os.pread(fd, _META.size, size))):
        if len(raw) != _META.size:
            raise IndexDamagedError(f"{where} is cut short or no index")
        magic, version, _, _, free, main, last, transaction = _META.unpack(raw)
        told, _, flags = HEAD.unpack_from(raw)[:3]
        if magic != _MAGIC or version != _VERSION or told != number or not flags & _IS_META:
            raise IndexDamagedError(f"{where}: meta page {number} is damaged")
        wrong = transaction and transaction & 1 != number
        if _TABLE.unpack(free)[0] != size or not 1 <= last <= most or wrong:
            raise IndexDamagedError(f"{where}: meta page {number} is damaged")
        metas.append(Meta(transaction, last, size, free, main))
    metas.sort(key=lambda meta: meta.transaction)
    if metas[1].transaction - metas[0].transaction > 1:
        raise IndexDamagedError(f"{where}: a meta page is damaged: they are of different times")
    return metas


def verify(file: str, transaction: int | None = None) -> Walked:
    """Look at all pages as of a transaction that something keeps readable, or of the last one.

    Raises IndexDamagedError, saying what is wrong; OSError.
    """
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        metas = read_metas(fd, file)
        chosen = metas[-1]
        if transaction is not None:
            same = [meta for meta in metas if meta.transaction == transaction]
            if not same:
                raise LookupError(f"transaction {transaction} is not the newest any more")
            chosen = same[-1]
        return _Walk(fd, file, chosen).run()
    finally:
        os.close(fd)


class _Walk:
    """One look at a file."""

    def __init__(self, fd: int, where: str, meta: Meta) -> None:
        self._fd = fd
        self._where = where
        self._meta = meta
        self._size = meta.page_size
        self._seen = bytearray(meta.last + 1)
        self._seen[:_METAS] = bytes([_USED] * _METAS)
        self._used = _METAS

    def run(self) -> Walked:
        """Look at everything."""
        free = 0
        for key, value in self._table("the table of free pages", self._meta.free):
            free += self._free(key, value)
        for name, value in self._table("the table of tables", self._meta.main, tables=True):
            for _ in self._table(f"table {name.decode(errors='replace')!r}", value):
                pass
        twice = self._seen.find(_TWICE)
        if twice >= 0:
            raise self._bad(f"page {twice} is in use and listed as free")
        return Walked(self._used, free, self._meta.last + 1)

    def _bad(self, what: str) -> IndexDamagedError:
        return IndexDamagedError(f"{self._where}: {what}")

    # --- tables -------------------------------------------------------------------------------------------

    def _table(self, name: str, raw: bytes, tables: bool = False) -> Iterator[tuple[bytes, bytes]]:
        """Its entries, in order; with `tables` each is the description of another table."""
        _, flags, depth, branches, leaves, overflows, entries, root = _TABLE.unpack(raw)
        integers = raw is self._meta.free
        if flags & ~(_NO_SUBDIRECTORY if integers else 0) != (_INTEGERS if integers else 0):
            raise self._bad(f"{name} is of kind {flags}")
        if root == _NONE:
            if entries or depth or branches or leaves or overflows:
                raise self._bad(f"{name} has no pages but {entries} entries")
            return
        if not 1 <= depth <= _DEEPEST:
            raise self._bad(f"{name} has a depth of {depth}")
        counts = [0, 0, 0, 0]
        for key, value in self._below(name, root, depth, (b"", None), integers, counts, tables):
            counts[3] += 1
            yield key, value
        if counts != [branches, leaves, overflows, entries]:
            said = [branches, leaves, overflows, entries]
            raise self._bad(f"{name} says to have {said} pages and entries, and has {counts}")

    def _below(
        self, name: str, number: int, depth: int, bounds: Bounds, integers: bool, counts: list[int],
        tables: bool,
    ) -> Iterator[tuple[bytes, bytes]]:  # fmt: skip
        page, flags = self._page(name, number)
        nodes = self._nodes(name, number, page, flags, bounds, integers)
        if depth == 1:
            if flags != _LEAF:
                raise self._bad(f"page {number} of {name} is no leaf")
            counts[1] += 1
            for key, at in nodes:
                yield key, self._value(name, number, page, at, counts, tables)
            return
        if flags != _BRANCH:
            raise self._bad(f"page {number} of {name} is no branch")
        counts[0] += 1
        for place, (key, at) in enumerate(nodes):
            low, high, more, _ = _NODE.unpack_from(page, at)
            upper = nodes[place + 1][0] if place + 1 < len(nodes) else bounds[1]
            inner = (key if place else bounds[0], upper)
            child = low | high << 16 | more << 32
            yield from self._below(name, child, depth - 1, inner, integers, counts, tables)

    def _page(self, name: str, number: int) -> tuple[bytes, int]:
        self._take(name, number)
        page = os.pread(self._fd, self._size, number * self._size)
        if len(page) != self._size:
            raise self._bad(f"page {number} of {name} is beyond the end of the file")
        told, _, flags, _, _ = HEAD.unpack_from(page)
        if told != number:
            raise self._bad(f"page {number} of {name} says to be page {told}")
        return page, flags

    def _take(self, name: str, number: int) -> None:
        if not _METAS <= number <= self._meta.last:
            raise self._bad(f"{name} has page {number} of {self._meta.last + 1}")
        if self._seen[number]:
            how = "is listed as free" if self._seen[number] == _FREE else "is used twice"
            raise self._bad(f"page {number} of {name} {how}")
        self._seen[number] = _USED
        self._used += 1

    # --- pages --------------------------------------------------------------------------------------------

    def _nodes(
        self, name: str, number: int, page: bytes, flags: int, bounds: Bounds, integers: bool
    ) -> list[tuple[bytes, int]]:
        """(key, offset) of each entry of a page. The first key of a branch is empty: none is smaller."""
        _, _, _, lower, upper = HEAD.unpack_from(page)
        if lower < HEAD.size or lower & 1 or upper < lower or upper > self._size:
            raise self._bad(f"page {number} of {name} has wrong bounds")
        found: list[tuple[bytes, int]] = []
        last: Any = None
        low, high = (_order(bound, integers) for bound in bounds)
        for (at,) in struct.iter_unpack("<H", page[HEAD.size : lower]):
            if at < upper or at + _NODE.size > self._size:
                raise self._bad(f"page {number} of {name} has an entry outside of it")
            length = _NODE.unpack_from(page, at)[3]
            key = page[at + _NODE.size : at + _NODE.size + length]
            implicit = flags == _BRANCH and not found
            if length > _LONGEST_KEY or len(key) != length or (integers and length != 8 and not implicit):
                raise self._bad(f"page {number} of {name} has a key of {length} bytes")
            if not implicit:
                sorts = _order(key, integers)
                after = last is None or last < sorts
                if not after or (bounds[0] and sorts < low) or (bounds[1] is not None and sorts >= high):
                    raise self._bad(f"keys of page {number} of {name} are not in order")
                last = sorts
            found.append((key, at))
        if not found or (flags == _BRANCH and len(found) < 2 and not integers):
            raise self._bad(f"page {number} of {name} has {len(found)} entries")
        return found

    def _value(self, name: str, number: int, page: bytes, at: int, counts: list[int], tables: bool) -> bytes:
        low, high, flags, length = _NODE.unpack_from(page, at)
        size, start = low | high << 16, at + _NODE.size + length
        if flags != (_SUB if tables else flags & _BIG):
            raise self._bad(f"page {number} of {name} has an entry of kind {flags}")
        if flags & _BIG:
            raw = page[start : start + _U64.size]
            if len(raw) != _U64.size:
                raise self._bad(f"page {number} of {name} has an entry outside of it")
            return self._overflow(name, _U64.unpack(raw)[0], size, counts)
        value = page[start : start + size]
        if len(value) != size or (tables and size != _TABLE.size):
            raise self._bad(f"page {number} of {name} has a value of {size} bytes")
        return value

    def _overflow(self, name: str, number: int, size: int, counts: list[int]) -> bytes:
        """A value that has pages of its own; more than it needs where a longer one was there before."""
        least = -(-(size + HEAD.size) // self._size)
        if not _METAS <= number <= self._meta.last:
            raise self._bad(f"{name} has page {number} of {self._meta.last + 1}")
        raw = os.pread(self._fd, HEAD.size + size, number * self._size)
        if len(raw) != HEAD.size + size:
            raise self._bad(f"page {number} of {name} is beyond the end of the file")
        told, _, flags, count = _OVERFLOW.unpack_from(raw)
        if told != number or flags != _IS_OVERFLOW or count < least:
            raise self._bad(f"page {number} of {name} is not the value of {size} bytes that it should be")
        for each in range(number, min(number + count, self._meta.last + 2)):
            self._take(name, each)
        counts[2] += count
        return raw[HEAD.size :]

    def _free(self, key: bytes, value: bytes) -> int:
        """Mark what a transaction has freed: its number, then the pages, in descending order."""
        transaction = _U64.unpack(key)[0]
        if transaction > self._meta.transaction or len(value) < _U64.size or len(value) % _U64.size:
            raise self._bad(f"the free pages of transaction {transaction} are damaged")
        count, *numbers = [number for (number,) in _U64.iter_unpack(value)]
        if count != len(numbers):
            raise self._bad(f"the free pages of transaction {transaction} are damaged")
        before = self._meta.last + 1
        for number in numbers:
            if not _METAS <= number < before:
                raise self._bad(f"the free pages of transaction {transaction} are damaged")
            before = number
            self._seen[number] = _TWICE if self._seen[number] else _FREE
        return int(count)


def _order(key: bytes | None, integers: bool) -> Any:
    """As LMDB compares it."""
    return int.from_bytes(key, "little") if integers and key is not None else key
