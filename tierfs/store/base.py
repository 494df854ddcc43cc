"""What TierFS asks of a place where copies live. Keys are text, objects immutable, all calls thread-safe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

Body = bytes | memoryview
PART = 8 << 20  # bytes; parts of an object are whole multiples of it


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a server was seen to do when the volume was created (probed, never assumed)."""

    conditional_put: bool = False
    partial_content: bool = False
    checks_sha256: bool = False
    client: str = ""
    bulk_delete: bool = True
    needs_sums: bool = False  # nothing is taken without one: of objects that are to be retained


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object: size in bytes, `modified` in seconds since the epoch by the store's own clock."""

    key: str
    size: int
    etag: str
    modified: float


@dataclass(frozen=True, slots=True)
class Put:
    """The answer to a put. `verified`: the store checks SHA-256 sums and accepted that of these bytes. So many
    of them as `copied` says were not sent, but taken from other objects."""

    etag: str
    verified: bool
    copied: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an object that is put: its bytes, and the object (`key`) that has the same ones from byte
    `start` on, as far as is known; "": none."""

    body: bytes
    key: str = ""
    start: int = 0


class ObjectStore(ABC):
    """A flat map from keys to immutable byte strings.

    Every method may raise StoreUnavailableError, StoreThrottledError, StoreDeniedError, BucketMissingError.
    """

    capabilities: Capabilities = Capabilities()

    @abstractmethod
    def put(self, key: str, body: bytes | Iterable[bytes], size: int) -> Put:
        """Write an object of exactly `size` bytes, durably; readers see all of it or nothing.

        Raises StoreFullError; ObjectCorruptError where the body is not `size` bytes long.
        """

    def part_size(self, size: int) -> int:
        """Bytes of a part of an object of this size, whole multiples of PART, where a part that another object
        has need not be sent (see `put_parts`); 0: all is sent in any case."""
        return 0

    def put_parts(self, key: str, parts: Iterable[Part], size: int) -> Put:
        """As `put`, in parts of `part_size(size)` bytes but for the last. What another object has may be taken
        from there: where that cannot be, or is seen to be something else, the part's own bytes are sent. Only a
        `verified` answer says that the object's bytes are those of the parts.

        Raises as `put`; ObjectCorruptError also where the server makes something else of it: nothing is put.
        """
        return self.put(key, (part.body for part in parts), size)

    @abstractmethod
    def put_if(self, key: str, body: bytes, etag: str | None) -> Put:
        """Write only if the object's etag is `etag` (None: only if there is no object).

        Raises PreconditionError. Without `capabilities.conditional_put` this is check-then-write, not atomic.
        """

    @abstractmethod
    def get(self, key: str, start: int = 0, length: int | None = None) -> Body:
        """Bytes [start, start + length), all of them; a view where the client's own buffer can be handed on.

        Raises ObjectMissingError; ObjectCorruptError if short.
        """

    @abstractmethod
    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """As `get`, in pieces of a few MiB. Raises as `get`, also midway."""

    def pieces(self, key: str, start: int, length: int) -> Iterator[Body]:
        """As `get`, in pieces of whole leaves as they come. What reads them one by one finds each in the
        processor's cache: a piece is good until the next is asked for, or this is closed. Raises as `get`, also
        midway."""
        if length:
            yield self.get(key, start, length)

    @abstractmethod
    def head(self, key: str) -> ObjectInfo:
        """Size and etag. Raises ObjectMissingError."""

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; absent ones are no error."""

    @abstractmethod
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix`, in any order."""

    def abort_uploads(self, prefix: str, before: float, keep: Collection[str]) -> int:
        """Give up uploads in parts of keys beginning with `prefix` that have not ended and were begun before
        this date of the store's clock, but for those of `keep`; how many. Most stores have no such thing."""
        return 0

    @abstractmethod
    def describe(self) -> str:
        """The store's URL without secrets."""

    def close(self) -> None:  # noqa: B027  (most stores hold nothing)
        """Release connections and descriptors; no call may follow."""
