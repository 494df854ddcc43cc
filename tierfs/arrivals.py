"""The state of one file whose content is coming back: which leaves are here, who waits, what may be written.

Nothing is ever written but where a live request asks for it: the server truncates a file only after all its
requests have ended. And nothing is written over data that is not what the copy has at that place.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from tierfs.digests import Extents
from tierfs.errors import ForeignStubError
from tierfs.model import LEAF, UNPROVEN, Copy, Record, Stub, leaf_count
from tierfs.store.base import Body
from tierfs.tree import Tree, pwrite_all

_PAGE = 4096
_ZEROS = bytes(_PAGE)
FIRST_RANGE = 128 * 1024
# To ask for a range is as much work as to write 2 MiB: few large ones are less.
MOST_RANGE = 16 << 20
_MOST_COMING = 128 << 20  # bytes in all ranges under way: what is on its way may fill memory
_LEAST_SPLIT = 1 << 20

MISSING, COMING, HERE = 0, 1, 2
_MISSING = bytes([MISSING])


@dataclass(slots=True)
class Request:
    """One Fetch message: bytes [start, end). `deadline` in seconds of CLOCK_MONOTONIC."""

    id: int
    ino: int
    stub: bytes
    size: int
    start: int
    end: int
    whole: bool
    ahead: bool
    deadline: float
    passable: bool = False
    shown: tuple[int, int] = (0, 0)  # mtime and ctime that the server shows
    ordered: bool = False  # nobody but an order waits
    lent: bool = False  # a scan asks
    pid: int = 0
    cancelled: bool = False
    passing: bool = False  # it is being served past the disk, and ends with that
    served: bool = False  # its first range has been asked for


@dataclass(slots=True, eq=False)
class Range:
    """Leaf-aligned bytes [start, end) on their way; `start` moves on with what has arrived."""

    start: int
    end: int
    ahead: bool
    allocated: bool = False  # there are blocks for all of it, or it has been tried


@dataclass(slots=True)
class Shown:
    """The times to show, and the real ones that our last own change left."""

    mtime: int
    ctime: int
    own_mtime: int
    own_ctime: int


@dataclass(slots=True)
class Arrival:
    """`lock` guards everything below it, and every write to the file."""

    ino: int
    stub: Stub
    size: int
    fd: int
    record: Record | None
    shown: Shown
    digests: bytes  # of the leaves; empty for a file of one chunk
    extents: Extents | None  # where to write; None: unknown, zero pages are left as holes
    suspect: Extents  # data of which it is not known who wrote it
    leaves: bytearray
    fresh: bool  # every leaf came from the store while this object lived
    touched: bool = False  # somebody else has changed its attributes, or what had come of its content
    lock: threading.Lock = field(default_factory=threading.Lock)
    requests: list[Request] = field(default_factory=list)
    ranges: list[Range] = field(default_factory=list)
    unsynced: int = 0
    moved: bool = False  # the index does not know the times that our last write has left
    settling: bool = False
    awaited: bool = False  # somebody waits until it is resident for good
    lent: bool = True  # nobody but scans has asked
    closed: bool = False
    used: float = field(default_factory=time.monotonic)
    noted: Future[None] | None = None  # the index knows that pages may have been written

    @property
    def small(self) -> bool:
        """One chunk, fetched whole."""
        return not self.digests

    @property
    def complete(self) -> bool:
        """Every leaf is here."""
        return self.leaves.count(HERE) == len(self.leaves)

    @property
    def bytes_here(self) -> int:
        """How much of the file is here."""
        return min(self.leaves.count(HERE) * LEAF, self.size)

    def bits(self) -> bytes:
        """One bit a leaf, least significant first."""
        packed = bytearray(-(-len(self.leaves) // 8))
        leaf = self.leaves.find(HERE)
        while leaf >= 0:
            packed[leaf >> 3] |= 1 << (leaf & 7)
            leaf = self.leaves.find(HERE, leaf + 1)
        return bytes(packed)

    def lacks(self, request: Request) -> bool:
        """Something that this request asks for is not here."""
        low, high = request.start // LEAF, leaf_count(request.end)
        return self.leaves.count(HERE, low, high) < high - low

    def runs(self, request: Request) -> Extents:
        """The leaves that are here and that the request is about, as byte ranges."""
        found: Extents = []
        low, high = request.start // LEAF, leaf_count(request.end)
        at = self.leaves.find(HERE, low, high)
        while at >= 0:
            end = at
            while end < high and self.leaves[end] == HERE:
                end += 1
            found.append((at * LEAF, min(end * LEAF, self.size)))
            at = self.leaves.find(HERE, end, high)
        return found

    def wanted(self, piece: Range) -> bool:
        """A live request covers some of this range."""
        return any(r.start < piece.end and r.end > piece.start for r in self.requests if not r.cancelled)

    def next_ranges(self, request: Request, most: int) -> list[Range]:
        """What to ask the store for next, for this request, until so many are under way; marks it as coming."""
        found: list[Range] = []
        low, high = request.start // LEAF, leaf_count(request.end)
        split = MOST_RANGE
        if not self.small:
            share = min(request.end - request.start, _MOST_COMING) // most // LEAF * LEAF
            split = max(_LEAST_SPLIT, min(MOST_RANGE, share))
            if not request.served and not request.whole:
                high = max(high, min(low + FIRST_RANGE // LEAF, len(self.leaves)))
        request.served = True
        while len(found) + len(self.ranges) < most:
            first = self.leaves.find(MISSING, low, high)
            if first < 0:
                break
            limit = high if self.small else min(high, first + split // LEAF)
            rest = self.leaves[first:limit]
            last = first + len(rest) - len(rest.lstrip(_MISSING))
            self.leaves[first:last] = bytes([COMING]) * (last - first)
            found.append(Range(first * LEAF, min(last * LEAF, self.size), request.ahead))
            low = last
        self.ranges.extend(found)
        return found

    def landed(self, piece: Range, count: int) -> None:
        """So many bytes of the range, from its start on, are here: the rest is what it is from now on."""
        self._become(piece.start, piece.start + count, HERE)
        piece.start += count
        if piece.start >= piece.end:
            self.ended(piece)

    def ended(self, piece: Range) -> None:
        """No more of the range comes."""
        if piece in self.ranges:
            self.ranges.remove(piece)
        if piece.start < piece.end:
            self._become(piece.start, piece.end, MISSING)

    def _become(self, start: int, end: int, state: int) -> None:
        low, high = start // LEAF, leaf_count(end)
        self.leaves[low:high] = bytes([state]) * (high - low)

    # --- writing, under the lock --------------------------------------------------------------------------

    def fill(self, tree: Tree, start: int, data: Body, reach: int = 0) -> None:
        """Write checked content; times stay as shown. `reach`: what lies before that will follow, and gets its
        blocks now, where the file's holes are known. Raises ForeignStubError, OSError."""
        self.compare(start, data)
        self.notice(os.fstat(self.fd))
        try:
            with tree.keeping_privileges(self.fd):
                for low, high in self._data_within(start, reach):
                    tree.allocate(self.fd, low, high - low)
                for low, high in self._to_write(start, data):
                    pwrite_all(self.fd, memoryview(data)[low - start : high - start], low)
        finally:
            # Also on a full disk after a part of it: the times it leaves are ours, not somebody's who has
            # changed the file. Those that somebody sets between these lines are covered; their mark brings them
            # back (draining).
            try:
                tree.set_mtime(self.fd, self.shown.mtime)
            finally:
                self.keep_times()
                self.moved = True

    def notice(self, st: os.stat_result) -> None:
        """If somebody else has changed the inode's attributes since our last change, those times are shown."""
        if st.st_ctime_ns != self.shown.own_ctime:
            self.touched = True
            self.shown.ctime = st.st_ctime_ns
            if st.st_mtime_ns != self.shown.own_mtime:
                self.shown.mtime = st.st_mtime_ns

    def as_here(self, copy: Copy) -> Copy:
        """The copy with the times that the file shows. Where somebody else has touched it, what is local has to
        be compared before any of it is given up: a change of content looks as one of attributes does."""
        custody = copy.custody | (UNPROVEN if self.touched else 0)
        return replace(copy, mtime=self.shown.mtime, ctime=self.shown.ctime, custody=custody)

    @property
    def times_right(self) -> bool:
        """The file has the time of change that is shown."""
        return self.shown.own_mtime == self.shown.mtime

    def keep_times(self) -> None:
        """Remember the real times after a change of our own."""
        st = os.fstat(self.fd)
        self.shown.own_mtime, self.shown.own_ctime = st.st_mtime_ns, st.st_ctime_ns

    def compare(self, start: int, data: Body) -> None:
        """Data that is there already must be ours: each page is zeros or equal. Raises ForeignStubError."""
        end = start + len(data)
        for low, high in self.suspect:
            low, high = max(low, start), min(high, end)
            for at in range(low // _PAGE * _PAGE, high, _PAGE):
                page = os.pread(self.fd, min(_PAGE, self.size - at), at)
                new = data[max(at - start, 0) : at - start + len(page)]
                page = page[max(start - at, 0) : max(start - at, 0) + len(new)]
                if page != new and page != _ZEROS[: len(page)]:
                    raise ForeignStubError(
                        f"inode {self.ino}: holds data at {at} that is not its copy's: nothing is overwritten"
                    )

    def _data_within(self, start: int, end: int) -> Extents:
        clipped = ((max(low, start), min(high, end)) for low, high in self.extents or [])
        return [(low, high) for low, high in clipped if low < high]

    def _to_write(self, start: int, data: Body) -> Extents:
        """What is known to be data, and whatever is not zeros besides: a list of extents is no proof."""
        end = start + len(data)
        known = self._data_within(start, end) if self.extents is not None else []
        found, at = list(known), start
        for low, high in [*sorted(known), (end, end)]:
            found += [(start + a, start + b) for a, b in _not_zeros(data, at - start, low - start)]
            at = max(at, high)
        return found


def _not_zeros(data: Body, start: int, end: int) -> Extents:
    """The pages of data[start:end] with anything else in them, in runs."""
    found: Extents = []
    for at in range(start, end, _PAGE):
        page = data[at : min(at + _PAGE, end)]
        if page == _ZEROS[: len(page)]:
            continue
        if found and found[-1][1] == at:
            found[-1] = found[-1][0], at + len(page)
        else:
            found.append((at, at + len(page)))
    return found


def leaves_from_bits(size: int, bits: bytes | None) -> bytearray:
    """The state of each leaf, from one bit a leaf."""
    leaves = bytearray(leaf_count(size))
    if bits is None:
        return leaves
    for leaf in range(min(len(leaves), len(bits) * 8)):
        if bits[leaf >> 3] >> (leaf & 7) & 1:
            leaves[leaf] = HERE
    return leaves


def outside(extents: Extents, leaves: bytearray, size: int) -> Extents:
    """The parts of data extents that lie in leaves which are not HERE."""
    found: Extents = []
    for start, end in extents:
        for leaf in range(start // LEAF, leaf_count(end)):
            if leaves[leaf] == HERE:
                continue
            low, high = max(start, leaf * LEAF), min(end, (leaf + 1) * LEAF, size)
            if found and found[-1][1] == low:
                found[-1] = found[-1][0], high
            elif low < high:
                found.append((low, high))
    return found


def shown_times(
    record: Record | None, copy: Copy | None, st: os.stat_result, served: tuple[int, int] | None = None
) -> Shown:
    """What the file shows now: its copy's times while ctime is the one that our last change left.

    `served`: the times that the server shows, where a mover died while it moved the file's. If they are the
    copy's, nobody else has changed them since: what the inode says is the dead mover's write.
    """
    mtime, ctime = st.st_mtime_ns, st.st_ctime_ns
    if record is not None and copy is not None:
        ours = record.left_ctime == ctime or served == (copy.mtime, copy.ctime)
        mtime, ctime = (copy.mtime, copy.ctime) if ours else (mtime, ctime)
    return Shown(mtime, ctime, st.st_mtime_ns, st.st_ctime_ns)
