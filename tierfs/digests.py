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
_BLOCK = 4096  # bytes; extents are made of such
_EXTENT_TEXT = 48  # bytes, at most, that one takes in JSON
_HEAD_TEXT = 4096

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
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
    return compressor.compress(head.encode() + b"\n" + digests)


def unpack_side(raw: bytes | memoryview, size: int, digest: bytes) -> tuple[bytes, Extents]:
    """(digests, extents) of a large file's side object. Raises ObjectCorruptError unless they are its."""
    most = leaf_count(size) * _DIGEST + (size // _BLOCK + 2) * _EXTENT_TEXT + _HEAD_TEXT
    try:
        # What it says of its own length is believed before anything of it is checked.
        if zstandard.frame_content_size(raw) > most:
            raise ValueError("it is longer than that of any file of this size")
        data = zstandard.ZstdDecompressor().decompress(raw, max_output_size=most)
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
    if any(not _are_zeros(digests, low, high, size) for low, high in holes(size, extents)):
        raise ObjectCorruptError("the list of extents has holes where the digests have content")
    return digests, extents


def holes(size: int, extents: Extents) -> Extents:
    """What lies between the extents, in whatever order they are."""
    holes, at = [], 0
    for start, end in [*sorted(extents), (size, size)]:
        if start > at:
            holes.append((at, start))
        at = max(at, end)
    return holes


def _are_zeros(digests: bytes, start: int, end: int, size: int) -> bool:
    """Whether the leaves that lie in bytes [start, end) as a whole have the digest of zeros. The digests are
    proven by the file's own; what is said of its extents is proven by nothing else."""
    low, high = leaf_count(start), leaf_count(end) if end == size else end // LEAF
    last = size // LEAF  # the leaf that is shorter, if there is one
    count = min(high, last) - low
    whole = digests[low * _DIGEST : (low + count) * _DIGEST]
    if count > 0 and not any(whole.count(digest(bytes(LEAF))) == count for digest in (leaf_digests, sha256)):
        return False
    return not low <= last < high or have_digests(bytes(size % LEAF), digests[last * _DIGEST :])


def is_sparse(size: int, extents: Extents) -> bool:
    """The file has holes."""
    return sum(end - start for start, end in extents) < size
