"""The control socket: framing, rights of peers, cancelling, and a daemon that is down."""

import contextlib
import errno
import os
import select
import shutil
import socket
import stat
import struct
import subprocess
import sys
import threading
import time

import pytest
from tierfsd import control_server
from tierfsd.credentials import Peer, acting_as
from tierfsd.reach import Reach, Target
from tierfsd.turns import Client, Shares, Turns

from tierfs import control, locate
from tierfs.errors import (
    BusyError,
    IndexError_,
    NotPermittedError,
    PathError,
    TierError,
    UsageError,
    VolumeError,
)


class FakeBackend:
    """Remembers what it is asked."""

    def __init__(self):
        self.orders = []
        self.pinned = set()
        self.cancelled = threading.Event()
        self.block = False
        self.error = None

    def status(self):
        errors = [control.Problem(1.0, "secret")]
        return control.Status("abc", "/s", "file:///x", 1, 2, 3, 4, 5, 6, 7, 8, {}, errors)

    def facts(self, opath, status, path):
        tier = "directory" if stat.S_ISDIR(status.st_mode) else "resident"
        return control.Facts(path, tier, status.st_size, status.st_blocks * 512)

    def handle_of(self, opath):
        return b"h%d" % os.fstat(opath).st_ino

    def demote(self, targets, job):
        if self.error:
            raise self.error
        self.orders.append(targets)
        while self.block:
            job.report(control.Progress(0, len(targets), 0, 0))
            if job.cancelled.wait(0.01):
                self.cancelled.set()
                break
        return control.Done(len(targets))

    fetch = demote

    def versions(self, path, opath):
        return []

    def versions_beneath(self, path):
        return []

    def set_pin(self, opath, status, parent, name, on):
        (self.pinned.add if on else self.pinned.discard)(name)

    def pins(self):
        return self.pinned

    def drain(self, job):
        return control.Done()

    def check(self, request, job):
        return control.Findings([control.Finding("stub without copy", b"a\xff")], 3)

    def reload(self):
        raise TierError("config.toml:1: bad")


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    (root / "d" / "e").mkdir(parents=True)
    (root / "f").write_text("12345")
    (root / "d" / "g").write_text("1")
    (root / "d" / "e" / "h").write_text("1")
    (root / "link").symlink_to("d")
    os.mkfifo(root / "fifo")
    return root


@pytest.fixture
def backend():
    return FakeBackend()


@pytest.fixture
def server(tree, backend, tmp_path, monkeypatch):
    path = str(tmp_path / "abc.sock")
    monkeypatch.setattr(control, "socket_path", lambda volume, uid: path)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(8)
    rootfd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    server = control_server.ControlServer(listener, rootfd, backend)
    server.start()
    yield server
    server.close()
    listener.close()
    os.close(rootfd)


@pytest.fixture
def mount(server):
    return locate.Mount("/m", locate.FSTYPE, "tierfs#abc", os.geteuid())


def ask(mount, request):
    return list(control.converse(mount, request))


def test_status_and_facts(mount):
    (status,) = ask(mount, control.GetStatus())
    assert status.volume == "abc" and status.errors
    *facts, done = ask(mount, control.GetFacts([b"f", b"d", b"none", b"link/g", b"../x"]))
    assert [(fact.path, fact.tier) for fact in facts] == [(b"f", "resident"), (b"d", "directory")]
    assert {item.path: item.reason for item in done.stayed} == {
        b"none": "does not exist",
        b"link/g": "does not exist",
        b"../x": "is not a plain path inside the volume",
    }


def test_what_is_refused_of_a_path_names_it_as_it_is_seen(mount):
    with pytest.raises(PathError) as refused:
        ask(mount, control.GetVersions(b"d/../f"))
    assert str(refused.value) == "/m/f: is not a plain path inside the volume"
    bound = mount._replace(mountpoint="/elsewhere", root="/d")
    with pytest.raises(PathError) as refused:
        ask(bound, control.GetVersions(b"d/none"))
    assert str(refused.value).startswith("/elsewhere/none: neither exists nor is a version of it kept: `tierfs")


def test_names_are_listed_in_order(mount):
    *facts, done = ask(mount, control.ListNames(b""))
    assert [fact.path for fact in facts] == [b"d", b"f", b"fifo", b"link"]
    assert done.files == 4
    *facts, _ = ask(mount, control.ListNames(b"d/g"))
    assert [fact.path for fact in facts] == [b"d/g"]
    (done,) = ask(mount, control.ListNames(b"none"))
    assert done.stayed == [control.Outcome(b"none", "does not exist", failed=True)]


def test_a_name_that_cannot_be_looked_at_hides_no_other(mount, backend, monkeypatch):
    usual = backend.facts

    def facts(opath, status, path):
        if path == b"f":
            raise PermissionError(errno.EACCES, "no")
        return usual(opath, status, path)

    monkeypatch.setattr(backend, "facts", facts)
    *found, done = ask(mount, control.ListNames(b""))
    assert [item.path for item in found] == [b"d", b"fifo", b"link"]
    assert [(item.path, item.reason) for item in done.stayed] == [(b"f", "you may not reach it")]


def test_an_order_reaches_all_files_below_and_says_which_were_named(mount, backend, tree):
    (done,) = ask(mount, control.Demote([b"", b"f", b"fifo"], True))
    (targets,) = backend.orders
    assert sorted((target.path, target.named) for target in targets) == [
        (b"d/e/h", False), (b"d/g", False), (b"f", True),
    ]  # fmt: skip
    by_path = {target.path: target for target in targets}
    assert by_path[b"d/g"].parent == (tree / "d").stat().st_ino
    assert by_path[b"d/g"].name == b"g"
    assert by_path[b"f"].size == 5
    assert [item.path for item in done.stayed] == [b"fifo"]


def test_links_of_a_file_are_one_target(mount, backend, tree):
    os.link(tree / "f", tree / "d" / "a-link")
    os.link(tree / "f", tree / "other")
    ask(mount, control.Demote([b"d", b"other"], True))
    targets = backend.orders[-1]
    assert sorted((target.path, target.named) for target in targets) == [
        (b"d/e/h", False), (b"d/g", False), (b"other", True),
    ]  # fmt: skip


def test_without_wait_the_order_runs_in_the_background(mount, backend):
    backend.block = True
    (done,) = ask(mount, control.Demote([b"d"], False))
    assert done.files == 2
    assert not backend.cancelled.wait(0.2)
    backend.block = False


def test_hanging_up_cancels(mount, backend):
    backend.block = True
    answers = control.converse(mount, control.Fetch([b"d"], True))
    assert isinstance(next(answers), control.Progress)
    answers.close()
    assert backend.cancelled.wait(5)


@pytest.mark.parametrize(
    "order", [control.Drain(), control.Check(False, False), control.Fetch([b"d"], True), control.Collect(True)]
)
def test_an_order_that_is_cut_short_by_the_end_is_no_success(mount, server, backend, monkeypatch, order):
    """Its client waits still, as while `tierfs restart` puts another mover in charge."""

    def cut_short(*arguments):
        server.close()
        assert arguments[-1].cancelled.wait(5)
        return iter([control.Done()]) if isinstance(order, control.Collect) else control.Done()

    for name in ("drain", "check", "fetch", "collect"):
        monkeypatch.setattr(backend, name, cut_short, raising=False)
    with pytest.raises(TierError, match="daemon is stopping: try again"):
        ask(mount, order)


def test_what_a_stopping_daemon_drops_is_no_internal_error(mount, server, backend):
    backend.error = RuntimeError("cannot schedule new futures after shutdown")
    with pytest.raises(TierError, match="internal error"):
        ask(mount, control.Demote([b"d"], True))

    class Stopping(RuntimeError):
        def __init__(self):
            server.close()

    backend.demote = lambda targets, job: (_ for _ in ()).throw(Stopping())
    with pytest.raises(TierError, match="daemon is stopping: try again"):
        ask(mount, control.Demote([b"d"], True))


def test_an_index_that_is_closed_beneath_an_order_is_a_daemon_that_stops(mount, server, backend):
    backend.error = IndexError_("the index cannot be read")
    with pytest.raises(TierError, match="the index cannot be read"):
        ask(mount, control.Demote([b"d"], True))

    def demote(targets, job):
        server.close()
        raise IndexError_("the index cannot be read: Attempt to operate on closed object")

    backend.demote = demote
    with pytest.raises(TierError, match="daemon is stopping: try again"):
        ask(mount, control.Demote([b"d"], True))


def test_who_waits_for_an_answer_or_an_order_is_known_for_as_long(mount, server, backend, monkeypatch):
    backend.block = True
    answers = control.converse(mount, control.Fetch([b"d"], True))
    assert isinstance(next(answers), control.Progress)
    assert (server.asked, server.ordered) == (False, True)
    answers.close()
    assert backend.cancelled.wait(5)
    seen = []
    monkeypatch.setattr(backend, "pins", lambda: seen.append((server.asked, server.ordered)) or [])
    until = time.monotonic() + 20
    while server.ordered:
        assert time.monotonic() < until
        time.sleep(0.01)
    ask(mount, control.GetPins())
    assert seen == [(True, False)]
    while server.asked:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_pinning_fetches_and_pins_are_listed(mount, backend):
    ask(mount, control.SetPin([b"f"], True))
    *facts, _ = ask(mount, control.GetPins())
    assert [fact.path for fact in facts] == [b"f"]
    ask(mount, control.SetPin([b"f"], False))
    assert ask(mount, control.GetPins()) == [control.Done(0)]


def test_errors_keep_their_message_and_class(mount, backend):
    with pytest.raises(TierError, match=r"^/m: config\.toml:1: bad"):
        ask(mount, control.Reload())
    backend.error = PathError("f: is gone")
    with pytest.raises(PathError, match=r"^/m: f: is gone"):
        ask(mount, control.Demote([b"f"], True))
    backend.error = ZeroDivisionError("boom")
    with pytest.raises(TierError, match=r"^/m: an internal error: see"):
        ask(mount, control.Demote([b"f"], True))
    (status,) = ask(mount, control.GetStatus())
    assert status.volume == "abc"


def test_findings_become_json(mount):
    (findings,) = ask(mount, control.Check(False, False))
    assert findings.findings[0].path == b"a\xff"
    document = control.to_json(control.Facts(b"a\xff", "stub", 3))
    assert document["path"] == "a\udcff"
    assert "type" not in document


@pytest.mark.parametrize(
    "data",
    [b"", b"\1", b"\xff\xff\xff\xff", struct.pack("<I", 3) + b"abc", struct.pack("<I", 100) + b"short",
     struct.pack("<I", 7) + b"\x81\xa4type\xa1"],
)  # fmt: skip
def test_nonsense_harms_nobody(mount, data):
    with control.connect(mount) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(100) == b""
    (status,) = ask(mount, control.GetStatus())
    assert status.volume == "abc"


def test_a_frame_that_is_too_long_is_refused():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(struct.pack("<I", control.MAX_FRAME + 1))
        with pytest.raises(UsageError, match="too long"):
            control.receive_request(theirs)


def test_a_daemon_that_is_down_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(control, "socket_path", lambda volume, uid: str(tmp_path / "none.sock"))
    mount = locate.Mount("/m", locate.FSTYPE, "tierfs#abc", os.geteuid())
    with pytest.raises(VolumeError, match="/m: its daemon does not answer"):
        ask(mount, control.GetStatus())


@pytest.fixture
def dying(tmp_path, monkeypatch):
    """Have a daemon's movers end, in their turn, when they have accepted somebody and said so much."""
    path = str(tmp_path / "x.sock")
    monkeypatch.setattr(control, "socket_path", lambda volume, uid: path)

    def run(*said):
        for answers in said:
            sock = listener.accept()[0]
            with sock:
                control.receive_request(sock)
                for answer in answers:
                    control.send(sock, answer)

    def start(*said):
        threads.append(threading.Thread(target=run, args=said, daemon=True))
        threads[-1].start()
        return locate.Mount("/m", locate.FSTYPE, "tierfs#abc", os.geteuid())

    threads = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(4)
        yield start
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive(), "somebody did not ask again"


def test_a_daemon_that_dies_meanwhile_is_one_clear_error(dying):
    with pytest.raises(VolumeError, match="/m: its daemon was restarted: try again"):
        ask(dying([], []), control.GetStatus())


def test_who_only_looks_asks_the_next_mover(dying):
    facts = control.Facts(b"f", "resident", 1, 512)
    assert ask(dying([], [facts, control.Done(1)]), control.GetFacts([b"f"])) == [facts, control.Done(1)]


def test_an_order_is_given_once_and_an_answer_told_once(dying):
    with pytest.raises(VolumeError, match="try again"):
        ask(dying([]), control.Fetch([b""], True))
    facts = control.Facts(b"f", "resident", 1, 512)
    answers = control.converse(dying([facts]), control.ListNames(b""))
    assert next(answers) == facts
    with pytest.raises(VolumeError, match="try again"):
        next(answers)


def test_runtime_directories_of_others_are_not_trusted(tmp_path, monkeypatch):
    uid = os.geteuid() + 12345
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert control.runtime_directory(uid) == f"/tmp/tierfs-{uid}"
    assert control.runtime_directory(0) == "/run/tierfs"


# --- other users (needs root) ----------------------------------------------------------------------------

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes on other users' rights")
NOBODY = Peer(65534, 65534, (65534,))


@pytest.fixture
def others(tree):
    for path, mode, owner in (("f", 0o600, 0), ("d", 0o755, 0), ("d/g", 0o644, 0), ("d/e", 0o700, 0)):
        os.chown(tree / path, owner, owner)
        os.chmod(tree / path, mode)
    (tree / "mine").write_text("")
    os.chown(tree / "mine", NOBODY.uid, NOBODY.gid)
    (tree / "group").write_text("")
    os.chown(tree / "group", 0, 4711)
    os.chmod(tree / "group", 0o640)
    rootfd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    yield Reach(rootfd, lambda opath: b"")
    os.close(rootfd)


def reached(reach, peer, path, access):
    targets, stayed = reach.targets(peer, [path], access, threading.Event())
    return [target.path for target in targets], [item.reason for item in stayed]


@needs_root
def test_another_user_reaches_what_the_kernel_would_allow(others):
    assert reached(others, NOBODY, b"d/g", os.O_RDONLY) == ([b"d/g"], [])
    assert reached(others, NOBODY, b"f", os.O_RDONLY) == ([], ["you may not read it"])
    assert reached(others, NOBODY, b"d/e/h", os.O_RDONLY) == ([], ["you may not reach it"])
    assert reached(others, NOBODY, b"d", os.O_RDONLY)[0] == [b"d/g"]
    assert reached(others, NOBODY, b"d/g", os.O_WRONLY) == ([], ["belongs to another user"])
    assert reached(others, NOBODY, b"mine", os.O_WRONLY) == ([b"mine"], [])


@needs_root
@pytest.mark.parametrize("when", ["before it is opened", "while it is open"])
def test_a_directory_that_goes_while_an_order_looks_for_files_is_passed_over(others, tree, monkeypatch, when):
    (tree / "d" / "sub").mkdir()
    (tree / "d" / "sub" / "file").write_text("")
    real = Reach._open_below

    def open_below(reach, top, root, path):
        if path != b"d/sub":
            return real(reach, top, root, path)
        fd = real(reach, top, root, path) if when == "while it is open" else -1
        shutil.rmtree(tree / "d" / "sub")
        return fd if fd >= 0 else real(reach, top, root, path)

    monkeypatch.setattr(Reach, "_open_below", open_below)
    found, stayed = reached(others, Peer(0, 0, ()), b"d", os.O_RDONLY)
    assert b"d/g" in found and not stayed


@needs_root
def test_supplementary_groups_count(others):
    assert reached(others, NOBODY, b"group", os.O_RDONLY)[0] == []
    member = Peer(NOBODY.uid, NOBODY.gid, (NOBODY.gid, 4711))
    assert reached(others, member, b"group", os.O_RDONLY)[0] == [b"group"]


@needs_root
def test_rights_are_given_back_and_other_threads_keep_theirs(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o600)
    inside, go = threading.Event(), threading.Event()
    seen = []

    def act():
        with acting_as(NOBODY):
            with contextlib.suppress(PermissionError), open(secret):
                seen.append("read")
            inside.set()
            go.wait(5)
        seen.append(secret.read_text())

    groups = os.getgroups()
    thread = threading.Thread(target=act)
    thread.start()
    assert inside.wait(5)
    assert secret.read_text() == "x"
    assert os.getgroups() == groups
    go.set()
    thread.join()
    assert seen == ["x"]


def open_to_others(tmp_path):
    """The socket, and the way to it."""
    os.chmod(tmp_path / "abc.sock", 0o666)
    for directory in [tmp_path, *tmp_path.parents]:
        if directory.stat().st_uid == 0 and str(directory).startswith("/tmp/"):
            os.chmod(directory, directory.stat().st_mode | 0o011)


@needs_root
def test_another_user_over_the_socket(mount, tree, tmp_path):
    open_to_others(tmp_path)
    os.chmod(tree / "f", 0o600)
    script = f"""
import sys
from tierfs import control, locate
control.socket_path = lambda volume, uid: {str(tmp_path / "abc.sock")!r}
mount = locate.Mount("/m", locate.FSTYPE, "tierfs#abc", 0)
(status,) = control.converse(mount, control.GetStatus())
assert status.errors == [], status
*facts, done = control.converse(mount, control.GetFacts([b"f", b"d/g"]))
assert [fact.path for fact in facts] == [b"d/g"], facts
for request in (control.Drain(), control.Check(False, False), control.Reload()):
    try:
        list(control.converse(mount, request))
    except control.NotPermittedError as error:
        assert str(error) == "/m: only root and the volume's owner may ask for this: act as one of them", error
        continue
    sys.exit(f"{{request}} was allowed")
(done,) = control.converse(mount, control.SetPin([b"d/g"], True))
assert done.stayed[0].reason == "belongs to another user", done
"""
    script = script.replace("import sys\n", "import os, sys\n", 1).replace(
        "control.socket_path", "os.setgroups([]); os.setgid(65534); os.setuid(65534)\ncontrol.socket_path", 1
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_only_root_can_serve_other_users(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(NotPermittedError), acting_as(Peer(77, 77, ())):
        pass


def test_targets_are_plain_values():
    assert Target(b"p", 1, b"h", 2, b"n", 3, True).named


def test_orders_in_the_background_are_so_many_at_most(mount, server, backend):
    backend.block = True
    taken = [ask(mount, control.Demote([b"d"], False)) for _ in range(control_server.MOST_ORDERS)]
    assert all(done.files == 2 for (done,) in taken)
    with pytest.raises(TierError, match="too many orders"):
        ask(mount, control.Demote([b"d"], False))
    assert ask(mount, control.GetStatus())
    backend.block = False
    deadline = time.monotonic() + 10
    while server._background._trusted:
        assert time.monotonic() < deadline, "an order that has ended makes room for no other"
        time.sleep(0.01)
    assert ask(mount, control.Demote([b"d"], False))


def test_shares_of_users(monkeypatch):
    shares = Shares(10, others=6, one=4)
    mine, theirs, his = (Peer(uid, uid, ()) for uid in (os.geteuid(), 70001, 70002))
    assert [shares.take(theirs) for _ in range(5)] == [True] * 4 + [False]
    assert [shares.take(his) for _ in range(3)] == [True, True, False]
    assert [shares.take(mine) for _ in range(5)] == [True] * 4 + [False]
    shares.give(theirs)
    assert shares.take(his) and not shares.take(theirs) and not shares.take(mine)


def connected(peer):
    """A client of this user, and the server's end of its connection."""
    theirs, ours = socket.socketpair()
    return theirs, Client(ours, peer)


def test_who_has_his_share_waits_for_his_turn():
    turns = Turns(Shares(1 << 30, others=3, one=2), most=4, one=3)
    theirs, his = Peer(70001, 70001, ()), Peer(70002, 70002, ())
    with contextlib.ExitStack() as stack:
        ends, clients = zip(*(connected(theirs) for _ in range(7)), strict=True)
        other_ends, others = zip(*(connected(his) for _ in range(3)), strict=True)
        for sock in (*ends, *other_ends, *(client.sock for client in (*clients, *others))):
            stack.enter_context(sock)
        assert [turns.enter(client) for client in clients[:5]] == [True, True, False, False, False]
        with pytest.raises(BusyError, match="too many"):
            turns.enter(clients[5])
        assert [turns.enter(client) for client in others[:2]] == [True, False]
        with pytest.raises(BusyError, match="too many"):
            turns.enter(others[2])
        ends[3].sendall(b"a request")
        ends[3].close()  # gone while it waited: it is not asked what it wanted, and its place is free
        assert not turns.enter(clients[6])
        assert turns.leave(theirs) == clients[2]
        assert turns.leave(theirs) == clients[4], "its turn was another's"
        assert turns.leave(theirs) == others[1], "the other user had waited longer"
        assert turns.leave(theirs) == clients[6]
        assert [turns.leave(peer) for peer in (theirs, his, his)] == [None] * 3
        assert turns.enter(clients[5]), "nobody is left, and yet he waits"
        assert turns.dismiss() == []


def as_nobody(path, work):
    """Another user's program, in which `connect` makes a connection to `path`."""
    script = f"""
import os, socket, sys
from tierfs import control
os.setgroups([]); os.setgid(65534); os.setuid(65534)
def connect():
    sock = socket.socket(socket.AF_UNIX)
    sock.connect({str(path)!r})
    sock.settimeout(10)
    return sock
{work}
"""
    return subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@needs_root
def test_connections_of_another_user_leave_room_for_the_owner(mount, server, tmp_path):
    open_to_others(tmp_path)
    work = """
held = [connect() for _ in range(65)]
print(held[-1].recv(4096), flush=True)
sys.stdin.read()
"""
    child = as_nobody(tmp_path / "abc.sock", work)
    try:
        assert "too many" in child.stdout.readline()
        asked = []
        asking = threading.Thread(target=lambda: asked.extend(ask(mount, control.GetStatus())), daemon=True)
        asking.start()
        asking.join(5)
        assert asked, "the owner is kept out"
    finally:
        child.communicate("")


@needs_root
def test_many_commands_of_another_user_at_a_time_wait_for_each_other(mount, server, tmp_path):
    """find | xargs -P32 tierfs status"""
    open_to_others(tmp_path)
    work = """
held = [connect() for _ in range(32)]
for sock in held:
    control.send(sock, control.GetStatus())
answers = []
for sock in held:  # the seventeenth is answered when one of the first sixteen has ended
    answers.append(type(control.receive_answer(sock)).__name__)
    sock.close()
print(*sorted(set(answers)), flush=True)
sys.stdin.read()
"""
    child = as_nobody(tmp_path / "abc.sock", work)
    try:
        assert child.stdout.readline() == "Status\n"
        deadline = time.monotonic() + 10
        while server._turns._shares._taken:
            assert time.monotonic() < deadline, "what has ended keeps its share"
            time.sleep(0.01)
        assert server._places._value == control_server._MAX_CONNECTIONS
    finally:
        child.communicate("")


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_question_does_not_wait_for_orders_though_they_be_many(mount, server, backend):
    """Nor does an order for ever: it has its turn when another has ended, or is told that they are too many."""
    most, may_wait = control_server._MAX_ORDERS, 20
    server._order_turns._most = may_wait
    backend.block = True
    answers = [control.converse(mount, control.Demote([b"d"], True)) for _ in range(most)]
    assert all(isinstance(next(each), control.Progress) for each in answers)
    with contextlib.ExitStack() as stack:
        socks = []
        for _ in range(may_wait + 1):
            socks.append(stack.enter_context(control.connect(mount)))
            socks[-1].settimeout(20)
            control.send(socks[-1], control.Demote([b"d"], True))
        told = select.select(socks, [], [], 20)[0]
        assert len(told) == 1 and "too many" in control.receive_answer(told[0]).message
        assert len(ask(mount, control.GetStatus())) == 1
        socks.remove(told[0])
        answers.pop().close()
        assert isinstance(control.receive_answer(select.select(socks, [], [], 20)[0][0]), control.Progress)
        assert len(ask(mount, control.GetFacts([b"f"]))) == 2
        backend.block = False
        for sock in socks:
            answer = control.receive_answer(sock)
            while isinstance(answer, control.Progress):
                answer = control.receive_answer(sock)
            assert answer == control.Done(2)
    assert [list(each)[-1] for each in answers] == [control.Done(2)] * (most - 1)
    wait_for(lambda: not server._order_turns._shares._trusted)
    wait_for(lambda: server._places._value == control_server._MAX_CONNECTIONS)


def test_an_order_that_is_interrupted_before_its_turn_is_not_carried_out(mount, server, backend):
    backend.block = True
    answers = [control.converse(mount, control.Demote([b"d"], True)) for _ in range(control_server._MAX_ORDERS)]
    for each in answers:
        next(each)
    sock = control.connect(mount)
    control.send(sock, control.Fetch([b"f"], True))
    wait_for(lambda: server._order_turns._waiting)
    sock.close()
    before = len(backend.orders)
    for each in answers:
        each.close()
    wait_for(lambda: not server._order_turns._shares._trusted)
    assert len(backend.orders) == before == control_server._MAX_ORDERS


def test_a_connection_may_ask_one_thing_after_another_and_ends_with_an_order(mount, server):
    """Which would otherwise keep its turn while nothing is asked for."""
    with control.connect(mount) as sock:
        sock.settimeout(20)
        for request in (control.GetStatus(), control.GetStatus(), control.Demote([b"d"], True)):
            control.send(sock, request)
            answer = control.receive_answer(sock)
            assert isinstance(answer, control.Status) or answer.files
        assert control.receive_answer(sock) is None


def test_an_order_for_which_there_is_no_thread_is_told_so(mount, server, monkeypatch):
    start = threading.Thread.start

    def refuse(self):
        if self.name == "control-long":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(TierError, match="too many"):
        ask(mount, control.Demote([b"d"], True))
    monkeypatch.undo()
    wait_for(lambda: not server._order_turns._shares._trusted)


@needs_root
def test_the_orders_of_another_user_leave_room_for_their_questions(mount, server, backend, tree, tmp_path):
    open_to_others(tmp_path)
    backend.block = True
    work = f"""
held = [connect() for _ in range({control_server._MAX_ORDERS // 4} + 5)]
for sock in held:
    control.send(sock, control.Fetch([b"d"], True))
asking, large = connect(), connect()
control.send(asking, control.GetStatus())
print(type(control.receive_answer(asking)).__name__, flush=True)
sys.stdin.readline()
control.send(large, control.Fetch([b"d" * 100] * 1000, True))
print(control.receive_answer(large).message, flush=True)
sys.stdin.read()
"""
    child = as_nobody(tmp_path / "abc.sock", work)
    try:
        assert child.stdout.readline() == "Status\n"
        wait_for(lambda: len(server._order_turns._waiting) == 5)
        child.stdin.write("\n")
        child.stdin.flush()
        assert "too many orders" in child.stdout.readline(), "it would be kept in memory"
    finally:
        child.communicate("")
    wait_for(lambda: not server._order_turns._shares._taken)


@needs_root
def test_who_waits_is_told_when_the_daemon_stops(server, tmp_path):
    open_to_others(tmp_path)
    work = """
held = [connect() for _ in range(17)]
control.send(held[-1], control.GetStatus())
print("waiting", flush=True)
print(control.receive_answer(held[-1]).message, flush=True)
sys.stdin.read()
"""
    child = as_nobody(tmp_path / "abc.sock", work)
    try:
        assert child.stdout.readline() == "waiting\n"
        deadline = time.monotonic() + 10
        while not server._turns._waiting:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        server.close()
        assert child.stdout.readline() == "the daemon is stopping: try again\n"
    finally:
        child.communicate("")


def test_an_order_that_waits_is_told_when_the_daemon_stops(mount, server, backend):
    backend.block = True
    answers = [control.converse(mount, control.Demote([b"d"], True)) for _ in range(control_server._MAX_ORDERS)]
    for each in answers:
        next(each)
    with control.connect(mount) as sock:
        sock.settimeout(20)
        control.send(sock, control.Demote([b"d"], True))
        wait_for(lambda: server._order_turns._waiting)
        server.close()
        assert "daemon is stopping: try again" in control.receive_answer(sock).message


@needs_root
def test_names_in_a_directory_that_may_not_be_searched_tell_another_user_nothing(others, tree, backend):
    os.chmod(tree / "d", 0o744)
    rootfd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    ours, theirs = socket.socketpair()
    listener = socket.socket(socket.AF_UNIX)
    with ours, theirs, listener:
        served = control_server.ControlServer(listener, rootfd, backend)
        done = served._send_names(ours, NOBODY, b"d")
        assert {outcome.reason for outcome in done.stayed} == {"you may not reach it"} and not done.files
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)
    os.close(rootfd)
