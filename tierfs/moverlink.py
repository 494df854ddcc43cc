"""The mount server's end of the link to the mover: what it asks and reports, and whether it gets on.

Movers come and go. What one was doing is void with its link; what is awaited of it is asked of the next.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

from tierfs import wire
from tierfs.errors import TierError
from tierfs.guarding import Guarding
from tierfs.inflow import Inflow
from tierfs.marking import Marking
from tierfs.report import Outbox
from tierfs.room import Room
from tierfs.states import States
from tierfs.vigil import Vigil
from tierfs.waits import Blocked

log = logging.getLogger("gate")


class MoverLink:
    """Belongs to the gate, and is called under its lock."""

    def __init__(
        self,
        outbox: Outbox,
        vigil: Vigil,
        states: States,
        marking: Marking,
        guarding: Guarding,
        inflow: Inflow,
        room: Room,
    ) -> None:
        self._outbox = outbox
        self._vigil = vigil
        self._states = states
        self._marking = marking
        self._guarding = guarding
        self._inflow = inflow
        self._room = room
        # Told of a mover that does not get on: its pid, and why.
        self.on_stuck: Callable[[int, str], None] = lambda pid, reason: None

    def connect(self, link: wire.Link | None) -> None:
        """Talk to this mover from now on. What the old one was doing is void."""
        self._outbox.connect(link)
        self._vigil.begin()
        self._guarding.end_all()
        if link is not None:
            self._inflow.new_mover()

    def _give_up(self, error: Exception) -> None:
        """Close our end. The mover may live, and be punching: its guards hold until the next one comes."""
        log.error("talking to the mover failed: %r", error)
        self._outbox.connect(None)
        self._marking.seals.clear()

    def on_readable(self) -> None:
        """Take what the mover has sent."""
        while self._outbox.link is not None:
            try:
                received = self._outbox.link.receive()
            except BlockingIOError:
                return
            except ConnectionError as error:
                log.warning("lost the mover: %s", error)
                received = None
            except Exception as error:
                self._give_up(error)
                return
            if received is None:
                self.connect(None)
                return
            message, fds = received
            self._vigil.heard()
            try:
                self._handle(message, fds)
            except Exception as error:
                self._give_up(error)
            finally:
                for fd in fds:
                    os.close(fd)

    def _handle(self, message: object, fds: list[int]) -> None:
        match message:
            case wire.Filled():
                self._inflow.filled(message)
            case wire.Passing() if len(fds) == 1:
                self._inflow.passed(message, fds[0])
            case wire.FetchEnd():
                self._inflow.ended(message)
                self._states.leave_if_idle(message.ino)
            case wire.Settled():
                self._on_settled(message)
            case wire.Seal():
                answers = [self._guarding.seal(ino, fd) for ino, fd in zip(message.inos, fds, strict=True)]
                self._outbox.post(wire.SealAnswer(message.id, answers))
            case wire.Unseal():
                self._marking.seals.difference_update(message.inos)
            case wire.Guard():
                granted = [self._guarding.guard(ino, message.position) for ino in message.inos]
                self._outbox.post(wire.GuardAnswer(message.id, granted))
            case wire.GuardEnd():
                self._guarding.end_of(message.inos)
                self._room.look(time.monotonic())
            case wire.Drained():
                self._marking.drained(message.position)
            case wire.Limits():
                self._inflow.limit(message.fetch_timeout)
            case wire.Futile():
                self._room.in_vain(time.monotonic())
            case wire.Hello():
                self._vigil.pid = message.pid
                self._marking.drained(message.position)
            case wire.Bring():
                for ino, fd in zip(message.inos, fds, strict=True):
                    self._bring(ino, fd)

    def _bring(self, ino: int, fd: int) -> None:
        """Ask for a stub's content though nobody opens it. One that cannot be entered now is left alone: the
        mover asks again."""
        opath = os.dup(fd)
        try:
            inode = self._states.enter(opath, os.fstat(opath), 0, b"")
            try:
                if inode.content is not None:
                    self._inflow.bring(ino)
            finally:
                self._states.leave(inode, opath)
        except Blocked:
            log.debug("inode %d is guarded", ino)
        except (OSError, TierError) as error:
            log.warning("inode %d cannot be fetched as a whole: %s", ino, error)
        finally:
            os.close(opath)

    def _on_settled(self, message: wire.Settled) -> None:
        inode = self._states.inodes.get(message.ino)
        if inode is not None and message.lost:
            self._states.disbelieve(inode)
        self._inflow.settled(message)
        if inode is not None and not message.errno:
            inode.content, inode.shown = None, None
            self._states.note(inode)
            self._inflow.untrack(message.ino)
        self._states.leave_if_idle(message.ino)

    def look_after(self, now: float) -> bool:
        """Whether somebody waits for the mover; then see that it is there, at `now` of CLOCK_MONOTONIC."""
        waited_for = self._inflow.waiting or self._room.waiting or self._vigil.guards_waited_for
        there = self._outbox.link is not None or self._vigil.pid  # else there is soon another
        if waited_for and there:
            if self._vigil.question_due(now):
                self._outbox.post(wire.Ping())
            problem = self._vigil.problem(now)
            if problem:
                self.on_stuck(self._vigil.pid, problem)
        return waited_for
