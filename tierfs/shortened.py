"""Stubs that are shorter than their copies: a power cut has taken the end of a file that became one (in a
version that did not sync content before the attribute), or somebody has cut one behind the mount.

Such a one gets its length again, and the rest of its content from its copy, where all that is here of it is
the beginning of that: no byte is given up for it. Nobody writes to a stub through the mount, so that there is
no work in a length either. Whatever is here besides may be somebody's, and is left to a person.

    guard → F_WRLCK → object, digests, what is here compared → commit STUB of the copy's length, pending
      → the end of the last leaf that is here → fdatasync → length → times → fsync → commit, not pending
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

from tierfs.digests import SIDE_SUFFIX, Extents, have_digests, sha256, unpack_side
from tierfs.errors import BusyError, ObjectArchivedError, ObjectCorruptError, ObjectMissingError
from tierfs.index import Writer
from tierfs.kit import WRITE_FLAGS, Kit, read_exactly
from tierfs.model import LEAF, UNPROVEN, Copy, Record, Residency, Stub
from tierfs.store.base import Body
from tierfs.tree import pwrite_all

log = logging.getLogger("recovery")

_CLAIM_SECONDS = 5.0  # a fetch that is just settling
_UNUSABLE = (ObjectMissingError, ObjectCorruptError, ObjectArchivedError)


class StaysError(Exception):
    """Why a file stays as it is."""


def lengthen(kit: Kit, drain: Callable[[], int], opath: int, stub: Stub) -> str:
    """Give a stub the length of its copy again; "" where that was done, else why not.

    Raises StoreError where the store gives no answer, IndexError_.
    """
    ino = os.fstat(opath).st_ino
    if not kit.claims.take(ino, _CLAIM_SECONDS):
        return "is being worked on"
    try:
        with kit.server.guard([ino], drain()) as granted:
            if ino not in granted:
                return "is open"
            with kit.writable(opath):
                fd = kit.tree.reopen(opath, WRITE_FLAGS & ~os.O_NOFOLLOW)
            try:
                _lengthen(kit, fd, stub)
            finally:
                os.close(fd)
    except (StaysError, BusyError) as error:
        return str(error)
    except _UNUSABLE as error:
        return f"its object is of no use: {error}"
    except OSError as error:
        return f"cannot be given its length again: {error.strerror or error}"
    finally:
        kit.claims.give(ino)
    return ""


def _lengthen(kit: Kit, fd: int, stub: Stub) -> None:
    if not kit.tree.try_lease(fd, fcntl.F_WRLCK):
        raise StaysError("is open or mapped")
    kit.tree.read_anew(fd)
    st = os.fstat(fd)
    record, copy = _known(kit, fd, st, stub)
    original = _Original(kit, stub)
    if not st.st_size:
        raise StaysError("is being emptied: opening it ends that")
    here = kit.tree.extents(fd, st.st_size)
    if st.st_size >= original.size or not _is_original(fd, here, st.st_size, original):
        raise StaysError("holds what is not its copy's: `tierfs restore-version` brings that back elsewhere")
    whole = replace(
        record,
        residency=Residency.STUB,
        size=original.size,
        blocks=max(record.blocks, -(-original.size // 4096) * 8),
        local=st.st_blocks * 512,
        copy=replace(copy, size=original.size, custody=copy.custody | UNPROVEN),
        left_ctime=0,
    )
    _put(kit, record, whole, pending=True)
    _write(kit, fd, st, here, original)
    kit.tree.set_times(fd, st.st_atime_ns, copy.mtime)
    os.fsync(fd)
    now = os.fstat(fd)
    _put(kit, whole, replace(whole, local=now.st_blocks * 512, left_ctime=now.st_ctime_ns), pending=False)
    log.info("inode %d has the %d bytes of its copy again, not %d", record.ino, original.size, st.st_size)


def _known(kit: Kit, fd: int, st: os.stat_result, stub: Stub) -> tuple[Record, Copy]:
    record = kit.index.get(st.st_ino)
    if kit.tree.read_stub(fd) != stub:
        raise StaysError("has changed meanwhile")
    if record is None or record.copy is None or record.handle != kit.tree.handle_of(fd):
        raise StaysError("has no record")
    if record.dirty or Stub.of(record.fid, record.copy) != stub:
        raise StaysError("its stub is not that of its record")
    return record, record.copy


def _put(kit: Kit, before: Record, after: Record, *, pending: bool) -> None:
    """`pending`: recovery is to look at it. Raises StaysError where a mark was quicker."""

    def commit(w: Writer) -> bool:
        if w.get(before.ino) != before:
            return False
        w.put(after)
        (w.put_pending if pending else w.drop_pending)(before.ino)
        return True

    if not kit.index.commit(commit).result():
        raise StaysError("was changed meanwhile")


def _write(kit: Kit, fd: int, st: os.stat_result, here: Extents, original: _Original) -> None:
    """A block of which the copy's bytes end in the middle would be taken for content with zeros behind: what is
    here goes on to the end of its leaf, durably, before the file is longer than that."""
    with kit.tree.keeping_privileges(fd):
        if here and here[-1][1] == st.st_size:
            end = min(-(-st.st_size // LEAF) * LEAF, original.size)
            if end > st.st_size:
                pwrite_all(fd, original.piece(st.st_size, end), st.st_size)
                os.fdatasync(fd)
        os.ftruncate(fd, original.size)


def _is_original(fd: int, here: Extents, length: int, original: _Original) -> bool:
    """Every byte of data in a file of this length is the copy's."""
    for leaf, ranges in _by_leaf(here):
        start, end = leaf * LEAF, min((leaf + 1) * LEAF, length)
        data = read_exactly(fd, start, end - start)
        if original.has(leaf, data):
            continue
        if any(data[low - start : high - start] != original.piece(low, high) for low, high in ranges):
            return False
    return True


def _by_leaf(extents: Extents) -> Iterator[tuple[int, Extents]]:
    """The ranges of data in each leaf that has any."""
    found: dict[int, Extents] = {}
    for low, high in extents:
        for leaf in range(low // LEAF, -(-high // LEAF)):
            found.setdefault(leaf, []).append((max(low, leaf * LEAF), min(high, (leaf + 1) * LEAF)))
    yield from sorted(found.items())


class _Original:
    """The copy: its size and checked bytes of it. Raises StoreError, ObjectCorruptError."""

    def __init__(self, kit: Kit, stub: Stub) -> None:
        self._store, self._stub = kit.store, stub
        self._digests = b""
        self._leaf: tuple[int, bytes] = (-1, b"")
        self.size = self._store.head(stub.key).size
        if self._is_large:
            side = self._store.get(stub.key + SIDE_SUFFIX)
            self._digests, _ = unpack_side(side, self.size, stub.digest)
        else:
            whole = bytes(self._store.get(stub.key, 0, self.size))
            if len(whole) != self.size or sha256(whole) != stub.digest:
                raise ObjectCorruptError(f"{stub.key} does not have the recorded digest")
            self._whole = whole

    @property
    def _is_large(self) -> bool:
        return self.size > 1 << self._stub.chunk_shift

    def has(self, leaf: int, data: Body) -> bool:
        """Whether this is all of that leaf, as far as can be told without asking for it."""
        return self._is_large and have_digests(data, self._digests[leaf * 32 : leaf * 32 + 32])

    def piece(self, start: int, end: int) -> bytes:
        """These bytes, which lie in one leaf."""
        if not self._is_large:
            return self._whole[start:end]
        leaf = start // LEAF
        if self._leaf[0] != leaf:
            at = leaf * LEAF
            data = bytes(self._store.get(self._stub.key, at, min(LEAF, self.size - at)))
            if not self.has(leaf, data):
                raise ObjectCorruptError(f"{self._stub.key}: bytes at {at} do not match their digest")
            self._leaf = leaf, data
        return self._leaf[1][start - leaf * LEAF : end - leaf * LEAF]
