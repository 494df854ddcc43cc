"""Which binding `auto` takes, and what it says."""

import os

import pytest

from tierfs.errors import VolumeError
from tierfs.fuse import choice


@pytest.mark.parametrize(
    ("platform", "release", "device", "problem"),
    [
        ("linux", "6.18.44-x", True, ""),
        ("linux", "5.13.0", True, ""),
        ("linux", "unknown", True, ""),
        ("linux", "5.12.9", True, "Linux 5.12.9 is older than 5.13"),
        ("linux", "4.19", True, "Linux 4.19 is older than 5.13"),
        ("linux", "6.1", False, "there is no /dev/fuse"),
        ("darwin", "23.1", True, "darwin has no FUSE protocol of Linux's"),
    ],
)
def test_where_the_kernel_can_be_spoken_to(platform, release, device, problem):
    assert choice._kernel_problem(platform, release, device) == problem


def test_what_is_asked_for_is_taken(monkeypatch):
    monkeypatch.setattr(choice, "find_library", lambda _: "libfuse.so.2")
    for name in ("kernel", "fusepy"):
        assert choice.choose(name) == (name, "asked for with --binding")


def test_a_library_that_is_asked_for_and_is_missing_is_named(monkeypatch):
    monkeypatch.delenv("FUSE_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(choice, "find_library", lambda _: None)
    with pytest.raises(VolumeError, match="no libfuse 2"):
        choice.choose("fusepy")
    assert choice.choose("kernel").name == "kernel"
    monkeypatch.setenv("FUSE_LIBRARY_PATH", "/opt/lib/libfuse.so.2")
    assert choice.choose("fusepy").name == "fusepy"


@pytest.mark.parametrize(("library", "name"), [("libfuse.so.2", "fusepy"), (None, "kernel")])
def test_auto_falls_back_where_it_can(monkeypatch, library, name):
    monkeypatch.setattr(choice, "find_library", lambda _: library)
    monkeypatch.setattr(choice, "_kernel_problem", lambda *_: "it is too old")
    chosen = choice.choose("auto")
    assert chosen.name == name
    assert "it is too old" in chosen.reason


def test_without_a_device_the_kernels_binding_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(choice, "_DEVICE", "/dev/there-is-none")
    monkeypatch.setattr(choice, "find_library", lambda _: "libfuse.so.2")
    assert choice.choose("auto").name == "kernel"


def test_auto_takes_the_kernel_here():
    if os.path.exists("/dev/fuse"):
        assert choice.choose("auto").name == "kernel"
