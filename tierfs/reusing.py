"""Of a large file only what the store does not have is sent, where the store can put an object together from
parts of others: a virtual machine's image or a mailbox in which little has changed, the holes of sparse files.

What the store has is known by the digests of its leaves, part by part: those of the file's present copy, and of
its rescue copy. That is no proof: the new object is proven as any other, by its parts' sums or read back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

from tierfs.digests import SIDE_SUFFIX, Extents, holes, leaf_digests, sha256, unpack_side
from tierfs.errors import IndexError_, ObjectArchivedError, ObjectCorruptError, ObjectMissingError
from tierfs.kit import Kit, abandon_intended, intend_all
from tierfs.model import DOUBTED, LEAF, Record, new_fid, new_tag, object_key
from tierfs.spelling import quoted
from tierfs.store.base import Part

log = logging.getLogger("mover")

_DIGEST = 32
_EMPTY = 4  # parts without content, from which on an object of zeros is worth its own upload


class Sources:
    """Where the store has what a file may consist of, in parts of `size` bytes."""

    def __init__(self, kit: Kit, size: int) -> None:
        self._kit = kit
        self.size = size
        self._places: dict[bytes, tuple[str, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._places)

    def learn(self, key: str, digests: bytes) -> None:
        """An object's parts; of the same one the object that was learnt last is taken."""
        step = self.size // LEAF * _DIGEST
        if len(digests) >= step:
            for at in range(0, len(digests), step):
                self._places[sha256(digests[at : at + step])] = key, at // _DIGEST * LEAF

    def part(self, body: bytes, digests: bytes) -> Part:
        """The part of a file that has these bytes, and leaves with these digests."""
        key, start = self._places.get(sha256(digests), ("", 0))
        return Part(body, key, start)

    def learn_copies(self, record: Record | None) -> None:
        """What the store has of a file. Raises StoreError where it does not answer, IndexError_."""
        if record is None:
            return
        copy = record.copy
        if copy is not None and copy.custody != DOUBTED:
            leaves = self._kit.index.get_leaves(record.fid, copy.generation)
            if leaves is not None and sha256(leaves.digests) == copy.digest:
                self.learn(object_key(record.fid, copy.generation, copy.tag), leaves.digests)
        rescue = self._kit.index.rescue(record.fid)
        if rescue is not None and rescue.size > 1 << rescue.chunk_shift:
            key = rescue.key(record.fid)
            try:
                side = self._kit.store.get(key + SIDE_SUFFIX)
                self.learn(key, unpack_side(side, rescue.size, rescue.digest)[0])
            except (ObjectMissingError, ObjectArchivedError, ObjectCorruptError) as error:
                log.info("nothing is taken from the rescue copy of %s: %s", quoted(record.name), error)

    @contextmanager
    def with_zeros(self, size: int, extents: Extents) -> Iterator[None]:
        """Until the block ends there is an object of zeros, where that is worth it for a file of this size with
        these extents, and none is known. It is noted before it is put, as a copy is: a crash leaves nothing
        for ever. Raises StoreError, IndexError_."""
        zeros = leaf_digests(bytes(LEAF)) * (self.size // LEAF)
        if sha256(zeros) in self._places or _empty_parts(size, extents, self.size) < _EMPTY:
            yield
            return
        key = object_key(new_fid(), 1, new_tag())
        self._kit.index.commit(partial(intend_all, [key])).result()
        try:
            self._kit.store.put(key, bytes(self.size), self.size)
            self.learn(key, zeros)
            yield
        finally:
            with suppress(IndexError_):  # closed: the next mover does it
                self._kit.index.post(partial(abandon_intended, [key]))


def _empty_parts(size: int, extents: Extents, part: int) -> int:
    """How many parts of a file lie in its holes as a whole."""
    return sum(max(0, end // part - -(-start // part)) for start, end in holes(size, extents))
