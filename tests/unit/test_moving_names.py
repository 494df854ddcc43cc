"""Names change at each step of a demotion and of a fetch: all goes by file id, so nothing else does."""

from __future__ import annotations

import os
import threading

import pytest
from journals import Journalled
from tierfsd import checking
from tiering import Job

from tierfs import failpoints

OUT = failpoints.DEMOTE_POINTS
IN = (failpoints.FILL_WRITTEN, failpoints.FILL_SYNCED, failpoints.FILL_CLEARED)
WAIT_SECONDS = 0.1  # for what has to wait for the step itself


@pytest.fixture
def home(tmp_path):
    made = Journalled(tmp_path)
    made.snapshots.take()
    yield made
    made.close()


def rename(home):
    home.run("rename", *home.above("a"), *home.above("d/b"))
    return {"d/b": "a", "other": "other"}


def link(home):
    home.run("link", home.node("a"), *home.above("d/b"))
    return {"a": "a", "d/b": "a", "other": "other"}


def unlink(home):
    home.run("unlink", *home.above("a"))
    return {"other": "other"}


def replace(home):
    home.run("rename", *home.above("other"), *home.above("a"))
    return {"a": "other"}


@pytest.mark.parametrize("change", [rename, link, unlink, replace])
@pytest.mark.parametrize("point", OUT + IN)
def test_a_name_that_changes_on_the_way(home, monkeypatch, point, change):
    contents = {name: os.urandom(20_000) for name in ("a", "other")}
    home.mkdir("d")
    for name, content in contents.items():
        home.write(name, content)
    home.volume.tier.drain()
    if point in IN:
        assert [item.reason for item in home.volume.demote("a", "other")] == ["", ""]
    there, problems = {}, []

    def come():
        try:
            there.update(change(home))
        except BaseException as error:
            problems.append(error)

    changing = threading.Thread(target=come)

    def hit(name):
        if name == point and not changing.ident:
            changing.start()
            changing.join(WAIT_SECONDS)

    monkeypatch.setattr(failpoints, "hit", hit)
    (home.volume.fetch if point in IN else home.volume.demote)("a")
    changing.join(20)
    assert there and not problems, problems
    for _ in range(2):
        check(home, there, contents)
        home.volume.demote(*there)
    assert checking.check(home.volume.tier, True, None, Job()).findings == []


def check(home, there, contents):
    for name, content in there.items():
        assert home.volume.server.read(home.volume.path(name)) == contents[content], name
        home.volume.settle(name)
    told = {os.fsdecode(path) for path in home.there()}
    assert told == {"", "d", *there}
    home.volume.tier.drain()
    assert home.volume.index.pending() == []
