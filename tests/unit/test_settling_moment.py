"""When content is made final: a moment later where only readers wanted it, at once where somebody waits."""

import os
import time

import pytest
from bare import until
from tiering import Volume

from tierfs import settling

LONG = 20.0  # seconds; what ends sooner has not waited for the moment to pass
DATA = os.urandom(20_000)


@pytest.fixture
def volume(tmp_path, monkeypatch):
    monkeypatch.setattr(settling, "CALM_SECONDS", LONG)
    made = Volume(tmp_path, fetch_timeout=10.0)
    made.server.create(made.path("a"), DATA)
    (item,) = made.demote("a")
    assert item.demoted, item.reason
    yield made
    made.stop()


def arrived(volume):
    """A reader has got the content, and the moment runs."""
    assert volume.server.read(volume.path("a")) == DATA
    arrival = volume.tier.filler.arrival(os.stat(volume.path("a")).st_ino)
    assert until(lambda: arrival.settling)
    return time.monotonic()


def test_a_reader_is_answered_before_the_file_is_resident_for_good(volume):
    arrived(volume)
    assert volume.stub("a") is not None


def test_the_moment_ends(volume, monkeypatch):
    monkeypatch.setattr(settling, "CALM_SECONDS", 0.2)
    arrived(volume)
    assert until(lambda: volume.stub("a") is None)


def test_a_writer_does_not_wait_for_the_moment_to_pass(volume):
    began = arrived(volume)
    volume.server.write(volume.path("a"), b"new")
    assert time.monotonic() - began < LONG / 2
    assert volume.stub("a") is None


def test_nor_does_one_who_comes_before_the_content(volume):
    began = time.monotonic()
    volume.server.write(volume.path("a"), b"new")
    assert time.monotonic() - began < LONG / 2


def test_nor_an_order(volume):
    began = time.monotonic()
    volume.fetch("a")
    assert time.monotonic() - began < LONG / 2
    assert volume.stub("a") is None


def test_nor_the_end_of_the_mover(volume):
    began = arrived(volume)
    volume.restart()
    assert time.monotonic() - began < LONG / 2
    assert volume.stub("a") is None
