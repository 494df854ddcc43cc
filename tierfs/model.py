"""The vocabulary of TierFS as values. Times are nanoseconds since the epoch, sizes bytes, blocks of 512 bytes.

A *generation* numbers content versions over the whole volume: `epoch << 28 | counter`, so that later content
always has the larger number. A file's identity in the backing tree is its inode number together with its
kernel file handle (which contains the inode's own generation number): inode numbers are reused.
"""

from __future__ import annotations

import enum
import os
import struct
from dataclasses import dataclass

LEAF = 64 * 1024  # the unit of digests and of residency bits
CHUNK_SHIFT = 22  # log2 of the unit of fetching: 4 MiB
EPOCH_SHIFT = 28  # counter bits of a generation; 20 more for the epoch make 48

ARCHIVES = frozenset({"GLACIER", "DEEP_ARCHIVE"})  # S3's storage classes that take hours to give back

STUB_XATTR_LIMIT = 64  # one byte more and ext4 spends a 4 KiB block on each stub (measured)


class Residency(enum.IntEnum):
    """Where a file's content is: all, some or no leaves local."""

    RESIDENT = 0
    PARTIAL = 1
    STUB = 2


DOUBTED = (1 << 32) - 1  # no custody epoch comes so far
UNPROVEN = 1 << 31  # beside a custody epoch; nor so far


@dataclass(frozen=True, slots=True)
class Copy:
    """A verified object in the store, and the inode's tuple under which its content was last proven equal.

    `mtime` and `ctime` are also what a stub shows. `custody` is the custody epoch in which the proof was made,
    or DOUBTED: the object was found missing or damaged, and comparing it with the file proves nothing any more.
    With UNPROVEN the object was there in that epoch, but what is local has to be compared with it.
    `digest` is SHA-256 of the content, or of the list of leaf digests for a file larger than one chunk.
    """

    generation: int
    tag: bytes
    digest: bytes
    size: int
    mtime: int
    ctime: int
    custody: int
    chunk_shift: int = CHUNK_SHIFT

    @property
    def unproven(self) -> bool:
        """The object is as good as ever, but what is local may be something else."""
        return self.custody != DOUBTED and bool(self.custody & UNPROVEN)


@dataclass(frozen=True, slots=True)
class Record:
    """What the index knows of one regular file. Dirty is derived: no copy of the present generation.

    `blocks` is the file's full st_blocks; `local` its bytes on the local disk; `left_ctime` the real ctime that
    our own last punch or fill left behind (0: none): while the inode still has it, `copy.ctime` is shown.
    `parent` and `name` are where the file was last seen: a hint, verified before use.
    """

    ino: int
    handle: bytes
    fid: bytes
    generation: int
    residency: Residency = Residency.RESIDENT
    size: int = 0
    blocks: int = 0
    local: int = 0
    parent: int = 0
    name: bytes = b""
    copy: Copy | None = None
    left_ctime: int = 0

    @property
    def dirty(self) -> bool:
        """No verified copy of the present content exists."""
        return self.copy is None or self.copy.generation != self.generation


_STUB = struct.Struct("<BB16s6s8s32s")
_STUB_VERSION = 1
_SHIFT_MASK = 0x1F


@dataclass(frozen=True, slots=True)
class Stub:
    """The content of a stub's extended attribute: enough to find and check its object without the index."""

    fid: bytes
    generation: int
    tag: bytes
    digest: bytes
    chunk_shift: int = CHUNK_SHIFT

    def pack(self) -> bytes:
        """64 bytes: version, flags (log2 of the chunk size), file id, generation, copy tag, digest."""
        generation = self.generation.to_bytes(6, "little")
        return _STUB.pack(_STUB_VERSION, self.chunk_shift, self.fid, generation, self.tag, self.digest)

    @classmethod
    def unpack(cls, raw: bytes) -> Stub:
        """Raises ValueError where the bytes are no stub of a known version."""
        if len(raw) != _STUB.size or raw[0] != _STUB_VERSION or raw[1] & ~_SHIFT_MASK:
            raise ValueError(f"not a stub attribute of a known version: {raw[:2].hex()} ({len(raw)} bytes)")
        _, shift, fid, generation, tag, digest = _STUB.unpack(raw)
        return cls(fid, int.from_bytes(generation, "little"), tag, digest, shift)

    @property
    def key(self) -> str:
        """The object's key below the store's prefix."""
        return object_key(self.fid, self.generation, self.tag)

    @classmethod
    def of(cls, fid: bytes, copy: Copy) -> Stub:
        """The stub that stands for this copy of that file."""
        return cls(fid, copy.generation, copy.tag, copy.digest, copy.chunk_shift)


def object_key(fid: bytes, generation: int, tag: bytes) -> str:
    """`data/<2 hex>/<file id>/<generation>-<copy tag>`: random, so never used twice."""
    name = fid.hex()
    return f"data/{name[:2]}/{name}/{generation:012x}-{tag.hex()}"


def new_fid() -> bytes:
    """A random 128-bit file id."""
    return os.urandom(16)


def new_tag() -> bytes:
    """A random 64-bit copy tag."""
    return os.urandom(8)


def epoch_of(generation: int) -> int:
    """The epoch that it was given in, or a later one: those of a session of months may run on into the next."""
    return generation >> EPOCH_SHIFT


def clamped(time: int) -> int:
    """The nearest time that 64 bits hold: a file may have one behind the year 2262."""
    return max(-(1 << 63), min(time, (1 << 63) - 1))


def make_generation(epoch: int, counter: int) -> int:
    """The generation number of the `counter`-th content change of this epoch."""
    return epoch << EPOCH_SHIFT | counter


def leaf_count(size: int) -> int:
    """How many leaves a file of `size` bytes has."""
    return -(-size // LEAF)
