"""The supervisor's end of the channel to the mount server: what it has said, of one server after another."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Sequence

import msgspec

from tierfs import channel, wire
from tierfsd.attachment import Attachment
from tierfsd.events import Events

log = logging.getLogger("supervisor")


class ServerChannel:
    """Open while there is a server that has not closed its end. What the last one has said stays known."""

    def __init__(
        self,
        events: Events,
        attachment: Attachment,
        on_suspect: Callable[[], None],
        on_stuck: Callable[[channel.Stuck], None],
    ) -> None:
        """`on_suspect`: it has met damage in the index. `on_stuck`: its mover does not get on."""
        self._events = events
        self._attachment = attachment
        self._on_suspect = on_suspect
        self._on_stuck = on_stuck
        self._channel: channel.Channel | None = None
        self.prepared = False
        self.ready = False
        self._ready_at = 0.0
        self.lasting = False  # another could take its session over
        self.form = ""
        self.clean = False  # it has ended in order

    @property
    def is_open(self) -> bool:
        """There is somebody to talk to."""
        return self._channel is not None

    def served_for(self) -> float:
        """Seconds since it has answered the kernel; 0 before."""
        return time.monotonic() - self._ready_at if self.ready else 0.0

    def open(self) -> socket.socket:
        """To a server that is about to be started, whose end this is."""
        self.prepared = self.ready = self.clean = self.lasting = False
        ours, theirs = channel.make_pair()
        ours.setblocking(False)
        self._channel = channel.Channel(ours, server=False)
        self._events.watch(self._channel, self.hear)
        return theirs

    def drop(self) -> None:
        """Close our end."""
        if self._channel is not None:
            self._events.unwatch(self._channel)
            self._channel.close()
            self._channel = None

    def send(self, message: wire.Message, fds: Sequence[int] = ()) -> None:
        """Say something; nothing where it is closed. Raises OSError."""
        if self._channel is not None:
            self._channel.send(message, fds)

    def hand_on(self) -> None:
        """Give it what the server before has left. Raises OSError."""
        if self._channel is not None:
            self._attachment.hand_on(self._channel)

    def hear_all(self) -> None:
        """Take all that a server which has ended had still to say, and its descriptors."""
        while self.hear():
            pass

    def hear(self) -> bool:
        """Take one message; False where there is none."""
        if self._channel is None:
            return False
        try:
            received = self._channel.receive()
        except BlockingIOError:
            return False
        except msgspec.DecodeError as error:  # the mount lives on, whatever a newer server says
            log.error("a message of the mount server cannot be read: %s", error)
            return True
        except OSError:
            received = None
        if received is None:
            self.drop()
            return False
        message, fds = received
        if isinstance(message, channel.Keep) and fds:
            self._attachment.keep(message.ino, fds.pop())
        for fd in fds:
            os.close(fd)
        self._take(message)
        return True

    def _take(self, message: object) -> None:
        match message:
            case channel.Prepared():
                self.prepared = True
            case channel.Ready():
                self.ready, self.lasting, self._ready_at = True, message.lasting, time.monotonic()
                self.form = message.form
            case channel.Suspect():
                self._on_suspect()
            case channel.Stuck():
                self._on_stuck(message)
            case channel.LetGo():
                self._attachment.let_go(message.ino)
            case channel.Stopped():
                self.clean = message.clean
