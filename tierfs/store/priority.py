"""Who goes first at the store: a person who waits, then uploads, then garbage collection."""

from __future__ import annotations

import contextlib
import contextvars
import enum
from collections.abc import Iterator


class Priority(enum.IntEnum):
    """The lower value goes first."""

    FOREGROUND = 0
    UPLOAD = 1
    GARBAGE = 2


_current: contextvars.ContextVar[Priority | None] = contextvars.ContextVar(
    "tierfs_store_priority", default=None
)


@contextlib.contextmanager
def priority(value: Priority) -> Iterator[None]:
    """Calls of this thread inside the block have this priority, whatever they are (a read-back: UPLOAD)."""
    token = _current.set(value)
    try:
        yield
    finally:
        _current.reset(token)


def current_priority(default: Priority) -> Priority:
    """The priority set by the enclosing block, or the operation's own."""
    value = _current.get()
    return default if value is None else value
