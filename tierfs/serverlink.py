"""The mover's end of the link to the mount server: seals, guards, and what the server reports.

One thread receives and only sorts messages; whoever asks waits for the answer with a deadline. When the server
is gone every waiting question fails and `on_lost` is called.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Protocol

from tierfs import wire
from tierfs.errors import BusyError

log = logging.getLogger("mover")

ANSWER_SECONDS = 30.0


class Listener(Protocol):
    """What the server's own messages go to; called in the receiving thread, so it must not wait."""

    def on_fetch(self, message: wire.Fetch, opath: int) -> None:
        """Content is asked for; the descriptor is the listener's to close."""

    def on_cancel(self, message: wire.CancelFetch) -> None:
        """Nobody waits for that any more."""

    def on_touches(self, message: wire.Touches) -> None:
        """Heat."""

    def on_poke(self, message: wire.Poke) -> None:
        """There are new marks, or space is short."""

    def on_hurry(self) -> None:
        """Somebody waits for us."""

    def on_lost(self) -> None:
        """The server is gone."""


class ServerLink:
    """Safe to use from several threads."""

    def __init__(self, link: wire.Link) -> None:
        self._link = link
        self._send_lock = threading.Lock()
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._answers: dict[int, Future[Any]] = {}
        self._unbroken: set[int] = set()  # sealed inodes whose seal nobody has broken
        self._guarded: dict[int, bool] = {}  # guarded inode -> somebody waits for it
        self._lost = False

    def start(self, listener: Listener) -> None:
        """Receive in a thread of its own."""
        threading.Thread(target=self._receive, args=(listener,), name="server-link", daemon=True).start()

    def send(self, message: wire.Message, fds: Sequence[int] = ()) -> None:
        """Send one message. Raises BusyError where the server is gone."""
        try:
            with self._send_lock:
                self._link.send(message, fds)
        except OSError as exc:
            raise BusyError(f"the mount server is gone: {exc.strerror}") from exc

    # --- seals --------------------------------------------------------------------------------------------

    def seal(self, inos: Sequence[int], fds: Sequence[int]) -> list[int]:
        """Per inode the generation that is now sealed, 0 where somebody may be writing.

        `fds` are O_RDONLY. Whoever seals must `unseal`. Raises BusyError.
        """
        with self._lock:
            self._unbroken.update(inos)
        try:
            answer: wire.SealAnswer = self._ask(lambda ident: wire.Seal(ident, list(inos)), fds)
        except BaseException:
            self.unseal(inos)
            raise
        refused = [ino for ino, generation in zip(inos, answer.generations, strict=True) if not generation]
        with self._lock:
            self._unbroken.difference_update(refused)
        return answer.generations

    def sealed(self, ino: int) -> bool:
        """The seal holds as far as is known; the mark log has the last word."""
        return ino in self._unbroken

    def unseal(self, inos: Iterable[int]) -> None:
        """These seals are needed no more."""
        listed = list(inos)
        with self._lock:
            self._unbroken.difference_update(listed)
        if listed and not self._lost:
            self.send(wire.Unseal(listed))

    # --- guards -------------------------------------------------------------------------------------------

    @contextmanager
    def guard(self, inos: Sequence[int], position: int) -> Iterator[set[int]]:
        """The inodes that stay shut meanwhile: no handle, no mark at or after `position`. Raises BusyError."""
        with self._lock:
            self._guarded.update(dict.fromkeys(inos, False))
        shut = set(inos)  # a server that is slow may grant it when nobody waits for the answer any more
        try:
            answer: wire.GuardAnswer = self._ask(lambda ident: wire.Guard(ident, list(inos), position), ())
            shut = {ino for ino, given in zip(inos, answer.granted, strict=True) if given}
            self._unguard(ino for ino in inos if ino not in shut)
            yield shut
        finally:
            self._unguard(shut)
            if shut and not self._lost:
                self.send(wire.GuardEnd(sorted(shut)))

    def await_marks(self) -> None:
        """Return when what the server had done by now has its marks in the log: at once where it has ended.

        Raises BusyError.
        """
        try:
            with self.guard([], 0):
                pass
        except BusyError:
            if not self._lost:
                raise

    def _unguard(self, inos: Iterable[int]) -> None:
        with self._lock:
            for ino in inos:
                self._guarded.pop(ino, None)

    def wanted(self, ino: int) -> bool:
        """Somebody waits to open this guarded inode."""
        return self._guarded.get(ino, False)

    # --- receiving ----------------------------------------------------------------------------------------

    def _ask(self, make: Callable[[int], wire.Message], fds: Sequence[int]) -> Any:
        future: Future[Any] = Future()
        with self._lock:
            if self._lost:
                raise BusyError("the mount server is gone")
            ident = next(self._ids)
            self._answers[ident] = future
        try:
            self.send(make(ident), fds)
            return future.result(ANSWER_SECONDS)
        except TimeoutError as exc:
            raise BusyError(f"the mount server did not answer within {ANSWER_SECONDS:g} s") from exc
        finally:
            with self._lock:
                self._answers.pop(ident, None)

    def _receive(self, listener: Listener) -> None:
        while True:
            try:
                received = self._link.receive()
            except Exception as error:  # also what cannot be read: nobody would be heard any more
                log.warning("lost the mount server: %s", error)
                received = None
            if received is None:
                break
            message, fds = received
            try:
                self._sort(listener, message, fds)
            except Exception:
                log.exception("a %s message of the mount server failed", type(message).__name__)
        with self._lock:
            self._lost = True
            self._unbroken.clear()
            answers = list(self._answers.values())
        for future in answers:
            if not future.done():  # its answer has come, and nobody has taken it yet
                future.set_exception(BusyError("the mount server is gone"))
        listener.on_lost()

    def _sort(self, listener: Listener, message: object, fds: list[int]) -> None:
        match message:
            case wire.Fetch() if len(fds) == 1:
                listener.on_fetch(message, fds.pop())
            case wire.CancelFetch():
                listener.on_cancel(message)
            case wire.SealAnswer() | wire.GuardAnswer():
                with self._lock:
                    future = self._answers.get(message.id)
                if future is not None:
                    future.set_result(message)
            case wire.SealBroken():
                with self._lock:
                    self._unbroken.difference_update(message.inos)
            case wire.GuardBreak():
                with self._lock:
                    if message.ino in self._guarded:
                        self._guarded[message.ino] = True
                listener.on_hurry()
            case wire.Ping():
                listener.on_hurry()
                self.send(wire.Pong())
            case wire.Touches():
                listener.on_touches(message)
            case wire.Poke():
                listener.on_poke(message)
        for fd in fds:
            os.close(fd)
