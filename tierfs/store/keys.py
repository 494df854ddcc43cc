"""What every store does alike: which keys are allowed, and bodies of exactly the announced size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tierfs.errors import ObjectCorruptError, UsageError

_LONGEST = 1024  # bytes of UTF-8; the limit of S3
_SEGMENT = 255  # bytes of one path component; the limit of most filesystems


def check_key(key: str) -> None:
    """Raises UsageError unless `key` is a relative path of ordinary components.

    A store may be a directory: no key may leave it, whoever made the key up.
    """
    if not key or len(key.encode()) > _LONGEST or not key.isprintable():
        raise UsageError(f"not a key for a store (empty, too long or unprintable): {key!r}")
    for segment in key.split("/"):
        if segment in ("", ".", "..") or len(segment.encode()) > _SEGMENT:
            raise UsageError(f"not a key for a store (component {segment!r}): {key!r}")


def check_prefix(prefix: str) -> None:
    """Raises UsageError for the beginning of what cannot be a key."""
    check_key(prefix + "x")


def is_key(key: str) -> bool:
    """Whether `check_key` takes it; a bucket may hold what others put there."""
    try:
        check_key(key)
    except UsageError:
        return False
    return True


def check_range(start: int, length: int | None) -> None:
    """Raises UsageError for a range that begins or ends before the object."""
    if start < 0 or (length is not None and length < 0):
        raise UsageError(f"not a range of an object: {start}+{length}")


def exactly(key: str, body: bytes | Iterable[bytes], size: int) -> Iterator[bytes]:
    """The pieces of `body`; raises ObjectCorruptError before the end if they are not `size` bytes in all."""
    total = 0
    for piece in (body,) if isinstance(body, bytes) else body:
        total += len(piece)
        if total > size:
            break
        yield piece
    if total != size:
        raise wrong_size(key, size)


def wrong_size(key: str, size: int) -> ObjectCorruptError:
    """The error for a body that is not `size` bytes long."""
    return ObjectCorruptError(f"the body for {key} is not the announced {size} bytes long")


def whole(key: str, body: bytes | Iterable[bytes], size: int) -> bytes:
    """`body` in one piece; raises ObjectCorruptError if it is not `size` bytes long."""
    if isinstance(body, bytes) and len(body) == size:
        return body
    return b"".join(exactly(key, body, size))


def too_short(key: str, start: int, length: int | None, found: int) -> ObjectCorruptError:
    """The error for an object that does not have the asked bytes; `found` counts those that it has."""
    asked = f"{length} bytes at {start}" if length is not None else f"a byte {start}"
    return ObjectCorruptError(f"{key} is shorter than recorded: asked for {asked}, got {found}")
