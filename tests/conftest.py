"""Fixtures: volumes mounted by the command, S3 servers, users, and the check that nothing of ours stays behind.

With TIERFS_TESTS_PLAIN=1 volumes are plain directories: the workloads are then tried against the filesystem
beneath (tests that need tiers are skipped).
"""

from __future__ import annotations

import compileall
import contextlib
import gc
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import harness
import pytest
import s3servers
from harness import REPO, TIERFS, PlainVolume, Scratch, Volume

PLAIN = bool(os.environ.get("TIERFS_TESTS_PLAIN"))
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def area() -> Iterator[Scratch]:
    """The run's directory; at the end the run fails when a mount or a process of ours is left."""
    area = Scratch()
    yield area
    left = area.close()
    assert not left, "left behind by the tests:\n" + "\n".join(left)


def _new(area: Scratch, **options: object) -> Volume:
    base = area.path / f"v{next(_numbers)}"
    base.mkdir()
    base.chmod(0o755)
    return (PlainVolume if PLAIN else Volume)(base, area.connections, **options)


@pytest.fixture
def volume(area: Scratch) -> Iterator[Callable[..., Volume]]:
    """A factory: `volume(store=…, env=…, options=…, mount=False)` makes and mounts a volume for one test."""
    with contextlib.ExitStack() as stack:

        def make(mount: bool = True, **options: object) -> Volume:
            made = _new(area, **options)
            stack.callback(made.discard)
            if mount:
                made.mount()
            return made

        yield make


def pytest_configure(config: pytest.Config) -> None:
    """Two things that are handed on to all that is started from here.

    What a shell starts in the background ignores ^C. And where bytecode is not to be written, as containers
    have it, each of thousands of processes would compile all sources anew: nearly half of the time they take.
    """
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if not hasattr(config, "workerinput"):
        for sources in (REPO / "tierfs", REPO / "daemon"):
            compileall.compile_dir(sources, quiet=1)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Thousands of tests that are collected stay to the end: no garbage is looked for in them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module that names BINDINGS has its shared volume on each of them."""
    bindings = getattr(metafunc.module, "BINDINGS", None)
    if bindings and "shared" in metafunc.fixturenames and not PLAIN:
        metafunc.parametrize("shared", bindings, indirect=True, scope="module")


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest, area: Scratch) -> Iterator[Volume]:
    """One mounted volume for all tests of a module, each of which keeps to a directory of its own."""
    made = _new(area, limit=500, options=("--binding", getattr(request, "param", "auto")))
    try:
        made.mount()
        yield made
    finally:
        made.discard()


@pytest.fixture
def work(shared: Volume) -> Iterator[Path]:
    """An empty directory in the shared volume."""
    path = shared.mountpoint / f"t{next(_numbers)}"
    path.mkdir()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def opened() -> Iterator[Callable[..., int]]:
    """`opened(path, flags, mode)`: a descriptor that is closed when the test ends."""
    fds: list[int] = []

    def open_(path: Path, flags: int, mode: int = 0o644) -> int:
        fds.append(os.open(path, flags, mode))
        return fds[-1]

    yield open_
    for fd in fds:
        os.close(fd)


@pytest.fixture
def tiers() -> None:
    """For tests that have no meaning on a plain directory."""
    if PLAIN:
        pytest.skip("plain directories have no tiers")


@pytest.fixture(params=["resident", "demoted"])
def settle(request: pytest.FixtureRequest, shared: Volume) -> Callable[..., None]:
    """`settle(paths…)` brings files of the shared volume into the state that the test runs for."""

    def settle(*paths: Path) -> None:
        if request.param == "demoted" and paths:
            shared.demote(*paths)
            assert [shared.tier(path) for path in paths] == ["stub"] * len(paths)

    if request.param == "demoted" and PLAIN:
        pytest.skip("plain directories have no tiers")
    return settle


@pytest.fixture(scope="session")
def rclone_s3(area: Scratch) -> Iterator[s3servers.Server]:
    with _server(area, "rclone") as server:
        yield server


@pytest.fixture(scope="session")
def quick_s3(area: Scratch) -> Iterator[s3servers.Server]:
    """For thousands of files: rclone, where each copy is read back, takes minutes."""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(s3servers.SERVERS["versitygw"](area.path / "s3-versitygw"))
        except s3servers.Unavailable:
            server = stack.enter_context(_server(area, "rclone"))
        yield server


@contextlib.contextmanager
def _server(area: Scratch, name: str) -> Iterator[s3servers.Server]:
    try:
        with s3servers.SERVERS[name](area.path / f"s3-{name}") as server:
            yield server
    except s3servers.Unavailable as exc:
        pytest.skip(str(exc))


@pytest.fixture
def needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can do this")


@pytest.fixture(scope="session")
def handed_on() -> None:
    if harness.linux() < (6, 9):
        pytest.skip("before 6.9 Linux asks nobody again what a mount server has left unanswered")


@pytest.fixture(scope="session")
def user(area: Scratch) -> Iterator[pwd.struct_passwd]:
    """A user made for the run, with a home of the ordinary sort."""
    if os.geteuid() != 0 or not shutil.which("useradd"):
        pytest.skip("only root can make a user")
    name, home = f"tierfs-t{os.getpid()}", area.path / "home"
    subprocess.run(["useradd", "-m", "-d", home, "-s", "/bin/sh", name], check=True, capture_output=True)
    entry = pwd.getpwnam(name)
    (home / ".run").mkdir(mode=0o700)
    os.chown(home / ".run", entry.pw_uid, entry.pw_gid)
    try:
        yield entry
    finally:
        subprocess.run(["userdel", name], check=True, capture_output=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """The files of contract/ go to one worker: they share servers, some of which take their time to start."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByServers(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return os.path.dirname(file) if os.path.basename(os.path.dirname(file)) == "contract" else file

    return ByServers(config, log)


LONGEST = ("home", "crash", "model", "mount")  # directories, by how long their files take


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests under mount/ and home/ need FUSE and the command. Long ones come first."""

    def place(item: pytest.Item) -> int:
        top = item.path.relative_to(Path(__file__).parent).parts[0]
        return LONGEST.index(top) if top in LONGEST else len(LONGEST)

    items.sort(key=place)
    usable = os.path.exists("/dev/fuse") and TIERFS.exists()
    for item in items:
        if {"mount", "home"} & set(item.path.relative_to(Path(__file__).parent).parts[:-1]):
            item.add_marker(pytest.mark.mount)
            if not usable and not PLAIN:
                item.add_marker(pytest.mark.skip(reason="needs /dev/fuse and an installed tierfs"))
