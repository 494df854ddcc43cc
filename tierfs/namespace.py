"""The namespace as a store's journal tells it: of now, or of a moment in the past. Nothing here writes.

    journal = Chronicle(store)                  lists `meta/`
    tree = journal.read()                       the newest tree
    tree = journal.read(until=when_ns)          as of a moment: all segments written up to then
    for path, inode in tree.walk(): ...         every name, directories before what is in them

What is damaged, missing or another volume's is named in `Chronicle.troubles` and passed over where that is
safe: an older snapshot takes the place of a broken one, and where a segment is missing the later ones are
applied all the same, since lines say how things are.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import NamedTuple

import msgspec

from tierfs import manifest
from tierfs.errors import ObjectCorruptError, ObjectMissingError, PathError, VolumeError
from tierfs.manifest import AnyInode, Change, Directory, File, Gone, Key, Opened
from tierfs.store.base import ObjectStore

log = logging.getLogger("journal")

_AT_ONCE = 16
_PARTS_AT_ONCE = 4  # each takes a processor while it is looked at
MOST_DEPTH = 2000  # directories below each other
_ID = "-"  # in place of a packed line's own
_encoder = msgspec.msgpack.Encoder()
_unpack = msgspec.msgpack.Decoder(AnyInode).decode


class Inodes(MutableMapping[str, AnyInode]):
    """Lines by the ids of what they describe. What they say of a name is left out: the name says that.

    Kept packed: of a tree's million files lines as they are used would take two gigabytes.
    """

    def __init__(self) -> None:
        self._packed: dict[str, bytes] = {}
        self._buffer = bytearray()

    def __getitem__(self, ident: str) -> AnyInode:
        inode: AnyInode = _unpack(self._packed[ident])
        return msgspec.structs.replace(inode, id=ident)

    def __setitem__(self, ident: str, inode: AnyInode) -> None:
        # What is encoded at once stays in the kilobyte that was there for the longest.
        _encoder.encode_into(msgspec.structs.replace(inode, id=_ID, dir="", name=""), self._buffer)
        self._packed[ident] = bytes(self._buffer)

    def __delitem__(self, ident: str) -> None:
        del self._packed[ident]

    def __contains__(self, ident: object) -> bool:
        return ident in self._packed

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


class Tree:
    """Inodes by id, and names by directory. Lines are applied in order."""

    def __init__(self) -> None:
        self.inodes = Inodes()
        self.names: dict[str, dict[str, str]] = {}
        self.root = ""

    def apply(self, line: Change) -> None:
        """Take in one line."""
        if isinstance(line, Gone):
            self.names.get(line.dir, {}).pop(line.name, None)
            return
        self.inodes[line.id] = line
        if line.name:
            self.names.setdefault(line.dir, {})[line.name] = line.id
        if isinstance(line, Directory) and line.root:
            self.root = line.id

    def children(self, ident: str) -> Iterator[tuple[bytes, AnyInode]]:
        """The names in a directory. What no line describes, or cannot be a name, is left out."""
        for text, child in self.names.get(ident, {}).items():
            inode = self.inodes.get(child)
            name = name_of(text)
            if inode is not None and name is not None:
                yield name, inode

    def walk(self) -> Iterator[tuple[bytes, AnyInode]]:
        """(path, inode) of every name that can be reached from the root, b"" first. A directory is entered
        once, whatever the lines say."""
        root = self.inodes.get(self.root)
        if root is None:
            return
        yield b"", root
        entered = {self.root}
        pending = [(b"", self.root, 0)]
        while pending:
            path, ident, depth = pending.pop()
            for name, inode in self.children(ident):
                below = path + b"/" + name if path else name
                if isinstance(inode, Directory):
                    if inode.id in entered or depth >= MOST_DEPTH:
                        continue
                    entered.add(inode.id)
                    pending.append((below, inode.id, depth + 1))
                yield below, inode

    def find(self, path: bytes) -> AnyInode | None:
        """What is at a path; None where there is nothing."""
        ident = self.root
        for name in path.split(b"/") if path else []:
            child = self.names.get(ident, {}).get(manifest.text(name))
            if child is None:
                return None
            ident = child
        return self.inodes.get(ident)

    def beneath(self, path: bytes) -> Tree:
        """What is in one directory, as a tree of its own. Raises PathError where the path leads to none."""
        top = self.find(path)
        if not isinstance(top, Directory):
            raise PathError(f"{os.fsdecode(path)}: is no directory of this volume as of then")
        below = Tree()
        below.root = top.id
        pending: list[AnyInode] = [top]
        while pending:
            inode = pending.pop()
            if inode.id in below.inodes:
                continue
            below.inodes[inode.id] = inode
            if isinstance(inode, Directory):
                below.names[inode.id] = self.names.get(inode.id, {})
                pending += [child for _, child in self.children(inode.id)]
        return below

    def files(self) -> Iterator[File]:
        """All regular files that lines describe, whether or not a name leads to them."""
        return (inode for inode in self.inodes.values() if isinstance(inode, File))


def name_of(text: str) -> bytes | None:
    """The bytes of a name in a directory; None for what can be none: empty, `.`, `..`, with slash or NUL."""
    try:
        name = manifest.raw(text)
    except ValueError:
        return None
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name or len(name) > 255:
        return None
    return name


class _Snapshot(NamedTuple):
    """A whole one. `at`: when its last part was written."""

    parts: list[Opened]
    at: int

    @property
    def place(self) -> tuple[int, int, int]:
        head = self.parts[0].head
        return head.epoch, head.sequence, self.at


class Chronicle:
    """The journal of one store. `volume`: refuse any other's (""  : that of the newest whole snapshot)."""

    def __init__(self, store: ObjectStore, volume: str = "") -> None:
        """Lists `meta/`. Raises StoreError."""
        self._store = store
        self.volume = volume
        self.troubles: list[str] = []
        self.at = 0  # when what was last read was written
        self.missing = 0  # segments that should be there
        keys = [key for info in store.list(manifest.PREFIX) if (key := Key.parse(info.key)) is not None]
        self._segments = sorted(key for key in keys if key.part < 0)
        self._parts: dict[tuple[int, int, str], list[Key]] = {}
        for key in sorted(keys):
            if key.part >= 0:
                self._parts.setdefault(key[:3], []).append(key)

    @property
    def empty(self) -> bool:
        """There is no journal."""
        return not self._segments and not self._parts

    def read(self, until: int | None = None) -> Tree:
        """The tree, as of a moment (ns since the epoch) or as it is known last.

        Raises VolumeError where there is no whole snapshot to begin with, StoreError.
        """
        self.troubles, self.missing = [], 0
        snapshot = self._snapshot(until)
        tree = Tree()
        for part in snapshot.parts:
            for line in part.lines(self._trouble):
                tree.apply(line)
        self.at = snapshot.at
        for segment in self._follow(snapshot, until):
            for line in segment.lines(self._trouble):
                tree.apply(line)
            self.at = max(self.at, segment.end.at)
        if not isinstance(tree.inodes.get(tree.root), Directory):
            raise VolumeError(f"{self._store.describe()}: its journal has no root directory")
        return tree

    # --- snapshots ----------------------------------------------------------------------------------------

    def _snapshot(self, until: int | None) -> _Snapshot:
        """The newest whole one; that was whole at the moment."""
        oldest: _Snapshot | None = None
        for _, attempts in groupby(self._newest_first(), key=lambda group: group[:2]):
            opened = [self._open_snapshot(self._parts[group]) for group in attempts]
            whole = [snapshot for snapshot in opened if snapshot is not None]
            for snapshot in sorted(whole, key=lambda one: one.at, reverse=True):
                if until is None or snapshot.at <= until:
                    return snapshot
                oldest = snapshot
        if oldest is not None:
            return oldest  # the moment lies before the first: this is the nearest there is
        what = "; ".join(self.troubles[:3]) or "it has not been written yet"
        raise VolumeError(f"{self._store.describe()}: holds no whole snapshot of a namespace: {what}")

    def _newest_first(self) -> list[tuple[int, int, str]]:
        """Attempts from the same place are together."""
        return sorted(self._parts, reverse=True)

    def _open_snapshot(self, keys: list[Key]) -> _Snapshot | None:
        last = self._open(keys[-1])
        if last is None or not last.end.last or [key.part for key in keys] != list(range(len(keys))):
            if last is not None and last.end.last:
                self._trouble(f"{keys[-1]}: parts of this snapshot are missing")
            return None
        parts = [*self._open_many(keys[:-1], _PARTS_AT_ONCE), last]
        previous = ""
        for part in parts:
            if part is None or part.head.previous != previous:
                self._trouble(f"{keys[-1]}: a part of this snapshot is not its own")
                return None
            previous = part.digest
        return _Snapshot([part for part in parts if part is not None], last.end.at)

    # --- segments -----------------------------------------------------------------------------------------

    def _follow(self, snapshot: _Snapshot, until: int | None) -> Iterator[Opened]:
        """The segments behind a snapshot, in order."""
        head = snapshot.parts[0].head
        # A chain goes on through later mounts, never through earlier ones: an owner that was taken over from.
        later = [key for key in self._segments if key.sequence > head.sequence and key.epoch >= head.epoch]
        followers: dict[str, list[Opened]] = {}
        for segment in self._open_many(later):
            if segment is not None and segment.head.chain == head.chain:
                followers.setdefault(segment.head.previous, []).append(segment)
        digest, reached, through = head.base, head.sequence, snapshot.parts[-1].end.through
        while True:
            choice = followers.pop(digest, [])
            if not choice:
                rest = [s for group in followers.values() for s in group if s.head.sequence > reached + 1]
                if not rest:
                    break
                following = min(rest, key=lambda s: s.head.sequence)
                self._lost(reached + 1, following.head.sequence - 1)
                digest = following.head.previous
                continue
            # Of two attempts at one segment the one that others build upon counts, else the later one.
            best = max(choice, key=lambda s: (s.digest in followers, s.head.position, s.head.at))
            if until is not None and best.end.at > until and best.head.sequence > through:
                return
            yield best
            digest, reached = best.digest, best.head.sequence
        if reached < through:
            self._lost(reached + 1, through)

    def _lost(self, first: int, last: int) -> None:
        self.missing += last - first + 1
        which = f"{first}" if first == last else f"{first} to {last}"
        self._trouble(f"segment {which} of the journal is missing: changes of that time are not known")

    # --- objects ------------------------------------------------------------------------------------------

    def _open_many(self, keys: list[Key], at_once: int = _AT_ONCE) -> Iterator[Opened | None]:
        with ThreadPoolExecutor(at_once, "meta") as pool:
            yield from pool.map(self._open, keys)

    def _open(self, key: Key) -> Opened | None:
        """None, with a trouble noted, for what cannot be used. Raises StoreError where the store fails."""
        try:
            opened = manifest.unpack(key, self._store.get(str(key)))
        except (ObjectCorruptError, ObjectMissingError) as exc:
            self._trouble(str(exc))
            return None
        if not self.volume:
            self.volume = opened.head.volume
        if opened.head.volume != self.volume:
            self._trouble(f"{key}: is of another volume")
            return None
        return opened

    def _trouble(self, what: str) -> None:
        log.warning("%s", what)
        self.troubles.append(what)
