"""The command line: arguments, exit codes, JSON and one-line errors, against a daemon that is played."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from harness import REPO
from msgspec import structs

from tierfs import cli, control, launch, locate, terminal
from tierfs.commands import asking, check
from tierfs.commands import mount as commands_mount
from tierfs.errors import PathError, VolumeError

MOUNT = locate.Mount("/vol", locate.FSTYPE, "tierfs#abc", 0)
STATUS = control.Status(
    volume="abc", state="/state", store="file:///store", local_bytes=100, local_limit=2048, total_bytes=300,
    files=3, stubs=1, dirty_files=1, dirty_bytes=50, queued=0, pids={"supervisor": 1, "server": 2, "mover": 3},
    errors=[control.Problem(0.0, "a\nb: not fetched")],
)  # fmt: skip


class Daemon:
    """Plays the daemon: answers by request type, and remembers the requests."""

    def __init__(self):
        self.requests = []
        self.answers = {control.GetStatus: [STATUS]}

    def converse(self, mount, request):
        self.requests.append(request)
        for answer in self.answers[type(request)]:
            if isinstance(answer, BaseException):
                raise answer
            yield answer


@pytest.fixture
def daemon(monkeypatch):
    played = Daemon()
    monkeypatch.setattr(control, "converse", played.converse)
    monkeypatch.setattr(locate, "read_mounts", lambda *_: [locate.Mount("/", "ext4", "x", 0), MOUNT])
    return played


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["tierfs", *arguments])
        code = cli._run()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return call


def facts(path, tier="resident", **more):
    return control.Facts(path, tier, size=10, local_bytes=4096, heat=1.5, generation=7, **more)


@pytest.mark.parametrize(
    "arguments",
    [["frobnicate"], ["mount"], ["mount", "--stroe", "x", "/vol"], ["demote"], ["umount"], ["adopt"], ["leave"],
     ["check"], ["mount", "--binding", "x", "/vol"], ["mount", "--local-limit", "much", "/tmp/x"],
     ["mount", "--store", "ftp://x", "/tmp/x"], ["mount", "--store", "s3://", "/tmp/x"]],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_exit_2(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("tierfs: ") and err.count("\n") == 1


def test_usage_errors_have_one_punctuation_mark(run):
    assert run("umount")[2] == "tierfs: Missing argument 'MOUNTPOINT': see `tierfs umount --help`\n"


def test_leaving_what_is_no_volume_says_so(run, daemon, tmp_path):
    code, out, err = run("leave", str(tmp_path))
    assert (code, out) == (1, "")
    assert err == f"tierfs: {tmp_path}: is no mounted TierFS volume: mount it first\n"


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (("umount",), "unmount it"), (("umount", "--wait"), "unmount it"), (("restart",), "restart it"),
        (("leave",), "make it a plain directory"),
    ],
)  # fmt: skip
def test_what_only_the_owner_of_a_mount_may_is_refused_to_others(run, daemon, monkeypatch, command, what):
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    code, out, err = run(*command, "/vol")
    assert (code, out) == (1, "")
    assert err == f"tierfs: /vol: only root and the user who mounted it may {what}\n"
    assert not daemon.requests


def test_a_mount_that_is_busy_for_another_in_it_says_so(run, daemon, monkeypatch):
    inner = locate.Mount("/vol/a b", locate.FSTYPE, "tierfs#def", 0)
    monkeypatch.setattr(locate, "read_mounts", lambda *_: [locate.Mount("/", "ext4", "x", 0), MOUNT, inner])
    monkeypatch.setattr(commands_mount, "_daemon_of", lambda mount: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    done = subprocess.CompletedProcess([], 32, "", "umount: /vol: target is busy.\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **more: done)
    code, _, err = run("umount", "/vol")
    assert (code, err) == (1, "tierfs: /vol: is busy: /vol/a b is mounted in it: unmount that first\n")


def test_without_arguments_the_commands_are_shown(run):
    code, out, err = run()
    assert code == 2
    assert all(name in out + err for name in cli._COMMANDS)


@pytest.mark.parametrize("name", list(cli._COMMANDS))
def test_every_command_has_help(run, name):
    code, out, _ = run(name, "--help")
    assert code == 0 and out.startswith("Usage: tierfs " + name)


def test_status_of_a_volume_has_the_promised_keys(run, daemon):
    code, out, _ = run("status", "--json", "/vol")
    document = json.loads(out)
    assert code == 0
    assert set(document) >= {
        "mountpoint", "state", "store", "local_bytes", "local_limit", "total_bytes", "files", "stubs",
        "dirty_files", "dirty_bytes", "queued", "errors", "pids",
    }  # fmt: skip
    assert document["mountpoint"] == "/vol"
    assert set(document["pids"]) == {"supervisor", "server", "mover"}


def test_status_of_a_path_has_the_promised_keys(run, daemon):
    daemon.answers[control.GetFacts] = [facts(b"d/f"), control.Done(1)]
    code, out, _ = run("status", "--json", "/vol/d/f")
    document = json.loads(out)
    assert code == 0
    assert set(document) >= {"path", "tier", "size", "local_bytes", "dirty", "pinned", "heat", "generation"}
    assert document["path"] == "/vol/d/f"
    assert daemon.requests == [control.GetFacts([b"d/f"])]


def test_of_many_that_stay_those_that_failed_are_told_first(run, daemon):
    kept = [control.Outcome(b"d/%d" % number, "is empty") for number in range(60)]
    failed, named = control.Outcome(b"d/z", "no content", True), control.Outcome(b"e", "is open")
    daemon.answers[control.Demote] = [control.Done(0, [*kept, named, failed])]
    code, _, err = run("demote", "--wait", "/vol/d", "/vol/e")
    lines = err.splitlines()
    assert code == 1
    assert lines[:2] == ["tierfs: /vol/d/z: no content", "tierfs: /vol/e: is open"]
    assert lines[-1] == "tierfs: … and 12 more"


def test_a_scrub_that_never_is_takes_few_words(run, daemon):
    daemon.answers[control.GetStatus] = [structs.replace(STATUS, scrub=control.Scrub(every=0.0))]
    assert "  scrub     never (scrub_every)\n" in run("status", "/vol")[1]


def test_of_garbage_that_is_not_there_is_said_so(run, daemon):
    daemon.answers[control.Collect] = [control.Done()]
    assert run("gc", "--dry-run", "/vol")[:2] == (0, "Nothing is to be removed.\n")


def test_the_limit_of_what_is_mounted_is_set_in_its_configuration(run, daemon):
    code, _, err = run("mount", "--local-limit", "20G", "/vol")
    assert code == 1
    assert err == "tierfs: /vol: is mounted already: set local_limit in /state/config.toml, that is enough\n"


@pytest.mark.parametrize(("number", "said"), [(0, "0 copies"), (1, "1 copy"), (2, "2 copies")])
def test_what_is_counted(number, said):
    assert terminal.count(number, "copy") == said


def test_a_path_that_is_not_there_is_said_to_be_missing(run, tmp_path):
    code, _, err = run("demote", f"{tmp_path}/none")
    assert code == 1
    assert err == f"tierfs: {tmp_path}/none: does not exist, and is not in a mounted TierFS volume\n"


DOCUMENTED = {
    "status PATH": (["status", "--json", "/vol/f"], set()),
    "ls": (["ls", "--json", "/vol/d"], {"name"}),
    "pins": (["pins", "--json", "/vol"], set()),
    "status MOUNTPOINT": (["status", "--json", "/vol"], set()),
    "versions": (["versions", "--json", "/vol/f"], set()),
    "gc --dry-run": (["gc", "--dry-run", "--json", "/vol"], set()),
    "gc": (["gc", "--json", "/vol"], set()),
    "check": (["check", "--json", "/vol"], set()),
}


@pytest.mark.parametrize("what", DOCUMENTED)
def test_json_has_the_keys_of_the_readme(run, daemon, what):
    command, more = DOCUMENTED[what]
    daemon.answers |= {
        control.GetFacts: [facts(b"f"), control.Done()],
        control.ListNames: [facts(b"d/f"), control.Done()],
        control.GetPins: [facts(b"f"), control.Done()],
        control.GetVersions: [control.Version(b"f", 7, 10, 0, "data/x", "current", 0, None), control.Done()],
        control.Collect: [control.Garbage("data/x", 10, "superseded", 0.0), control.Done()],
        control.Check: [control.Findings([])],
    }
    document = json.loads(run(*command)[1])
    keys = set(document[0] if isinstance(document, list) else document)
    rows = [row for row in (REPO / "README.md").read_text().splitlines() if row.startswith("| `")]
    (row,) = [row for row in rows if f"`{what}`" in row.split("|")[1] and "`" in row.split("|")[2]]
    told = set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)|; with `ls`.*", "", row.split("|")[2])))
    assert keys == told | more


def test_status_of_several_is_a_list(run, daemon):
    daemon.answers[control.GetFacts] = [facts(b"f"), control.Done(1)]
    code, out, _ = run("status", "--json", "/vol", "/vol/f")
    assert code == 0
    assert ["mountpoint" in document for document in json.loads(out)] == [True, False]
    code, out, _ = run("status", "--json")
    assert [document["mountpoint"] for document in json.loads(out)] == ["/vol"]


def test_status_for_people_is_one_line_an_item(run, daemon):
    code, out, _ = run("status")
    assert code == 0
    assert "2.0K" in out and "a\\nb: not fetched" in out


def test_status_outside_of_a_volume_fails_clearly(run, daemon):
    code, out, err = run("status", "/tmp")
    assert (code, out) == (1, "")
    assert err == "tierfs: /tmp: is not in a mounted TierFS volume: mount it with `tierfs mount`\n"


def test_a_missing_path_fails_and_the_others_are_shown(run, daemon):
    daemon.answers[control.GetFacts] = [control.Done(0, [control.Outcome(b"x", "does not exist", True)])]
    code, out, err = run("status", "/vol/x", "/vol")
    assert code == 1
    assert err == "tierfs: /vol/x: does not exist\n"
    assert "file:///store" in out


@pytest.fixture
def several(daemon, monkeypatch):
    """Four volumes, of which two say nothing. The others answer when all four have been asked."""
    mounts = [locate.Mount(f"/{name}", locate.FSTYPE, f"tierfs#{name}", 0) for name in ("v1", "v2", "v3", "v4")]
    all_asked, over = threading.Barrier(len(mounts)), threading.Event()

    def converse(mount, request):
        all_asked.wait(20)
        if mount.mountpoint in ("/v1", "/v3"):
            over.wait()
        yield from daemon.answers[type(request)]

    monkeypatch.setattr(control, "converse", converse)
    monkeypatch.setattr(locate, "read_mounts", lambda *_: mounts)
    monkeypatch.setattr(asking, "_PATIENCE_SECONDS", 1.0)
    yield
    over.set()


SILENT = "".join(
    f"tierfs: /{name}: has not answered within 1 s: name it, and it is waited for longer;"
    " log/tierfs.log in its state directory may say why\n"
    for name in ("v1", "v3")
)


def test_volumes_that_nobody_named_are_asked_together_and_the_silent_ones_named(run, several):
    began = time.monotonic()
    code, out, err = run("status", "--json")
    assert time.monotonic() - began < 5, "one patience for all of them"
    assert [document["mountpoint"] for document in json.loads(out)] == ["/v2", "/v4"]
    assert (code, err) == (1, SILENT)


def test_pins_of_silent_volumes_keep_nobody_from_those_of_others(run, several, daemon):
    daemon.answers[control.GetPins] = [facts(b"d", "directory", pinned=True), control.Done(1)]
    code, out, err = run("pins", "--json")
    assert [document["path"] for document in json.loads(out)] == ["/v2/d", "/v4/d"]
    assert (code, err) == (0, SILENT)


def test_ls_names_what_it_cannot_show_and_shows_the_rest(run, daemon):
    daemon.answers[control.ListNames] = [
        facts(b"d/c"), control.Done(1, [control.Outcome(b"d/x", "you may not reach it", True)])
    ]  # fmt: skip
    code, out, err = run("ls", "/vol/d")
    assert code == 1 and out.splitlines()[1].endswith(" c")
    assert err == "tierfs: /vol/d/x: you may not reach it\n"
    daemon.answers[control.ListNames] = [control.Done(0, [control.Outcome(b"d", "does not exist", True)])]
    assert run("ls", "/vol/d") == (1, "", "tierfs: /vol/d: does not exist\n")


def test_ls_shows_strange_names_on_one_line(run, daemon):
    strange = facts(b"d/a\nb\xff", "stub", pinned=True)
    daemon.answers[control.ListNames] = [strange, facts(b"d/c"), control.Done(2)]
    code, out, _ = run("ls", "/vol/d")
    assert code == 0
    assert out.count("\n") == 3
    assert "a\\nb\\xff" in out
    code, out, _ = run("ls", "--json", "/vol/d")
    documents = json.loads(out)
    assert [os.fsencode(document["name"]) for document in documents] == [b"a\nb\xff", b"c"]
    assert documents[0]["tier"] == "stub" and documents[0]["pinned"] is True


def test_pins_are_absolute_paths(run, daemon):
    daemon.answers[control.GetPins] = [facts(b"d", "directory", pinned=True), control.Done(1)]
    code, out, _ = run("pins", "--json")
    assert code == 0
    assert [document["path"] for document in json.loads(out)] == ["/vol/d"]


def test_pins_of_a_path_that_is_not_there_are_an_error(run, daemon):
    absent = [control.Done(0, [control.Outcome(b"no", "does not exist", True)])]
    daemon.answers[control.GetFacts] = absent
    daemon.answers[control.GetPins] = [facts(b"d", "directory", pinned=True), control.Done(1)]
    assert run("pins", "/vol/no") == (1, "", "tierfs: /vol/no: does not exist\n")
    code, out, err = run("pins", "--json", "/tmp/x", "/vol/no", "/vol", "/vol")
    assert (code, [document["path"] for document in json.loads(out)]) == (1, ["/vol/d"])
    assert [line.split(": ")[1] for line in err.splitlines()] == ["/tmp/x", "/vol/no"]


@pytest.mark.parametrize(
    ("stayed", "arguments", "code"),
    [
        ([], ["--wait"], 0),
        ([control.Outcome(b"f", "is open")], ["--wait"], 1),
        ([control.Outcome(b"f", "is open")], [], 0),
        ([control.Outcome(b"d/below", "is pinned")], ["--wait"], 0),
        ([control.Outcome(b"d/below", "not in the store: the disk is full", True)], ["--wait"], 1),
        ([control.Outcome(b"f", "does not exist", True)], [], 1),
    ],
)
def test_what_stays_is_named_and_a_named_file_that_stays_fails(run, daemon, stayed, arguments, code):
    for name, request in (("demote", control.Demote), ("fetch", control.Fetch)):
        daemon.answers[request] = [control.Progress(1, 2, 3, 4, b"x"), control.Done(1, stayed)]
        found, out, err = run(name, *arguments, "/vol/f", "/vol/d")
        assert (found, out) == (code, "")
        assert err == "".join(f"tierfs: /vol/{os.fsdecode(item.path)}: {item.reason}\n" for item in stayed)
        assert daemon.requests[-1] == request([b"f", b"d"], bool(arguments))


@pytest.mark.parametrize("there", [True, False])
def test_paths_outside_fail_but_the_others_are_done(run, daemon, tmp_path, there):
    daemon.answers[control.SetPin] = [control.Done(1)]
    path = str(tmp_path if there else tmp_path / "x")
    code, _, err = run("pin", path, "/vol/f")
    assert code == 1
    why = "is not in a mounted TierFS volume"
    assert err.startswith(f"tierfs: {path}: {why if there else f'does not exist, and {why}'}")
    assert daemon.requests == [control.SetPin([b"f"], True)]


def test_what_is_to_be_known_while_one_waits_is_said_once(run, daemon):
    silent = control.Progress(0, 9, 0, 0, note="nothing comes")
    away = control.Outcome(b"", "9 files were not fetched", True)
    daemon.answers[control.Fetch] = [silent, silent, control.Done(0, [away])]
    code, out, err = run("fetch", "--wait", "/vol/d")
    assert (code, out) == (1, "")
    assert err == "tierfs: /vol: nothing comes\ntierfs: /vol: 9 files were not fetched\n"


STRANGE = b"/vol/a\n\xff\xc3\xa9"  # a newline, a byte that is no text, and an e with an accent
NEAR = {"utf-8": "/vol/a\\n\\xff\u00e9", "ascii": "/vol/a\\n\\xff\\xe9"}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_strange_name_is_written_in_one_way_everywhere(run, daemon, monkeypatch, encoding):
    """In an error that the command makes, in one about a path, in what the daemon says, and in a result."""
    name, near = os.fsdecode(STRANGE), NEAR[encoding]
    relative = STRANGE[len("/vol/") :]
    said = control.Outcome(relative, f"is like {name}", True)
    daemon.answers[control.GetFacts] = [control.Done(0, [said])]
    daemon.answers[control.Fetch] = [control.Done(0, [said])]
    daemon.answers[control.ListNames] = [facts(relative), control.Done(1)]
    out, err = io.BytesIO(), io.BytesIO()
    with monkeypatch.context() as streams:
        for stream, raw in (("stdout", out), ("stderr", err)):
            wrapped = io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace")
            streams.setattr(sys, stream, wrapped)
        for arguments in (["status", name], ["fetch", name], ["ls", name]):
            streams.setattr(sys, "argv", ["tierfs", *arguments])
            cli._run()
        sys.stdout.flush()
        sys.stderr.flush()
        results, errors = out.getvalue().decode(encoding), err.getvalue().decode(encoding)
    assert errors == f"tierfs: {near}: is like {near}\n" * 2
    assert results.splitlines()[1].endswith(near)


def test_an_interrupt_is_exit_130_without_a_word(run, daemon):
    daemon.answers[control.Demote] = [control.Progress(0, 1, 0, 1), KeyboardInterrupt()]
    code, out, err = run("demote", "--wait", "/vol/f")
    assert (code, out, err.strip()) == (130, "", "")


@pytest.mark.parametrize("error", [VolumeError("/vol: its daemon does not answer: x"), PathError("f: is gone")])
def test_errors_of_the_daemon_are_one_line(run, daemon, error):
    daemon.answers[control.GetStatus] = [error]
    assert run("status", "/vol") == (1, "", f"tierfs: {error}\n")


def test_an_unexpected_error_says_where_the_log_is(run, daemon, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    daemon.answers[control.GetStatus] = [ZeroDivisionError("boom")]
    code, out, err = run("status", "/vol")
    log = tmp_path / "tierfs" / "cli.log"
    assert (code, out) == (1, "")
    assert err == f"tierfs: internal error (ZeroDivisionError): see {log}\n"
    assert "boom" in log.read_text()


def test_umount_of_what_is_no_mount(run, daemon):
    code, _, err = run("umount", "/tmp")
    assert code == 1
    assert err.startswith("tierfs: /tmp: is no mounted TierFS volume")


def test_umount_wait_names_what_is_not_in_the_store_and_keeps_the_mount(run, daemon):
    stayed = [control.Outcome(b"db.sqlite", "open, not in the store since 10 min")]
    daemon.answers[control.Drain] = [control.Done(0, stayed)]
    code, _, err = run("umount", "--wait", "/vol")
    assert code == 1
    assert err.splitlines()[0] == "tierfs: /vol/db.sqlite: open, not in the store since 10 min"
    assert daemon.requests == [control.Drain()]


def test_output_into_a_closed_pipe_is_no_traceback():
    command = [sys.executable, "-m", "tierfs", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait(timeout=30)


def closed(*streams):
    return lambda: [os.close(stream) for stream in streams]


ALONE = "from tierfs import cli, locate; locate.read_mounts = lambda *_: []; cli.main()"  # no mounts of others


@pytest.mark.parametrize("arguments", [["status"], ["pins", "--json"], ["--help"]])
@pytest.mark.parametrize("where", ["closed", "/dev/full"])
def test_a_result_that_cannot_be_written_is_one_line_and_exit_1(arguments, where):
    command = [sys.executable, "-c", ALONE, *arguments]
    if where == "closed":
        done = subprocess.run(command, stderr=subprocess.PIPE, preexec_fn=closed(1), timeout=60)
        reason = b"Bad file descriptor"
    else:
        with open(where, "wb") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60)
        reason = b"No space left on device"
    assert done.returncode == 1
    assert done.stderr.startswith(b"tierfs: ") and done.stderr.endswith(reason + b"\n")
    assert done.stderr.count(b"\n") == 1


def test_an_error_is_no_result():
    """Nobody is there to read it, and what reads the results must not take it for one."""
    command = [sys.executable, "-m", "tierfs", "status", "/"]
    done = subprocess.run(command, stdout=subprocess.PIPE, preexec_fn=closed(2), timeout=60)
    assert (done.returncode, done.stdout) == (1, b"")
    assert subprocess.run(command, preexec_fn=closed(0, 1, 2), timeout=60).returncode == 1


def test_a_working_directory_that_is_gone_is_called_so(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    path = os.pathsep.join(sys.path)  # relative names in it would be looked for there
    code = f"import os, runpy; os.rmdir({str(gone)!r}); runpy.run_module('tierfs', run_name='__main__')"
    # -P, as what is installed does not look there for modules: in Python 3.13.0 that does not get so far.
    command = [sys.executable, "-P", "-c", f"import sys; sys.argv[1:] = ['ls']; {code}"]
    done = subprocess.run(
        command, cwd=gone, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "tierfs: the working directory is not there any more: cd to another\n"


AT_THE_END = """
import atexit, gc, sys
atexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count() > 10_000))
from tierfs.__main__ import main
main()
"""


def test_no_garbage_is_looked_for_in_what_is_imported():
    """Not while that is under way, nor later; what the command makes itself is another thing."""
    command = [sys.executable, "-c", AT_THE_END, "status", "/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "True True\n"), done.stderr


SLOW = """
import sys, time
from tierfs import cli, locate

def read_mounts():
    try:
        print("begun", flush=True)
        for _ in range(600):  # Python 3.14 hears of a signal that came during print after the next call
            time.sleep(0.1)
    finally:
        print("undone", flush=True)

locate.read_mounts = read_mounts
sys.argv = ["tierfs", "status"]
cli.main()
"""


EARLY = """
import sys, time

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            print("begun", flush=True)
            for _ in range(600):
                time.sleep(0.1)

sys.meta_path.insert(0, Slow())
from tierfs.__main__ import main
main()
"""


def test_ctrl_c_at_once_is_no_traceback():
    command = [sys.executable, "-c", EARLY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == (b"", b"", 130)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_what_is_under_way_is_undone_whichever_signal_ends_it(number, code):
    def hear():
        signal.signal(number, signal.SIG_DFL)

    command = [sys.executable, "-c", SLOW]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hear) as process:
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (out, process.returncode) == (b"undone\n", code)
    assert b"Traceback" not in err


def test_check_exits_1_while_findings_remain(run, daemon, monkeypatch):
    monkeypatch.setattr(check, "clear_dead_mount", lambda mountpoint: None)
    found = [control.Finding("blocks on a stub", b"a\nb", True), control.Finding("object missing", b"c")]
    for findings, code in ((found, 1), (found[:1], 0), ([], 0)):
        daemon.answers[control.Check] = [control.Progress(1, 2, 0, 0), control.Findings(findings, 7)]
        got, out, err = run("check", "--json", "--repair", "/vol")
        assert (got, err) == (code, "")
        assert json.loads(out)["left"] == code
        got, out, _ = run("check", "/vol")
        assert got == code
        assert out.count("\n") == len(findings) + 1
    assert daemon.requests[-2:] == [control.Check(True, False), control.Check(False, False)]


def test_check_of_what_is_no_volume(run, daemon, tmp_path):
    code, _, err = run("check", str(tmp_path))
    assert (code, err) == (1, f"tierfs: {tmp_path}: is neither a mounted volume nor a state directory\n")


@pytest.mark.parametrize("command", sorted(cli._COMMANDS))
def test_an_empty_path_is_not_the_working_directory(run, daemon, command):
    more = ["--store", "file:///nas"] if command == "restore" else []
    code, _, err = run(command, *more, "")
    assert code == 2 and "the path is empty" in err
    assert not daemon.requests


@pytest.mark.parametrize(("error", "code"), [(VolumeError("not mounted"), 1), (KeyboardInterrupt(), 130)])
def test_who_finds_an_empty_directory_is_told_where_its_content_is(run, tmp_path, monkeypatch, error, code):
    """The one rename of an adoption is done, and then it cannot be mounted."""
    home, state = tmp_path / "my home", tmp_path / "state"
    home.mkdir()
    state.mkdir()

    def fail(arguments, real):
        home.rename(state / "tree")
        raise error

    monkeypatch.setattr(launch, "launch", fail)
    got, _, err = run("adopt", "--state", str(state), str(home))
    assert got == code
    assert f"its content is in {state}/tree" in err
    for command in ("mount", "leave"):
        assert f"`tierfs {command} --state {state} '{home}'`" in err
    monkeypatch.setattr(launch, "launch", lambda arguments, real: (_ for _ in ()).throw(error))
    assert "its content is in" not in run("adopt", "--state", str(state), str(home))[2], "this moved nothing"
