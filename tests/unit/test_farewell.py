"""What is said to be on this disk only: also what no mover has heard of yet."""

import os

from tierfsd.farewell import local_only

from tierfs.commands.late import left
from tierfs.config import Never


def said(volume):
    return local_only(volume.index, str(volume.base / "marks"))


def unsaid(volume):
    """By the index alone, when all marks have been read."""
    volume.tier.drain()
    totals = volume.index.totals()
    return totals.dirty_files, totals.dirty_bytes


def test_marks_that_nobody_has_read_count(volume):
    assert said(volume) == (0, 0)
    for number in range(3):
        volume.server.create(volume.path(f"f{number}"), b"x" * (1000 + number))
    assert said(volume) == (3, 3003) == unsaid(volume) == said(volume)


def test_what_is_known_counts_once(volume):
    for name in ("copied", "dirty", "removed", "grown"):
        volume.server.create(volume.path(name), b"x" * 1000)
    volume.tier.drain()
    volume.demote("copied", punch=False)
    assert said(volume) == (3, 3000)
    volume.server.write(volume.path("copied"), b"new")
    volume.server.write(volume.path("dirty"), b"new")
    volume.server.write(volume.path("grown"), b"y" * 500, 1000)
    volume.server.unlink(volume.path("removed"))
    volume.server.create(volume.path("short"), b"x")
    volume.server.create(volume.path("brief"), b"x")
    volume.server.unlink(volume.path("brief"))
    assert said(volume) == (4, 1000 + 1000 + 1500 + 1)
    assert said(volume) == unsaid(volume)


def test_a_copied_file_that_is_removed_was_not_here_only(volume):
    volume.server.create(volume.path("file"), b"x" * 1000)
    volume.demote("file", punch=False)
    volume.server.unlink(volume.path("file"))
    assert said(volume) == (0, 0) == unsaid(volume)


def test_what_was_removed_while_it_was_open_is_not_here(volume):
    volume.server.create(volume.path("file"), b"x" * 1000)
    handle = volume.server.open(volume.path("file"), os.O_WRONLY)
    volume.server.unlink(volume.path("file"))
    volume.server.release(handle)
    assert said(volume) == (0, 0) == unsaid(volume)


def test_an_inode_number_that_is_used_again(volume):
    """The mark of the former file's end comes before that of the next one's beginning."""
    volume.server.create(volume.path("file"), b"x" * 1000)
    volume.tier.drain()
    former = os.stat(volume.path("file")).st_ino
    volume.server.unlink(volume.path("file"))
    volume.server.create(volume.path("file"), b"x" * 300)
    assert os.stat(volume.path("file")).st_ino == former or said(volume) == (1, 300)
    assert said(volume) == unsaid(volume)


def test_what_came_after_the_last_look(volume):
    """Not what is in the store, is gone again, or never leaves."""
    volume.server.create(volume.path("before"), b"x")
    volume.server.mkdir(volume.path("node_modules"))
    position = volume.tier.drain()

    def came_late():
        return left(volume.index, str(volume.base / "marks"), position, Never().matcher())

    assert came_late() == 0
    volume.server.create(volume.path("node_modules/f"), b"x")
    volume.server.create(volume.path("brief"), b"x")
    volume.server.unlink(volume.path("brief"))
    volume.server.create(volume.path("copied"), b"x")
    volume.server.write(volume.path("before"), b"y")
    volume.tier.drain()
    volume.demote("copied", punch=False)
    assert came_late() == 1
    volume.server.create(volume.path("unread"), b"x")
    assert came_late() == 2


def test_what_came_so_late_that_no_mover_has_read_it(volume):
    """It hung, and was killed in the end: the index says that the file is in the store."""
    volume.server.create(volume.path("file"), b"x" * 100)
    volume.tier.drain()
    volume.demote("file", punch=False)
    position, marks = volume.tier.drain(), str(volume.base / "marks")
    assert left(volume.index, marks, position, Never().matcher()) == 0
    volume.server.write(volume.path("file"), b"y")
    assert not volume.index.get(os.stat(volume.path("file")).st_ino).dirty
    assert left(volume.index, marks, position, Never().matcher()) == 1
    volume.tier.drain()
    assert left(volume.index, marks, position, Never().matcher()) == 1


def test_what_came_late_and_is_no_longer_in_the_log(volume, monkeypatch):
    """Segments that have been read are removed, and one is soon full."""
    monkeypatch.setattr("tierfs.marks.SEGMENT", 64 << 10)
    volume.marks._next_segment()
    position = volume.tier.drain()
    volume.server.create(volume.path("late"), b"x")
    start = volume.marks.start
    while volume.marks.start < start + (128 << 10):
        volume.server.create(volume.path("brief"), b"x")
        volume.server.unlink(volume.path("brief"))
    volume.tier.drain()
    assert volume.record("late").dirty
    assert left(volume.index, str(volume.base / "marks"), position, Never().matcher()) == 1
