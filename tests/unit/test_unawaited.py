"""Threads and jobs whose result nobody waits for: a defect is logged, and whoever waits is answered."""

import errno
import logging
import os
import socket
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from bare import until
from harness import needs_libfuse
from tierfsd import assembly, claiming, control_server, logs
from tierfsd.pinned import Pinned
from tierfsd.priority import Priority
from tierfsd.scheduler import Scheduler
from tierfsd.supervisor import Supervisor

from tierfs.errors import BusyError, IndexError_, IndexFullError
from tierfs.heat_index import HeatIndex
from tierfs.index import Index
from tierfs.settling import Settler
from tierfs.transfer import Pool, Urgency


def broken(*_args, **_more):
    raise RuntimeError("a defect")


@pytest.fixture
def stub(volume):
    """The path of a demoted file that says `content`."""
    path = volume.path("file")
    volume.server.create(path, b"content")
    volume.demote("file")
    return path


@pytest.mark.parametrize(
    ("error", "level"), [(RuntimeError("x"), logging.ERROR), (BusyError("x"), logging.INFO)]
)
def test_a_job_that_nobody_waits_for_says_how_it_failed(caplog, error, level):
    def job():
        raise error

    caplog.set_level(logging.INFO)
    pool = Pool(1, "uploads")
    pool.post(Urgency.GARBAGE, job)
    assert until(lambda: caplog.records)
    pool.close()
    (record,) = caplog.records
    assert record.levelno == level and "'uploads'" in record.getMessage()


def test_a_commit_that_nobody_waits_for_says_how_it_failed(volume, caplog):
    volume.index.post(broken)
    volume.index.commit(lambda writer: None).result(20)
    assert any("a commit that nobody waits for" in record.getMessage() for record in caplog.records)


def test_commits_go_on_after_no_room_could_be_made_for_one(volume, monkeypatch):
    index = volume.index
    with monkeypatch.context() as full:
        full.setattr(index, "make_room", broken)
        full.setattr(index, "_try_batch", lambda batch: ([], {0: IndexFullError("full")}))
        with pytest.raises(IndexFullError):
            index.commit(lambda writer: None).result(20)
    assert index.commit(lambda writer: 7).result(20) == 7


@pytest.mark.parametrize("where", ["open", "join"])
def test_a_defect_before_the_first_range_is_told_to_all_and_the_next_read_succeeds(
    volume, stub, monkeypatch, caplog, where
):
    filler = volume.tier.filler
    with monkeypatch.context() as defect:
        target, name = (filler._opener, "open") if where == "open" else (filler, "_join")
        defect.setattr(target, name, broken)
        with pytest.raises(OSError, match="a defect") as caught:
            volume.server.read(stub)
        assert caught.value.errno == errno.EIO
        assert until(lambda: filler.waiting == 0)
    assert any(record.exc_info for record in caplog.records)
    if where == "open":
        assert volume.server.read(stub) == b"content"


def test_a_defect_past_a_full_disk_is_told(volume, stub, monkeypatch):
    filler = volume.tier.filler
    monkeypatch.setattr(filler._kit.__class__, "has_room", lambda kit, count: False)
    monkeypatch.setattr(filler._passer, "serve", broken)
    with pytest.raises(OSError):
        volume.server.read(stub)
    assert until(lambda: filler.waiting == 0)


def test_settling_goes_on_after_what_cannot_be_given_up(volume, stub, monkeypatch, caplog):
    settler = volume.tier.filler._settle.__self__
    assert isinstance(settler, Settler)
    ended = threading.Event()

    def give_up(arrival, error):
        ended.set()
        broken()

    with monkeypatch.context() as defect:
        defect.setattr(settler, "settle", broken)
        defect.setattr(settler, "_give_up", give_up)
        assert volume.server.read(stub) == b"content"
        assert ended.wait(20)
        release = SimpleNamespace(moved=False, ino=5)
        defect.setattr(settler.filler, "drop", broken)
        began = time.monotonic()
        settler.release(release)
        assert time.monotonic() - began < 4, "it was answered, not waited for in vain"
    assert settler._thread.is_alive()


def test_ears_that_fail_end_the_server(monkeypatch):
    needs_libfuse()
    from tierfsd import portable_server

    class Ended(BaseException):
        pass

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    ears = portable_server.Ears.__new__(portable_server.Ears)
    ears._done, ears._lock = threading.Event(), threading.RLock()
    ears._poll = SimpleNamespace(poll=lambda seconds: [])
    ears._gate = SimpleNamespace(tick=broken)
    with pytest.raises(Ended, match="1"):
        ears._listen()


def test_clients_are_heard_after_there_were_too_many_threads(tmp_path, monkeypatch):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.listen(8)
    server = control_server.ControlServer(listener, 0, SimpleNamespace(handle_of=None))
    served = threading.Event()
    monkeypatch.setattr(server, "_serve", lambda client: (client.sock.close(), served.set()))
    real, refused = threading.Thread.start, threading.Event()

    def start(thread):
        if thread.name == "control-request" and not refused.is_set():
            refused.set()
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    server.start()
    with listener:
        for _ in range(2):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(tmp_path / "socket"))
                assert client.recv(1) == b""
        assert refused.is_set() and served.wait(20)
        server.close()


def test_a_claim_that_fails_in_an_unknown_way_is_tried_again(monkeypatch):
    kit = SimpleNamespace(withheld="not yet", claim_tried=threading.Event())
    mover = assembly.Mover.__new__(assembly.Mover)
    mover.stopping, mover._tier = threading.Event(), SimpleNamespace(kit=kit)
    mover._home = SimpleNamespace(identity=SimpleNamespace(view=True))
    said = []

    def where():
        said.append(kit.withheld)
        if len(said) == 1:
            broken()

    monkeypatch.setattr(mover, "_note_where_the_store_is", where)
    monkeypatch.setattr(assembly, "_CLAIM_SECONDS", 0.01)
    mover._claim()
    assert kit.claim_tried.is_set()
    assert said == ["not yet", "the store cannot be claimed: internal error (RuntimeError)"]


def test_a_fence_whose_question_fails_lets_work_go_on(caplog):
    claiming.Fence(broken, lambda: 60.0).check()
    assert any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("error", [IndexError_("damaged"), RuntimeError("a defect")])
def test_pins_that_cannot_be_listed_are_a_trouble(volume, monkeypatch, error):
    def pins():
        raise error

    monkeypatch.setattr(volume.tier, "pins", pins)
    Pinned(volume.tier, threading.Event()).fetch()
    assert "what is pinned cannot be fetched" in volume.tier.kit.troubles.list()[-1].what


def test_a_look_at_the_tree_whose_need_cannot_be_told_is_a_trouble(volume, tmp_path, monkeypatch):
    def totals():
        raise IndexError_("damaged")

    heat = HeatIndex(str(tmp_path / "heat"), 1 << 30)
    try:
        scheduler = Scheduler(volume.tier, heat, False, str(tmp_path / "ballast"))
        with monkeypatch.context() as ill:
            ill.setattr(volume.index, "totals", totals)
            assert not scheduler._look_if_needed()
        assert "the tree could not be looked through" in volume.tier.kit.troubles.list()[-1].what
    finally:
        heat.close()


def test_a_share_of_the_processor_is_looked_after_again_when_a_look_has_failed(tmp_path):
    (tmp_path / "group").write_text("")
    priority, looks = Priority(str(tmp_path / "group"), 0.01), []

    def waiting():
        looks.append(None)
        if len(looks) == 1:
            broken()
        return True

    priority.start(waiting)
    assert until(lambda: len(looks) > 2)
    priority.stop()


def test_a_thread_that_ends_by_a_defect_is_in_the_log(caplog, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", logs._log_thread)
    thread = threading.Thread(target=broken, name="somebody")
    thread.start()
    thread.join()
    assert any(record.getMessage() == "somebody has ended" and record.exc_info for record in caplog.records)
    caplog.clear()
    leaving = threading.Thread(target=sys.exit)
    leaving.start()
    leaving.join()
    assert not caplog.records


def no_thread(thread):
    raise RuntimeError("can't start new thread")


def test_a_pool_goes_on_after_there_were_too_many_threads(monkeypatch):
    pool, held, done = Pool(2, "work"), threading.Event(), []
    with monkeypatch.context() as many:
        many.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(BusyError):
            pool.submit(Urgency.READER, lambda: done.append("refused"))
    first = pool.submit(Urgency.READER, lambda: held.wait(20))
    with monkeypatch.context() as many:
        many.setattr(threading.Thread, "start", no_thread)
        second = pool.submit(Urgency.READER, lambda: done.append("second"))
    held.set()
    assert first.result(20) and second.result(20) is None and done == ["second"]
    pool.close()


def test_an_index_commits_after_there_were_too_many_threads(tmp_path, monkeypatch):
    index = Index.open(str(tmp_path))
    with monkeypatch.context() as many:
        many.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError):
            index.commit(lambda writer: None)
    assert index.commit(lambda writer: 7).result(20) == 7
    index.close()


def test_what_is_pinned_is_fetched_after_there_were_too_many_threads(volume, monkeypatch):
    pinned, fetched = Pinned(volume.tier, threading.Event()), threading.Event()
    monkeypatch.setattr(pinned, "fetch", fetched.set)
    volume.tier.drainer.pinned.set()
    with monkeypatch.context() as many:
        many.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError):
            pinned.turn()
    pinned.turn()
    assert fetched.wait(20) and not volume.tier.drainer.pinned.is_set()


def test_a_supervisor_outlives_too_many_threads(monkeypatch, caplog):
    """Who asks it to reload finds in the log that it was not done."""
    supervisor = Supervisor.__new__(Supervisor)
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    supervisor._begin_to_reload()
    assert "not reloaded" in caplog.text


def test_whose_the_store_is_is_asked_after_there_were_too_many_threads(monkeypatch):
    asked = []
    fence = claiming.Fence(lambda: asked.append(True), lambda: 60.0)
    with monkeypatch.context() as many:
        many.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError):
            fence.check()
    fence.check()
    assert asked == [True]
