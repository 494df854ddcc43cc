"""What is in the parts of the tree that cannot be read just now: as the journal told of it or the index knows.

A disk that begins to fail gives up a directory here and an inode there. A snapshot that left out what is in
them would be the newest one, and a restore would lack it although its content is in the store. So what the
journal told last stands in for it, with the copies that the index knows by now; and of files that no journal
has told of the index knows parent and name. What can be opened by its handle all the same tells of itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from tierfs import manifest
from tierfs.errors import ObjectArchivedError, VolumeError
from tierfs.kit import Kit
from tierfs.looking import as_recorded
from tierfs.model import Record
from tierfs.namespace import Chronicle, Tree
from tierfs.places import Places, join

log = logging.getLogger("journal")

_UNKNOWN_MODE = 0o600  # of a file of which nothing but its record is known


class Gap(NamedTuple):
    """A directory of which not all could be read. `told`: names that were told nevertheless; `only`: those that
    were missed, where it could be listed."""

    line: manifest.AnyInode
    told: set[bytes]
    only: set[bytes] | None

    def lacks(self, name: bytes) -> bool:
        """Nothing has been told of this name, and it may be there."""
        return name not in self.told and (self.only is None or name in self.only)


class Remembered:
    """Of one walk. The journal is read where there is a gap, and kept until the walk ends."""

    def __init__(self, kit: Kit, places: Places, volume: str) -> None:
        """`volume`: its id, of which the journal must be."""
        self._kit = kit
        self._places = places
        self._volume = volume
        self._told: Tree | None = None
        self._gaps: dict[int, Gap] = {}  # by inode number
        self.lent = 0  # copies that only the journal knows
        self._numbers: dict[tuple[int, bytes], int] | None = None

    def children(self, ident: str) -> Iterator[tuple[bytes, manifest.AnyInode]]:
        """The names in a directory as they were told last, each with what it is by now. Raises StoreError."""
        for name, inode in self._journal().children(ident):
            named = msgspec.structs.replace(inode, dir=ident, name=manifest.text(name))
            yield name, self._brought_up_to_date(named)

    def with_copy(self, told: manifest.AnyInode) -> manifest.AnyInode:
        """A line of now, with the copy that the journal told of where a new index knows none. Raises
        StoreError."""
        if not isinstance(told, manifest.File) or told.copy is not None:
            return told
        found = _with_copy_of(self._journal().inodes.get(told.id), told)
        self.lent += found is not told
        return found

    def leave(self, ino: int, gap: Gap) -> None:
        """What else is in it the index may know. An inode number of 0 is not known."""
        if ino:
            self._gaps[ino] = gap

    def number_of(self, parent: int, name: bytes) -> int:
        """The inode number of a directory that cannot be opened; 0: it is not known. Raises IndexError_."""
        if self._numbers is None:
            self._numbers = {(above, called): ino for ino, above, called in self._kit.index.dirs()}
        return self._numbers.get((parent, name), 0)

    def others(self) -> Iterator[tuple[manifest.File, bytes]]:
        """(line, path) of files in the gaps of which nothing was told: only the index knows them. Raises
        IndexError_."""
        start, more = 0, bool(self._gaps)
        while more:
            page = list(self._kit.index.records(start))
            for record in page:
                gap = self._gaps.get(record.parent)
                if gap is None or not record.name or not gap.lacks(record.name):
                    continue
                above = self._places.directory(record.parent)
                path = join(above.path, record.name) if above is not None else b""
                if not path or self._may_be(record, path):
                    yield self._of_record(record, gap.line), path
            start, more = (page[-1].ino + 1, True) if page else (0, False)

    def _journal(self) -> Tree:
        """As it is in the store; nothing where there is none that can be read. Raises StoreError."""
        if self._told is None:
            try:
                chronicle = Chronicle(self._kit.store, self._volume)
                self._told = Tree() if chronicle.empty else chronicle.read()
            except (VolumeError, ObjectArchivedError) as error:
                log.warning("what was in the journal is not known any more: %s", error)
                self._told = Tree()
        return self._told

    def _brought_up_to_date(self, inode: manifest.AnyInode) -> manifest.AnyInode:
        if not isinstance(inode, manifest.File) or not inode.fid:
            return inode
        record = self._kit.holder(bytes.fromhex(inode.fid))
        if record is None or manifest.inode_id(record.handle) != inode.id:
            return inode
        return as_recorded(self._kit, record, inode)

    def _of_record(self, record: Record, above: manifest.AnyInode) -> manifest.File:
        """Owner and mode are not in it: it is its directory's owner's, and nobody else's."""
        times = record.copy.mtime if record.copy is not None else 0
        bare = manifest.File(
            manifest.inode_id(record.handle), _UNKNOWN_MODE, above.uid, above.gid, times, times,
            above.id, manifest.text(record.name), size=record.size, blocks=record.blocks,
        )  # fmt: skip
        return as_recorded(self._kit, record, bare)

    def _may_be(self, record: Record, path: bytes) -> bool:
        """The index's place of a file is a hint: another name that it had may be gone by now."""
        try:
            return os.stat(path, dir_fd=self._kit.tree.rootfd, follow_symlinks=False).st_ino == record.ino
        except FileNotFoundError:
            return False
        except OSError:
            return True  # it cannot be told


def _with_copy_of(known: manifest.AnyInode | None, told: manifest.File) -> manifest.File:
    """A file keeps its newest copy however it changes: where it has none by now the index was lost, and the one
    that the journal knew is what there is of it; all there is of it where nothing has touched it since."""
    if not isinstance(known, manifest.File) or known.copy is None:
        return told
    untouched = (told.size, told.mtime, told.ctime) == (known.size, known.mtime, known.ctime)
    same = untouched and not known.dirty
    return msgspec.structs.replace(
        told, fid=known.fid, generation=known.copy.generation + (not same), copy=known.copy,
        since=0 if same else told.since or told.mtime or 1, extents=known.extents,
        rescue=known.rescue, rescued=known.rescued,
    )  # fmt: skip
