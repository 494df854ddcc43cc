"""What is moved while the tree is being looked through is looked at all the same, and nothing outside of it."""

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest

from tierfs.survey import Survey


@pytest.fixture(params=[True, False], ids=["by handle", "by name"])
def volume(request, volume):
    volume.tree.privileged = request.param
    return volume


def adopted(volume, *names):
    """Files that no mark tells of."""
    for name in names:
        path = Path(volume.path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(10_000))


def look(volume, monkeypatch, before, act):
    """A look through the tree, in which `act` comes right before the directory `before` is taken in."""
    survey = Survey(volume.tier, lambda guesses: None, threading.Event())
    real, acted = survey._directory, []

    def directory(here):
        if here.path == before and not acted:
            acted.append([act()])
        return real(here)

    monkeypatch.setattr(survey, "_directory", directory)
    assert survey.run() and acted and volume.index.surveyed
    volume.tier.drain()


def test_a_directory_that_is_renamed_while_it_waits(volume, monkeypatch):
    adopted(volume, "a/b/kept", "a/b/c/d/deep")
    path = volume.path
    look(volume, monkeypatch, b"a/b", lambda: volume.server.rename(path("a"), path("z")))
    assert volume.record("z/b/kept") and volume.record("z/b/c/d/deep")


@pytest.mark.parametrize("what", ["a/b", "a/b/kept"])
def test_what_moves_from_where_nobody_has_looked_to_where_somebody_has(volume, monkeypatch, what):
    adopted(volume, "a/b/kept", "other")
    look(volume, monkeypatch, b"a", lambda: volume.server.rename(volume.path(what), volume.path("moved")))
    assert volume.record("moved" if what.endswith("kept") else "moved/kept")
    assert [item.reason for item in volume.demote("moved" if what.endswith("kept") else "moved/kept")] == [""]


def test_a_link_in_the_place_of_a_directory_leads_nowhere(volume, monkeypatch, tmp_path):
    adopted(volume, "a/b/kept")
    outside = tmp_path / "outside" / "b"
    outside.mkdir(parents=True)
    (outside / "secret").write_bytes(b"secret")

    def swap():
        os.rename(volume.path("a"), volume.path("away"))
        os.symlink(outside.parent, volume.path("a"))

    look(volume, monkeypatch, b"a/b", swap)
    assert volume.index.totals().files == 0 or volume.tree.privileged
    assert volume.index.get((outside / "secret").stat().st_ino) is None


def test_a_directory_that_has_gone_is_looked_for_once(volume, monkeypatch):
    adopted(volume, "a/b/kept", "c/d")
    asked, real = [], volume.link.await_marks
    monkeypatch.setattr(volume.link, "await_marks", lambda: asked.append(real()))
    look(volume, monkeypatch, b"a/b", lambda: shutil.rmtree(volume.path("a/b")))
    assert len(asked) == 2 and volume.record("c/d") and volume.index.totals().files == 1


def test_a_directory_that_may_not_be_searched_hides_no_other(volume, monkeypatch):
    """As of mode 0600, to a daemon that is not root's."""
    adopted(volume, "a/kept", "closed/inner", "z/kept")
    place, usual = os.stat(volume.path("closed")).st_ino, os.stat

    def refuse(name, *more, dir_fd=None, **named):
        if dir_fd is not None and os.fstat(dir_fd).st_ino == place:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return usual(name, *more, dir_fd=dir_fd, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refuse)
        assert Survey(volume.tier, lambda guesses: None, threading.Event()).run()
    assert volume.index.surveyed and volume.index.totals().files == 2
