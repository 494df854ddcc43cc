"""The base of what is wrapped around a store: retry, throttle, faults. Each hands on the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from tierfs.errors import StoreDeniedError
from tierfs.store.base import Body, ObjectInfo, ObjectStore, Part, Put


class Decorator(ObjectStore):
    """A store that is another store, `inner`, with something about it changed."""

    def __init__(self, inner: ObjectStore) -> None:
        self.inner = inner
        self.capabilities = inner.capabilities

    def put(self, key: str, body: bytes | Iterable[bytes], size: int) -> Put:
        return self.inner.put(key, body, size)

    def part_size(self, size: int) -> int:
        return self.inner.part_size(size)

    def put_parts(self, key: str, parts: Iterable[Part], size: int) -> Put:
        return self.inner.put_parts(key, parts, size)

    def put_if(self, key: str, body: bytes, etag: str | None) -> Put:
        return self.inner.put_if(key, body, etag)

    def get(self, key: str, start: int = 0, length: int | None = None) -> Body:
        return self.inner.get(key, start, length)

    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        return self.inner.stream(key, start, length)

    def pieces(self, key: str, start: int, length: int) -> Iterator[Body]:
        return self.inner.pieces(key, start, length)

    def head(self, key: str) -> ObjectInfo:
        return self.inner.head(key)

    def delete(self, keys: Sequence[str]) -> None:
        self.inner.delete(keys)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self.inner.list(prefix)

    def abort_uploads(self, prefix: str, before: float, keep: Collection[str]) -> int:
        return self.inner.abort_uploads(prefix, before, keep)

    def describe(self) -> str:
        return self.inner.describe()

    def close(self) -> None:
        self.inner.close()


class ReadOnlyStore(Decorator):
    """Whatever asks for a change is told that there is none to be made."""

    def put(self, key: str, body: bytes | Iterable[bytes], size: int) -> Put:
        raise self._refused()

    def put_parts(self, key: str, parts: Iterable[Part], size: int) -> Put:
        raise self._refused()

    def put_if(self, key: str, body: bytes, etag: str | None) -> Put:
        raise self._refused()

    def delete(self, keys: Sequence[str]) -> None:
        raise self._refused()

    def abort_uploads(self, prefix: str, before: float, keep: Collection[str]) -> int:
        raise self._refused()

    def _refused(self) -> StoreDeniedError:
        return StoreDeniedError(f"{self.describe()}: a view of the past writes nothing")


def innermost(store: ObjectStore) -> ObjectStore:
    """The store beneath all decorators."""
    while isinstance(store, Decorator):
        store = store.inner
    return store
