"""What a mount server leaves to its successor: a table in shared memory that outlives the process.

The supervisor makes it and keeps it; the server writes down here, before each reply, what the kernel will count
on afterwards: nodes with their lookups, open files and directories, registered backing files, the generation,
and of the change that it is just making what the tree looked like before (the intent). A killed server's
successor reads all that and answers what the kernel sends again (see `takeover`).

A process may be killed between any two stores. So the field by which a record counts is written last when it is
made and first when it ends; what may be torn nevertheless belongs to the one request that was being served,
which has not been answered, is sent again, and writes the same record again. Records are in the machine's own
layout: fields that are aligned are written by one store each. A `FORMAT` other than ours is not read.
"""

from __future__ import annotations

import enum
import errno
import mmap
import os
import struct
import sys
import time
from collections.abc import Container, Iterator
from typing import NamedTuple

from tierfs.intents import STAT_SIZE, Doing, Intent, clamped, pack_stat, unpack_stat

FORMAT = 2
_UNSIZED = 1  # the form before: each long name has 256 bytes
_COARSE_CLOCK = 5  # CLOCK_REALTIME_COARSE (clock_gettime(2)): the one that stamps files
_MAP_NORESERVE = 0x4000
_MAGIC = b"tierfsLG"
SLOT_BITS = 32
_SLOT = (1 << SLOT_BITS) - 1
_HANDLE_BITS = 20  # of an open file's number: its slot
_HANDLE_SLOT = (1 << _HANDLE_BITS) - 1

_INLINE = 34  # bytes of a name or file handle beside its node; longer ones have a place of their own
_HEAD = struct.Struct("@8sII")  # magic, format, flags
_NODE = struct.Struct(f"@QQQIBB{_INLINE}s")  # number, inode, parent, lookups, kind, length, content
_LOADED = struct.Struct(f"@QQQIBB4s{_INLINE - 4}x")  # the same, with no more of the content than a place takes
_PARENT = struct.Struct(f"@Q8xQ{6 + _INLINE}x")  # a node's number and its parent's
_FILE = struct.Struct("@QQQIII4x")  # number, node, request, flags, user, backing id
_DIR = struct.Struct("@QQQ8x")  # number, node, request
_INODE = struct.Struct("@QIIqqQ")  # inode, backing id, 1: shows other than its own: mtime, ctime, blocks
_INTENT = struct.Struct("@QIIq")  # request, kind, length of the handle, when
_HANDLE_AT = _INTENT.size + 2 * STAT_SIZE
MOST_NAME = 255  # bytes
_INTENT_SIZE = 512
_MOST_LOOKUPS = (1 << 31) - 1

# Long content takes as many units as it needs. Its node says in which it begins; where the form before has
# written that, it says which place of that form it is.
_UNIT = 32  # bytes
_MOST_UNITS = 8  # of one place: it holds MOST_NAME
_IN_UNITS = 1 << 31

# Words of the header, of 8 bytes.
_GENERATION, _NODES, _FILES, _DIRS, _INODES, _UNSIZED_LONGS, _SERIAL, _LONGS = range(2, 10)
PENDING = 16  # intents of killed servers that may be asked for again

_INTENTS_AT = 4096  # one that is being carried out, then the pending ones
_NODES_AT = _INTENTS_AT + (1 + PENDING) * _INTENT_SIZE + 4096 & ~4095
MOST_NODES = 1 << 26
_LONGS_AT = _NODES_AT + MOST_NODES * _NODE.size
_MOST_LONGS = 1 << 25
_FILES_AT = _LONGS_AT + _MOST_LONGS * _UNIT
_MOST_OPEN = 1 << _HANDLE_BITS
_DIRS_AT = _FILES_AT + _MOST_OPEN * _FILE.size
_INODES_AT = _DIRS_AT + _MOST_OPEN * _DIR.size
SIZE = _INODES_AT + 2 * _MOST_OPEN * _INODE.size  # sparse: only what is used takes memory

_LOOKUPS = 24 // 4
_KIND, _LENGTH, _CONTENT = 28, 29, 30  # bytes into a node
_NODE_WORDS = _NODE.size // 4
# The kind, the length and where long content is: 8 bytes that one store changes, though not aligned.
_WAY_END = _KIND + 8
_WAYS_AT = _NODES_AT + _KIND % 8
_WAY, _NODE_WAYS = _KIND // 8, _NODE.size // 8


class Kind(enum.IntEnum):
    """How a node is reached."""

    NAME = 0  # by its name in its parent
    HANDLE = 1  # by file handle, or by a descriptor that the supervisor keeps
    GONE = 2  # not at all: its last attributes are known


class KeptFile(NamedTuple):
    """An open file as its server left it. `request`: which one opened it."""

    number: int
    node: int
    request: int
    flags: int
    uid: int
    backing_id: int


class KeptDir(NamedTuple):
    """An open directory as its server left it."""

    number: int
    node: int
    request: int


class KeptInode(NamedTuple):
    """A registered backing file, or one whose content is coming in and that shows other times than its own."""

    slot: int
    ino: int
    backing_id: int
    shown: tuple[int, int, int] | None


class Form(NamedTuple):
    """The table's memory, and where in it nodes, open files and inodes are, in this order, and long names.

    `parts`: of each the word of the header that says which slot was never taken yet, the offset of its records,
    the size of one, and how many there can be. `free`: the slots that have been given back. `longs` is the same
    of the units for long names, `free_longs` are the places that have been given back, by how many units they
    have. The lists are the very ones in use.
    """

    memory: memoryview
    parts: tuple[tuple[int, int, int, int], ...]
    free: tuple[list[int], ...]
    longs: tuple[int, int, int, int]
    free_longs: tuple[list[int], ...]
    intents: int  # the offset of the one that is being carried out


class Incompatible(Exception):
    """This table cannot be taken over: it is of another version's form, or too much is pending."""


def make() -> int:
    """A descriptor of new memory for a table, empty. Raises OSError."""
    fd = os.memfd_create("tierfs-ledger", os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE)
    return fd


class _Slots:
    """Places in one part of the table."""

    def __init__(self, first: int, most: int, words: memoryview, word: int) -> None:
        self.most = most
        self.free: list[int] = []
        self._words = words
        self._word = word  # where the first stands that has never been taken
        words[word] = max(first, words[word])

    def take(self) -> int:
        """A free one. Raises OSError(ENFILE) where there is none."""
        if self.free:
            return self.free.pop()
        slot = self._words[self._word]
        if slot >= self.most:
            raise OSError(errno.ENFILE, "more nodes or open files than a mount can have")
        self._words[self._word] = slot + 1
        return slot

    def used(self, first: int) -> range:
        """All that have ever been taken."""
        return range(first, self._words[self._word])


def _units(length: int) -> int:
    """How many units content of this length takes, beside its node; 0: none."""
    return -(-length // _UNIT) if length > _INLINE else 0


def _sized(place: int, length: int) -> tuple[int, int]:
    """A long content's place as its node says it: in units, and how many."""
    return (place & ~_IN_UNITS, _units(length)) if place & _IN_UNITS else (place * _MOST_UNITS, _MOST_UNITS)


class _Longs:
    """Places for content that does not fit beside its node."""

    def __init__(self, words: memoryview) -> None:
        self.free: tuple[list[int], ...] = tuple([] for _ in range(_MOST_UNITS + 1))  # by their units
        self._words = words

    def take(self, units: int) -> int:
        """A free place of so many units. Raises OSError(ENFILE) where there is none."""
        if self.free[units]:
            return self.free[units].pop()
        # The end of a larger one: what is left of that has to be a place, too.
        for larger in range(units + 2, _MOST_UNITS + 1):
            if self.free[larger]:
                place = self.free[larger].pop()
                self.free[larger - units].append(place)
                return place + larger - units
        place = self._words[_LONGS]
        if place + units > _MOST_LONGS:
            raise OSError(errno.ENFILE, "more long names than a mount can have")
        self._words[_LONGS] = place + units
        return place

    def give(self, place: int, units: int) -> None:
        """It is free again."""
        self.free[units].append(place)

    def load(self, taken: bytearray) -> None:
        """Free is what is not taken: a byte of each unit says whether it is."""
        begin = taken.find(0)
        while begin >= 0:
            end = taken.find(1, begin)
            end = len(taken) if end < 0 else end
            while begin < end:
                size = min(end - begin, _MOST_UNITS)
                size -= end - begin - size == 1  # a single unit is no place
                self.free[size].append(begin)
                begin += size
            begin = taken.find(0, end)


class Ledger:
    """See the module's docstring. Used by the serving thread only."""

    def __init__(self, fd: int | None = None) -> None:
        """Map the memory behind `fd`, which stays the caller's; None: some that nobody inherits.

        Raises Incompatible.
        """
        if fd is None:
            self._map = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE)
        else:
            self._map = mmap.mmap(fd, SIZE)
        self._view = memoryview(self._map)
        self._head = self._view[:_INTENTS_AT]
        self._words = self._head.cast("Q")
        if not self._words[0]:
            _HEAD.pack_into(self._map, 0, _MAGIC, FORMAT, 0)
        magic, found, _ = _HEAD.unpack_from(self._map, 0)
        if magic != _MAGIC or found not in (FORMAT, _UNSIZED):
            raise Incompatible(f"a session of form {found}; this version reads {FORMAT}")
        self._flags = self._head.cast("I")
        self._lookups = self._view[_NODES_AT:_LONGS_AT].cast("I")
        self._ways = self._view[_WAYS_AT : _LONGS_AT + _KIND % 8].cast("Q")
        self._nodes = _Slots(1, MOST_NODES, self._words, _NODES)
        self._longs = _Longs(self._words)
        self._files = _Slots(0, _MOST_OPEN, self._words, _FILES)
        self._dirs = _Slots(0, _MOST_OPEN, self._words, _DIRS)
        self._inodes = _Slots(1, 2 * _MOST_OPEN, self._words, _INODES)
        self.request = 0  # the number of the one that is being served
        self.replayed: Intent | None = None  # what it had begun to do when its server was killed
        self._pending: dict[int, tuple[int, Intent]] = {}  # request -> its slot, and what it was doing

    def close(self) -> None:
        """Unmap. What it holds stays, for as long as somebody has the descriptor."""
        for view in (self._words, self._flags, self._lookups, self._ways, self._head, self._view):
            view.release()
        self._map.close()

    # --- the session --------------------------------------------------------------------------------------

    @property
    def serving(self) -> bool:
        """The kernel has been answered: there is something to take over."""
        return bool(self._flags[3] & 1)

    @property
    def passthrough(self) -> bool:
        """The kernel takes backing files in this session."""
        return bool(self._flags[3] & 2)

    def serve(self, *, passthrough: bool) -> None:
        """The session has begun."""
        self._flags[3] = 3 if passthrough else 1

    @property
    def generation(self) -> int:
        """The newest generation given to content, 0 before the first."""
        return int(self._words[_GENERATION])

    @generation.setter
    def generation(self, value: int) -> None:
        self._words[_GENERATION] = value

    # --- nodes --------------------------------------------------------------------------------------------

    def new_node(self) -> int:
        """A node's number, of those that its slot had the one that is longest ago: of billions. Raises
        OSError(ENFILE)."""
        slot = self._nodes.take()
        (before,) = struct.unpack_from("@Q", self._map, _NODES_AT + slot * _NODE.size)
        return ((before >> SLOT_BITS) + 1 & _SLOT) << SLOT_BITS | slot if before else slot

    def node(
        self, number: int, ino: int, parent: int, lookups: int, content: bytes, kind: Kind = Kind.NAME
    ) -> None:
        """Write down a node.

        Long content comes and goes by one store, and a new node is there by the last. What may be torn is a
        short name by another, or a name and its directory: that is stale until the request is sent again.
        """
        slot = number & _SLOT
        at = _NODES_AT + slot * _NODE.size
        length = len(content)
        place, units = self._place(slot)
        if length > _INLINE:
            content = self._long(content)
        record = _NODE.pack(number, ino, parent, lookups, kind, length, content)
        if length <= _INLINE:  # of long content nothing is there: what is there stays whole until then
            self._map[at + _WAY_END : at + _NODE.size] = record[_WAY_END:]
        way = int.from_bytes(record[_KIND:_WAY_END], sys.byteorder)
        self._map[at : at + 4 * _LOOKUPS], self._ways[slot * _NODE_WAYS + _WAY] = record[: 4 * _LOOKUPS], way
        self._lookups[slot * _NODE_WORDS + _LOOKUPS] = lookups
        if units:
            self._longs.give(place, units)

    def _long(self, content: bytes) -> bytes:
        """Put long content in a place of its own, never in the one before; what stands in the node."""
        place = self._longs.take(_units(len(content)))
        at = _LONGS_AT + place * _UNIT
        self._map[at : at + len(content)] = content
        return (place | _IN_UNITS).to_bytes(4, sys.byteorder)

    def _place(self, slot: int) -> tuple[int, int]:
        """The place of a node's long content, and how many units it has: 0 where there is none."""
        at = _NODES_AT + slot * _NODE.size
        length = self._map[at + _LENGTH]
        if length <= _INLINE or not self._lookups[slot * _NODE_WORDS + _LOOKUPS]:
            return 0, 0
        return _sized(int.from_bytes(self._map[at + _CONTENT : at + _CONTENT + 4], sys.byteorder), length)

    def name(self, number: int) -> bytes:
        """The name by which a node is reached; b"" where it is not reached by one."""
        slot = number & _SLOT
        at = _NODES_AT + slot * _NODE.size
        return b"" if self._map[at + _KIND] else self._content(slot, at)

    def content(self, number: int) -> bytes:
        """What a node is reached by, or its last attributes."""
        slot = number & _SLOT
        return self._content(slot, _NODES_AT + slot * _NODE.size)

    def _content(self, slot: int, at: int) -> bytes:
        length = self._map[at + _LENGTH]
        if length <= _INLINE:
            return self._map[at + _CONTENT : at + _CONTENT + length]
        place, units = self._place(slot)
        if not units:
            return b""  # a directory that was forgotten before a hard link in it: its name is no more
        at = _LONGS_AT + place * _UNIT
        return self._map[at : at + length]

    def lookups(self, number: int) -> int:
        """How often the kernel has looked a node up."""
        return self._lookups[(number & _SLOT) * _NODE_WORDS + _LOOKUPS]

    def looked_up(self, number: int) -> None:
        """The kernel has looked it up once more."""
        at = (number & _SLOT) * _NODE_WORDS + _LOOKUPS
        self._lookups[at] = min(self._lookups[at] + 1, _MOST_LOOKUPS)

    def given_back(self, number: int, count: int) -> int:
        """The kernel gives back so many lookups; how many are left. After 2^31 of them, which are no longer
        told apart, it never has none."""
        at = (number & _SLOT) * _NODE_WORDS + _LOOKUPS
        before = self._lookups[at]
        if before == _MOST_LOOKUPS:
            return before
        left = max(before - count, 0)
        if left:
            self._lookups[at] = left
        return left

    def table(self) -> tuple[memoryview, int]:
        """The records of nodes, by slot, and the size of one."""
        return self._view[_NODES_AT:_LONGS_AT], _NODE.size

    def form(self) -> Form:
        """For who keeps records in our place."""
        slots = (self._nodes, self._files, self._inodes)
        places = (_NODES_AT, _FILES_AT, _INODES_AT)
        sizes = (_NODE.size, _FILE.size, _INODE.size)
        words = (_NODES, _FILES, _INODES)
        parts = zip(words, places, sizes, (each.most for each in slots), strict=True)
        free = tuple(each.free for each in slots)
        longs = (_LONGS, _LONGS_AT, _UNIT, _MOST_LONGS)
        return Form(self._view, tuple(parts), free, longs, self._longs.free, _INTENTS_AT)

    def drop_node(self, number: int) -> None:
        """The kernel has forgotten it."""
        slot = number & _SLOT
        place, units = self._place(slot)
        self._lookups[slot * _NODE_WORDS + _LOOKUPS] = 0
        if units:
            self._longs.give(place, units)
        self._nodes.free.append(slot)

    @property
    def node_slots(self) -> int:
        """No node's slot is as high."""
        return self._nodes.used(1).stop

    def load_nodes(self) -> Iterator[tuple[int, int, int]]:
        """Number, inode and kind of each that the kernel knows. Call it once, before anything is written.

        Callers wait meanwhile, and there may be a million: nothing is made of a node that is not needed.
        """
        if self._flags[2] == _UNSIZED:
            self._words[_LONGS] = self._words[_UNSIZED_LONGS] * _MOST_UNITS
            self._flags[2] = FORMAT
        used = self._nodes.used(1)
        taken = bytearray(self._words[_LONGS])
        for slot, record in zip(used, _LOADED.iter_unpack(self._records(used)), strict=True):
            number, ino, _, lookups, kind, length, place_of = record
            if not lookups or number & _SLOT != slot:
                self._nodes.free.append(slot)
                continue
            if length > _INLINE:
                place, units = _sized(int.from_bytes(place_of, sys.byteorder), length)
                if place + units > len(taken):  # torn, by a version before: the kernel looks it up anew
                    self._lookups[slot * _NODE_WORDS + _LOOKUPS] = 0
                    self._nodes.free.append(slot)
                    continue
                taken[place : place + units] = b"\1" * units
            yield number, ino, kind
        self._longs.load(taken)

    def parents(self) -> Iterator[tuple[int, int]]:
        """The numbers of each node and of its parent, and of some that the kernel has forgotten."""
        yield from _PARENT.iter_unpack(self._records(self._nodes.used(1)))

    def _records(self, slots: range) -> memoryview:
        return self._view[_NODES_AT + slots.start * _NODE.size : _NODES_AT + slots.stop * _NODE.size]

    # --- open files and directories -----------------------------------------------------------------------

    def _serial(self) -> int:
        self._words[_SERIAL] += 1
        return self._words[_SERIAL] << _HANDLE_BITS

    def file(self, node: int, flags: int, uid: int, backing_id: int) -> int:
        """Write down an open file of the request that is being served; its number."""
        slot = self._files.take()
        number = self._serial() | slot
        at = _FILES_AT + slot * _FILE.size
        _FILE.pack_into(self._map, at, 0, node, self.request, flags, uid, backing_id)
        struct.pack_into("@Q", self._map, at, number)
        return number

    def drop_file(self, number: int) -> None:
        """It is closed."""
        slot = number & _HANDLE_SLOT
        struct.pack_into("@Q", self._map, _FILES_AT + slot * _FILE.size, 0)
        self._files.free.append(slot)

    def load_files(self) -> Iterator[KeptFile]:
        """All that are open. Call it once, before anything is written."""
        for slot in self._files.used(0):
            kept = KeptFile(*_FILE.unpack_from(self._map, _FILES_AT + slot * _FILE.size))
            if kept.number:
                yield kept
            else:
                self._files.free.append(slot)

    def directory(self, node: int) -> int:
        """Write down an open directory of the request that is being served; its number."""
        slot = self._dirs.take()
        number = self._serial() | slot
        at = _DIRS_AT + slot * _DIR.size
        _DIR.pack_into(self._map, at, 0, node, self.request)
        struct.pack_into("@Q", self._map, at, number)
        return number

    def drop_directory(self, number: int) -> None:
        """It is closed."""
        slot = number & _HANDLE_SLOT
        struct.pack_into("@Q", self._map, _DIRS_AT + slot * _DIR.size, 0)
        self._dirs.free.append(slot)

    def load_directories(self) -> Iterator[KeptDir]:
        """All that are open. Call it once, before anything is written."""
        for slot in self._dirs.used(0):
            kept = KeptDir(*_DIR.unpack_from(self._map, _DIRS_AT + slot * _DIR.size))
            if kept.number:
                yield kept
            else:
                self._dirs.free.append(slot)

    # --- inodes -------------------------------------------------------------------------------------------

    def inode(self, former: int, ino: int, backing_id: int, shown: tuple[int, int, int] | None = None) -> int:
        """Write down what is to be known of an inode; its slot. `former`: the one before, 0 where there is
        none; it ends when the new one is there, so that there is no moment in which nothing is known."""
        slot = self._inodes.take()
        times = (1, *(clamped(value) for value in shown)) if shown is not None else (0, 0, 0, 0)
        at = _INODES_AT + slot * _INODE.size
        _INODE.pack_into(self._map, at, 0, backing_id, *times)
        struct.pack_into("@Q", self._map, at, ino)
        if former:
            self.drop_inode(former)
        return slot

    def drop_inode(self, slot: int) -> None:
        """Nothing is to be known of it any more."""
        struct.pack_into("@Q", self._map, _INODES_AT + slot * _INODE.size, 0)
        self._inodes.free.append(slot)

    def load_inodes(self) -> Iterator[KeptInode]:
        """All of which something is to be known. Call it once, before anything is written."""
        for slot in self._inodes.used(1):
            ino, backing, shows, *shown = _INODE.unpack_from(self._map, _INODES_AT + slot * _INODE.size)
            if ino:
                yield KeptInode(slot, ino, backing, tuple(shown) if shows else None)
            else:
                self._inodes.free.append(slot)

    # --- intents ------------------------------------------------------------------------------------------

    def intend(
        self,
        doing: Doing,
        first: os.stat_result | None = None,
        second: os.stat_result | None = None,
        handle: bytes = b"",
    ) -> None:
        """Call right before the change that the request being served is about to make."""
        when = time.clock_gettime_ns(_COARSE_CLOCK)
        self._write_intent(_INTENTS_AT, self.request, Intent(doing, when, first, second, handle))

    def _write_intent(self, at: int, request: int, intent: Intent) -> None:
        struct.pack_into("@Q", self._map, at, 0)
        if intent.first is not None:
            pack_stat(self._map, at + _INTENT.size, intent.first)
        if intent.second is not None:
            pack_stat(self._map, at + _INTENT.size + STAT_SIZE, intent.second)
        size = len(intent.handle)
        if size:
            self._map[at + _HANDLE_AT : at + _HANDLE_AT + size] = intent.handle
        which = intent.doing | (intent.first is not None) << 8 | (intent.second is not None) << 9
        _INTENT.pack_into(self._map, at, 0, which, size, intent.when)
        struct.pack_into("@Q", self._map, at, request)

    def _read_intent(self, at: int) -> tuple[int, Intent] | None:
        request, which, size, when = _INTENT.unpack_from(self._map, at)
        if not request:
            return None
        first = unpack_stat(self._map, at + _INTENT.size) if which >> 8 & 1 else None
        second = unpack_stat(self._map, at + _INTENT.size + STAT_SIZE) if which >> 9 & 1 else None
        handle = self._map[at + _HANDLE_AT : at + _HANDLE_AT + size]
        return request, Intent(Doing(which & 0xFF), when, first, second, handle)

    def load_intents(self) -> None:
        """Take over what the killed server was doing, and what those before it were."""
        places = [_INTENTS_AT + (1 + slot) * _INTENT_SIZE for slot in range(PENDING)]
        for slot, at in enumerate(places):
            pending = self._read_intent(at)
            if pending is not None:
                self._pending[pending[0]] = slot, pending[1]
        newest = self._read_intent(_INTENTS_AT)
        if newest is None or newest[0] in self._pending:
            return
        taken = {slot for slot, _ in self._pending.values()}
        free = next((slot for slot in range(PENDING) if slot not in taken), None)
        if free is None:
            raise Incompatible("too many servers have been killed one after another")
        self._write_intent(places[free], newest[0], newest[1])
        self._pending[newest[0]] = free, newest[1]

    @property
    def is_pending(self) -> bool:
        """Something was being done that has not been answered, as far as is known."""
        return bool(self._pending)

    def pending(self, request: int) -> Intent | None:
        """What this request, now sent again, was doing."""
        entry = self._pending.get(request)
        return entry[1] if entry is not None else None

    def settle(self, request: int) -> None:
        """This request has been answered."""
        entry = self._pending.pop(request, None)
        if entry is not None:
            struct.pack_into("@Q", self._map, _INTENTS_AT + (1 + entry[0]) * _INTENT_SIZE, 0)

    def settle_all_but(self, requests: Container[int]) -> None:
        """All others have been answered by those who carried them out."""
        for request in [each for each in self._pending if each not in requests]:
            self.settle(request)
