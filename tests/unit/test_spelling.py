"""Names that are no text, or no line, in what is said, logged and sent."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import sys
import time

import pytest
from tierfsd import logs

from tierfs import control, terminal, volume
from tierfs.errors import UsageError
from tierfs.index import Index
from tierfs.spelling import quoted, shown
from tierfs.store.urls import check_url, open_store
from tierfs.transfer import Troubles

STRANGE = b"a\n\xff \xc3\xa9"
NEAR = "a\\n\\xff \u00e9"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_progress_bar_stays_on_one_line(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with terminal.bar("Copying to the store") as bar:
        for done in range(5):
            bar.show(control.Progress(done, 12345, done << 30, 5 << 30, "d/" + "long name of a file " * 5))
            time.sleep(0.12)  # it is drawn ten times a second
        drawn = sys.stderr.getvalue()
    assert "/12345" in drawn
    assert "\x1b[1A" not in drawn, "a second line is what it goes up from"


def test_names_and_messages_with_names_are_written_in_one_way():
    assert shown(STRANGE) == shown(os.fsdecode(STRANGE)) == NEAR
    assert quoted(STRANGE) == f"'{NEAR}'"
    assert shown(f"{shown(STRANGE)}: {os.fsdecode(STRANGE)}") == f"{NEAR}: {NEAR}"
    assert json.loads(json.dumps(shown(STRANGE))) == NEAR


def test_the_log_has_a_line_of_text_an_event():
    stream = io.StringIO()
    before = logging.getLogger().handlers[:], logging.getLogger().level
    logs.setup(stream)
    try:
        logging.getLogger("x").error("%s is away", os.fsdecode(STRANGE))
    finally:
        logging.getLogger().handlers[:], logging.getLogger().level = before
    assert stream.getvalue().endswith(f"ERROR x: {NEAR} is away\n")
    assert stream.getvalue().encode("utf-8")


def test_what_status_tells_of_errors_is_text():
    troubles = Troubles()
    troubles.note(f"{os.fsdecode(STRANGE)}: is damaged")
    assert [trouble.what for trouble in troubles.list()] == [f"{NEAR}: is damaged"]


def test_a_message_that_is_no_text_reaches_whoever_asked():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        control.send(ours, control.Done(1, [control.Outcome(STRANGE, f"like {os.fsdecode(STRANGE)}", True)]))
        assert control.receive_answer(theirs) == control.Done(
            1, [control.Outcome(STRANGE, f"like {NEAR}", True)]
        )


def test_a_state_directory_may_have_any_name(tmp_path):
    place = os.path.join(tmp_path, os.fsdecode(STRANGE))
    os.mkdir(place)
    url = volume.resolve_store(place, "embedded")
    check_url(url)
    store = open_store(url, create=True)
    try:
        store.put("data/x", b"x", 1)
        assert store.describe().endswith("/a%0A%FF%20%C3%A9/store")
    finally:
        store.close()
    assert os.listdir(os.path.join(place, "store", "data")) == ["x"]
    Index.open(os.path.join(place, "index")).close()
    status = control.Status("v", place, "", 1, 2, 3, 4, 5, 6, 7, 8, {}, [], state_bytes=os.fsencode(place))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        control.send(ours, status)
        answer = control.receive_answer(theirs)
    assert isinstance(answer, control.Status) and answer.where == place


def test_a_url_says_what_is_no_text_in_text():
    with pytest.raises(UsageError, match="write %XX for what is no text"):
        check_url("file:///" + os.fsdecode(STRANGE))


def test_a_result_is_written_in_the_encoding_that_was_asked_for(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii", errors="backslashreplace"))
    terminal.tell(os.fsdecode(STRANGE))
    terminal.sys.stdout.flush()
    assert raw.getvalue() == b"a\\n\\xff \\xe9\n"
