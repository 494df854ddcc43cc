"""Replies that go from a file through a pipe: all of it behind its header, or nothing, and then another way."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hotside import Side

from tierfs.fuse import protocol as p
from tierfs.fuse.kernel import READAHEAD
from tierfs.fuse.splicing import LEAST, Splicer
from tierfs.vfs import ROOT
from tierfs.waits import Stretch

SIZE = 2 << 20
CONTENT = os.urandom(SIZE)
PAGE = os.sysconf("SC_PAGE_SIZE")


class Device:
    """A file in the place of /dev/fuse."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT)
        self.splicer = Splicer(self.fd)

    def said(self) -> tuple[int, bytes] | None:
        """(unique, body) of what has been said since the last time."""
        data = os.pread(self.fd, SIZE, 0)
        os.truncate(self.fd, 0)
        os.lseek(self.fd, 0, os.SEEK_SET)
        if not data:
            return None
        length, number, unique = p.OUT.unpack_from(data)
        assert (length, number) == (len(data), 0)
        return unique, data[p.OUT_SIZE :]


@pytest.fixture
def device(tmp_path):
    made = Device(tmp_path / "device")
    yield made
    made.splicer.close()
    os.close(made.fd)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    fd = os.open(tmp_path / "file", os.O_RDWR)
    yield fd
    os.close(fd)


def test_what_the_disk_cannot_give_is_answered_with_its_error(tmp_path, monkeypatch):
    """A reader who got no answer would wait for ever."""
    (tmp_path / "tree").mkdir()
    side = Side(tmp_path / "side", "pure", monkeypatch, None)
    try:
        message = p.HEAD.pack(p.IN, p.Op.READ, 8, ROOT) + p.CALLER.pack(0, 0, 0, 0) + bytes(2)
        side.session._answer(8, Stretch(-1, 0, LEAST), message)
        assert p.OUT.unpack(side.sock.recv(100)) == (p.OUT_SIZE, -errno.EBADF, 8)
    finally:
        side.close()


@pytest.mark.parametrize(
    ("offset", "count"),
    [(0, LEAST), (PAGE, READAHEAD), (SIZE - LEAST - 5, LEAST + 5), (5, READAHEAD - PAGE), (7, LEAST + 1)],
)
def test_a_reply_is_its_header_and_these_bytes(device, file, offset, count):
    for unique in (3, 4):
        assert device.splicer.reply(unique, Stretch(file, offset, count))
        assert device.said() == (unique, CONTENT[offset : offset + count])


@pytest.mark.parametrize(("offset", "count"), [(0, LEAST - 1), (0, READAHEAD + PAGE), (5, READAHEAD)])
def test_what_is_small_or_does_not_fit_goes_another_way(device, file, offset, count):
    assert not device.splicer.reply(3, Stretch(file, offset, count))
    assert device.said() is None


def test_of_a_file_that_has_become_shorter_nothing_is_said(device, file):
    os.truncate(file, LEAST + 100)
    assert not device.splicer.reply(3, Stretch(file, 0, 2 * LEAST))
    assert device.said() is None
    assert device.splicer.reply(4, Stretch(file, 100, LEAST))
    assert device.said() == (4, CONTENT[100 : 100 + LEAST])


def test_a_refused_reply_leaves_nothing_to_the_next(device, file):
    out, refusing = os.pipe()
    os.close(out)
    kept = os.dup(device.fd)
    os.dup2(refusing, device.fd)
    with pytest.raises(BrokenPipeError):
        device.splicer.reply(3, Stretch(file, 0, LEAST))
    os.dup2(kept, device.fd)
    assert device.splicer.reply(4, Stretch(file, LEAST, LEAST))
    assert device.said() == (4, CONTENT[LEAST : 2 * LEAST])
    os.close(kept)
    os.close(refusing)


def test_what_cannot_be_spliced_is_not_tried_again(device, file, monkeypatch):
    def refuse(*_arguments: object, **_options: object) -> int:
        tried.append(1)
        raise OSError(errno.EINVAL, "not from here")

    tried: list[int] = []
    monkeypatch.setattr(os, "splice", refuse)
    for _ in range(3):
        assert not device.splicer.reply(3, Stretch(file, 0, LEAST))
    assert (tried, device.said()) == ([1], None)


def test_without_a_pipe_it_goes_another_way(device, file, monkeypatch):
    def none_left(_flags: int) -> tuple[int, int]:
        raise OSError(errno.EMFILE, "no descriptor left")

    with monkeypatch.context() as scarce:
        scarce.setattr(os, "pipe2", none_left)
        assert not device.splicer.reply(3, Stretch(file, 0, LEAST))
    assert device.splicer.reply(4, Stretch(file, 0, LEAST))
