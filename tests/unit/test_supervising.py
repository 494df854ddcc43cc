"""What the supervisor keeps and hears, without processes and without a mount."""

import contextlib
import errno
import os
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
from tierfsd import supervisor as supervisor_module
from tierfsd.attachment import Attachment
from tierfsd.children import Child
from tierfsd.events import Events
from tierfsd.indexcare import INDEX_DAMAGED, IndexCare
from tierfsd.logs import CANNOT_WORK, LogFile, LogPipe
from tierfsd.serverchannel import ServerChannel
from tierfsd.standin import StandIn
from tierfsd.supervisor import Supervisor

from tierfs import channel, control


@pytest.fixture
def attachment(tmp_path):
    made = Attachment(str(tmp_path), "00112233445566778899aabbccddeeff")
    yield made
    made.detach()


@pytest.fixture
def heard(attachment):
    """(the supervisor's end, the server's, what was called)."""
    called = []
    ours = ServerChannel(Events(), attachment, lambda: called.append("suspect"), called.append)
    with ours.open() as sock:
        yield ours, channel.Channel(sock, server=True), called
    ours.drop()


def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_what_a_server_says_is_known_after_its_end(heard):
    ours, theirs, called = heard
    ready, stuck = channel.Ready(True, True, "pure"), channel.Stuck(7, "sleeps")
    for message in (channel.Prepared(), ready, channel.Suspect(), stuck, channel.Stopped(True)):
        theirs.send(message)
    theirs.close()
    ours.hear_all()
    assert not ours.is_open
    assert (ours.prepared, ours.ready, ours.lasting, ours.form, ours.clean) == (True, True, True, "pure", True)
    assert called == ["suspect", stuck] and ours.served_for() > 0
    with ours.open():
        assert not (ours.prepared or ours.ready or ours.lasting or ours.clean or ours.served_for())


def test_descriptors_of_nameless_files_are_kept_until_they_are_let_go(heard, attachment, tmp_path):
    ours, theirs, _ = heard
    for ino in (5, 5, 6):
        with open(tmp_path / "nameless", "w") as file:
            theirs.send(channel.Keep(ino), [file.fileno()])
    assert ours.hear()
    first = os.fstat(attachment.kept[5])
    ours.hear_all()
    assert os.fstat(attachment.kept[5]).st_ino == first.st_ino
    assert set(attachment.kept) == {5, 6} and all(map(is_open, attachment.kept.values()))
    theirs.send(channel.LetGo(5))
    let_go = attachment.kept[5]
    ours.hear_all()
    assert set(attachment.kept) == {6} and not is_open(let_go)
    left = attachment.kept[6]
    attachment.detach()
    assert not attachment.kept and not is_open(left)


def test_another_server_gets_all_that_is_kept(heard, attachment):
    ours, theirs, _ = heard
    for ino in range(1, 252):
        attachment.keep(ino, os.open("/dev/null", os.O_RDONLY))
    ours.hand_on()
    got = []
    while len(got) < 251:
        message, fds = theirs.receive()
        assert len(message.inos) == len(fds)
        got += message.inos
        for fd in fds:
            os.close(fd)
    assert sorted(got) == list(range(1, 252))


def test_who_asks_in_a_long_pause_is_told_why_nobody_answers(tmp_path):
    events = Events()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "control"))
    listener.listen()
    stand_in = StandIn(events, listener, lambda how, seconds: f"it {how}: {seconds:.0f} s")
    stand_in.begin("was killed", 0.0)
    with listener, socket.socket(socket.AF_UNIX) as asking:
        asking.connect(str(tmp_path / "control"))
        control.send(asking, control.Reload())
        events.wait(lambda: bool(select.select([asking], [], [], 0)[0]), 5)
        assert b"it was killed: 1 s" in asking.recv(4096)
        stand_in.end()
        stand_in.end()
        with socket.socket(socket.AF_UNIX) as later:
            later.connect(str(tmp_path / "control"))
            events.wait(lambda: False, 0.05)
            listener.setblocking(False)
            listener.accept()[0].close()  # it is left to the mover


def test_lines_of_children_reach_the_log_whole(tmp_path):
    pipe = LogPipe(LogFile(str(tmp_path / "log")))
    os.write(pipe.writing, b"first\nsec")
    pipe.drain()
    assert (tmp_path / "log").read_bytes() == b"first\n"
    os.write(pipe.writing, b"ond\n")
    pipe.drain()
    assert (tmp_path / "log").read_bytes() == b"first\nsecond\n"


def test_a_signal_ends_a_wait_and_is_taken_once():
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGCHLD)}
    events = Events()
    try:
        events.catch([signal.SIGUSR2])
        os.kill(os.getpid(), signal.SIGUSR2)
        events.wait(lambda: bool(events.signals), 10)
        assert events.take(signal.SIGUSR2) and not events.take(signal.SIGUSR2)
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)


def test_whatever_ends_it_leaves_no_mount_that_nobody_looks_after(monkeypatch):
    ending = Supervisor.__new__(Supervisor)
    done = []

    def fail():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ending, "_run", fail)
    monkeypatch.setattr(ending, "_end_children", lambda: done.append("children"))
    monkeypatch.setattr(ending, "_detach", lambda: done.append("mount"))
    with pytest.raises(OSError, match="No space"):
        ending.run()
    assert done == ["children", "mount"]


@pytest.mark.parametrize("status", [1, -9])
def test_who_asks_is_told_why_there_is_no_mover_and_what_to_do(tmp_path, status):
    """As while not one page of the index can be written."""
    logfile = LogFile(str(tmp_path / "log"))
    made = Supervisor.__new__(Supervisor)
    made._logfile, made._log, made._suspect, made._mover_due = logfile, LogPipe(logfile), False, 0.0
    made._care = IndexCare(SimpleNamespace(path=lambda name: str(tmp_path / name)))
    made._mover = Child("mover", "tierfsd.mover", -1)
    made._mover._started, made._mover.reap = time.monotonic(), lambda: status
    told = []
    made._stand_in = SimpleNamespace(begin=lambda how, until: told.append(made._excuse(how, 9.0)))
    made._start_mover = made._publish = lambda: None
    said = "/s/index: the index cannot be written: no room is left: make room on its filesystem"
    for _ in range(5):
        os.write(made._log.writing, f"2026-11-26 12:00:00.000 CRITICAL mover: {CANNOT_WORK}{said}\n".encode())
        made._look_after_mover()
    how = f"ended with exit code 1 ({said})" if status > 0 else "was killed by SIGKILL"
    (excuse,) = told
    assert excuse.startswith(f"the mover {how}, for the 5th time: another is started in 9 s")


def test_a_disk_without_room_for_a_mark_is_no_reason_to_end(tmp_path):
    """That the index is to be looked at cannot be written down: then it is known for now."""
    care = IndexCare(SimpleNamespace(path=lambda name: str(tmp_path / "gone" / name)))
    assert care.suspect(INDEX_DAMAGED) and not care.suspect(1)


@pytest.fixture
def serving(tmp_path, heard):
    """A supervisor with a server to talk to, and children that are not run. It may be asked."""
    made = Supervisor.__new__(Supervisor)
    made._channel, made._events, made._log = heard[0], Events(), SimpleNamespace(drain=lambda: None)
    made._care = IndexCare(SimpleNamespace(path=lambda name: str(tmp_path / "gone" / name)))
    made._suspect, made._mover_due, made._lock_fd = False, 0.0, 0
    made._plan = SimpleNamespace(volume=SimpleNamespace(state=str(tmp_path)))
    made._logfile = SimpleNamespace(path="/s/log/tierfs.log", last_error="")
    made._mover, made._server = Child("mover", "no.mover", 2), Child("server", "no.server", 2)
    made._publish = lambda: None
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control"))
        listener.listen()
        made._listener, made._stand_in = listener, StandIn(made._events, listener, made._excuse)
        yield made
    made._mover.kill()


def test_a_machine_without_a_process_to_spare_is_no_reason_to_end(serving, tmp_path, monkeypatch):
    """The mover has died, perhaps for want of memory, and there is none for the next one either."""
    left = 2
    real = subprocess.Popen

    def popen(*args, **named):
        nonlocal left
        left -= 1
        if left >= 0:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return real(["sleep", "60"], start_new_session=True)

    monkeypatch.setattr(subprocess, "Popen", popen)
    serving._look_after_mover()
    assert not serving._mover.pid and 0 < serving._mover_due - time.monotonic() < 10
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(str(tmp_path / "control"))
        control.send(asking, control.Reload())
        serving._events.wait(lambda: bool(select.select([asking], [], [], 0)[0]), 5)
        assert b"could not be started (Resource temporarily unavailable)" in asking.recv(4096)
    serving._mover_due = 0.0
    serving._look_after_mover()
    serving._mover_due = 0.0
    serving._look_after_mover()
    assert serving._mover.pid


def test_a_server_is_waited_for_until_there_is_memory_for_it(serving, monkeypatch):
    errors = [errno.ENOMEM, errno.EAGAIN]
    monkeypatch.setattr(supervisor_module, "_PATIENCE", (0.01, 0.01, 0.01))

    def start(arguments, fds):
        if errors:
            raise OSError(errors.pop(), "not now")
        started.append(fds)

    started = []
    serving._server.start = start
    serving._run_server({}, [3])
    assert started == [[3]]
    errors.append(errno.ENOENT)
    with pytest.raises(OSError, match="not now"):
        serving._run_server({}, [3])
    errors.extend([errno.EAGAIN] * 4)
    with pytest.raises(OSError, match="not now"):
        serving._run_server({}, [3])


def test_damage_on_a_full_disk_is_no_reason_to_end(serving):
    serving._doubt_index()
    assert serving._suspect


def test_who_asks_slowly_keeps_the_supervisor_from_nothing(serving, tmp_path):
    serving._stand_in.begin("was killed", time.monotonic() + 5)
    ended = threading.Event()
    with socket.socket(socket.AF_UNIX) as slow:
        slow.connect(str(tmp_path / "control"))

        def drip():
            with contextlib.suppress(OSError):
                slow.send(struct.pack("<I", 1 << 20))
                while not ended.wait(0.1):
                    slow.send(b"x")

        dripping = threading.Thread(target=drip)
        dripping.start()
        begun = time.monotonic()
        serving._events.wait(lambda: time.monotonic() > begun + 0.2, 0.3)
        took = time.monotonic() - begun
        ended.set()
        dripping.join()
    assert took < 3
