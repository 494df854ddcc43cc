"""A user without privileges mounts a volume of their own through fusermount3, and uses it."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest
from harness import Volume
from users import program_for

pytestmark = pytest.mark.usefixtures("tiers")
LARGE = os.urandom(9 << 20)


@pytest.fixture
def theirs(volume: Callable[..., Volume], user: pwd.struct_passwd) -> Iterator[Volume]:
    """A volume that belongs to the user."""
    if not shutil.which("fusermount3"):
        pytest.skip("fusermount3 is not installed")
    program = program_for(user)
    made = volume(mount=False, env=program.env, program=program.words, user=user.pw_uid, group=user.pw_gid)
    os.chown(made.base, user.pw_uid, user.pw_gid)
    made.mountpoint.mkdir()
    os.chown(made.mountpoint, user.pw_uid, user.pw_gid)
    made.mount()
    yield made


def as_user(mounted: Volume, script: str, check: bool = True) -> subprocess.CompletedProcess:
    more = {**mounted.identity, "capture_output": True, "text": True, "timeout": 60}
    return subprocess.run(["sh", "-c", script], cwd=mounted.base, check=check, **more)


def test_work_demote_and_read(theirs: Volume) -> None:
    (theirs.base / "large").write_bytes(LARGE)
    (theirs.base / "large").chmod(0o644)
    as_user(theirs, "cd mnt; mkdir d; echo small >d/small; chmod 444 d/small; cp ../large large; ln large link")
    theirs.demote()
    script = "getfattr --only-values -n user.tierfs.tier mnt/{}"
    for name in ("d/small", "large", "link"):
        assert as_user(theirs, script.format(name)).stdout == "stub", name
    tree = theirs.state / "tree"
    assert sum(path.lstat().st_blocks for path in tree.rglob("*") if path.is_file()) == 0
    assert as_user(theirs, "cat mnt/d/small").stdout == "small\n"
    as_user(theirs, "cmp mnt/large large")
    as_user(theirs, "printf new | dd of=mnt/large bs=1 seek=1000 conv=notrunc 2>/dev/null")
    as_user(theirs, "stat -c %a mnt/d/small | grep -qx 444")
    theirs.umount()
    theirs.mount()
    expected = LARGE[:1000] + b"new" + LARGE[1003:]
    (theirs.base / "large").write_bytes(expected)
    as_user(theirs, "cmp mnt/large large")


def test_others_see_nothing(theirs: Volume) -> None:
    as_user(theirs, "echo private >mnt/f")
    done = subprocess.run(
        ["cat", theirs.mountpoint / "f"], user=12345, group=12345, extra_groups=[], capture_output=True
    )
    assert done.returncode
    assert b"denied" in done.stderr
    assert os.stat(theirs.state).st_mode & 0o077 == 0


def test_everything_ends_with_umount(theirs: Volume) -> None:
    assert theirs.pids()
    theirs.umount()
    assert not theirs.pids()
    assert as_user(theirs, "ls mnt").stdout == ""
