"""`tierfs mount --at`: the whole tree as of a moment, read-only, beside the volume that goes on."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3servers
from harness import TIERFS, Volume, connection_of

from tierfs import failpoints

pytestmark = pytest.mark.usefixtures("tiers")
Make = Callable[..., Volume]


@pytest.fixture(params=["directory", pytest.param("s3", marks=pytest.mark.s3)])
def volumes(request: pytest.FixtureRequest, volume: Make, tmp_path: Path) -> Iterator[tuple[Volume, Volume]]:
    """A mounted volume, and a place for a view of it."""
    options: dict[str, object] = {"store": f"file://{tmp_path}/store"}
    if request.param == "s3":
        server: s3servers.Server = request.getfixturevalue("rclone_s3")
        options = {"store": server.url_for("view"), "env": server.env}
    first = volume(mount=False, **options)
    first.mount()
    first.umount()  # at once: its journal has yet to begin
    first.configure(journal="200ms")
    first.mount()
    view = volume(mount=False, **options)
    view.mountpoint.mkdir()
    yield first, view


def settled(volume: Volume) -> None:
    deadline = time.monotonic() + 60
    while volume.status()["journal_behind_seconds"]:
        assert time.monotonic() < deadline, "the journal does not catch up"
        time.sleep(0.1)


def show(view: Volume, at: str, check: bool = True):
    done = view.cli("mount", "--at", at, "--store", view.store, view.mountpoint, check=check)
    view.watch()
    return done


def stored(volume: Volume) -> dict[str, tuple[int, str]]:
    """Every object of the store but the signs of life, with size and version."""
    from tierfs.store.urls import open_store

    before = {key: os.environ.get(key) for key in volume.env}
    os.environ.update(volume.env)
    try:
        found = open_store(volume.store).list("")
        return {info.key: (info.size, info.etag) for info in found if info.key != "alive.json"}
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)


def views() -> set[str]:
    base = "/var/lib/tierfs" if os.geteuid() == 0 else os.path.expanduser("~/.local/state/tierfs")
    return {name for name in os.listdir(base) if name.startswith("view~")} if os.path.isdir(base) else set()


def iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f"{seconds % 1:.3f}"[1:] + "Z"


def test_the_tree_as_it_was(volumes: tuple[Volume, Volume]) -> None:
    first, view = volumes
    root, before_views = first.mountpoint, views()
    (root / "docs" / "old").mkdir(parents=True)
    large = os.urandom(5 << 20)
    contents = {"thesis": b"first draft" * 900, "docs/note": b"a note" * 900, "docs/old/large": large}
    for name, data in contents.items():
        (root / name).write_bytes(data)
    (root / "thesis").chmod(0o640)
    (root / "link").symlink_to("docs/note")
    os.link(root / "docs" / "note", root / "docs" / "same")
    first.demote()
    settled(first)
    time.sleep(0.01)
    between = time.time()
    time.sleep(0.01)
    (root / "thesis").write_bytes(b"all is lost" * 900)
    (root / "thesis").chmod(0o600)
    (root / "docs" / "note").rename(root / "moved")
    shutil.rmtree(root / "docs")
    (root / "later").write_bytes(b"later" * 900)
    first.demote()
    settled(first)
    first.umount()

    before = stored(first)
    said = show(view, iso(between)).stdout
    assert "3 files" in said and "read-only" in said
    at = view.mountpoint
    assert sorted(os.listdir(at)) == ["docs", "link", "thesis"]
    for name, data in contents.items():
        assert (at / name).read_bytes() == data, name
    assert (at / "thesis").stat().st_mode & 0o777 == 0o640
    assert os.readlink(at / "link") == "docs/note"
    assert (at / "docs" / "same").samefile(at / "docs" / "note")
    for change in (
        lambda: (at / "new").write_bytes(b"x"), lambda: (at / "thesis").unlink(),
        lambda: (at / "thesis").chmod(0o777), lambda: os.open(at / "thesis", os.O_RDWR),
    ):  # fmt: skip
        with pytest.raises(OSError) as caught:
            change()
        assert caught.value.errno == errno.EROFS
    assert "view of the past" in " ".join(view.status()["notes"])
    assert len(views() - before_views) == 1

    first.mount()
    (root / "during").write_bytes(b"during" * 900)
    first.demote()
    assert (at / "thesis").read_bytes() == contents["thesis"]
    first.umount()
    changed = {key for key, what in before.items() if stored(first).get(key) != what}
    assert changed <= {"volume.json"}, "the volume's own new mount"
    before = stored(first)
    view.umount("--wait")
    assert stored(first) == before, "nothing is written for a view"
    assert views() == before_views, "its state goes with it"


@pytest.mark.parametrize("volumes", ["directory"], indirect=True)
def test_what_cannot_be_shown_leaves_nothing(volumes: tuple[Volume, Volume], tmp_path: Path) -> None:
    first, view = volumes
    before = views()
    (first.mountpoint / "file").write_bytes(b"x" * 5000)
    first.demote()
    settled(first)
    wrong = [
        (("mount", "--at", "tomorrow", "--store", view.store, view.mountpoint), 2, "is no moment"),
        (("mount", "--at", "1 day ago", view.mountpoint), 2, "--at needs --store"),
        (("mount", "--at", "1 day ago", "--force", "--store", view.store, view.mountpoint), 2, "--at needs"),
        (("mount", "--at", "1 day ago", "--store", f"file://{tmp_path}", view.mountpoint), 1, "no volume"),
        (("mount", "--at", "1 day ago", "--store", view.store, first.mountpoint), 1, "already mounted"),
        (("mount", "--only", "docs", "--store", view.store, view.mountpoint), 2, "--only goes with --at"),
        (
            ("mount", "--at", "0 days ago", "--only", "file", "--store", view.store, view.mountpoint),
            1,
            "file: is no directory",
        ),
    ]
    for argv, code, text in wrong:
        done = view.cli(*argv, check=False)
        assert done.returncode == code and text in done.stderr, (argv, done.stderr)
        assert done.stderr.count("\n") == 1
    assert connection_of(view.mountpoint) is None and views() == before
    done = show(view, "5 weeks ago")
    assert "does not reach back so far" in done.stderr
    assert connection_of(view.mountpoint) is not None
    # On a busy machine the first snapshot is of the time before the file.
    assert [path.read_bytes() for path in view.mountpoint.iterdir()] in ([], [b"x" * 5000])
    view.umount()
    assert views() == before


@pytest.mark.parametrize("volumes", ["directory"], indirect=True)
def test_a_part_can_be_read_while_a_restore_of_all_is_under_way(
    volumes: tuple[Volume, Volume], volume: Make
) -> None:
    """It has a claim on nothing, and is made of the journal alone, so that neither notices the other."""
    first, view = volumes
    root = first.mountpoint
    (root / "docs" / "old").mkdir(parents=True)
    (root / "docs").chmod(0o750)
    content = os.urandom(5 << 20)
    for path in (root / "docs" / "old" / "large", root / "elsewhere"):
        path.write_bytes(content)
    os.link(root / "elsewhere", root / "docs" / "here too")
    first.umount("--wait")
    shutil.rmtree(first.state)

    machine = volume(mount=False, store=first.store)
    argv = [TIERFS, "restore", "--store", machine.store, "--state", machine.state, machine.mountpoint]
    environment = {**machine.environment, "TIERFS_FAILPOINT": f"{failpoints.RESTORE_PLANTED}:1:STOP"}
    restoring = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        os.waitid(os.P_PID, restoring.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert not (machine.state / "tree").exists() and connection_of(machine.mountpoint) is None
        view.cli("mount", "--at", "0 seconds ago", "--only", "/docs/", "--store", view.store, view.mountpoint)
        view.watch()
        at = view.mountpoint
        assert sorted(os.listdir(at)) == ["here too", "old"]
        assert at.stat().st_mode & 0o777 == 0o750
        assert (at / "old" / "large").read_bytes() == (at / "here too").read_bytes() == content
        view.umount()
    finally:
        restoring.send_signal(signal.SIGCONT)
        said = restoring.communicate(timeout=90)
    machine.watch()
    assert restoring.returncode == 0, said
    root = machine.mountpoint
    assert (root / "docs" / "old" / "large").read_bytes() == (root / "elsewhere").read_bytes() == content
    assert (root / "docs" / "here too").samefile(root / "elsewhere")
