"""Answers in a mover's stead, in a long pause before the next one: whoever asks something is told so."""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Callable

from tierfs import control
from tierfsd.events import Events

_REQUEST_SECONDS = 0.5  # for a request from somebody who has just connected
_AT_ONCE = 1 << 16


class StandIn:
    """At the control socket, which the mover has too and answers otherwise."""

    def __init__(self, events: Events, listener: socket.socket, explain: Callable[[str, float], str]) -> None:
        """`explain`: the message, of how the mover has ended and after how many seconds there is another."""
        self._events = events
        self._listener = listener
        self._explain = explain
        self._how = ""
        self._until = 0.0

    def begin(self, how: str, until: float) -> None:
        """The mover has ended like this; the next one is due at `until` of CLOCK_MONOTONIC."""
        self.end()
        self._how, self._until = how, until
        self._events.watch(self._listener.fileno(), self._decline)

    def end(self) -> None:
        """A mover answers."""
        if self._how:
            self._events.unwatch(self._listener.fileno())
            self._how = ""

    def _decline(self) -> None:
        message = self._explain(self._how, max(1.0, self._until - time.monotonic()))
        with contextlib.suppress(OSError):  # who asks has gone
            sock, _ = self._listener.accept()
            with sock:
                _hear_out(sock)
                control.send(sock, control.Failed(errno.EAGAIN, message))


def _hear_out(sock: socket.socket) -> None:
    """Take what it asks, whatever that is: a socket that is closed before is broken to the other end. Not for
    longer, however slowly somebody talks: nothing else is looked after meanwhile. Raises OSError."""
    until = time.monotonic() + _REQUEST_SECONDS
    with contextlib.suppress(TimeoutError):
        while (left := until - time.monotonic()) > 0:
            sock.settimeout(left)
            if len(sock.recv(_AT_ONCE)) < _AT_ONCE:
                return
