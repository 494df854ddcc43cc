"""A user without privileges mounts a volume of their own through fusermount3, and uses it."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from harness import LET_GO, REPO, Scratch, Volume
from users import program_for

pytestmark = pytest.mark.usefixtures("tiers")
OPEN_TO_USERS = os.path.exists("/dev/fuse") and os.stat("/dev/fuse").st_mode & 0o006 == 0o006
# What a distribution's udev does, for the processes of a namespace alone.
OPEN_DEVICE = f"""set -e
{LET_GO}
mount -t tmpfs -o mode=755 none "$1"
mknod "$1/fuse" c 10 229
chmod 666 "$1/fuse"
mount --bind "$1/fuse" /dev/fuse
shift
exec "$@"
"""
LARGE = os.urandom(9 << 20)


@pytest.fixture
def theirs(volume: Callable[..., Volume], user: pwd.struct_passwd) -> Iterator[Volume]:
    """A volume that belongs to the user."""
    if not shutil.which("fusermount3"):
        pytest.skip("fusermount3 is not installed")
    if not OPEN_TO_USERS:
        pytest.skip("/dev/fuse is closed to users here; tried in a namespace instead")
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


def test_files_that_their_owner_may_not_write_or_read(theirs: Volume) -> None:
    script = "cd mnt; mkdir d; echo 1 >d/ro; echo 2 >d/shut; chmod 444 d/ro; chmod 0 d/shut; chmod 555 d"
    as_user(theirs, script)
    assert [item["name"] for item in theirs.json("ls", "--json", theirs.mountpoint / "d")] == ["ro", "shut"]
    for name in ("d/ro", "d"):
        theirs.cli("pin", theirs.mountpoint / name)
        assert theirs.status(theirs.mountpoint / name)["pinned"]
        theirs.cli("unpin", theirs.mountpoint / name)
        assert not theirs.status(theirs.mountpoint / name)["pinned"]
    modes = as_user(theirs, "stat -c %a mnt/d mnt/d/ro mnt/d/shut").stdout.split()
    assert modes == ["555", "444", "0"]
    as_user(theirs, "chmod 755 mnt/d")



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


def test_where_the_device_is_closed_to_users(area: Scratch, needs_root: None) -> None:
    """Run the tests above in a mount namespace in which /dev/fuse is open to all, as it ordinarily is."""
    if OPEN_TO_USERS:
        pytest.skip("/dev/fuse is open to users: tried directly")
    apart = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True, timeout=10)
    if apart.returncode:  # in a chroot, for one: its root is no mount
        pytest.skip(f"no mount namespace can be made here: {apart.stderr.strip()}")
    place = area.path / "dev"
    place.mkdir()
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    argv = ["unshare", "--mount", "sh", "-c", OPEN_DEVICE, "sh", str(place), *tests]
    done = subprocess.run(argv, cwd=REPO, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
