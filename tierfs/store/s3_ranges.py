"""Large ranges over plain HTTP, from the socket straight into the buffer that is handed on, piece by piece.

obstore wakes two threads for each piece that arrives and copies it once more: where they run on two processors
that is 0.8 s of processor time for each GiB, against 0.45. Whatever comes that is not the range is left to
obstore, which asks again and says what is wrong.
"""

from __future__ import annotations

import http.client
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple
from urllib.parse import urlsplit

log = logging.getLogger("store")

LEAST = 1 << 20  # bytes; of a smaller range all this is nothing
PIECE = 1 << 20  # bytes; whoever works on a piece finds it in the processor's cache
_KEPT_SECONDS = 20.0  # a connection that was idle for longer may have been closed by the server
_REFUSALS = 3  # in a row: this server does not take such requests
_OF_THE_OBJECT = frozenset({404, 416, 429})  # and what a server in trouble says: nothing about such requests


class _Idle(NamedTuple):
    since: float
    connection: http.client.HTTPConnection


class Ranges:
    """Gets ranges by signed URLs. Thread-safe."""

    def __init__(self, sign: Callable[[str], str], connect_timeout: float, read_timeout: float) -> None:
        """`sign` gives the URL with which a key may be read now. Seconds; `read_timeout` of silence."""
        self._sign = sign
        self._connect_timeout = connect_timeout
        self._read_timeout = read_timeout
        self._lock = threading.Lock()
        self._idle: list[_Idle] = []  # the last used is the last
        self._refused = 0

    def pieces(self, key: str, start: int, length: int, most: int = PIECE) -> Iterator[memoryview]:
        """The range in pieces of `most` bytes, each in the place of the one before. Ends early where no more is
        to be had this way. Raises TimeoutError."""
        if self._refused >= _REFUSALS:
            return
        url = urlsplit(self._sign(key))
        connection = self._kept() or http.client.HTTPConnection(url.netloc, timeout=self._connect_timeout)
        left = length
        try:
            answer = self._ask(connection, f"{url.path}?{url.query}", start, length)
            if answer is None:
                return
            buffer = memoryview(bytearray(min(most, length)))
            while left:
                piece = buffer[:left]
                if answer.readinto(piece) < len(piece):
                    return
                left -= len(piece)
                yield piece
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException) as error:
            log.debug("%s: %s", key, type(error).__name__)
        finally:
            if left:
                connection.close()
            else:
                with self._lock:
                    self._idle.append(_Idle(time.monotonic(), connection))

    def _kept(self) -> http.client.HTTPConnection | None:
        """The last used, if it is fresh. All are to the same host."""
        oldest = time.monotonic() - _KEPT_SECONDS
        with self._lock:
            stale = [idle for idle in self._idle if idle.since < oldest]
            self._idle = self._idle[len(stale) :]
            kept = self._idle.pop().connection if self._idle else None
        for idle in stale:
            idle.connection.close()
        return kept

    def _ask(
        self, connection: http.client.HTTPConnection, target: str, start: int, length: int
    ) -> http.client.HTTPResponse | None:
        """The answer, if its body is the range."""
        end = start + length
        if connection.sock is None:
            self._connect(connection)
        connection.request("GET", target, headers={"Range": f"bytes={start}-{end - 1}"})
        answer = connection.getresponse()
        given = answer.getheader("Content-Range", "")
        expected = f"bytes {start}-{end - 1}/"
        if answer.status != 206 or answer.length != length or not given.startswith(expected):
            self._refused += answer.status < 500 and answer.status not in _OF_THE_OBJECT
            return None
        self._refused = 0
        return answer

    def _connect(self, connection: http.client.HTTPConnection) -> None:
        connection.connect()
        connection.sock.settimeout(self._read_timeout)
