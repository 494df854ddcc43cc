"""How the namespace journal stands in the store: objects of JSON lines, compressed with zstd, below `meta/`.

    meta/<epoch>-<sequence>-<tag>.segment.jsonl.zst             what has changed since the segment before it
    meta/<epoch>-<sequence>-<tag>.snapshot-<part>.jsonl.zst     the whole tree, in parts

The first line of each object is a `Head`, the last one an `End` with the number of lines between: what is cut
short, empty or another volume's is noticed. A segment names the SHA-256 of the (compressed) segment before it,
a part that of the part before it, so that a missing or exchanged one is noticed too.

Lines between say how things are, never how they became so: a later line about the same inode, or the same name
in the same directory, replaces an earlier one, and applying one twice changes nothing. Inodes go by an id that
is never used again (their kernel file handle). A line about an inode that carries `dir` and `name` also says
that this name in that directory is that inode. A snapshot is taken while the tree is in use: it is right
together with the segments behind its `sequence`, of which it was completed after the one numbered `through`.

Names and symbolic links are text; what is not UTF-8 is a NUL and then base64. Times are nanoseconds.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Annotated, Any, NamedTuple

import msgspec
import zstandard

from tierfs.errors import ObjectCorruptError
from tierfs.model import Copy, clamped

FORMAT = 1
PREFIX = "meta/"
SEGMENT, SNAPSHOT = "segment", "snapshot"
MOST_EXTENTS = 2000  # in one line; a file in more pieces is shown without holes until its first read

MOST_RAW = 1 << 28  # bytes of lines in one object, about: a reader takes four times as much
MOST_XATTRS = 1 << 22  # bytes of extended attributes in one line, a quarter of what a reader takes as a line

_LEVEL = 3
_MOST_BYTES = 1 << 30  # of one object, decompressed
_MOST_IN_LINE = 1 << 24
_READ_AT_ONCE = 1 << 16
_KEY = re.compile(r"meta/([0-9a-f]{8})-([0-9a-f]{8})-([0-9a-f]{16})\.(segment|snapshot-([0-9]{6}))\.jsonl\.zst")

U31 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
U32 = Annotated[int, msgspec.Meta(ge=0, lt=(1 << 32) - 1)]
U48 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]
# What 64 bits hold: to the year 2262 and 8 EiB. What a filesystem has beyond is told as the nearest of these.
Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Time = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Mode = Annotated[int, msgspec.Meta(ge=0, le=0o7777)]
Id = Annotated[str, msgspec.Meta(min_length=1, max_length=180)]


class Line(msgspec.Struct, tag_field="t", frozen=True, omit_defaults=True, gc=False):
    """Base of all lines."""


class Head(Line, tag="head", frozen=True, omit_defaults=True, gc=False):
    """The first line. `chain` names a run of segments without a gap in what they tell; only those of a
    snapshot's own chain continue it. `at` by the writer's clock; `position` in the mark log, so that of two
    attempts at one segment the later one is known."""

    format: int
    kind: str
    volume: str
    epoch: U32
    sequence: U32
    chain: str
    previous: str
    at: Time
    position: Size = 0
    part: U31 = 0
    base: str = ""  # snapshot: the digest of the segment numbered `sequence`


class End(Line, tag="end", frozen=True, omit_defaults=True, gc=False):
    """The last line. Of a snapshot's last part `last` is set."""

    lines: U31
    last: bool = False
    through: U32 = 0
    at: Time = 0


class CopyLine(msgspec.Struct, frozen=True, gc=False):
    """A verified object: `data/<2 hex>/<fid>/<generation, 12 hex>-<tag>`. `digest`: SHA-256 in hex, of the
    content, or where that is larger than 2**chunk bytes of the leaf digests in the object's `.leaves`."""

    generation: U48
    tag: str
    digest: str
    size: Size
    mtime: Time
    ctime: Time
    chunk: Annotated[int, msgspec.Meta(ge=12, le=31)]

    def copy(self) -> Copy:
        """As the index has it; no custody. Raises ValueError."""
        tag, digest = bytes.fromhex(self.tag), bytes.fromhex(self.digest)
        if len(tag) != 8 or len(digest) != 32:
            raise ValueError("a copy's tag or digest is of the wrong length")
        return Copy(self.generation, tag, digest, self.size, self.mtime, self.ctime, 0, self.chunk)

    @classmethod
    def of(cls, copy: Copy) -> CopyLine:
        """The line of a copy."""
        tag, digest = copy.tag.hex(), copy.digest.hex()
        return cls(copy.generation, tag, digest, copy.size, copy.mtime, copy.ctime, copy.chunk_shift)


class Inode(Line, frozen=True, omit_defaults=True, gc=False):
    """What every inode has. Without `name` the line says nothing about names."""

    id: Id
    mode: Mode
    uid: U32
    gid: U32
    mtime: Time
    ctime: Time
    dir: str = ""
    name: str = ""
    xattrs: dict[str, str] | None = None  # name -> base64
    pinned: bool = False


class File(Inode, tag="file", frozen=True, omit_defaults=True, gc=False):
    """A regular file. `copy` is its newest one, of an older generation where the file is dirty; `since` says
    since when it is known to be dirty (0: it is clean); `extents` are there where it has holes. `rescue` is
    what was read at `rescued` of a dirty file while somebody wrote it: newer than `copy`, and perhaps torn."""

    size: Size = 0
    blocks: Size = 0
    fid: str = ""
    generation: U48 = 0
    copy: CopyLine | None = None
    since: Time = 0
    extents: list[tuple[Size, Size]] | None = None
    rescue: CopyLine | None = None
    rescued: Time = 0

    @property
    def dirty(self) -> bool:
        """The store has no copy of its present content."""
        return self.copy is None or self.copy.generation != self.generation


class Directory(Inode, tag="dir", frozen=True, omit_defaults=True, gc=False):
    """A directory; `root`: the tree's own."""

    root: bool = False


class Symlink(Inode, tag="link", frozen=True, omit_defaults=True, gc=False):
    """A symbolic link."""

    target: str = ""


class Special(Inode, tag="special", frozen=True, omit_defaults=True, gc=False):
    """`kind`: fifo, socket, char or block; `rdev` as in stat."""

    kind: str = "fifo"
    rdev: Size = 0


class Gone(Line, tag="gone", frozen=True, omit_defaults=True, gc=False):
    """There is nothing of this name in this directory."""

    dir: Id
    name: Annotated[str, msgspec.Meta(min_length=1)]


Change = File | Directory | Symlink | Special | Gone
AnyInode = File | Directory | Symlink | Special

_TIMES = {"mtime", "ctime", "since", "rescued"}
_encoder = msgspec.json.Encoder()
_CHANGE: Any = Change
_lines: msgspec.json.Decoder[Change] = msgspec.json.Decoder(_CHANGE)
_heads = msgspec.json.Decoder(Head)
_ends = msgspec.json.Decoder(End)


# --- names -----------------------------------------------------------------------------------------------


def text(raw: bytes) -> str:
    """A name or a symbolic link's target as text."""
    try:
        plain = raw.decode()
    except UnicodeDecodeError:
        plain = "\0"
    return "\0" + base64.b64encode(raw).decode() if plain.startswith("\0") else plain


def raw(value: str) -> bytes:
    """The bytes behind `text`. Raises ValueError."""
    if value.startswith("\0"):
        return base64.b64decode(value[1:], validate=True)
    return value.encode()


def inode_id(handle: bytes) -> str:
    """The id of the inode with this kernel file handle."""
    return base64.urlsafe_b64encode(handle).decode().rstrip("=")


def handle_of(ident: str) -> bytes:
    """The kernel file handle behind `inode_id`. Raises ValueError."""
    return base64.urlsafe_b64decode(ident + "=" * (-len(ident) % 4))


# --- keys ------------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """What the name of an object says; ordered as the objects are. `part` is -1 for a segment."""

    epoch: int
    sequence: int
    tag: str
    part: int = -1

    def __str__(self) -> str:
        kind = SEGMENT if self.part < 0 else f"{SNAPSHOT}-{self.part:06d}"
        return f"{PREFIX}{self.epoch:08x}-{self.sequence:08x}-{self.tag}.{kind}.jsonl.zst"

    @classmethod
    def parse(cls, key: str) -> Key | None:
        """None for what is no key of a journal."""
        match = _KEY.fullmatch(key)
        if match is None:
            return None
        return cls(int(match[1], 16), int(match[2], 16), match[3], -1 if match[5] is None else int(match[5]))


# --- objects ---------------------------------------------------------------------------------------------


class Packer:
    """Collects the lines of one object."""

    def __init__(self, head: Head) -> None:
        self._compress = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compressobj()
        self._parts: list[bytes] = []
        self.lines = 0
        self.size = 0  # compressed bytes that have left the compressor
        self._raw = 0
        self._write(head)

    @property
    def full(self) -> bool:
        """More would be too much for who reads it, however well it can be compressed."""
        return self._raw >= MOST_RAW

    def _write(self, line: Line) -> None:
        text = _encoder.encode(line) + b"\n"
        self._raw += len(text)
        data = self._compress.compress(text)
        if data:
            self._parts.append(data)
            self.size += len(data)

    def add(self, line: Change) -> None:
        """One more line."""
        self._write(line)
        self.lines += 1

    def finish(self, at: int, *, last: bool = False, through: int = 0) -> bytes:
        """The object's bytes."""
        self._write(End(self.lines, last, through, at))
        self._parts.append(self._compress.flush())
        return b"".join(self._parts)


class Opened(NamedTuple):
    """An object of the journal that is whole and what its key says."""

    key: Key
    head: Head
    end: End
    digest: str
    data: bytes | memoryview  # compressed: a large tree's many parts are kept until all are known to be whole

    def lines(self, refuse: Callable[[str], None]) -> Iterator[Change]:
        """The lines between head and end, in order. `refuse` hears of those that make no sense: one that says
        what cannot be is no reason to have none of the others."""
        refused, why = 0, ""
        with _rows(self.data) as rows:
            for line in islice(rows, 1, 1 + self.end.lines):  # behind the head
                try:
                    yield _change(line)
                except msgspec.MsgspecError as exc:
                    refused, why = refused + 1, why or str(exc)
        if refused:
            refuse(f"{self.key}: {refused} of its lines make no sense and are left out, the first: {why}")


def _change(line: bytes) -> Change:
    """One line. Former versions wrote times that no reader takes. Raises MsgspecError."""
    try:
        return _lines.decode(line)
    except msgspec.ValidationError:
        fields = msgspec.json.decode(line, type=dict[str, Any])
        for name in _TIMES & fields.keys():
            if isinstance(fields[name], int):
                fields[name] = clamped(fields[name])
        change: Change = msgspec.convert(fields, _CHANGE)
        return change


def digest_of(data: bytes | memoryview) -> str:
    """How the object behind it names this one."""
    return hashlib.sha256(data).hexdigest()


def unpack(key: Key, data: bytes | memoryview) -> Opened:
    """Open an object; its lines are not decoded yet. Raises ObjectCorruptError unless it is whole and what its
    key says."""
    try:
        first, lines, final = _frame(data)
        head, end = _heads.decode(first), _ends.decode(final)
    except (zstandard.ZstdError, msgspec.MsgspecError, EOFError) as exc:
        raise ObjectCorruptError(f"{key}: is damaged: {exc}") from exc
    if head.format != FORMAT:
        raise ObjectCorruptError(f"{key}: has format {head.format}: this version of tierfs reads {FORMAT}")
    said = (head.epoch, head.sequence, head.kind, head.part)
    if said != (key.epoch, key.sequence, SNAPSHOT if key.part >= 0 else SEGMENT, max(key.part, 0)):
        raise ObjectCorruptError(f"{key}: is another object than its name says")
    if lines != end.lines:
        raise ObjectCorruptError(f"{key}: does not have the {end.lines} lines that it should")
    return Opened(key, head, end, digest_of(data), data)


def _frame(data: bytes | memoryview) -> tuple[bytes, int, bytes]:
    """First line, how many lines there are between, last line; nothing else is kept.

    Raises EOFError where it is too much: a few bytes may unpack to any number."""
    size, count, first, last = 0, 0, b"", b""
    with _rows(data) as rows:
        while line := rows.readline(_MOST_IN_LINE):
            size += len(line)
            if len(line) == _MOST_IN_LINE or size > _MOST_BYTES:
                raise EOFError("it unpacks to more than any object of a journal")
            count, first, last = count + 1, first or line, line
    return first, count - 2, last


def _rows(data: bytes | memoryview) -> io.BufferedReader:
    reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data)
    return io.BufferedReader(reader, _READ_AT_ONCE)
