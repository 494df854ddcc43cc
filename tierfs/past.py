"""What the index knows of the past: copies that a file has no more, and objects that nothing may ever refer to.

    table    key                               value       written by          resolved (removed) by
    tombs    beat, object key                  handle      `end`, `bury_found` collection; return of the file
    versions file id, generation, tag          Version     `end`               with its tombstone
    places   path (cut), that key              (empty)     `end`               with its tombstone
    orphans  beat, object key                  (empty)     `abandon`           collection
    intents  object key                        (empty)     copying, before PUT the copy's commit; `abandon`
    twins    object key, file handle           (empty)     looks at the tree   collection, once it is none
    beats    number                            believed s  collection          once no tombstone is older
    lists    number of the beat it was made in Listed      collection          once all on it is gone

A *beat* is one look at the store's own date (policy/aging.py). What is buried carries the number of the last
beat before; it is as old as the first beat after that. Numbers only grow, so that a published list (all up to
some beat) never gets longer afterwards. A *twin* is a stub without a record of its own: a backing file that
was copied with its attributes behind the mount. Its object is another file's.
"""

from __future__ import annotations

import logging
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec

from tierfs.errors import IndexDamagedError, IndexError_
from tierfs.model import Record, object_key
from tierfs.policy.aging import Clock

log = logging.getLogger("index")

R = TypeVar("R")
U64 = struct.Struct(">Q")
_CRC = struct.Struct("<I")
_PATH_MOST = 440  # bytes; LMDB's keys have at most 511
_DEPTH = 4096
_KEY_SIZE = 16 + 8 + 8
Buried = tuple[int, str]  # the beat before, the object's key
_OBJECT = rb"data/[0-9a-f]{2}/[0-9a-f]{32}/[0-9a-f]{12}-[0-9a-f]{16}"
_is_object = re.compile(_OBJECT).fullmatch
# What a key can look like: one that cannot be is damaged, and passed over.
KEY_FORMS = {
    table: re.compile(form, re.DOTALL)
    for table, form in {
        **dict.fromkeys(("files", "dirty", "bits", "pins", "dirs", "pending", "beats", "lists"), rb".{8}"),
        "quiet": rb".{16}",
        "changes": rb".{8,263}",
        "leaves": rb".{24}",
        "rescues": rb".{16}",
        "tombs": rb".{8}" + _OBJECT,
        "orphans": rb".{8}" + _OBJECT,
        "intents": _OBJECT,
        "twins": _OBJECT + rb"\0.+",
        "versions": rb".{32}",
        "places": rb".*\0.{32}",
    }.items()
}
PAST_TABLES = ("tombs", "versions", "places", "orphans", "intents", "twins", "beats", "lists")


def is_object(key: str) -> bool:
    """Whether a file's content could stand under this key; others may have put anything into the store."""
    return _is_object(key.encode()) is not None


def summed(value: bytes) -> bytes:
    """With its CRC."""
    return _CRC.pack(zlib.crc32(value)) + value


def checked(what: str, raw: bytes) -> bytes:
    """Without its CRC. Raises IndexError_ where that is wrong."""
    if len(raw) < _CRC.size or zlib.crc32(raw[_CRC.size :]) != _CRC.unpack_from(raw)[0]:
        raise IndexError_(f"the index's {what} is damaged: run `tierfs check --repair`")
    return raw[_CRC.size :]


def whole(read: Callable[[Any, bytes], R], what: Any, raw: bytes) -> R | None:
    """A value as `read` finds it; None where it is damaged: what is not known is found out anew.

    Without its record a file is not punched, its stub attribute says what to read, and the next look through
    the tree or `tierfs check --repair` makes a record. Bitmaps and places are hints, digests are fetched again.
    """
    try:
        return read(what, raw)
    except (IndexError_, struct.error, ValueError) as error:
        log.error("%s", error)
        return None


def ascending(table: str, rows: Iterator[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """The rows of a cursor but for those whose key cannot be. Raises IndexDamagedError where they are not in
    order: among damaged pages there are circles."""
    last: bytes | None = None
    form = KEY_FORMS[table].fullmatch
    for key, value in rows:
        if last is not None and key <= last:
            raise IndexDamagedError("the index's keys are not in order: run `tierfs check --repair`")
        last = key
        if form(key):
            yield key, value


def place(what: str, raw: bytes) -> tuple[int, bytes]:
    """An inode number and a name. Raises IndexError_."""
    body = checked(what, raw)
    return U64.unpack_from(body)[0], body[U64.size :]


class Version(msgspec.Struct, array_like=True, frozen=True):
    """A copy that its file has no more. Times in ns; `mode` 0: owner and mode were not known.

    The content was the file's from `begun` (at the latest) until `ended`; `deleted`: it ended with the file.
    `path` is where the file was then. `stale`: owner and mode were seen when the file had other content.
    """

    fid: bytes
    generation: int
    tag: bytes
    path: bytes
    size: int
    mtime: int
    begun: int
    ended: int
    digest: bytes
    chunk_shift: int
    deleted: bool
    mode: int
    uid: int
    gid: int
    beat: int
    stale: bool = False

    @property
    def key(self) -> str:
        """The object's key."""
        return object_key(self.fid, self.generation, self.tag)


class Listed(msgspec.Struct, array_like=True, frozen=True):
    """A published list: all tombstones and orphans up to these beats (-1: none), in objects `key`0 and so on.

    `at` is believed time in seconds.
    """

    number: int
    tombs: int
    orphans: int
    at: float
    key: str
    parts: int


class Ending(msgspec.Struct, frozen=True):
    """The end of a copy, besides what its record says: when (ns), where, and the file's last attributes."""

    at: int
    deleted: bool = True
    parent: int = 0
    name: bytes = b""
    path: bytes = b""
    mode: int = 0
    uid: int = 0
    gid: int = 0


class Garbage(msgspec.Struct):
    """Part of the meta value: the last beat's number and clock, the inode number of the tree's root, and the
    beats before which the last two durable snapshots of the namespace were begun."""

    beat: int = 0
    believed: float = 0.0
    server: float = 0.0
    uptime: float = 0.0
    boot: str = ""
    root: int = 0
    snapshots: tuple[int, int] = (-1, -1)

    @property
    def clock(self) -> Clock:
        """As of the last beat."""
        return Clock(self.believed, self.server, self.uptime, self.boot)


def _id(fid: bytes, generation: int, tag: bytes) -> bytes:
    return fid + U64.pack(generation) + tag


def _split(key: str) -> bytes:
    """The id of a version from its object key."""
    _, _, name, version = key.split("/")
    generation, _, tag = version.partition("-")
    return _id(bytes.fromhex(name), int(generation, 16), bytes.fromhex(tag))


def _place_key(path: bytes, ident: bytes) -> bytes:
    return path[:_PATH_MOST] + b"\0" + ident


class PastWriter:
    """The part of a write transaction that is about the past."""

    _txn: Any
    _db: dict[str, Any]

    @property
    def past(self) -> Garbage:
        """What the meta value says of garbage; may be changed."""
        raise NotImplementedError

    def set_root(self, ino: int) -> None:
        """The inode number of the tree's root, at which paths begin."""
        self.past.root = ino

    def place_of(self, parent: int, name: bytes) -> bytes:
        """A path from the hints of directories; begins with `?/` where they do not lead up to the root."""
        parts = [name]
        for _ in range(_DEPTH):
            if parent == self.past.root:
                break
            raw = self._txn.get(U64.pack(parent), db=self._db["dirs"])
            if raw is None:
                parts.append(b"?")
                break
            found = whole(place, f"directory {parent}", raw)
            if found is None:
                parts.append(b"?")
                break
            parent, above = found
            parts.append(above)
        return b"/".join(reversed(parts))

    def end(self, record: Record, ending: Ending) -> None:
        """The record's copy is not the file's any more: it becomes a version, to be collected in time."""
        copy = record.copy
        if copy is None:
            return
        parent, name = (ending.parent, ending.name) if ending.name else (record.parent, record.name)
        ident = _id(record.fid, copy.generation, copy.tag)
        self._drop_version(ident)
        version = Version(
            record.fid, copy.generation, copy.tag, ending.path or self.place_of(parent, name), copy.size,
            copy.mtime, copy.ctime, max(ending.at, copy.ctime), copy.digest, copy.chunk_shift, ending.deleted,
            ending.mode, ending.uid, ending.gid, self.past.beat, record.dirty,
        )  # fmt: skip
        self._txn.put(ident, summed(msgspec.msgpack.encode(version)), db=self._db["versions"])
        self._txn.put(_place_key(version.path, ident), b"", db=self._db["places"])
        self._txn.put(U64.pack(self.past.beat) + version.key.encode(), record.handle, db=self._db["tombs"])

    def _drop_version(self, ident: bytes) -> None:
        """With its place and its tombstone: also of one that has come back and ends a second time."""
        raw = self._txn.get(ident, db=self._db["versions"])
        if raw is None:
            return
        version = _decode(raw)
        if version is not None:  # of a damaged one the tombstone stays, and goes when its time is over
            self._txn.delete(_place_key(version.path, ident), db=self._db["places"])
            self._txn.delete(U64.pack(version.beat) + version.key.encode(), db=self._db["tombs"])
        self._txn.delete(ident, db=self._db["versions"])

    def drop_tombstone(self, beat: int, key: str) -> None:
        """That object is gone from the store, or in use again."""
        self._txn.delete(U64.pack(beat) + key.encode(), db=self._db["tombs"])
        self._drop_version(_split(key))

    def intend(self, key: str) -> None:
        """An object with this key is about to be put."""
        self._txn.put(key.encode(), b"", db=self._db["intents"])

    def intended(self, key: str) -> bool:
        """The key is one that is being put."""
        return self._txn.get(key.encode(), db=self._db["intents"]) is not None

    def fulfil(self, key: str) -> None:
        """A record refers to the object now, or it was never put."""
        self._txn.delete(key.encode(), db=self._db["intents"])

    def abandon(self, key: str) -> None:
        """Nothing has ever referred to this object, or will, if it is there at all."""
        self._txn.delete(key.encode(), db=self._db["intents"])
        self._txn.put(U64.pack(self.past.beat) + key.encode(), b"", db=self._db["orphans"])

    def bury_found(self, key: str) -> None:
        """An object in the store that nothing refers to: of a former index, perhaps. Kept as versions are."""
        self._txn.put(U64.pack(self.past.beat) + key.encode(), b"", db=self._db["tombs"])

    def abandon_all(self) -> None:
        """What a mover that was killed was putting. Before this one puts anything."""
        for key in self._intended():
            self.abandon(key)

    def drop_orphan(self, beat: int, key: str) -> None:
        """That object is gone from the store."""
        self._txn.delete(U64.pack(beat) + key.encode(), db=self._db["orphans"])

    def taken_over(self) -> None:
        """Others have had the store since this index was last used (a machine that was rolled back has taken it
        by force): what was being put may be a file's by now, and the last snapshots are not ours."""
        self.past.snapshots = (-1, -1)
        for key in self._intended():
            self._txn.delete(key.encode(), db=self._db["intents"])
            self.bury_found(key)

    def _intended(self) -> list[str]:
        with self._txn.cursor(db=self._db["intents"]) as cursor:
            return [bytes(key).decode() for key in cursor.iternext(values=False)]

    def note_twin(self, key: str, handle: bytes) -> None:
        """The file with this handle is a stub of that object, and has no record."""
        self._txn.put(key.encode() + b"\0" + handle, b"", db=self._db["twins"])

    def drop_twin(self, key: str, handle: bytes) -> None:
        """It is none any more."""
        self._txn.delete(key.encode() + b"\0" + handle, db=self._db["twins"])

    def beat(self, clock: Clock) -> int:
        """The next beat, at this time; its number."""
        past = self.past
        past.beat += 1
        past.believed, past.server = clock.believed, clock.server
        past.uptime, past.boot = clock.uptime, clock.boot
        value = summed(struct.pack("<d", clock.believed))
        self._txn.put(U64.pack(past.beat), value, db=self._db["beats"])
        return past.beat

    def forget_beats(self, before: int) -> None:
        """Nothing that is buried needs the beats before this one."""
        with self._txn.cursor(db=self._db["beats"]) as cursor:
            while cursor.first() and U64.unpack(cursor.key())[0] < before:
                cursor.delete()

    def note_snapshot(self, beat: int) -> None:
        """A snapshot of the namespace is durable; it was begun when this was the last beat."""
        self.past.snapshots = (self.past.snapshots[1], beat)

    def put_list(self, listed: Listed) -> None:
        """A list has been published."""
        value = summed(msgspec.msgpack.encode(listed))
        self._txn.put(U64.pack(listed.number), value, db=self._db["lists"])

    def drop_list(self, number: int) -> None:
        """All on it is gone."""
        self._txn.delete(U64.pack(number), db=self._db["lists"])


class PastReader:
    """The part of the index's view that is about the past. Every method may raise IndexError_."""

    def _get(self, table: str, key: bytes) -> bytes | None:
        raise NotImplementedError

    def _scan(self, table: str, start: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        raise NotImplementedError

    def _walk(self, table: str, prefix: bytes, page: int = 1000) -> Iterator[tuple[bytes, bytes]]:
        """All rows whose key starts with the prefix, each page in a transaction of its own."""
        start = prefix
        while True:
            rows = self._scan(table, start, page)
            for key, value in rows:
                if not key.startswith(prefix):
                    return
                yield key, value
            if len(rows) < page:
                return
            start = rows[-1][0] + b"\0"

    def tombstones(self, upto: int, after: Buried | None = None, limit: int = 1000) -> list[Buried]:
        """What was buried up to this beat, oldest first, behind `after`."""
        return self._buried("tombs", upto, after, limit)

    def orphans(self, upto: int, after: Buried | None = None, limit: int = 1000) -> list[Buried]:
        """What was abandoned up to this beat."""
        return self._buried("orphans", upto, after, limit)

    def _buried(self, table: str, upto: int, after: Buried | None, limit: int) -> list[Buried]:
        start = U64.pack(after[0]) + after[1].encode() + b"\0" if after is not None else b""
        rows = [(U64.unpack_from(key)[0], key[8:].decode()) for key, _ in self._scan(table, start, limit)]
        return [(beat, key) for beat, key in rows if beat <= upto]

    def tombstone_handle(self, beat: int, key: str) -> bytes:
        """The file handle that a buried object's file had."""
        return self._get("tombs", U64.pack(beat) + key.encode()) or b""

    def twins(self, key: str) -> list[bytes]:
        """The handles of files that were seen as stubs of this object, without a record."""
        prefix = key.encode() + b"\0"
        return [found[len(prefix) :] for found, _ in self._walk("twins", prefix)]

    def intents(self) -> list[str]:
        """The keys that are being put."""
        return [key.decode() for key, _ in self._walk("intents", b"")]

    def version(self, key: str) -> Version | None:
        """The version with this object key."""
        raw = self._get("versions", _split(key))
        return None if raw is None else _decode(raw)

    def versions_of(self, fid: bytes) -> list[Version]:
        """The former copies of a file, oldest first."""
        found = [_decode(raw) for _, raw in self._walk("versions", fid)]
        return [version for version in found if version is not None]

    def versions_at(self, path: bytes) -> list[Version]:
        """Versions that ended at this very path."""
        return [v for v in self._placed(_place_key(path, b"")) if v.path == path]

    def versions_beneath(self, path: bytes) -> Iterator[Version]:
        """Versions that ended beneath this directory; b"" is the root."""
        prefix = path + b"/" if path else b""
        return (v for v in self._placed(prefix[:_PATH_MOST]) if v.path.startswith(prefix))

    def _placed(self, prefix: bytes) -> Iterator[Version]:
        for key, _ in self._walk("places", prefix):
            raw = self._get("versions", key[-_KEY_SIZE:])
            version = _decode(raw) if raw is not None else None
            if version is not None:
                yield version

    def beats(self, first: int = 0, limit: int = 1 << 20) -> list[tuple[int, float]]:
        """(number, believed time in seconds) from this one on."""
        rows = self._scan("beats", U64.pack(first), limit)
        return [(U64.unpack(key)[0], struct.unpack("<d", checked("beat", raw))[0]) for key, raw in rows]

    def lists(self) -> list[Listed]:
        """The published lists, oldest first."""
        rows = self._scan("lists", b"", 1 << 20)
        return [msgspec.msgpack.decode(checked("list of garbage", raw), type=Listed) for _, raw in rows]


def _decode(raw: bytes) -> Version | None:
    """None of a damaged one: its object is kept as long, and not named."""
    body = whole(checked, "version", raw)
    return None if body is None else msgspec.msgpack.decode(body, type=Version)
