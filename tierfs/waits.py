"""How an operation of the mount server says that it cannot be finished now.

Each operation runs to its end without blocking. One that needs something (content, the end of a guard) raises
Blocked before it has changed anything; the binding parks the request and runs the whole operation again when
the wait fires. One that needs a slow local system call returns Slow, and the binding runs that in a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Wait:
    """Something that will happen once. With an errno it has failed, and so has everyone who waits."""

    __slots__ = ("_callbacks", "deadline", "done", "errno", "keeper", "reason")

    def __init__(self, deadline: float | None = None) -> None:
        """`deadline`: seconds of CLOCK_MONOTONIC, after which whoever keeps this wait lets it fail."""
        self.done = False
        self.errno = 0
        self.reason = ""
        self.deadline = deadline
        self.keeper: Callable[[], None] | None = None  # told when it fires; does not wait for it
        self._callbacks: list[Callable[[], None]] = []

    @property
    def wanted(self) -> bool:
        """Somebody still waits."""
        return bool(self._callbacks)

    def add(self, callback: Callable[[], None]) -> None:
        """Call back when it fires; at once if it has."""
        if self.done:
            callback()
        else:
            self._callbacks.append(callback)

    def discard(self, callback: Callable[[], None]) -> None:
        """This caller waits no more (interrupted)."""
        if callback in self._callbacks:
            self._callbacks.remove(callback)

    def fire(self, errno: int = 0, reason: str = "") -> None:
        """It has happened, or failed with `errno`. A second firing does nothing."""
        if self.done:
            return
        self.done, self.errno, self.reason = True, errno, reason
        if self.keeper is not None:
            self.keeper()
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()


class Blocked(Exception):
    """The operation must be run again when `wait` fires; it has changed nothing yet."""

    def __init__(self, wait: Wait) -> None:
        super().__init__()
        self.wait = wait


class Slow:
    """The rest of an operation, to be run in a thread: returns its result or raises OSError."""

    __slots__ = ("run",)

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run


class Stretch(NamedTuple):
    """The result of reading: these bytes of a file, which its reader may be given without their being read."""

    fd: int
    offset: int
    length: int
