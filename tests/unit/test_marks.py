"""The mark log: order, segments, a torn end, another process, a killed writer."""

from __future__ import annotations

import errno
import mmap
import multiprocessing
import os
import signal

import pytest

from tierfs import marks
from tierfs.marks import Mark, MarkReader, MarkWriter


@pytest.fixture
def directory(tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)


def test_entries_come_back_in_order_and_the_position_goes_on(directory):
    writer, reader = MarkWriter(directory), MarkReader(directory, None)
    writer.append(Mark.WRITE, 5, 77, 2, handle=b"h" * 12, name=b"n\xff\n")
    writer.append(Mark.CLOSED, 5, a=-3, b=9)
    first, second = reader.read()
    assert (first.kind, first.ino, first.generation, first.parent) == (Mark.WRITE, 5, 77, 2)
    assert (first.handle, first.name) == (b"h" * 12, b"n\xff\n")
    assert (second.kind, second.a, second.b) == (Mark.CLOSED, -3, 9)
    assert list(reader.read()) == []
    writer.append(Mark.GONE, 5)
    assert [e.kind for e in reader.read()] == [Mark.GONE]
    assert reader.position == writer.position


def test_segments_follow_each_other_and_drained_ones_go(directory, monkeypatch):
    monkeypatch.setattr(marks, "SEGMENT", 4096)
    writer, reader = MarkWriter(directory), MarkReader(directory, 0)
    for ino in range(500):
        writer.append(Mark.NAMED, ino, name=b"x" * (ino % 255))
    assert len(os.listdir(directory)) > 3
    assert [e.ino for e in reader.read(limit=10)] == list(range(10))
    assert [e.ino for e in reader.read()] == list(range(10, 500))
    reader.forget(reader.position)
    assert len([n for n in os.listdir(directory) if n.startswith("marks-")]) == 1
    writer.append(Mark.GONE, 1)
    assert [e.kind for e in MarkReader(directory, reader.position).read()] == [Mark.GONE]


def test_the_newest_end_is_that_of_the_last_mark_in_the_newest_segment(directory, monkeypatch):
    monkeypatch.setattr(marks, "SEGMENT", 4096)
    reader = MarkReader(directory, 0)
    assert reader.newest_end() == 0
    writer = MarkWriter(directory)
    for ino in range(100):
        writer.append(Mark.NAMED, ino, name=b"x" * ino)
        assert reader.newest_end() == writer.position
    assert writer.start > 0
    assert len(list(reader.read())) == 100 and reader.newest_end() == writer.position
    writer.append(Mark.GONE, 1)
    assert reader.newest_end() == writer.position


def test_threads_that_look_for_the_end_take_no_names_from_each_other(directory, monkeypatch):
    """Listings of one open directory share their place in it: each of two threads would get a part."""
    MarkWriter(directory).append(Mark.WRITE, 1)
    reader, listdir, listed = MarkReader(directory, 0), os.listdir, []
    monkeypatch.setattr(os, "listdir", lambda fd: listed.append(fd) or listdir(fd))
    assert reader.newest_end() > 0 and len(list(reader.read())) == 1
    assert listed and directory not in listed


def test_a_new_writer_goes_on_behind_the_last_whole_entry(directory):
    writer = MarkWriter(directory)
    writer.append(Mark.WRITE, 1)
    end = writer.position
    writer.append(Mark.WRITE, 2)
    writer.close()
    (name,) = (n for n in os.listdir(directory) if n.startswith("marks-"))
    fd = os.open(name, os.O_RDWR, dir_fd=directory)
    os.pwrite(fd, b"\xff", end + 20)
    os.close(fd)
    again = MarkWriter(directory)
    assert again.position == end
    again.append(Mark.GONE, 3)
    assert [e.ino for e in MarkReader(directory, 0).read()] == [1, 3]


def test_a_position_ahead_of_a_log_that_was_lost_does_not_hide_new_marks(directory):
    reader = MarkReader(directory, 1 << 30)
    writer = MarkWriter(directory, at_least=1 << 30)
    writer.append(Mark.WRITE, 9)
    assert [e.ino for e in reader.read()] == [9]


def _write(path, pipe):
    fd = os.open(path, os.O_RDONLY)
    writer = MarkWriter(fd)
    for ino in range(1 << 30):
        writer.append(Mark.WRITE, ino, name=b"name")
        if ino % 1000 == 0:
            pipe.send(ino)


def test_marks_of_a_killed_writer_survive(tmp_path, directory):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_write, args=(str(tmp_path), theirs))
    process.start()
    reader, seen = MarkReader(directory, 0), []
    while ours.recv() < 20_000:
        seen += [e.ino for e in reader.read()]
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    while more := [e.ino for e in reader.read()]:
        seen += more
    assert len(seen) > 20_000 and seen == list(range(len(seen)))


def overwrite(directory, name, offset, data):
    fd = os.open(name, os.O_RDWR, dir_fd=directory)
    os.pwrite(fd, data, offset)
    os.close(fd)


def test_whole_entries_behind_a_torn_one_never_come_back(directory):
    """A power cut writes pages in any order; the new entry has the torn one's length."""
    writer = MarkWriter(directory)
    ends = []
    for ino in range(4):
        writer.append(Mark.WRITE, ino)
        ends.append(writer.position)
    writer.close()
    overwrite(directory, marks._segment_name(0), ends[0] + 8, b"\xff")
    reader = MarkReader(directory, 0)
    again = MarkWriter(directory)
    again.append(Mark.WRITE, 100)
    assert [e.ino for e in reader.read()] == [0, 100]
    again.append(Mark.WRITE, 101)
    assert [e.ino for e in reader.read()] == [101]


def test_a_start_looks_at_nothing_that_was_never_written(directory, monkeypatch):
    """To erase what a torn entry might have left, the first server of a volume read 4 MiB of zeros."""
    looked = []

    class Watched(mmap.mmap):
        def __getitem__(self, which):
            looked.append(len(range(*which.indices(len(self)))) if isinstance(which, slice) else 1)
            return super().__getitem__(which)

    monkeypatch.setattr(marks.mmap, "mmap", Watched)
    MarkWriter(directory)
    assert sum(looked) < 4096


def test_what_is_erased_may_stand_anywhere_behind_the_end(directory):
    writer = MarkWriter(directory)
    writer.append(Mark.WRITE, 1)
    places = (writer.position, writer.position + 5000, 1 << 20, marks.SEGMENT - 7)
    for place in places:
        overwrite(directory, marks._segment_name(0), place, b"\xff" * 7)
    writer.close()
    again = MarkWriter(directory)
    assert again.segment[again.position :] == bytes(marks.SEGMENT - again.position)
    assert [e.ino for e in MarkReader(directory, 0).read()] == [1]


def test_a_torn_segment_before_an_empty_one(directory, monkeypatch):
    """The power cut came while a segment was begun; of the one before not all was written."""
    monkeypatch.setattr(marks, "SEGMENT", 4096)
    writer = MarkWriter(directory)
    while writer.position < 4096 - 600:
        writer.append(Mark.WRITE, 1)
    writer.close()
    overwrite(directory, marks._segment_name(0), writer.position - 20, b"\xff")
    os.close(os.open(marks._segment_name(4040), os.O_CREAT | os.O_WRONLY, dir_fd=directory))
    again = MarkWriter(directory)
    reader = MarkReader(directory, 0)
    seen = len(list(reader.read()))
    again.append(Mark.GONE, 7)
    assert again.position > 4040 and [e.ino for e in reader.read()] == [7]
    assert seen > 50


def test_a_segment_that_vanishes_while_it_is_looked_for(directory, monkeypatch):
    monkeypatch.setattr(marks, "SEGMENT", 4096)
    writer = MarkWriter(directory)
    for ino in range(200):
        writer.append(Mark.WRITE, ino)
    real = marks._segments
    monkeypatch.setattr(marks, "_segments", lambda fd: [*real(fd), 1 << 40])
    reader = MarkReader(directory, 0)
    assert [e.ino for e in reader.read()] == list(range(200))


def test_after_a_full_disk_appending_goes_on(directory, monkeypatch):
    monkeypatch.setattr(marks, "SEGMENT", 4096)
    writer = MarkWriter(directory)

    def full(fd, offset, length):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as context:
        context.setattr(os, "posix_fallocate", full)
        context.setattr(writer, "_has_spare", False)
        appended = 0
        with pytest.raises(OSError, match="full"):
            while True:
                writer.append(Mark.WRITE, appended)
                appended += 1
        with pytest.raises(OSError, match="full"):
            writer.append(Mark.WRITE, appended)
        assert len(MarkReader(directory, 0)._ahead()) == 1
    writer.append(Mark.WRITE, appended)
    assert [e.ino for e in MarkReader(directory, 0).read()] == list(range(appended + 1))


def test_a_spare_segment_takes_over_when_the_disk_is_full(directory, monkeypatch):
    monkeypatch.setattr(marks, "SEGMENT", 4096)
    writer = MarkWriter(directory)
    taken = []

    def full(fd, offset, length):
        if os.fstat(fd).st_size < length:
            taken.append(fd)
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    for ino in range(100):
        writer.append(Mark.NAMED, ino)
    with pytest.raises(OSError, match="full"):
        writer.reserve()
    assert taken and [e.ino for e in MarkReader(directory, 0).read()] == list(range(100))
    monkeypatch.undo()
    writer.reserve()


def test_a_writer_begins_without_room_for_a_spare_segment(directory, monkeypatch):
    MarkWriter(directory).close()
    os.unlink(marks.SPARE, dir_fd=directory)

    def full(fd, offset, length):
        if os.fstat(fd).st_size < length:
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    writer = MarkWriter(directory)
    writer.append(Mark.NAMED, 1)
    with pytest.raises(OSError, match="full"):
        writer.ensure(marks.SEGMENT)
    monkeypatch.undo()
    writer.ensure(marks.SEGMENT // 2)
    writer.close()


def test_a_new_writer_finds_the_end_of_a_long_log(directory):
    writer = MarkWriter(directory)
    for ino in range(10_001):
        writer.append(Mark.CLOSED, ino)
    end = writer.position
    writer.close()
    again = MarkWriter(directory)
    assert again.position == end
    again.close()
