"""What is said of a file, above all whether it is pinned, while a directory above it is renamed."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from tierfsd.backend import TierBackend
from tierfsd.control_server import ControlServer
from tierfsd.credentials import Peer
from tiering import Volume

from tierfs import control

KINDS = ("file", "directory", "link")


@pytest.fixture
def volume(tmp_path):
    made = Volume(tmp_path)
    os.makedirs(made.path("d/directory"))
    made.server.create(made.path("d/file"), b"x" * 5000)
    os.symlink("file", made.path("d/link"))
    made.tier.drain()
    yield made
    made.stop()


@pytest.fixture
def backend(volume):
    made = TierBackend.__new__(TierBackend)
    made._tier, made._kit, made._drained = volume.tier, volume.tier.kit, 0.0
    made._heat = SimpleNamespace(heat=lambda ino: 0.0, last_use=lambda ino: None)
    return made


@pytest.fixture
def asked(volume, backend):
    """What somebody is told who lists a directory, or asks for a path."""
    rootfd = os.open(volume.root, os.O_RDONLY | os.O_DIRECTORY)
    server = ControlServer(SimpleNamespace(), rootfd, backend)
    peer = Peer(os.geteuid(), os.getegid(), ())

    def ask(request):
        told = []
        monkey.setattr(control, "send", lambda sock, answer: told.append(answer))
        done = server._carry_out(SimpleNamespace(), peer, request)
        return {answer.path: answer for answer in told}, done.stayed

    with pytest.MonkeyPatch.context() as monkey:
        yield ask
    os.close(rootfd)


def pin(volume, name):
    fd = os.open(volume.path(name), os.O_RDONLY | os.O_DIRECTORY)
    volume.tier.set_pin(fd, os.stat(volume.root).st_ino, os.fsencode(name), True)
    os.close(fd)


@pytest.fixture
def at_each_look(volume, monkeypatch):
    """Have something done when it is looked at whether something is pinned, so many times."""
    is_pinned = volume.tree.is_pinned

    def arrange(change, times=1):
        left = [times]

        def looked(fd):
            if left[0]:
                left[0] -= 1
                change()
            return is_pinned(fd)

        monkeypatch.setattr(volume.tree, "is_pinned", looked)

    return arrange


def swap(volume):
    """The other directory has its name afterwards, and the other way round."""
    for old, new in (("d", "between"), ("z", "d"), ("between", "z")):
        os.rename(volume.path(old), volume.path(new))


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_that_is_renamed_while_it_is_asked_for_is_told_of(volume, asked, at_each_look, kind):
    """It was there when it was asked for."""
    pin(volume, "d")
    at_each_look(lambda: os.rename(volume.path("d"), volume.path("z")))
    path = b"d/" + kind.encode()
    facts, stayed = asked(control.GetFacts([path]))
    assert stayed == [] and facts[path].pinned


def test_no_name_is_left_out_of_a_listing_whose_directory_is_renamed(volume, asked, at_each_look):
    at_each_look(lambda: os.rename(volume.path("d"), volume.path("z")))
    facts, stayed = asked(control.ListNames(b"d"))
    assert sorted(facts) == [b"d/directory", b"d/file", b"d/link"] and stayed == []


@pytest.mark.parametrize("pinned", ["d", "z"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_pin_of_what_takes_a_directorys_place_is_not_its_own(volume, asked, at_each_look, kind, pinned):
    os.mkdir(volume.path("z"))
    pin(volume, pinned)
    at_each_look(lambda: swap(volume))
    path = b"d/" + kind.encode()
    facts, stayed = asked(control.GetFacts([path]))
    assert stayed == [] and facts[path].pinned == (pinned == "d")


def test_what_is_moved_at_each_look_is_to_be_asked_for_again(volume, asked, at_each_look):
    os.mkdir(volume.path("z"))
    at_each_look(lambda: swap(volume), times=1000)
    facts, (stayed,) = asked(control.GetFacts([b"d/file"]))
    assert facts == {} and stayed.reason == "was moved just now: try again"


def test_what_is_removed_meanwhile_is_not_there(volume, asked, at_each_look):
    at_each_look(lambda: os.unlink(volume.path("d/file")))
    facts, (stayed,) = asked(control.GetFacts([b"d/file"]))
    assert facts == {} and stayed.reason == "does not exist"


def test_the_root_is_pinned_by_itself_alone(volume, asked):
    facts, _ = asked(control.GetFacts([b"", b"d/file"]))
    assert not facts[b""].pinned and not facts[b"d/file"].pinned
    fd = os.open(volume.root, os.O_RDONLY | os.O_DIRECTORY)
    volume.tier.set_pin(fd, 0, b"", True)
    os.close(fd)
    facts, _ = asked(control.GetFacts([b"", b"d/file"]))
    assert facts[b""].pinned and facts[b"d/file"].pinned
