"""A damaged index under a real mount: nothing is ever read wrong, and in the end there is a whole one again."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Volume, connection_of

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))
import damaging
import test_index_damage

from tierfs import pages

pytestmark = pytest.mark.usefixtures("tiers", "needs_root")
Make = Callable[..., Volume]
LARGE = 9 << 20


@pytest.fixture
def filled(volume: Make) -> tuple[Volume, dict[str, bytes]]:
    """Stubs, a file of which a part is here, resident ones; unmounted."""
    made = volume()
    made.configure(min_age="0s", quiet="0s", replicate="cold")
    rng = random.Random(5)
    files = {f"dir{n % 7}/file{n}": rng.randbytes(rng.randrange(1, 9000)) for n in range(300)}
    files["large"] = rng.randbytes(LARGE)
    for name, data in files.items():
        path = made.mountpoint / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    made.demote(*[made.mountpoint / name for n, name in enumerate(files) if n % 3 or name == "large"])
    with open(made.mountpoint / "large", "rb") as part:
        assert part.read(100) == files["large"][:100]
    made.umount()
    return made, files


def test_a_volume_that_was_moved_to_another_disk_goes_on(filled: tuple[Volume, dict[str, bytes]]) -> None:
    """All inodes have other numbers there, and the index knew files by those."""
    made, files = filled
    here = made.state.with_name("there")
    subprocess.run(["cp", "-a", "--sparse=always", made.state, here], check=True)
    shutil.rmtree(made.state)
    here.rename(made.state)
    made.mount()
    assert made.tier(made.mountpoint / "dir1/file1") == "stub"
    deadline = time.monotonic() + 40
    while made.status()["files"] < len(files) or made.status()["verifying"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    status = made.status()
    assert (status["files"], status["stubs"]) == (len(files), 1 + sum(n % 3 > 0 for n in range(300)))
    checked = made.cli("check", made.mountpoint, check=False)
    assert checked.returncode == 0, checked.stdout
    for _ in range(2):
        read_all(made, files)
        made.demote()
        assert made.status()["stubs"] == len(files)


def read_all(volume: Volume, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        assert read(volume, name) == data, name


def read(volume: Volume, name: str) -> bytes:
    """Again while the volume is being mounted anew: an error is allowed then, wrong bytes never are."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return (volume.mountpoint / name).read_bytes()
        except OSError as exc:
            away = exc.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.ENOENT, errno.EIO)
            assert away and time.monotonic() < deadline, (exc, volume.log())
            time.sleep(0.1)


def sound(volume: Volume, files: dict[str, bytes]) -> None:
    """All is right, and the checks say so, after a repair at most."""
    read_all(volume, files)
    deadline = time.monotonic() + 60
    # Where the mover meets the damage just now the volume is mounted anew.
    while not volume.cli("check", "--repair", "--json", volume.mountpoint, check=False).stdout:
        assert time.monotonic() < deadline, volume.log()
        time.sleep(0.1)
    found = volume.json("check", "--json", volume.mountpoint)
    assert not found["findings"], found
    pages.verify(str(volume.state / "index" / "data.mdb"))


def aside(volume: Volume) -> list[Path]:
    return sorted(volume.state.glob("index.damaged-*"))


def test_bytes_of_every_kind_of_page_changed_between_two_mounts(filled) -> None:
    made, files = filled
    file = made.state / "index" / "data.mdb"
    for some in (("branch", "leaf"), ("meta", "free list")):
        numbers = [number for number, what in damaging.page_kinds(file).items() if what in some]
        rng = random.Random(some[0])
        with open(file, "r+b") as opened:
            for number in numbers:
                opened.seek(number * damaging.PAGE + rng.randrange(10, 160))
                opened.write(rng.randbytes(6))
        made.mount()
        sound(made, files)
        made.umount()
    assert aside(made)


def test_the_whole_file_lost(filled) -> None:
    made, files = filled
    file = made.state / "index" / "data.mdb"
    for what in ("deleted", "truncated", "zeros", "noise"):
        size = file.stat().st_size
        if what == "deleted":
            file.unlink()
        elif what == "truncated":
            os.truncate(file, size // 2)
        else:
            file.write_bytes(bytes(size) if what == "zeros" else random.Random(1).randbytes(size))
        made.mount()
        sound(made, files)
        made.umount()


def test_with_the_index_lost_only_the_ctime_of_stubs_moves(volume: Make) -> None:
    made = volume()
    file = made.mountpoint / "file"
    file.write_bytes(b"content " * 1000)
    os.utime(file, ns=(1, 2))
    os.setxattr(file, "user.a", b"b")
    before = os.stat(file)
    made.demote(file)
    demoted = time.time_ns()
    assert made.tier(file) == "stub" and os.stat(file).st_ctime_ns == before.st_ctime_ns
    made.umount()
    shutil.rmtree(made.state / "index")
    made.mount()
    until = time.monotonic() + 60
    while any("looked through" in note for note in made.status()["notes"]):
        assert time.monotonic() < until, made.log()
        time.sleep(0.1)
    after = os.stat(file)
    assert made.tier(file) == "stub"
    assert before.st_ctime_ns < after.st_ctime_ns <= demoted, "it is that of the demotion"
    for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks", "st_mtime_ns"):
        assert getattr(after, name) == getattr(before, name), name
    assert file.read_bytes() == b"content " * 1000 and os.getxattr(file, "user.a") == b"b"


def test_with_the_index_lost_status_says_why_nothing_is_removed_from_the_store(volume: Make) -> None:
    """To the copies of resident files only the journal refers, until there are others."""
    made = volume()
    made.configure(quiet="0s", replicate="all")
    for name in ("a", "b"):
        (made.mountpoint / name).write_bytes(b"content")
    made.umount("--wait")
    made.configure(quiet="0s", replicate="cold")
    shutil.rmtree(made.state / "index")
    made.mount()
    until = time.monotonic() + 60
    while not any("before 2 files are copied anew" in note for note in made.status()["notes"]):
        assert time.monotonic() < until, made.log()
        time.sleep(0.1)
    told = " ".join(made.cli("status", made.mountpoint).stdout.split())
    assert "nothing is removed from the store before 2 files" in told


def test_a_check_finds_damage_that_nobody_has_met_and_makes_a_new_index(filled) -> None:
    made, files = filled
    file = made.state / "index" / "data.mdb"
    with open(file, "r+b") as opened:
        newest = pages.read_metas(opened.fileno(), "")[-1].transaction & 1
        opened.seek(newest * damaging.PAGE + 72)  # how many entries the table of free pages has
        opened.write(b"\7\7")
    made.mount()
    found = made.json("check", "--json", made.mountpoint, check=False)
    assert [finding["repaired"] for finding in found["findings"]] == [False] and found["left"] == 1
    assert "the index is damaged" in found["findings"][0]["what"]
    found = made.json("check", "--repair", "--json", made.mountpoint, check=False)
    assert found["findings"][0]["repaired"] and not found["left"], found
    assert found["files"] == len(files) and len(aside(made)) == 1
    sound(made, files)


def await_new_index(volume: Volume, poke: Callable[[], None]) -> None:
    deadline = time.monotonic() + 60
    while not aside(volume):
        poke()
        assert time.monotonic() < deadline, volume.log()
        time.sleep(0.1)


def damage_all_pages(made: Volume) -> None:
    """Of the index, as it is in use."""
    file = made.state / "index" / "data.mdb"
    with open(file, "r+b") as opened:
        for number, kind in damaging.page_kinds(file).items():
            if kind in ("leaf", "branch"):
                opened.seek(number * damaging.PAGE + 10)
                opened.write(b"\x77\x07")


def test_damage_under_a_running_mount(filled) -> None:
    """Met by the mover at its work: it ends, the index is looked at and made anew, and all goes on."""
    made, files = filled
    made.mount()
    damage_all_pages(made)
    await_new_index(made, lambda: made.cli("status", made.mountpoint, check=False))
    deadline = time.monotonic() + 60
    while made.cli("status", made.mountpoint, check=False).returncode:
        assert time.monotonic() < deadline, made.log()
        time.sleep(0.1)
    sound(made, files)
    assert len(aside(made)) == 1


def test_a_mover_that_dies_of_something_else_leaves_the_index_as_it_is(filled) -> None:
    made, files = filled
    made.mount()
    before = made.mover()
    os.kill(before, signal.SIGSEGV)
    deadline = time.monotonic() + 60
    while "the index is looked at" not in made.log() or made.status()["pids"]["mover"] == before:
        assert time.monotonic() < deadline, made.log()
        time.sleep(0.1)
    assert not aside(made) and not (made.state / "index.suspect").exists()
    sound(made, files)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_thousands_of_damages_without_a_mount(tmp_path: Path) -> None:
    test_index_damage.judge(test_index_damage.outcomes(tmp_path, 10_000, 14_000))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100))
def test_any_damage_between_two_mounts(filled, seed: int) -> None:
    made, files = filled
    file = made.state / "index" / "data.mdb"
    damaging.damage(file, damaging.page_kinds(file), seed)
    made.mount()
    sound(made, files)


def test_who_unmounts_while_a_new_index_is_made_has_it_unmounted(filled) -> None:
    """The server has met damage and still serves; the mover takes its time to end, and then the volume would be
    mounted anew."""
    made, _ = filled
    made.mount()
    mover = made.status()["pids"]["mover"]
    os.kill(mover, signal.SIGSTOP)
    damage_all_pages(made)
    try:
        command = ["ls", "-lR", made.mountpoint]
        subprocess.run(command, check=False, timeout=30, capture_output=True)
        deadline = time.monotonic() + 30
        while not (made.state / "index.suspect").exists():
            assert time.monotonic() < deadline, made.log()
            time.sleep(0.01)
        argv = [*made.program, "umount", made.mountpoint]
        with subprocess.Popen(argv, env=made.environment, stderr=subprocess.PIPE) as umount:
            while connection_of(made.mountpoint) is not None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            os.kill(mover, signal.SIGCONT)
            _, said = umount.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(mover, signal.SIGCONT)
    assert (umount.returncode, said) == (0, b"")
    assert connection_of(made.mountpoint) is None and not made.pids(), made.log()
    assert aside(made) and "it has been unmounted meanwhile" in made.log()
