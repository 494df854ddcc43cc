"""Large ranges over plain HTTP, from the socket straight into the buffer that is handed on, piece by piece.

obstore wakes two threads for each piece that arrives and copies it once more: where they run on two processors
that is 0.8 s of processor time for each GiB, against 0.45. Whatever comes that is not the range is left to
obstore, which asks again and says what is wrong.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterator
from urllib.parse import SplitResult, urlsplit

log = logging.getLogger("store")

LEAST = 1 << 20  # bytes; of a smaller range all this is nothing
PIECE = 1 << 20  # bytes
# Each piece has its own way to the disk and to who waits: fewer are less work, where none has to wait for more.
# But ranges arrive side by side: the first piece of one comes when as much of all the others has. So a piece is
# at most half of its range, and the ranges of who has just begun to read a file are small.
_LARGE_PIECE = 8 * PIECE
_QUICK_SECONDS = 0.03  # for a MiB
_SIGNED_SECONDS = 30.0  # a signed URL is used for so long: to sign one takes half as long as to ask for a range
_KEPT_SECONDS = 20.0  # a connection that was idle for longer may have been closed by the server
_REFUSALS = 3  # in a row: this server does not take such requests ...
_AGAIN_SECONDS = 600.0  # ... for so long: it may have been credentials that had run out
_OF_THE_OBJECT = frozenset({404, 416, 429})  # and what a server in trouble says: nothing about such requests
_SERVER_TROUBLE = 500
_HEAD_PART = 2048  # what comes with it of the body has to be copied
_MOST_HEAD = 64 << 10


class _Answer:
    """What an answer says of itself."""

    def __init__(self, head: bytes) -> None:
        """Raises ValueError."""
        first, *lines = head.split(b"\r\n")
        version, status, *_ = first.split(b" ", 2)
        if not version.startswith(b"HTTP/1."):
            raise ValueError("not HTTP")
        self.status = int(status)
        parts = (line.partition(b":") for line in lines)
        self._fields = {name.lower(): value.strip() for name, _, value in parts}
        self.lasting = version != b"HTTP/1.0" and self._fields.get(b"connection", b"").lower() != b"close"

    def is_range(self, start: int, length: int) -> bool:
        """Its body is these bytes of the object, as they are."""
        expected = b"bytes %d-%d/" % (start, start + length - 1)
        return (
            self.status == 206
            and self._fields.get(b"content-length") == b"%d" % length
            and b"transfer-encoding" not in self._fields
            and self._fields.get(b"content-range", b"").startswith(expected)
        )


def _pages(size: int) -> mmap.mmap:
    """Memory in large pages, where there are such: to copy to it and from it takes a quarter less."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class _Places:
    """Where pieces are put: in as few places as will do. Thread-safe.

    A piece takes one when it has come, not while it is waited for. So nearly all have the same, which stays in
    the processor's cache: with one for each of eight connections it takes a tenth longer to copy a piece, work
    out its digests and write it. They are kept: to clear a new one costs as much as a copy.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[tuple[float, memoryview]] = []  # since when; the last used is the last

    def take(self) -> memoryview:
        """A place for the largest piece, until it is given back."""
        with self._lock:
            if self._free:
                return self._free.pop()[1]
        return memoryview(_pages(_LARGE_PIECE))

    def give(self, place: memoryview) -> None:
        """Nobody looks at what is in it any more."""
        now = time.monotonic()
        with self._lock:
            self._free = [free for free in self._free if free[0] > now - _KEPT_SECONDS]
            self._free.append((now, place))


class _Connection:
    """To the server. Its calls raise OSError; what it may wait for is bounded by the timeouts."""

    def __init__(self, url: SplitResult, connect_timeout: float, read_timeout: float) -> None:
        self._sock = socket.create_connection((url.hostname or "", url.port or 80), connect_timeout)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock.settimeout(None)
        seconds, rest = divmod(read_timeout, 1)
        timeout = struct.pack("@ll", int(seconds), int(rest * 1e6))
        for side in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._sock.setsockopt(socket.SOL_SOCKET, side, timeout)
        self._arrived = select.poll()
        self._arrived.register(self._sock, select.POLLIN)
        self._patience = read_timeout * 1e3
        self._least = 1  # bytes that the kernel wakes for
        self._ahead = b""  # what has come with the head
        self._began = 0.0  # to wait for a piece
        self.piece = PIECE  # what is to be awaited at once, at most
        self.idle_since = 0.0

    def close(self) -> None:
        self._sock.close()

    def ask(self, url: SplitResult, start: int, length: int) -> _Answer:
        """The head of the answer. Raises ValueError where it is none."""
        asked = (
            f"GET {url.path}?{url.query} HTTP/1.1\r\nHost: {url.netloc}\r\nAccept-Encoding: identity\r\n"
            f"Range: bytes={start}-{start + length - 1}\r\n\r\n"
        )
        self._wake_for(1)
        self._sock.sendall(asked.encode("ascii"))
        head, part, end = bytearray(), memoryview(bytearray(_HEAD_PART)), -1
        while end < 0:
            count = self._receive(part)
            head += part[:count]
            end = head.find(b"\r\n\r\n")
            if not count or len(head) > _MOST_HEAD:
                raise ValueError("no answer")
        self._ahead = bytes(head[end + 4 :])
        return _Answer(bytes(head[:end]))

    def await_piece(self, size: int) -> None:
        """Return when it has come, or as much as the kernel holds of it, or no more is to be expected."""
        self._began = time.monotonic()
        self._await(size - len(self._ahead))

    def read_into(self, piece: memoryview) -> bool:
        """Fill it with what has been awaited; False where the connection ends before."""
        done = min(len(self._ahead), len(piece))
        piece[:done] = self._ahead[:done]
        self._ahead = self._ahead[done:]
        while done < len(piece):
            count = self._receive(piece[done:], socket.MSG_DONTWAIT)
            if not count:
                return False
            done += count
            self._await(len(piece) - done)
        quick = time.monotonic() - self._began < _QUICK_SECONDS * done / PIECE
        self.piece = _LARGE_PIECE if quick else PIECE
        return True

    def _await(self, count: int) -> None:
        """The kernel waits until so many bytes are there: nobody is woken, nor reads, for each of the parts in
        which they come."""
        if count > 0:
            self._wake_for(count)
            self._arrived.poll(self._patience)

    def _wake_for(self, least: int) -> None:
        if least != self._least:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)
            self._least = least

    def _receive(self, into: memoryview, flags: int = 0) -> int:
        try:
            return self._sock.recv_into(into, 0, flags)
        except BlockingIOError as error:
            raise TimeoutError("the server is silent") from error


class Ranges:
    """Gets ranges by signed URLs. Thread-safe."""

    def __init__(self, sign: Callable[[str], str], connect_timeout: float, read_timeout: float) -> None:
        """`sign` gives the URL with which a key may be read for some minutes. Seconds; `read_timeout` of
        silence."""
        self._sign = sign
        self._connect_timeout = connect_timeout
        self._read_timeout = read_timeout
        self._lock = threading.Lock()
        self._places = _Places()
        self._idle: list[_Connection] = []  # the last used is the last
        self._signed: dict[str, tuple[float, SplitResult]] = {}  # until when, of the key that was read last
        self._refused = 0
        self._again = 0.0  # when it is tried once more

    def whole(self, key: str, start: int, length: int) -> memoryview | None:
        """The range, for whoever keeps it; None where it is not to be had this way. Raises TimeoutError."""
        buffer = memoryview(bytearray(length))
        found = sum(len(piece) for piece in self._pieces(key, start, length, buffer))
        return buffer if found == length else None

    def pieces(self, key: str, start: int, length: int) -> Iterator[memoryview]:
        """The range in pieces, each in the place of the one before, larger where they come quickly. Ends early
        where no more is to be had this way. Raises TimeoutError."""
        return self._pieces(key, start, length)

    def _pieces(
        self, key: str, start: int, length: int, into: memoryview | None = None
    ) -> Iterator[memoryview]:
        """`into`: where all of it goes, as one piece."""
        if self._refused >= _REFUSALS and time.monotonic() < self._again:
            return
        fresh, url = self._url(key)
        connection, left, lasting = None, length, False
        try:
            connection = self._kept() or _Connection(url, self._connect_timeout, self._read_timeout)
            answer = connection.ask(url, start, length)
            if not self._is_taken(answer, start, length, fresh):
                return
            parts = self._body(connection, length) if into is None else _whole_body(connection, into)
            with contextlib.closing(parts):
                for piece in parts:
                    left -= len(piece)
                    lasting = answer.lasting and not left
                    yield piece
        except TimeoutError:
            raise
        except (OSError, ValueError) as error:
            log.debug("%s: %s", key, type(error).__name__)
        finally:
            if connection is not None:
                self._leave(connection, lasting)

    def _body(self, connection: _Connection, length: int) -> Generator[memoryview]:
        """Each piece in a place that is its own until the next is asked for. Ends early as `read_into`."""
        most = max(PIECE, length // 2 // PIECE * PIECE)  # whole leaves
        while length:
            size = min(length, most, connection.piece)
            connection.await_piece(size)
            place = self._places.take()
            try:
                if not connection.read_into(place[:size]):
                    return
                yield place[:size]
            finally:
                self._places.give(place)
            length -= size

    def _url(self, key: str) -> tuple[bool, SplitResult]:
        """Whether it has been signed just now, and the URL."""
        now = time.monotonic()
        until, url = self._signed.get(key, (0.0, None))
        if url is not None and now < until:
            return False, url
        url = urlsplit(self._sign(key))
        self._signed = {key: (now + _SIGNED_SECONDS, url)}
        return True, url

    def _is_taken(self, answer: _Answer, start: int, length: int, fresh: bool) -> bool:
        """`fresh`: the URL was. Another one may have been signed by what has run out since: no word against the
        server."""
        if answer.is_range(start, length):
            self._refused = 0
            return True
        if answer.status < _SERVER_TROUBLE and answer.status not in _OF_THE_OBJECT:
            self._signed = {}
            if fresh:
                self._refused += 1
                self._again = time.monotonic() + _AGAIN_SECONDS
        return False

    def _leave(self, connection: _Connection, lasting: bool) -> None:
        if not lasting:
            connection.close()
            return
        connection.idle_since = time.monotonic()
        with self._lock:
            self._idle.append(connection)

    def _kept(self) -> _Connection | None:
        """The last used, if it is fresh. All are to the same host."""
        oldest = time.monotonic() - _KEPT_SECONDS
        with self._lock:
            stale = [idle for idle in self._idle if idle.idle_since < oldest]
            self._idle = self._idle[len(stale) :]
            kept = self._idle.pop() if self._idle else None
        for idle in stale:
            idle.close()
        return kept


def _whole_body(connection: _Connection, into: memoryview) -> Generator[memoryview]:
    connection.await_piece(len(into))
    if connection.read_into(into):
        yield into
