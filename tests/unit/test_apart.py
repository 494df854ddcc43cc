"""Work in a process of its own ends as it would have in this one."""

import errno
import os
import signal
from pathlib import Path

import pytest
from tierfsd.apart import apart

from tierfs.errors import BucketMissingError, UsageError, VolumeError


def raising(error):
    def work():
        raise error

    return work


def test_what_it_does_is_done_elsewhere(tmp_path):
    apart(lambda: (tmp_path / "pid").write_text(str(os.getpid())))
    assert int((tmp_path / "pid").read_text()) != os.getpid()


@pytest.mark.parametrize("kind", [UsageError, VolumeError, BucketMissingError, ValueError])
def test_what_it_raises_is_raised_here(kind):
    with pytest.raises(kind, match=r"^what is wrong$"):
        apart(raising(kind("what is wrong")))


class Refusing(Exception):
    """As those of libraries: it cannot be made of its arguments."""

    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def test_what_cannot_be_handed_on_is_told_in_words():
    with pytest.raises(RuntimeError, match=r"^Refusing: this and that$"):
        apart(raising(Refusing("this", "that")))


def test_an_errno_and_a_path_come_along():
    with pytest.raises(FileNotFoundError) as caught:
        apart(lambda: os.stat("/nowhere"))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, "/nowhere")


def test_that_it_was_killed_is_told():
    with pytest.raises(VolumeError, match="was killed"):
        apart(lambda: os.kill(os.getpid(), signal.SIGKILL))


def children():
    return {pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def test_no_child_and_no_descriptor_is_left():
    before = sorted(os.listdir("/proc/self/fd")), children()
    apart(lambda: None)
    assert sorted(os.listdir("/proc/self/fd")) == before[0]
    assert children() <= before[1]
