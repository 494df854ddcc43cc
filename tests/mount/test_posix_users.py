"""Several users of one mount: owners, permissions and groups are the filesystem's."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ALICE, BOB, STAFF = 12345, 12346, 54321
Settle = Callable[..., None]
pytestmark = pytest.mark.usefixtures("needs_root")


def shell(script: str, cwd: Path, uid: int, groups: tuple[int, ...] = ()) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["sh", "-c", script], cwd=cwd, user=uid, group=uid, extra_groups=groups, capture_output=True, text=True
    )


@pytest.fixture
def common(work: Path) -> Path:
    work.chmod(0o1777)
    return work


def test_files_belong_to_who_makes_them(common: Path) -> None:
    assert shell("echo a >f; mkdir d; ln -s f l; mkfifo p", common, ALICE).returncode == 0
    for name in "fdlp":
        found = (common / name).lstat()
        assert (found.st_uid, found.st_gid) == (ALICE, ALICE)


def test_modes_hold_for_others(common: Path, settle: Settle) -> None:
    assert shell("umask 077; echo secret >f; echo open >g; chmod 644 g", common, ALICE).returncode == 0
    settle(common / "f", common / "g")
    refused = shell("cat f", common, BOB)
    assert refused.returncode
    assert "denied" in refused.stderr
    assert shell("cat g", common, BOB).stdout == "open\n"
    assert shell("echo more >>g", common, BOB).returncode
    assert shell("cat f", common, ALICE).stdout == "secret\n"
    assert shell("chmod 777 f", common, BOB).returncode
    assert shell("touch -d 2001-01-01 g", common, BOB).returncode
    assert shell("mv f mine", common, BOB).returncode, "the sticky bit"
    assert shell("rm -f f", common, BOB).returncode, "the sticky bit"


def test_groups(common: Path, settle: Settle) -> None:
    path = common / "f"
    path.write_text("for staff\n")
    os.chown(path, 0, STAFF)
    path.chmod(0o640)
    settle(path)
    assert shell("cat f", common, BOB).returncode
    assert shell("cat f", common, BOB, (STAFF,)).stdout == "for staff\n"


def test_new_file_in_a_setgid_directory_of_ones_group(common: Path) -> None:
    directory = common / "d"
    directory.mkdir()
    os.chown(directory, ALICE, STAFF)
    directory.chmod(0o2775)
    assert shell("touch d/f", common, BOB, (STAFF,)).returncode == 0
    found = (directory / "f").stat()
    assert (found.st_uid, found.st_gid) == (BOB, STAFF)
    assert shell("chmod g+s d/f", common, BOB).returncode == 0
    assert not (directory / "f").stat().st_mode & 0o2000, "not a member: the bit is dropped"


def test_only_the_owner_and_root_change_attributes(common: Path) -> None:
    assert shell("echo x >f; setfattr -n user.a -v b f", common, ALICE).returncode == 0
    assert shell("setfattr -n user.a -v c f", common, BOB).returncode
    assert shell("chown 12346 f", common, ALICE).returncode
    assert shell("setfacl -m u:12346:rw f", common, ALICE).returncode == 0
    assert shell("echo y >>f; cat f", common, BOB).stdout == "x\ny\n"
