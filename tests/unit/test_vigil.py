"""When a mover is given up: never one that answers, always one that does not get on while somebody waits."""

import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import get_args

import pytest

from tierfs import channel, serverlink, wire
from tierfs.errors import BusyError
from tierfs.serverlink import ServerLink
from tierfs.vigil import GUARD_SECONDS, LOADING_SECONDS, SILENCE_SECONDS, Vigil


def asked(pid=7, at=100.0):
    vigil = Vigil()
    vigil.pid = pid
    assert vigil.question_due(at)
    return vigil


def test_silence_after_a_question_is_told_once():
    vigil = asked()
    assert not vigil.question_due(101) and not vigil.problem(100 + SILENCE_SECONDS - 1)
    assert "has not answered" in vigil.problem(101 + SILENCE_SECONDS)
    assert not vigil.problem(200 + SILENCE_SECONDS)
    vigil.begin()
    assert vigil.pid == 0 and vigil.question_due(300)


def test_whoever_answers_is_asked_again_and_stays():
    vigil, now = asked(), 100.0
    for _ in range(20):
        now += SILENCE_SECONDS / 2
        vigil.heard()
        vigil.question_due(now)
        assert not vigil.problem(now)


def test_one_that_is_still_loading_has_more_time():
    vigil = asked(pid=0)
    assert not vigil.problem(100 + LOADING_SECONDS - 1)
    assert vigil.problem(101 + LOADING_SECONDS)


def test_a_guard_counts_from_the_first_who_waits():
    vigil = asked()
    vigil.wait_for_guard(5, 100)
    vigil.wait_for_guard(5, 100 + GUARD_SECONDS)
    vigil.heard()
    assert not vigil.problem(99 + GUARD_SECONDS)
    assert "file shut" in vigil.problem(101 + GUARD_SECONDS)


def test_a_guard_that_ends_is_forgotten():
    vigil = asked()
    vigil.wait_for_guard(5, 100)
    assert vigil.guards_waited_for
    vigil.guard_ended(5)
    vigil.heard()
    assert not vigil.guards_waited_for and not vigil.problem(101 + GUARD_SECONDS)


def test_every_message_can_be_read_by_its_receiver():
    """One that was left out of the unions would end the link when it is first sent."""
    unions = (wire.ToMover, wire.ToServer, channel.ToServer, channel.ToSupervisor)
    read = {kind for union in unions for kind in get_args(union)}
    sent = {
        kind for kind in wire.Message.__subclasses__() if kind.__module__ in (wire.__name__, channel.__name__)
    }
    assert sent - read == {wire.Touch}  # a part of Touches


def test_a_guard_that_is_granted_too_late_ends(monkeypatch):
    """The server was caught in its disk: nobody in the mover knows of the guard, which kept the file shut."""
    monkeypatch.setattr(serverlink, "ANSWER_SECONDS", 0.05)
    ours, theirs = wire.make_pair()
    link, server = ServerLink(wire.Link(theirs, server=False)), wire.Link(ours, server=True)
    link.start(SimpleNamespace(on_lost=lambda: None))
    with pytest.raises(BusyError, match="did not answer"), link.guard([5, 6], 0):
        pass
    asked, _ = server.receive()
    server.send(wire.GuardAnswer(asked.id, [True, False]))
    assert server.receive()[0] == wire.GuardEnd([5, 6])
    server.close()


def test_a_server_that_ends_between_an_answer_and_its_taking_is_noticed():
    ours, theirs = wire.make_pair()
    link, server = ServerLink(wire.Link(theirs, server=False)), wire.Link(ours, server=True)
    lost = threading.Event()
    answered: Future[wire.GuardAnswer] = Future()
    answered.set_result(wire.GuardAnswer(1, []))
    link._answers[1] = answered
    link.start(SimpleNamespace(on_lost=lost.set))
    server.close()
    assert lost.wait(20) and answered.result().id == 1
