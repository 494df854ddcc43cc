"""Log file, children, hot reload and the service manager: the supervisor's parts, without a mount."""

import errno
import logging
import os
import resource
import select
import signal
import socket
import sys
import threading
from pathlib import Path
from queue import Empty, SimpleQueue
from types import SimpleNamespace

import lmdb
import pytest
from tierfsd import logs, main, mount_server, servicemanager
from tierfsd import scheduler as scheduling
from tierfsd.backend import TierBackend
from tierfsd.children import Child
from tierfsd.scheduler import Scheduler
from tierfsd.watcher import ConfigWatcher
from tiering import Volume
from watchdog.events import FileModifiedEvent

from tierfs import config, locate, wire
from tierfs.errors import ConfigError, StoreUnavailableError, VolumeError
from tierfs.heat_index import HeatIndex
from tierfs.survey import Survey


@pytest.fixture
def root_logger():
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    yield root
    root.handlers[:], level = before
    root.setLevel(level)


def test_log_lines_can_be_read_and_keep_to_one_line(tmp_path, root_logger):
    file = logs.LogFile(str(tmp_path / "t.log"))
    logs.setup(file)
    logging.getLogger("mover").error("%s: cannot be read", "a\nb\udcff")
    logging.getLogger("mover").info("fine")
    lines = (tmp_path / "t.log").read_text().splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("ERROR mover: a\\nb\\xff: cannot be read")
    assert lines[0][:2] == "20"
    assert file.last_error == "a\\nb\\xff: cannot be read"


def test_the_log_is_rotated_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "MAX_BYTES", 1000)
    file = logs.LogFile(str(tmp_path / "t.log"))
    for number in range(200):
        file.append(b"%090d\n" % number)
    names = sorted(os.listdir(tmp_path))
    assert names == ["t.log", *(f"t.log.{n}" for n in range(1, logs.KEEP + 1))]
    assert (tmp_path / "t.log").read_bytes().endswith(b"%090d\n" % 199)
    assert all((tmp_path / name).stat().st_size <= 1200 for name in names)


def test_a_log_that_somebody_has_removed_is_begun_anew_when_that_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "MAX_BYTES", 1000)
    file = logs.LogFile(str(tmp_path / "t.log"))
    file.append(b"%0999d\n" % 1)
    os.unlink(tmp_path / "t.log")
    file.append(b"%099d\n" % 2)
    file.append(b"%099d\n" % 3)
    assert (tmp_path / "t.log").read_bytes() == b"%099d\n" % 3


@pytest.mark.parametrize("permitted", [True, False])
def test_the_server_has_more_descriptors_than_one_program_may(monkeypatch, permitted):
    most = int(Path("/proc/sys/fs/nr_open").read_text())
    now = [256, 512]

    def setrlimit(_, limits):
        if limits[1] > now[1] and not permitted:
            raise ValueError("not allowed to raise maximum limit")
        now[:] = limits

    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(now))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    main._raise_limits()
    assert now == ([most, most] if permitted else [512, 512])


def test_what_is_mounted_is_refused_before_a_state_directory_that_may_be_anothers(tmp_path, monkeypatch):
    mount = locate.Mount(str(tmp_path), locate.FSTYPE, "tierfs#1", 0)
    monkeypatch.setattr(locate, "read_mounts", lambda: [mount])
    monkeypatch.setattr(os, "stat", lambda *_, **__: pytest.fail("it looks into it"))
    with pytest.raises(VolumeError, match="is already mounted"):
        main._precheck(SimpleNamespace(mountpoint=str(tmp_path), state=str(tmp_path / "state"), store=None))


def test_the_foreground_sees_the_log(tmp_path):
    reading, writing = os.pipe()
    logs.LogFile(str(tmp_path / "t.log"), echo=writing).append(b"hello\n")
    assert os.read(reading, 100) == b"hello\n"
    os.close(reading)
    os.close(writing)


def test_a_child_is_started_reaped_and_counted(tmp_path):
    module = tmp_path / "childmodule.py"
    module.write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
    reading, writing = os.pipe()
    child = Child("c", "childmodule", writing)
    os.environ["PYTHONPATH"] = str(tmp_path)
    try:
        child.start({"state": "/s", "epoch": 4}, [])
    finally:
        del os.environ["PYTHONPATH"]
    while child.alive():
        threading.Event().wait(0.01)
    assert os.read(reading, 1000) == b"['--state', '/s', '--epoch', '4']\n"
    assert child.reap() == 3
    assert child.reap() is None
    child.died()
    assert (child.deaths, child.pid) == (1, 0)
    child.signal(signal.SIGTERM)
    child.kill()
    os.close(reading)
    os.close(writing)


def test_the_working_directory_is_not_imported_from(tmp_path, monkeypatch):
    (tmp_path / "msgspec.py").write_text("raise SystemExit(77)")
    monkeypatch.chdir(tmp_path)
    status = os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-P", "-c", "import msgspec"])
    assert status == 0


@pytest.fixture
def watched(tmp_path):
    path = tmp_path / "config.toml"
    config.write_default(str(path))
    seen = []
    changed = threading.Condition()

    def apply(fresh):
        with changed:
            seen.append(fresh)
            changed.notify_all()

    watcher = ConfigWatcher(str(path), config.EMBEDDED_STORE, apply)
    watcher.start()

    def wait_for(condition):
        with changed:
            assert changed.wait_for(condition, 10)

    yield path, watcher, seen, wait_for
    watcher.close()


def test_a_saved_configuration_is_in_force_at_once(watched):
    path, _, seen, wait_for = watched
    path.write_text('quiet = "1s"\n')
    wait_for(lambda: seen and seen[-1].quiet_seconds == 1)
    config.set_key(str(path), "quiet", "2s")  # saved as editors do: written aside and renamed over
    wait_for(lambda: seen[-1].quiet_seconds == 2)


def test_a_bad_configuration_changes_nothing_and_is_told(watched):
    path, watcher, seen, wait_for = watched
    path.write_text('quite = "1s"\n')
    with pytest.raises(ConfigError, match="did you mean 'quiet'"):
        watcher.reload()
    assert "unknown key 'quite'" in watcher.problem
    assert seen == [] and watcher.current == config.VolumeConfig()
    path.write_text('quiet = "3s"\n')
    wait_for(lambda: seen)
    assert watcher.problem == "" and watcher.current.quiet_seconds == 3


def test_a_bad_configuration_is_logged_once(tmp_path, caplog):
    """One save makes several events. Without the observer's thread, whose events would come between."""
    path = tmp_path / "config.toml"
    path.write_text(config.default_text())
    watcher = ConfigWatcher(str(path), config.EMBEDDED_STORE, lambda fresh: None)
    path.write_text('quite = "1s"\n')
    for _ in range(2):
        watcher.on_any_event(FileModifiedEvent(str(path)))
    assert [record.message for record in caplog.records if "quite" in record.message] == [
        f"{path}:1: unknown key 'quite': did you mean 'quiet'?; the former settings stay in force"
    ]


def test_a_configuration_that_is_bad_from_the_beginning_gives_the_defaults(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("nonsense")
    watcher = ConfigWatcher(str(path), "file:///x", lambda fresh: None)
    assert watcher.current == config.VolumeConfig(store="file:///x")
    assert "is not valid TOML" in watcher.problem


def test_the_store_of_a_volume_cannot_be_changed_by_its_configuration(watched):
    path, watcher, seen, _ = watched
    path.write_text('store = "s3://other"\n')
    with pytest.raises(ConfigError, match="fixed when the volume is created"):
        watcher.reload()
    assert seen == []


def test_the_service_manager_is_told(tmp_path, monkeypatch):
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        servicemanager.notify("READY=1")
        assert sock.recv(100) == b"READY=1"
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    servicemanager.notify("READY=1")


def test_nobody_waits_for_a_look_at_the_tree_that_has_failed_and_it_is_tried_again(tmp_path, monkeypatch):
    made = Volume(tmp_path)
    heat = HeatIndex(str(tmp_path / "heat"), 1 << 30)
    scheduler = Scheduler(made.tier, heat, False, str(tmp_path / "ballast"))
    looking = threading.Thread(target=scheduler._look_through, daemon=True)
    try:
        monkeypatch.setattr(scheduling, "_AGAIN_SECONDS", 0.01)
        with monkeypatch.context() as patch:
            patch.setattr(Survey, "run", lambda self: (_ for _ in ()).throw(OSError(5, "the disk is broken")))
            looking.start()
            assert scheduler.looked.wait(5) and not made.index.surveyed
            assert "the disk is broken" in made.tier.kit.troubles.list()[-1].what
            backend = TierBackend.__new__(TierBackend)
            backend._home = SimpleNamespace(identity=SimpleNamespace(view=False))
            backend._kit, backend._looked = made.tier.kit, scheduler.looked
            (stayed,) = backend.drain(SimpleNamespace(cancelled=threading.Event())).stayed
            assert stayed.failed and "could not be looked through" in stayed.reason
        looking.join(5)
        assert made.index.surveyed
    finally:
        scheduler._stopping.set()
        heat.close()
        made.stop()


def test_a_collection_waits_for_the_stores_first_answer():
    backend = TierBackend.__new__(TierBackend)
    kit = SimpleNamespace(withheld="the store has not answered yet", claim_tried=threading.Event())
    backend._kit, backend._tier = kit, SimpleNamespace(kit=kit, drain=lambda: None)
    backend._collector = SimpleNamespace(run=lambda now: 3)

    def answer():
        kit.withheld = ""
        kit.claim_tried.set()

    timer = threading.Timer(0.1, answer)
    timer.start()
    (done,) = backend.collect(False, SimpleNamespace(cancelled=threading.Event()))
    timer.join()
    assert done.files == 3
    kit.withheld = "it belongs to another machine"
    with pytest.raises(StoreUnavailableError, match="nothing is removed: it belongs to another machine"):
        list(backend.collect(False, SimpleNamespace(cancelled=threading.Event())))


def test_a_first_look_through_the_tree_verifies_nothing(tmp_path):
    class Looking(Survey):
        def _directory(self, path):
            lefts.append(self.left)
            return super()._directory(path)

    made = Volume(tmp_path)
    lefts = []
    try:
        made.server.create(made.path("a"), b"a" * 5000)
        for _ in range(2):
            assert Looking(made.tier, lambda guesses: None, threading.Event()).run()
        assert lefts == [0, 1]  # in a second look its record may say what is not so any more
    finally:
        made.stop()


def test_heat_that_finds_no_room_fails_nothing_and_is_written_later(tmp_path, monkeypatch):
    made = Volume(tmp_path)
    heat = HeatIndex(str(tmp_path / "heat"), 1 << 30)
    try:
        scheduler = Scheduler(made.tier, heat, False, str(tmp_path / "ballast"))
        movements, written = made.tier.kit.movements, []
        movements.take()
        movements.here(1, 10, 10)
        movements.left(2)
        movements.gone(3)

        def full(write):
            movements.here(1, 12, 2)
            movements.here(2, 5, 5)  # it has come back meanwhile
            raise lmdb.DiskError("mdb_txn_commit: No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(heat, "_env", SimpleNamespace(begin=full))
            scheduler.keeper.flush()
        monkeypatch.setattr(heat, "admit_many", lambda files, unused: written.extend(files))
        monkeypatch.setattr(heat, "left", lambda inos: written.append(("left", *inos)))
        monkeypatch.setattr(heat, "forget", lambda inos: written.append(("gone", *inos)))
        scheduler.keeper.flush()
        assert written == [(1, 12, 12), (2, 5, 5), ("gone", 3)]
    finally:
        heat.close()
        made.stop()


def test_rounds_are_made_when_there_is_something_to_do(tmp_path, monkeypatch):
    made = Volume(tmp_path)
    heat = HeatIndex(str(tmp_path / "heat"), 1 << 30)
    monkeypatch.setattr(scheduling, "_ROUND_SECONDS", 0.01)
    monkeypatch.setattr(scheduling, "_IDLE_SECONDS", 1000.0)
    scheduler, rounds = Scheduler(made.tier, heat, made.tree.device, str(tmp_path / "ballast")), SimpleQueue()
    monkeypatch.setattr(scheduler._pinned, "turn", lambda: rounds.put(None))
    try:
        scheduler.start()
        assert scheduler.looked.wait(30)
        while not rounds_have_ended(rounds):
            pass
        for happens in (
            scheduler.look,
            scheduler.bring_pinned,
            lambda: scheduler.poke(wire.Poke(0)),
            lambda: scheduler.poke(wire.Poke(0, urgent=True)),
            lambda: made.tier.kit.movements.here(1, 1, 1),
        ):
            happens()
            rounds.get(timeout=30)
            assert rounds_have_ended(rounds)
        scheduler.trials.doubtful = True  # nobody says when the store answers again: that has to be tried
        scheduler.look()
        for _ in range(20):
            rounds.get(timeout=30)
    finally:
        scheduler.stop()
        heat.close()
        made.stop()


def test_rounds_go_on_after_the_filesystem_did_not_say_how_full_it_is(tmp_path, monkeypatch):
    made = Volume(tmp_path)
    heat = HeatIndex(str(tmp_path / "heat"), 1 << 30)
    monkeypatch.setattr(scheduling, "_ROUND_SECONDS", 0.01)
    scheduler, rounds = Scheduler(made.tier, heat, False, str(tmp_path / "ballast")), SimpleQueue()
    monkeypatch.setattr(scheduler.trials, "ask_store", lambda: rounds.put(None))
    try:
        with monkeypatch.context() as patch:

            def ill():
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            patch.setattr(made.tree, "space", ill)
            scheduler.start()
            for _ in range(3):
                rounds.get(timeout=30)
        scheduler.look()
        rounds.get(timeout=30)
    finally:
        scheduler.stop()
        heat.close()
        made.stop()


def test_who_waits_for_space_is_waited_for_to_the_end(tmp_path, monkeypatch):
    made = Volume(tmp_path)
    heat = HeatIndex(str(tmp_path / "heat"), 1 << 30)
    scheduler = Scheduler(made.tier, heat, made.tree.device, str(tmp_path / "ballast"))
    seen = []
    eviction = scheduler.eviction
    monkeypatch.setattr(eviction, "victims", lambda urgent: seen.append(eviction.is_waited_for) or iter(()))
    try:
        assert not eviction.is_waited_for
        scheduler.poke(wire.Poke(0, urgent=True))
        assert eviction.is_waited_for
        eviction.turn()
        eviction.evict(1, urgent=False)
        assert seen == [True, False]
        assert not eviction.is_waited_for
    finally:
        heat.close()
        made.stop()


def rounds_have_ended(rounds):
    try:
        rounds.get(timeout=0.5)
    except Empty:
        return True
    return False


@pytest.mark.parametrize("who", ["the kernel", "the mover"])
def test_only_a_request_that_ends_a_sleep_is_one_that_spinning_would_have_caught(who):
    """While content arrives the mover speaks once a millisecond: the server would spin for that in vain."""
    pipes = {name: os.pipe() for name in ("the kernel", "the mover")}
    slept = []
    server = object.__new__(mount_server.Server)
    server._session = SimpleNamespace(fileno=lambda: pipes["the kernel"][0])
    server._spinner = SimpleNamespace(slept=slept.append)
    server._handlers = {pipes["the mover"][0]: lambda: os.read(pipes["the mover"][0], 1)}
    server._next_tick = float("inf")
    server._others, server._poll = select.epoll(), select.epoll()
    try:
        server._others.register(pipes["the mover"][0], select.EPOLLIN)
        for fd in (pipes["the kernel"][0], server._others.fileno()):
            server._poll.register(fd, select.EPOLLIN)
        os.write(pipes[who][1], b"x")
        server._events(5.0)
        assert len(slept) == (who == "the kernel")
    finally:
        server._poll.close()
        server._others.close()
        for pipe in pipes.values():
            os.close(pipe[0])
            os.close(pipe[1])


@pytest.mark.parametrize("failing", [0, 3])
def test_no_more_leaves_than_what_is_to_be_freed(tmp_path, monkeypatch, failing):
    """Also where several batches are needed, or some of the first stay."""
    made = Volume(tmp_path)
    heat = HeatIndex(str(tmp_path / "heat"), 1 << 30)
    names = [f"f{number:02}" for number in range(40)]
    try:
        scheduler = Scheduler(made.tier, heat, False, str(tmp_path / "ballast"))
        monkeypatch.setattr("tierfsd.eviction._BATCH", 16)
        for name in names:
            made.server.create(made.path(name), name.encode() * 4000)
        made.tier.drain()
        scheduler.keeper.flush()
        for name in names[:failing]:
            opath = os.open(made.path(name), os.O_PATH)
            made.tier.set_pin(opath, made.record(name).parent, name.encode(), True)
            os.close(opath)
        each = made.record(names[-1]).local
        assert scheduler.eviction.evict(20 * each, urgent=True) == 20 * each
        assert [name for name in names if made.stub(name) is not None] == names[failing : failing + 20]
    finally:
        heat.close()
        made.stop()


def test_on_a_full_disk_nothing_is_copied_to_a_store_on_it(tmp_path):
    """That takes what it was to free, and keeps it when the file is removed; what has a copy may go."""
    made = Volume(tmp_path)
    heat = HeatIndex(str(tmp_path / "heat"), 1 << 30)
    try:
        scheduler = Scheduler(made.tier, heat, True, str(tmp_path / "ballast"))
        for name in ("copied", "new"):
            made.server.create(made.path(name), name.encode() * 4000)
        made.demote("copied")
        made.fetch("copied")
        made.tier.drain()
        scheduler.keeper.flush()
        assert made.record("new").dirty and not made.record("copied").dirty
        freed = scheduler.eviction.evict(1 << 20, urgent=True)
        assert (made.stub("copied") is not None, made.stub("new")) == (True, None)
        assert freed > 0
        told = []
        scheduler.eviction.tell_futile = lambda: told.append(1)
        scheduler.eviction.urgent.set()
        scheduler.eviction.turn()
        assert told, "nothing is left that may go"
        told.clear()
        scheduler._stopping.set()
        scheduler.eviction.urgent.set()
        scheduler.eviction.turn()
        assert not told, "one that is ending tries no more, and leaves it to the next to say so"
    finally:
        heat.close()
        made.stop()
