"""Messages between the mount server and the mover, over a SOCK_SEQPACKET pair, with descriptors where named.

The server asks for content and reports events; the mover asks for seals and guards and reports results.
Neither ever blocks on the other: a request carries an `id`, its answer comes as a message of its own.
"""

from __future__ import annotations

import array
import logging
import os
import socket
from collections.abc import Sequence
from typing import Any, get_args

import msgspec

log = logging.getLogger("wire")

MAX_MESSAGE = 128 * 1024
MAX_FDS = 64  # descriptors in one message (the kernel's own limit is 253)
# Worked out once: the socket module's flags are enumerations, and to combine two takes longer than to receive.
_ANCILLARY = socket.CMSG_SPACE(array.array("i").itemsize * MAX_FDS)
_CUT = int(socket.MSG_TRUNC) | int(socket.MSG_CTRUNC)


class Message(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Base of all messages."""


class Unknown(msgspec.Struct, frozen=True):
    """In the place of a message that only the newer version at the other end knows, as after an upgrade in
    place: it is passed over. None may be needed for anything to be safe."""

    name: str


# --- mount server to mover -------------------------------------------------------------------------------


class Fetch(Message, frozen=True):
    """Bring [start, start + length) of a stub to the local disk; comes with one O_PATH descriptor of it.

    `whole`: all of it. `ahead`: nobody waits. `ordered`: nobody but an order. `passable`: only readers wait, so
    that Passing may serve them where the local disk is full. Readers are woken by Filled; whenever the last
    missing leaf has arrived the mover settles the file and says Settled, which is what writers wait for.
    FetchEnd ends the request, always, also a cancelled one, and only when no write of it to the file is under
    way any more. `mtime` and `ctime` (ns): what the file shows. `pid`: the thread that has it open, 0 where
    that is not known or there are several.
    """

    id: int
    ino: int
    stub: bytes
    size: int
    start: int
    length: int
    whole: bool
    ahead: bool
    passable: bool = False
    mtime: int = 0
    ctime: int = 0
    ordered: bool = False
    pid: int = 0


class CancelFetch(Message, frozen=True):
    """Nobody waits for this fetch any more (interrupted, deadline)."""

    id: int


class SealAnswer(Message, frozen=True):
    """Per asked inode: the generation now sealed, or 0 where somebody may be writing."""

    id: int
    generations: list[int]


class SealBroken(Message, frozen=True):
    """A write-open or truncation came: the copy being taken of these inodes is void."""

    inos: list[int]


class GuardAnswer(Message, frozen=True):
    """Per asked inode: True where no handle is open, no newer mark exists and opens now wait."""

    id: int
    granted: list[bool]


class GuardBreak(Message, frozen=True):
    """Somebody waits to open this guarded inode: finish or give up quickly."""

    ino: int


class Touch(Message, frozen=True):
    """Uses of one file since the last report. `last` is seconds of CLOCK_MONOTONIC; `pid` is as in Fetch."""

    ino: int
    count: int
    bytes_read: int
    last: float
    size: int
    parent: int
    name: bytes
    pid: int = 0


class Touches(Message, frozen=True):
    """A batch of heat."""

    touches: list[Touch]


class Poke(Message, frozen=True):
    """The mark log has grown up to this position; `urgent` when space is short."""

    position: int
    urgent: bool = False


class Ping(Message, frozen=True):
    """Somebody waits, and nothing has been heard: answered at once with Pong."""


# --- mover to mount server -------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """A new mover is here and has read the log up to `position`: earlier seals and guards are void."""

    pid: int
    position: int


class Pong(Message, frozen=True):
    """The answer to Ping."""


class Drained(Message, frozen=True):
    """All marks before this position are in the index."""

    position: int


class Filled(Message, frozen=True):
    """[start, start + length) of this inode is on the local disk and checked."""

    ino: int
    start: int
    length: int


class Passing(Message, frozen=True):
    """[start, start + length) of the content that this stub stands for, checked, and not on the local disk, as
    that is full; comes with one descriptor of a memory file that holds it from its beginning on.

    The FetchEnd of the request follows, with errno 0: whoever needs the bytes in the file asks again.
    """

    ino: int
    stub: bytes
    start: int
    length: int


class FetchEnd(Message, frozen=True):
    """A fetch has ended: errno 0 when all it asked for is local, or has been passed on."""

    id: int
    ino: int
    errno: int
    reason: str = ""


class Settled(Message, frozen=True):
    """The file is resident for good: its stub attribute is durably gone and the index says RESIDENT.

    With an errno: all leaves may be here, but that could not be made final; a later whole fetch tries again.
    `lost`: what has come is not to be believed either, but for what the index says is here: the disk did not
    take it.
    """

    ino: int
    errno: int = 0
    reason: str = ""
    lost: bool = False


class Seal(Message, frozen=True):
    """Seal these files for copying; comes with one O_RDONLY descriptor each, in order."""

    id: int
    inos: list[int]


class Unseal(Message, frozen=True):
    """These copies were given up (or committed): their seals end."""

    inos: list[int]


class Guard(Message, frozen=True):
    """Keep these inodes shut for a punch, if no mark at or after `position` names them."""

    id: int
    inos: list[int]
    position: int


class GuardEnd(Message, frozen=True):
    """The punch is over, done or not: opens may go on."""

    inos: list[int]


class Bring(Message, frozen=True):
    """Ask for all content of these stubs (an order, a pin); comes with one O_PATH descriptor each, in order.

    The server asks by Fetch, as for somebody who opens them, so that only it decides when a file may change.
    """

    inos: list[int]


class Limits(Message, frozen=True):
    """Settings the server needs; sent on start and after a reload. Times in seconds."""

    fetch_timeout: float
    small_file: int


class Futile(Message, frozen=True):
    """Nothing can leave now for those who wait for space: they need not wait."""


ToMover = Fetch | CancelFetch | SealAnswer | SealBroken | GuardAnswer | GuardBreak | Touches | Poke | Ping
ToServer = (
    Hello | Pong | Drained | Filled | Passing | FetchEnd | Settled
    | Seal | Unseal | Guard | GuardEnd | Bring | Limits | Futile
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_to_mover = msgspec.msgpack.Decoder(ToMover)
_to_server = msgspec.msgpack.Decoder(ToServer)


def send(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send one message with descriptors. Raises OSError."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], rights)


def receive(sock: socket.socket) -> tuple[bytes, list[int]] | None:
    """The next message with its descriptors (the caller's to close); None at the end. Raises OSError."""
    data, ancillary, flags, _ = sock.recvmsg(MAX_MESSAGE, _ANCILLARY)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if not data:
        return None
    if flags & _CUT:
        for fd in fds:
            os.close(fd)
        raise OSError("a message between two processes was cut")
    return data, list(fds)


def decoded(
    decoder: msgspec.msgpack.Decoder[Any], data: bytes, fds: list[int], named: set[str]
) -> tuple[Any, list[int]]:
    """A message with its descriptors; Unknown where this version has none of that name. Raises DecodeError
    where it cannot be read. `named`: those unknown ones of which the log has a word already."""
    try:
        return decoder.decode(data), fds
    except msgspec.DecodeError as error:
        for fd in fds:
            os.close(fd)
        name = _name_in(data)
        if name in {kind.__name__ for kind in get_args(decoder.type)}:
            raise
        if name not in named:
            named.add(name)
            log.warning("a %s message, which this version does not know, is passed over: %s", name, error)
        return Unknown(name), []


def _name_in(data: bytes) -> str:
    """The tag of a message. Raises DecodeError where it has none."""
    items = msgspec.msgpack.decode(data, type=list[Any])
    return msgspec.convert(items[0] if items else None, type=str)


class Link:
    """One end of the pair; messages arrive whole and in order."""

    def __init__(self, sock: socket.socket, *, server: bool) -> None:
        self.sock = sock
        self._decoder: msgspec.msgpack.Decoder[Any] = _to_server if server else _to_mover
        self._unknown: set[str] = set()

    def fileno(self) -> int:
        """For poll."""
        return self.sock.fileno()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send one message. Raises OSError: EAGAIN (non-blocking and full), EPIPE/ECONNRESET (peer gone)."""
        send(self.sock, _encoder.encode(message), fds)

    def receive(self) -> tuple[ToMover | ToServer | Unknown, list[int]] | None:
        """The next message with its descriptors (the caller's to close); None at the end of the stream.

        Raises BlockingIOError where nothing is there yet, OSError where the peer is gone.
        """
        received = receive(self.sock)
        if received is None:
            return None
        return decoded(self._decoder, *received, self._unknown)

    def close(self) -> None:
        """Close this end."""
        self.sock.close()


def make_pair() -> tuple[socket.socket, socket.socket]:
    """A connected pair (server end, mover end) with room for a burst of messages."""
    server, mover = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock in (server, mover):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * 1024 * 1024)
    return server, mover
