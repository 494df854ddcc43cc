"""Rules of custody that have no better place; the table of all of them and their tests is tests/CUSTODY.md."""

from __future__ import annotations

import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tierfs.errors import IndexError_
from tierfs.index import Index
from tierfs.syscalls import fallocate

TESTS = Path(__file__).parents[1]
KEEP_SIZE = 1
RULES = 28


def test_each_rule_has_tests_and_each_test_exists():
    rows = [
        line.split("|") for line in (TESTS / "CUSTODY.md").read_text().splitlines() if re.match(r"\| \d", line)
    ]
    assert [int(row[1]) for row in rows] == list(range(1, RULES + 1))
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", row[3])
        assert named, row
        for path, test in named:
            text = (TESTS / path).read_text()
            assert not test or f"def {test}(" in text, f"{path}::{test}"


def test_a_file_of_this_very_moment_is_not_copied(volume, monkeypatch):
    """Within one tick of the clock a later write would leave the same ctime: no tuple could show it."""
    volume.server.create(volume.path("a"), b"x" * 10_000)
    ctime = os.stat(volume.path("a")).st_ctime_ns
    with monkeypatch.context() as still:
        still.setattr(time, "time_ns", lambda: ctime + 1)
        (item,) = volume.demote("a")
    assert item.reason == "is changing right now" and volume.stub("a") is None
    (item,) = volume.demote("a")
    assert item.demoted


def test_after_a_crash_content_that_changed_under_an_equal_tuple_is_not_given_up(volume):
    """What a power cut may leave: size and times are those of the copy, the bytes are not."""
    volume.server.create(volume.path("a"), b"x" * 10_000)
    volume.demote("a", punch=False)
    with open(volume.path("a"), "r+b") as file:
        file.write(b"changed")
    st, record = os.stat(volume.path("a")), volume.record("a")
    forged = replace(record.copy, mtime=st.st_mtime_ns, ctime=st.st_ctime_ns)
    volume.index.commit(lambda w: w.put(replace(record, copy=forged))).result()
    volume.restart(clean=False, boot="another")
    volume.demote("a")
    assert volume.record("a").copy.tag != record.copy.tag
    assert volume.server.read(volume.path("a")) == b"changed" + b"x" * 9_993


def test_blocks_beyond_the_end_go_too(volume):
    volume.server.create(volume.path("a"), b"x" * 10_000)
    fd = os.open(volume.path("a"), os.O_RDWR)
    fallocate(fd, KEEP_SIZE, 0, 1 << 20)
    os.close(fd)
    assert os.stat(volume.path("a")).st_blocks >= 2048
    (item,) = volume.demote("a")
    assert item.demoted, item.reason
    assert os.stat(volume.path("a")).st_blocks == 0


def test_who_reads_the_index_cannot_write_it(tmp_path):
    Index.open(str(tmp_path)).close()
    index = Index.open(str(tmp_path), readonly=True)
    try:
        with pytest.raises(IndexError_):
            index.commit(lambda w: w.note(1)).result()
    finally:
        index.close()
