"""Wrong input gives one clear line, an exit code, and leaves everything as it was."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import s3servers
from harness import Volume, connection_of

pytestmark = pytest.mark.usefixtures("tiers")
Make = Callable[..., Volume]


def refused(done: subprocess.CompletedProcess, *words: str, code: int = 1) -> None:
    """One line on stderr that has these words, and the exit code."""
    assert done.returncode == code, done
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("tierfs: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize(
    "args",
    [
        ("mount",), ("mount", "--no-such", "x"), ("nonsense",), ("pin",), ("demote",), ("umount",),
        ("mount", "--local-limit", "plenty", "x"), ("mount", "--binding", "magic", "x"),
        ("mount", "--store", "gopher://x", "x"), ("leave",), ("check",),
    ],
)  # fmt: skip
def test_wrong_usage_is_exit_code_2(volume: Make, args: tuple[str, ...]) -> None:
    done = volume(mount=False).cli(*args, check=False)
    assert done.returncode == 2, done
    assert done.stderr.strip()
    assert "Traceback" not in done.stderr


def test_mountpoint_missing(volume: Make) -> None:
    made = volume(mount=False)
    refused(made.cli("mount", "--state", made.state, made.base / "nowhere", check=False), "nowhere")
    assert not (made.state / "tree").exists()


def test_mountpoint_is_a_file(volume: Make) -> None:
    made = volume(mount=False)
    (made.base / "file").touch()
    refused(made.cli("mount", "--state", made.state, made.base / "file", check=False), "directory")


@pytest.mark.parametrize("more", [(), ("--foreground",)])
def test_mountpoint_not_empty(volume: Make, more: tuple[str, ...]) -> None:
    made = volume(mount=False)
    made.mountpoint.mkdir()
    (made.mountpoint / "mine").write_text("precious")
    refused(made.mount(*more, check=False), "not empty")
    assert (made.mountpoint / "mine").read_text() == "precious"


def test_a_mount_with_an_option_that_is_none_makes_no_volume(volume: Make) -> None:
    """The next attempt, with another store, would be refused for that."""
    made = volume(mount=False)
    made.mountpoint.mkdir()
    wrong = made.mount("-o", "noatime,bogus", "--binding", "kernel", check=False)
    assert wrong.returncode == 2 and wrong.stderr.startswith("tierfs: -o bogus: unknown mount option: use ")
    assert not made.state.exists()
    made.mount("--store", f"file://{made.base}/store", "-o", "noatime")


def test_state_inside_the_mountpoint(volume: Make) -> None:
    made = volume(mount=False)
    made.mountpoint.mkdir()
    inside = made.mountpoint / "state"
    refused(made.cli("mount", "--state", inside, made.mountpoint, check=False), "inside")
    assert not inside.exists()


@pytest.mark.parametrize("verb", ["mount", "adopt"])
def test_store_inside_of_its_own_volume(volume: Make, verb: str) -> None:
    made = volume(mount=False)
    made.mountpoint.mkdir()
    if verb == "adopt":
        (made.mountpoint / "mine").write_text("precious")
    (made.base / "link").symlink_to(made.mountpoint)
    names = sorted(path.name for path in made.base.iterdir())
    inside = f"file://{made.base}/link/store"
    refused(made.cli(verb, "--store", inside, "--state", made.state, made.mountpoint, check=False), "inside")
    assert sorted(path.name for path in made.base.iterdir()) == names
    assert not (made.mountpoint / "store").exists()


def test_a_directory_whose_files_have_names_elsewhere_is_not_adopted(volume: Make) -> None:
    made = volume(mount=False)
    made.mountpoint.mkdir()
    file, elsewhere = made.mountpoint / "file", made.base / "elsewhere"
    file.write_bytes(b"content")
    elsewhere.hardlink_to(file)
    before = sorted(made.base.rglob("*"))
    refused(made.cli("adopt", made.mountpoint, check=False), "mnt/file", "hard links", "replace them by copies")
    assert sorted(made.base.rglob("*")) == before and file.read_bytes() == b"content"


def test_an_adoption_that_cannot_begin_leaves_nothing_behind(volume: Make) -> None:
    made = volume(mount=False)
    made.mountpoint.mkdir()
    (made.mountpoint / "mine").write_text("precious")
    refused(made.cli("adopt", "--store", "file:///no/such/nas", made.mountpoint, check=False), "no/such")
    assert [path.name for path in made.base.iterdir()] == ["mnt"]
    assert (made.mountpoint / "mine").read_text() == "precious"


def test_mounting_twice(volume: Make) -> None:
    made = volume()
    (made.mountpoint / "f").write_text("x")
    refused(made.mount(check=False), "already")
    other = made.base / "other"
    other.mkdir()
    refused(made.cli("mount", "--state", made.state, other, check=False), str(made.mountpoint))
    assert (made.mountpoint / "f").read_text() == "x"


def test_umount_when_busy(volume: Make) -> None:
    made = volume()
    with open(made.mountpoint / "held", "w") as held:
        refused(made.umount(check=False), "busy")
        held.write("still works")
    assert (made.mountpoint / "held").read_text() == "still works"


def test_umount_of_what_is_not_mounted(volume: Make) -> None:
    made = volume(mount=False)
    made.mountpoint.mkdir()
    refused(made.umount(check=False), "mnt")


@pytest.mark.parametrize("command", ["status", "pin", "demote", "fetch", "ls"])
def test_a_path_outside_any_mount(volume: Make, command: str) -> None:
    made = volume(mount=False)
    outside = made.base / "outside"
    outside.touch()
    refused(made.cli(command, outside, check=False), "outside", "mount")


@pytest.mark.parametrize("command", ["status", "pin", "demote", "fetch"])
def test_a_path_that_does_not_exist(shared: Volume, work: Path, command: str) -> None:
    refused(shared.cli(command, work / "absent", check=False), "absent")


@pytest.mark.parametrize("name", [b"new\nline", b"\xff\xfe", b"'; rm -rf x", b"-rf", b"*", b"tab\there"])
def test_strange_names_from_end_to_end(shared: Volume, work: Path, name: bytes) -> None:
    path = os.path.join(os.fsencode(work), name)
    with open(path, "wb") as out:
        out.write(name * 1000)
    shared.cli("demote", "--wait", path)
    assert os.getxattr(path, "user.tierfs.tier") == b"stub"
    facts = shared.status(path)
    assert facts["tier"] == "stub"
    assert os.fsencode(facts["path"]) == path
    (listed,) = shared.json("ls", "--json", work)
    assert os.fsencode(listed["name"]) == name
    shared.cli("pin", path)
    with open(path, "rb") as back:
        assert back.read() == name * 1000
    shared.cli("unpin", path)


def test_config_malformed(volume: Make) -> None:
    made = volume()
    made.umount()
    config = made.state / "config.toml"
    good = config.read_text()
    config.write_text("local_limit = [\n")
    refused(made.mount(check=False), "config.toml")
    config.write_text(good.replace("# quiet =", "quite ="))
    refused(made.mount(check=False), "config.toml", "quite", "quiet")
    config.write_text(good.replace('# chunk_size = "4M"', 'chunk_size = "a lot"'))
    refused(made.mount(check=False), "chunk_size", "a lot")
    assert connection_of(made.mountpoint) is None
    config.write_text(good)
    made.mount()


def test_config_not_readable(volume: Make) -> None:
    made = volume()
    made.umount()
    config = made.state / "config.toml"
    config.rename(made.state / "kept")
    config.mkdir()
    refused(made.mount(check=False), "config.toml")
    config.rmdir()
    (made.state / "kept").rename(config)
    made.mount()


def test_state_directory_that_is_something_else(volume: Make) -> None:
    made = volume(mount=False)
    made.state.mkdir()
    (made.state / "letters.txt").write_text("mine")
    refused(made.mount(check=False), "state")
    assert (made.state / "letters.txt").read_text() == "mine"
    assert not (made.state / "tree").exists()


def test_volume_json_damaged(volume: Make) -> None:
    made = volume()
    (made.mountpoint / "f").write_text("x")
    made.umount()
    path = made.state / "volume.json"
    good = path.read_text()
    path.write_text(good[: len(good) // 2])
    refused(made.mount(check=False), "volume.json")
    path.write_text(good)
    made.mount()
    assert (made.mountpoint / "f").read_text() == "x"


# --- stores ------------------------------------------------------------------------------------------------


def test_store_directory_missing(volume: Make) -> None:
    made = volume(mount=False)
    made.store = f"file://{made.base}/no/such/nas"
    refused(made.mount(check=False), "no/such")


def test_bucket_missing(volume: Make, rclone_s3: s3servers.Server) -> None:
    url = rclone_s3.url_for("x").replace(rclone_s3.bucket, "no-such-bucket")
    made = volume(mount=False, store=url, env=rclone_s3.env)
    refused(made.mount(check=False), "no-such-bucket")
    assert connection_of(made.mountpoint) is None
    made.store = rclone_s3.url_for("after-a-typo")
    made.mount()


def test_no_credentials(volume: Make, rclone_s3: s3servers.Server) -> None:
    bare = {**rclone_s3.env, "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    made = volume(mount=False, store=rclone_s3.url_for("x"), env=bare)
    refused(made.mount(check=False), "credentials")


def test_wrong_credentials(volume: Make, rclone_s3: s3servers.Server) -> None:
    env = s3servers.credentials("tierfs-tests", "not-the-secret")
    made = volume(mount=False, store=rclone_s3.url_for("x"), env=env)
    done = made.mount(check=False)
    refused(done)
    assert "not-the-secret" not in done.stderr + made.log()


def test_store_of_another_volume(volume: Make, rclone_s3: s3servers.Server) -> None:
    first = volume(store=rclone_s3.url_for("owned"), env=rclone_s3.env)
    (first.mountpoint / "f").write_text("x")
    second = volume(mount=False, store=rclone_s3.url_for("owned"), env=rclone_s3.env)
    refused(second.mount(check=False), "belongs", socket.gethostname())
    assert (first.mountpoint / "f").read_text() == "x"


def test_nothing_listens(volume: Make) -> None:
    port = s3servers.free_port()
    url = f"s3://bucket/x?endpoint=http://127.0.0.1:{port}&region=us-east-1"
    made = volume(mount=False, store=url, env=s3servers.credentials())
    refused(made.mount(check=False), str(port))


class _Nonsense(BaseHTTPRequestHandler):
    """Says 200 and something that is no S3 to whatever it is asked."""

    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b"" if self.command == "HEAD" else b"<html>Welcome to the hotel's network. Please log in.</html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def nonsense() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Nonsense)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_store_that_answers_nonsense(volume: Make, nonsense: str) -> None:
    url = f"s3://bucket/x?endpoint={nonsense}&region=us-east-1"
    made = volume(mount=False, store=url, env=s3servers.credentials())
    refused(made.mount(check=False))
    assert connection_of(made.mountpoint) is None


def test_json_is_one_document(shared: Volume, work: Path) -> None:
    (work / "a").write_text("a")
    (work / "b").write_text("b")
    facts = shared.status(work / "a")
    wanted = {"path", "tier", "size", "local_bytes", "dirty", "pinned", "heat", "generation"}
    assert wanted <= facts.keys()
    assert [item["path"] for item in shared.status(work / "a", work / "b")] == [f"{work}/a", f"{work}/b"]
    assert shared.status(work)["tier"] == "directory"
    volume_facts = json.loads(shared.cli("status", "--json", shared.mountpoint).stdout)
    assert volume_facts.keys() >= {
        "mountpoint", "state", "store", "local_bytes", "local_limit", "total_bytes", "files", "stubs",
        "dirty_files", "dirty_bytes", "queued", "errors", "pids",
    }  # fmt: skip
    assert volume_facts["pids"].keys() >= {"supervisor", "server", "mover"}


@pytest.mark.usefixtures("needs_root")
def test_what_root_has_demoted_is_not_read_as_zeros_without_the_privileges(volume: Make) -> None:
    """The attribute of a stub is in a namespace that only they make visible."""
    made = volume()
    content = os.urandom(50_000)
    (made.mountpoint / "a").write_bytes(content)
    made.demote(made.mountpoint / "a")
    made.umount()
    apart = ("unshare", "--user", "--map-root-user", "--mount", "--propagation", "private", *made.program)
    other = dataclasses.replace(made, program=apart)
    for verb in ("mount", "leave"):
        done = other.cli(verb, "--state", made.state, made.mountpoint, check=False)
        refused(done, "root's privileges", "files of zeros")
    assert (made.state / "tree" / "a").stat().st_blocks == 0
    made.mount()
    assert (made.mountpoint / "a").read_bytes() == content
