"""Digests of content and the side object that carries them: leaves, extents, and how both are written down.

A file of one chunk has the SHA-256 of its bytes. A larger one has the BLAKE3 of each leaf of 64 KiB, and the
SHA-256 of their concatenation stands for the whole. `<key>.leaves` holds them with the extents of sparse files:
zstd of a line of JSON and the raw digests. In a list of format 1 they are SHA-256's: such ones are read.

BLAKE3 because leaves are hashed while a reader waits, and all of a volume after a power cut: 5.8 GiB a second
of one CPU where SHA-256 (with the instructions made for it) does 1.3.
"""

from __future__ import annotations

import hashlib
import json

import zstandard
from blake3 import blake3

from tierfs.errors import ObjectCorruptError
from tierfs.model import LEAF, leaf_count

SIDE_SUFFIX = ".leaves"
_FORMAT = 2
_READABLE = (1, _FORMAT)
_DIGEST = 32
_MOST_SIDE = 1 << 30  # decompressed bytes of a side object; 2 TB of content

Extents = list[tuple[int, int]]


def sha256(data: bytes | memoryview) -> bytes:
    """SHA-256 of the bytes."""
    return hashlib.sha256(data).digest()


def leaf_digests(data: bytes | memoryview) -> bytes:
    """The concatenated digests of the leaves of a piece that starts at a leaf."""
    view = memoryview(data)
    return b"".join([blake3(view[at : at + LEAF]).digest() for at in range(0, len(view), LEAF)])


def have_digests(data: bytes | memoryview, wanted: bytes | memoryview) -> bool:
    """Whether the leaves of this piece have these digests; those of a list of format 1 are SHA-256's."""
    if leaf_digests(data) == wanted:
        return True
    view = memoryview(data)
    return b"".join([sha256(view[at : at + LEAF]) for at in range(0, len(view), LEAF)]) == wanted


def pack_side(size: int, extents: Extents, digests: bytes) -> bytes:
    """The bytes of a side object. `digests` is empty for a file of one chunk."""
    head = json.dumps({"format": _FORMAT, "size": size, "leaf": LEAF, "extents": extents})
    return zstandard.ZstdCompressor(level=3).compress(head.encode() + b"\n" + digests)


def unpack_side(raw: bytes | memoryview, size: int, digest: bytes) -> tuple[bytes, Extents]:
    """(digests, extents) of a large file's side object. Raises ObjectCorruptError unless they are its."""
    try:
        data = zstandard.ZstdDecompressor().decompress(raw, max_output_size=_MOST_SIDE)
        head, _, digests = data.partition(b"\n")
        fields = json.loads(head)
        extents = [(int(start), int(end)) for start, end in fields["extents"]]
        known = fields["format"] in _READABLE and fields["leaf"] == LEAF and fields["size"] == size
    except (zstandard.ZstdError, ValueError, TypeError, KeyError) as exc:
        raise ObjectCorruptError(f"the list of digests is damaged: {exc}") from exc
    if not known or len(digests) != leaf_count(size) * _DIGEST or sha256(digests) != digest:
        raise ObjectCorruptError("the list of digests is not that of this file")
    if any(not 0 <= start < end <= size for start, end in extents):
        raise ObjectCorruptError("the list of extents lies outside of the file")
    return digests, extents


def is_sparse(size: int, extents: Extents) -> bool:
    """The file has holes."""
    return sum(end - start for start, end in extents) < size
