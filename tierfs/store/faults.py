"""A store that fails on order: errors, delays, hangs, short and altered bodies, lost answers. For tests."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tierfs.errors import ObjectCorruptError, StoreUnavailableError, TierError
from tierfs.store.base import Body, ObjectInfo, ObjectStore, Part, Put
from tierfs.store.decorators import Decorator

T = TypeVar("T")


class Kind(enum.Enum):
    """What goes wrong."""

    ERROR = "error"  # `error` instead of the operation
    LOST = "lost"  # the operation is done, then `error`: nobody knows that it was
    DELAY = "delay"  # `seconds` later than asked
    HANG = "hang"  # no answer until `release`, then `error`; at most `seconds`
    SHORT = "short"  # a read: half of the bytes (of a stream), then ObjectCorruptError
    FLIP = "flip"  # a read: one bit of the first piece is another


@dataclass
class Fault:
    """The next `times` operations of this name ("*": any) on keys with this prefix, after `skip` others."""

    kind: Kind
    operation: str = "*"
    prefix: str = ""
    times: float = 1
    skip: int = 0
    seconds: float = 0.0
    error: TierError = field(default_factory=lambda: StoreUnavailableError("injected: the store is away"))

    def takes(self, operation: str, key: str) -> bool:
        """Whether it strikes this operation; counts."""
        if self.operation not in ("*", operation) or not key.startswith(self.prefix) or self.times <= 0:
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class FaultyStore(Decorator):
    """`arm` faults, `disarm` all; `calls` counts operations by name. Thread-safe."""

    def __init__(self, inner: ObjectStore) -> None:
        super().__init__(inner)
        self.calls: dict[str, int] = {}
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._released = threading.Event()

    def arm(self, *faults: Fault) -> None:
        with self._lock:
            self._released.clear()
            self._faults += faults

    def disarm(self) -> None:
        with self._lock:
            self._faults.clear()
        self.release()

    def release(self) -> None:
        """Let what hangs fail now."""
        self._released.set()

    def put(self, key: str, body: bytes | Iterable[bytes], size: int) -> Put:
        return self._do("put", key, lambda: self.inner.put(key, body, size))

    def put_parts(self, key: str, parts: Iterable[Part], size: int) -> Put:
        """A write like `put`, and counted as such."""
        return self._do("put", key, lambda: self.inner.put_parts(key, parts, size))

    def put_if(self, key: str, body: bytes, etag: str | None) -> Put:
        return self._do("put_if", key, lambda: self.inner.put_if(key, body, etag))

    def get(self, key: str, start: int = 0, length: int | None = None) -> Body:
        fault = self._strike("get", key)
        if fault and fault.kind is Kind.SHORT:
            raise ObjectCorruptError(f"injected: {key} is shorter than recorded")
        data = self.inner.get(key, start, length)
        return self._after(fault, _flip(bytes(data)) if fault and fault.kind is Kind.FLIP else data)

    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        fault = self._strike("stream", key)
        first = True
        for piece in self.inner.stream(key, start, length):
            if fault and fault.kind is Kind.SHORT:
                yield piece[: len(piece) // 2]
                raise ObjectCorruptError(f"injected: {key} is shorter than recorded")
            yield _flip(piece) if first and fault and fault.kind is Kind.FLIP else piece
            self._after(fault, None)
            first = False

    def pieces(self, key: str, start: int, length: int) -> Iterator[Body]:
        """A read like `get`, and counted as such."""
        fault = self._strike("get", key)
        given = 0
        for piece in self.inner.pieces(key, start, length):
            if fault and fault.kind is Kind.SHORT and 2 * (given + len(piece)) > length:
                raise ObjectCorruptError(f"injected: {key} is shorter than recorded")
            flipped = fault and fault.kind is Kind.FLIP and 2 * given <= length < 2 * (given + len(piece))
            given += len(piece)
            yield _flip(bytes(piece)) if flipped else piece
        self._after(fault, None)

    def head(self, key: str) -> ObjectInfo:
        return self._do("head", key, lambda: self.inner.head(key))

    def delete(self, keys: Sequence[str]) -> None:
        self._do("delete", keys[0] if keys else "", lambda: self.inner.delete(keys))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._do("list", prefix, lambda: self.inner.list(prefix))

    def close(self) -> None:
        self.disarm()
        super().close()

    def _do(self, operation: str, key: str, action: Callable[[], T]) -> T:
        fault = self._strike(operation, key)
        return self._after(fault, action())

    def _strike(self, operation: str, key: str) -> Fault | None:
        """What is to happen to this operation; what happens before it happens here."""
        with self._lock:
            self.calls[operation] = self.calls.get(operation, 0) + 1
            fault = next((each for each in self._faults if each.takes(operation, key)), None)
        if fault is None:
            return None
        if fault.kind in (Kind.DELAY, Kind.HANG):
            self._released.wait(fault.seconds or None)
        if fault.kind in (Kind.ERROR, Kind.HANG):
            raise fault.error
        return fault

    def _after(self, fault: Fault | None, result: T) -> T:
        if fault and fault.kind is Kind.LOST:
            raise fault.error
        return result


def _flip(data: bytes) -> bytes:
    """`data` with one bit in the middle changed."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else data
