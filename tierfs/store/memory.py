"""A store in this process's memory: real, complete, and gone with the process. For tests and simulations."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

from tierfs.errors import ObjectMissingError, PreconditionError
from tierfs.store.base import Body, Capabilities, ObjectInfo, ObjectStore, Put
from tierfs.store.keys import check_key, check_prefix, check_range, too_short, whole

_PIECE = 2 * 1024 * 1024


class MemoryStore(ObjectStore):
    """Objects in a dictionary. `verifies`: puts claim to have been checked by the store."""

    def __init__(self, verifies: bool = False) -> None:
        self.capabilities = Capabilities(
            conditional_put=True, partial_content=True, checks_sha256=verifies, client="memory"
        )
        self._lock = threading.Lock()
        self._objects: dict[str, tuple[bytes, ObjectInfo]] = {}
        self._versions = itertools.count(1)

    def put(self, key: str, body: bytes | Iterable[bytes], size: int) -> Put:
        check_key(key)
        data = whole(key, body, size)
        with self._lock:
            return self._write(key, data)

    def put_if(self, key: str, body: bytes, etag: str | None) -> Put:
        check_key(key)
        with self._lock:
            present = self._objects.get(key)
            if (present[1].etag if present else None) != etag:
                raise PreconditionError(f"{key} is not the expected version")
            return self._write(key, bytes(body))

    def _write(self, key: str, data: bytes) -> Put:
        etag = f'"{next(self._versions)}"'
        self._objects[key] = (data, ObjectInfo(key, len(data), etag, time.time()))
        return Put(etag, self.capabilities.checks_sha256)

    def get(self, key: str, start: int = 0, length: int | None = None) -> Body:
        check_range(start, length)
        data, _ = self._find(key)
        end = len(data) if length is None else start + length
        if start > len(data) or end > len(data):
            raise too_short(key, start, length, max(0, len(data) - start))
        return data[start:end]

    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        data = bytes(self.get(key, start, length))
        for offset in range(0, len(data), _PIECE):
            yield data[offset : offset + _PIECE]

    def head(self, key: str) -> ObjectInfo:
        return self._find(key)[1]

    def _find(self, key: str) -> tuple[bytes, ObjectInfo]:
        check_key(key)
        with self._lock:
            found = self._objects.get(key)
        if found is None:
            raise ObjectMissingError(f"no object {key} in {self.describe()}")
        return found

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            check_key(key)
        with self._lock:
            for key in keys:
                self._objects.pop(key, None)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        with self._lock:
            found = [info for key, (_, info) in self._objects.items() if key.startswith(prefix)]
        yield from found

    def describe(self) -> str:
        return "memory:"
