"""Messages between the supervisor and the mount server, over a SOCK_SEQPACKET pair."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import msgspec

from tierfs import wire
from tierfs.wire import Message

# --- supervisor to mount server ---------------------------------------------------------------------------


class Mounted(Message, frozen=True):
    """The answer to Prepared: it is mounted now; comes with the descriptor of /dev/fuse to serve."""


class Kept(Message, frozen=True):
    """Before Mounted, at a takeover: descriptors that the server before has given to Keep, of these inodes."""

    inos: list[int]


class NewMover(Message, frozen=True):
    """There is a new mover; comes with the server's end of the link to it."""


class Stop(Message, frozen=True):
    """End now, as on SIGTERM: what is still mounted is nobody's from then on."""


# --- mount server to supervisor ---------------------------------------------------------------------------


class Prepared(Message, frozen=True):
    """All is loaded; not before may be mounted: the program itself may lie in what will be covered."""


class Ready(Message, frozen=True):
    """The kernel has been answered: the mount works. `lasting`: another server could take it over.

    `form`: how it serves, `compiled` or `pure`; "" where it cannot be chosen.
    """

    passthrough: bool
    lasting: bool
    form: str = ""


class Keep(Message, frozen=True):
    """Comes with a descriptor of a file that has no name, without which it would end with this process."""

    ino: int


class LetGo(Message, frozen=True):
    """The descriptor of this inode is needed no more."""

    ino: int


class Stopped(Message, frozen=True):
    """The last message. `clean`: unmounted, and no file was open for writing any more."""

    clean: bool


class Suspect(Message, frozen=True):
    """The index that the server has open is damaged, it seems: somebody else must look at it."""


class Stuck(Message, frozen=True):
    """The mover with this pid (0: that has not said it) does not get on, and somebody waits for it."""

    pid: int
    reason: str


_encoder = msgspec.msgpack.Encoder()
ToServer = Mounted | Kept | NewMover | Stop
ToSupervisor = Prepared | Ready | Keep | LetGo | Stopped | Suspect | Stuck
_to_server = msgspec.msgpack.Decoder(ToServer)
_to_supervisor = msgspec.msgpack.Decoder(ToSupervisor)


class Channel:
    """One end of the pair."""

    def __init__(self, sock: socket.socket, *, server: bool) -> None:
        self.sock = sock
        self._decoder: msgspec.msgpack.Decoder[Any] = _to_server if server else _to_supervisor
        self._unknown: set[str] = set()

    def fileno(self) -> int:
        """For poll."""
        return self.sock.fileno()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send one message. Raises OSError: EPIPE, ECONNRESET where the peer is gone."""
        wire.send(self.sock, _encoder.encode(message), fds)

    def receive(self) -> tuple[Message | wire.Unknown, list[int]] | None:
        """The next message with its descriptors (the caller's to close); None at the end of the stream.

        Raises BlockingIOError where nothing is there yet, OSError where the peer is gone, DecodeError where it
        cannot be read.
        """
        received = wire.receive(self.sock)
        if received is None:
            return None
        return wire.decoded(self._decoder, *received, self._unknown)

    def close(self) -> None:
        """Close this end."""
        self.sock.close()


def make_pair() -> tuple[socket.socket, socket.socket]:
    """A connected pair (supervisor's end, server's end)."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
