"""From errors of the system, on files of a directory store, to our errors."""

from __future__ import annotations

import errno

from tierfs.errors import (
    ObjectMissingError,
    StoreDeniedError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
)
from tierfs.spelling import shown

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_DENIED = frozenset({errno.EACCES, errno.EPERM})
_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP})


class DiskErrors:
    """A context in which the system's errors become ours: `with DiskErrors(root, key): ...`"""

    __slots__ = ("_key", "_path")

    def __init__(self, path: str, key: str) -> None:
        self._path = path
        self._key = key

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if isinstance(exc, OSError):
            raise _translate(exc, self._path, self._key) from exc


def _translate(exc: OSError, path: str, key: str) -> StoreError:
    path = shown(path)
    where = f"file://{path}: {key}"
    if exc.errno in _FULL:
        return StoreFullError(f"file://{path} is full")
    if exc.errno == errno.EROFS:
        return StoreDeniedError(f"{where}: {exc.strerror}: have it mounted for writing")
    if exc.errno in _DENIED:
        return StoreDeniedError(f"{where}: {exc.strerror}: correct the owner or mode of {path}")
    if exc.errno in _MISSING:
        return ObjectMissingError(f"{where}: no such object")
    return StoreUnavailableError(f"{where}: {exc.strerror}")
