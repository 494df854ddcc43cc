"""Former contents of files, while they are kept: which there are, and their bytes.

A version follows its file: those of a path are the ones of the file that is there now, under whatever name it
had them, those of every file that ended there, and what was superseded at this place. Of each only copies are
left: what was never copied out, or was overwritten before it was, is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tierfs.digests import SIDE_SUFFIX, Extents, have_digests, sha256, unpack_side
from tierfs.errors import ObjectCorruptError, ObjectMissingError, PathError
from tierfs.kit import Kit
from tierfs.model import LEAF, Copy, Record, leaf_count, object_key
from tierfs.past import Version
from tierfs.store.base import Body

_PIECE = 4 << 20
_NEVER = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Kept:
    """One content of a file. Times in ns; `since`..`until`: when it was the file's (`until` is None: still).

    `state` is current, superseded or deleted; `version` is None for a copy that a file has. Mode 0: not known.
    """

    fid: bytes
    generation: int
    tag: bytes
    path: bytes
    size: int
    mtime: int
    since: int
    until: int | None
    digest: bytes
    chunk_shift: int
    state: str
    mode: int = 0
    uid: int = 0
    gid: int = 0
    version: Version | None = None

    @property
    def key(self) -> str:
        """The object's key."""
        return object_key(self.fid, self.generation, self.tag)

    @property
    def stale(self) -> bool:
        """Owner and mode were seen when the file had other content already: they may have come with that, and
        open to all what was not open before."""
        return self.state == "superseded" or (self.version is not None and self.version.stale)


def of_path(kit: Kit, path: bytes, record: Record | None) -> list[Kept]:
    """All that is kept of a path, oldest first; `record` is of the file there now. Raises IndexError_."""
    timelines: dict[bytes, list[Version]] = {}
    if record is not None:
        timelines[record.fid] = kit.index.versions_of(record.fid)
    for version in sorted(kit.index.versions_at(path), key=lambda version: not version.deleted):
        if version.fid in timelines:
            continue
        if version.deleted:
            timelines[version.fid] = kit.index.versions_of(version.fid)
        else:
            # Its file lives on under another name: only what it was here.
            here = [each for each in kit.index.versions_of(version.fid) if each.path == path]
            timelines[version.fid] = here
    found: list[Kept] = []
    for fid, versions in timelines.items():
        copy = record.copy if record is not None and record.fid == fid else None
        found += _timeline(versions, path, record, copy)
    return sorted(found, key=lambda kept: (kept.until or _NEVER, kept.generation))


def beneath(kit: Kit, path: bytes) -> Iterator[Kept]:
    """What ended beneath a directory, by path and age. Raises IndexError_."""
    for version in kit.index.versions_beneath(path):
        record = kit.index.get_by_fid(version.fid)
        if record is None or record.copy is None or record.copy.tag != version.tag:
            yield _kept(version, version.begun)


def _timeline(versions: list[Version], path: bytes, record: Record | None, copy: Copy | None) -> list[Kept]:
    """The contents of one file: each begins where the one before has ended."""
    found: list[Kept] = []
    since = 0
    for version in sorted(versions, key=lambda version: (version.ended, version.generation)):
        if copy is not None and copy.tag == version.tag and copy.generation == version.generation:
            continue  # it has come back after a power cut
        found.append(_kept(version, since or version.begun))
        since = version.ended
    if copy is not None and record is not None:
        state = "superseded" if record.dirty else "current"
        found.append(
            Kept(
                record.fid, copy.generation, copy.tag, path, copy.size, copy.mtime, since or copy.ctime, None,
                copy.digest, copy.chunk_shift, state,
            )
        )  # fmt: skip
    return found


def _kept(version: Version, since: int) -> Kept:
    return Kept(
        version.fid, version.generation, version.tag, version.path, version.size, version.mtime,
        min(since, version.ended), version.ended, version.digest, version.chunk_shift,
        "deleted" if version.deleted else "superseded", version.mode, version.uid, version.gid, version,
    )  # fmt: skip


def choose(found: Iterable[Kept], generation: int | None, when: int | None) -> Kept:
    """The one with this generation, or the content as of `when` (ns). Raises PathError."""
    listed = list(found)
    if generation is not None:
        fitting = [kept for kept in listed if kept.generation == generation]
        if len(fitting) > 1:
            raise PathError(f"{len(fitting)} versions have generation {generation}: name one by its time")
    else:
        assert when is not None
        fitting = [kept for kept in listed if kept.since <= when < (kept.until or _NEVER)]
        fitting = sorted(fitting, key=lambda kept: kept.since)[-1:]
    if not fitting:
        raise PathError("there is no such version: `tierfs versions` lists those that are kept")
    return fitting[0]


def content(kit: Kit, kept: Kept) -> Iterator[tuple[int, Body]]:
    """(offset, bytes) of all data, checked; holes are left out. Raises StoreError: missing, corrupt, down."""
    with kit.in_use.holding(kept.key):
        if kept.size <= 1 << kept.chunk_shift:
            data = kit.store.get(kept.key)
            if len(data) != kept.size or sha256(data) != kept.digest:
                raise ObjectCorruptError(f"{kept.key}: does not match its digest")
            for start, end in _extents_of_small(kit, kept):
                yield start, data[start:end]
            return
        digests, extents = _leaves(kit, kept)
        for start, end in extents:
            at = start // LEAF * LEAF  # a leaf is checked as a whole
            while at < end:
                stop = min(at + _PIECE, -(-end // LEAF) * LEAF, kept.size)
                data = kit.store.get(kept.key, at, stop - at)
                first = at // LEAF * 32
                if not have_digests(data, digests[first : first + leaf_count(stop - at) * 32]):
                    raise ObjectCorruptError(f"{kept.key}: bytes at {at} do not match their digest")
                low, high = max(at, start), min(stop, end)
                yield low, data[low - at : high - at]
                at = stop


def _extents_of_small(kit: Kit, kept: Kept) -> Extents:
    leaves = kit.index.get_leaves(kept.fid, kept.generation)
    return leaves.extents if leaves is not None else [(0, kept.size)]


def _leaves(kit: Kit, kept: Kept) -> tuple[bytes, Extents]:
    leaves = kit.index.get_leaves(kept.fid, kept.generation)
    if leaves is not None and sha256(leaves.digests) == kept.digest:
        return leaves.digests, leaves.extents
    try:
        return unpack_side(kit.store.get(kept.key + SIDE_SUFFIX), kept.size, kept.digest)
    except ObjectMissingError as exc:
        raise ObjectMissingError(f"{kept.key}: its list of digests is not in the store any more") from exc
