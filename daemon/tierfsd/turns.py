"""Who of several users has how many of something, and who waits for his turn."""

from __future__ import annotations

import select
import socket
import threading
from collections import Counter
from typing import NamedTuple

from tierfs import control
from tierfs.errors import BusyError
from tierfsd.credentials import Peer


class Shares:
    """Who has how many of something of which there are so many: each of the users who are not trusted has `one`
    at most, and all of them together `others`, so that nobody is kept out by them."""

    def __init__(self, most: int, others: int, one: int) -> None:
        self._most, self._others, self._one = most, others, one
        self._lock = threading.Lock()
        self._trusted = 0
        self._taken: Counter[int] = Counter()

    def take(self, peer: Peer) -> bool:
        """One more, if there is one for this user."""
        with self._lock:
            others = self._taken.total()
            if self._trusted + others >= self._most:
                return False
            if peer.trusted:
                self._trusted += 1
                return True
            if others >= self._others or self._taken[peer.uid] >= self._one:
                return False
            self._taken[peer.uid] += 1
            return True

    def give(self, peer: Peer) -> None:
        """It is free again."""
        with self._lock:
            if peer.trusted:
                self._trusted -= 1
            else:
                self._taken[peer.uid] -= 1
                self._taken += Counter()


class Client(NamedTuple):
    """A connection, and who is at its other end. `request`: what was read from it already."""

    sock: socket.socket
    peer: Peer
    request: control.Request | None = None


class Turns:
    """Connections that are served while there are shares, and those that wait until one ends: `one` of each
    user who is not trusted, and `most` of these and of the trusted, for each takes a descriptor. Who waits is
    called by whoever leaves: no thread of its own, and nobody is in the way of those who have their share."""

    def __init__(self, shares: Shares, most: int, one: int) -> None:
        self._shares, self._most, self._one = shares, most, one
        self._lock = threading.Lock()  # before that of the shares
        self._waiting: list[Client] = []

    def enter(self, client: Client, *, may_wait: bool = True) -> bool:
        """Whether it is served now; otherwise it waits. Raises BusyError where it may not, or too many do."""
        with self._lock:
            if self._shares.take(client.peer):
                return True
            if not may_wait:
                raise BusyError("you have too many connections: end some")
            if not self._room_for(client.peer):
                self._drop_gone()
                if not self._room_for(client.peer):
                    raise BusyError("you have too many connections: end some")
            self._waiting.append(client)
            return False

    def leave(self, peer: Peer) -> Client | None:
        """One of this user's has ended; the result is to be served now, in its place."""
        with self._lock:
            self._shares.give(peer)
            if self._waiting:
                self._drop_gone()
            for index, client in enumerate(self._waiting):
                if self._shares.take(client.peer):
                    return self._waiting.pop(index)
        return None

    def dismiss(self) -> list[Client]:
        """Those who wait, who do so no more."""
        with self._lock:
            dismissed, self._waiting = self._waiting, []
        return dismissed

    def _room_for(self, peer: Peer) -> bool:
        like = [client.peer.uid for client in self._waiting if client.peer.trusted == peer.trusted]
        return len(like) < self._most and (peer.trusted or like.count(peer.uid) < self._one)

    def _drop_gone(self) -> None:
        """What was interrupted while it waited is not carried out, and takes nobody's place."""
        poll = select.poll()
        for client in self._waiting:
            poll.register(client.sock, 0)  # a hang-up is told unasked
        gone = {fd for fd, _ in poll.poll(0)}
        for client in self._waiting:
            if client.sock.fileno() in gone:
                client.sock.close()
        self._waiting = [client for client in self._waiting if client.sock.fileno() >= 0]
