"""`tierfs versions`, `restore-version` and `gc` on a mounted volume."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Volume
from users import program_for

pytestmark = pytest.mark.usefixtures("tiers")


def save(volume: Volume, path: Path, text: str) -> None:
    """New content that is in the store."""
    path.write_text(text)
    volume.demote(path)


def kept(volume: Volume, path: Path) -> list[dict]:
    return volume.json("versions", "--json", path)


def test_overwritten_deleted_and_brought_back(shared: Volume, work: Path) -> None:
    path = work / "thesis"
    for text in ("first draft\n" * 500, "second draft\n" * 500):
        save(shared, path, text)
    path.chmod(0o640)
    os.utime(path, ns=(10**18, 10**18 + 7))
    save(shared, path, "all is lost\n" * 500)
    versions = kept(shared, path)
    assert [version["state"] for version in versions] == ["superseded", "superseded", "current"]
    assert [set(version) >= {"generation", "size", "mtime", "key"} for version in versions] == [True] * 3
    assert versions[0]["kept_until"] == pytest.approx(time.time() + 30 * 86400, abs=300)
    shown = shared.cli("versions", path).stdout
    assert "KEPT UNTIL" in shown and str(versions[0]["generation"]) in shown

    refused = shared.cli("restore-version", f"{path}@{versions[0]['generation']}", check=False)
    assert refused.returncode == 1 and "give another place" in refused.stderr
    shared.cli("restore-version", f"{path}@{versions[0]['generation']}", work / "one")
    assert (work / "one").read_text() == "first draft\n" * 500
    shared.cli("restore-version", f"{path}@{versions[2]['generation']}", work / "present")
    assert stat.S_IMODE((work / "present").stat().st_mode) == 0o640, "as the file is now"
    (work / "present").unlink()
    path.unlink()
    assert [version["state"] for version in kept(shared, path)] == ["superseded", "superseded", "deleted"]
    shared.cli("restore-version", f"{path}@{versions[1]['generation']}")
    st = path.stat()
    assert path.read_text() == "second draft\n" * 500
    assert stat.S_IMODE(st.st_mode) == 0o640, "as it was when that content ended"
    assert sorted(os.listdir(work)) == ["one", "thesis"]


def test_a_file_saved_as_editors_do_it(shared: Volume, work: Path) -> None:
    path, new = work / "letter", work / ".letter.new"
    save(shared, path, "dear\n" * 900)
    new.write_text("dearest\n" * 900)
    new.replace(path)
    shared.demote(path)
    versions = kept(shared, path)
    assert [version["state"] for version in versions] == ["deleted", "current"]
    assert {version["path"] for version in versions} == {str(path)}
    shared.cli("restore-version", f"{path}@{versions[0]['generation']}", work / "before")
    assert (work / "before").read_text() == "dear\n" * 900


def test_as_of_a_moment(shared: Volume, work: Path) -> None:
    path = work / "diary"
    save(shared, path, "monday\n" * 500)
    os.utime(path, ns=(10**18, 10**18 + 7))
    time.sleep(0.05)
    between = time.time()
    time.sleep(0.05)
    save(shared, path, "tuesday\n" * 500)
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(between)) + f"{between % 1:.3f}"[1:] + "Z"
    shared.cli("restore-version", f"{path}@{moment}", work / "then")
    assert (work / "then").read_text() == "monday\n" * 500
    done = shared.cli("restore-version", f"{path}@3 weeks ago", work / "before", check=False)
    assert done.returncode == 1 and "no such version" in done.stderr
    assert not (work / "before").exists()


def test_a_deleted_directory_and_what_lay_in_it(shared: Volume, work: Path) -> None:
    deep = work / "project" / "src"
    deep.mkdir(parents=True)
    for name in ("a.c", "b.c"):
        save(shared, deep / name, name * 5000)
    shutil.rmtree(work / "project")
    found = kept(shared, work / "project")
    assert [version["path"] for version in found] == [str(deep / "a.c"), str(deep / "b.c")]
    done = shared.cli("restore-version", f"{deep / 'a.c'}@{found[0]['generation']}", check=False)
    assert done.returncode == 1 and "make it, or give another place" in done.stderr
    done = shared.cli("restore-version", f"{work / 'project'}@0 seconds ago", work / "all", check=False)
    assert done.returncode == 1 and "is a directory: name a file in it" in done.stderr
    deep.mkdir(parents=True)
    shared.cli("restore-version", f"{deep / 'a.c'}@{found[0]['generation']}")
    assert (deep / "a.c").read_text() == "a.c" * 5000


def test_large_files_keep_their_holes(shared: Volume, work: Path) -> None:
    path, data = work / "large", os.urandom(9 << 20)
    with path.open("wb") as file:
        file.write(data)
        file.seek(64 << 20)
        file.write(b"end")
    shared.demote(path)
    path.unlink()
    (version,) = kept(shared, path)
    shared.cli("restore-version", f"{path}@{version['generation']}")
    assert path.stat().st_size == (64 << 20) + 3 and path.stat().st_blocks * 512 < 12 << 20
    with path.open("rb") as file:
        assert file.read(9 << 20) == data
        assert not file.read((64 << 20) - (9 << 20)).strip(b"\0")
        assert file.read() == b"end"


@pytest.mark.parametrize("wrong", ["thesis", "@5", "thesis@", "thesis@tomorrow", "thesis@2026-99-01"])
def test_what_is_not_understood(shared: Volume, work: Path, wrong: str) -> None:
    done = shared.cli("restore-version", f"{work}/{wrong}" if wrong[0] != "@" else wrong, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "2026-11-20T14:30" in done.stderr


def test_paths_of_which_nothing_is_known(shared: Volume, work: Path) -> None:
    done = shared.cli("versions", work / "never", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"tierfs: {work}/never: neither exists nor is a version of it kept: `tierfs")
    (work / "new").write_text("x")
    assert kept(shared, work / "new") == []


def test_others_see_what_they_could_have_read(shared: Volume, work: Path, user, needs_root: None) -> None:
    program = program_for(user)

    def ask(*args: object) -> subprocess.CompletedProcess:
        env = {**shared.environment, **program.env}
        return subprocess.run(
            [*program.words, *map(str, args)], user=user.pw_uid, group=user.pw_gid, extra_groups=[],
            env=env, cwd="/", capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    work.chmod(0o755)
    private, gone = work / "private", work / "gone"
    for directory in (private, gone):
        directory.mkdir()
        save(shared, directory / "open", "x" * 5000)
    private.chmod(0o700)
    for name, mode in (("open", 0o644), ("secret", 0o600), ("mine", 0o600)):
        save(shared, work / name, name * 2000)
        (work / name).chmod(mode)
        if name == "mine":
            os.chown(work / name, user.pw_uid, user.pw_gid)
        (work / name).unlink()
    (private / "open").unlink()
    shutil.rmtree(gone)
    out = Path(user.pw_dir) / "out"
    for path, allowed in (
        (work / "open", True), (work / "mine", True), (work / "secret", False), (private / "open", False),
        (gone / "open", False),
    ):  # fmt: skip
        generation = kept(shared, path)[0]["generation"]
        out.unlink(missing_ok=True)
        done = ask("restore-version", f"{path}@{generation}", out)
        assert (done.returncode == 0) is allowed and out.exists() is allowed, (path, done.stderr)
        if not allowed:
            assert "may not" in done.stderr or "denied" in done.stderr, done.stderr
    assert json.loads(ask("versions", "--json", gone).stdout or "[]") == []
    assert ask("gc", shared.mountpoint).returncode == 1
    assert not [name for name in os.listdir(user.pw_dir) if name.startswith(".tierfs-restore")]


def test_garbage_goes_when_its_time_is_over(volume: Callable[..., Volume]) -> None:
    made = volume(mount=False)
    made.mount()
    made.umount()
    made.configure(keep_versions="0s", grace="3s", quiet="100s")
    made.mount()
    path = made.mountpoint / "file"
    save(made, path, "one" * 5000)
    begun = time.monotonic()  # its time begins with the next copy, before anybody hears of that
    save(made, path, "two" * 5000)
    assert len(made.objects()) == 2
    (planned,) = made.json("gc", "--dry-run", "--json", made.mountpoint)
    assert set(planned) == {"key", "size", "reason", "may_go"} and planned["size"] == 15000
    assert "1 object, " in made.cli("gc", "--dry-run", made.mountpoint).stdout
    deadline = time.monotonic() + 60
    while len(made.objects()) == 2 and time.monotonic() < deadline:
        made.cli("gc", made.mountpoint)
    assert time.monotonic() - begun >= 3
    assert len(made.objects()) == 1
    assert path.read_text() == "two" * 5000
    assert [version["state"] for version in kept(made, path)] == ["current"]
