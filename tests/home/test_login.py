"""A user's home is adopted, the user logs in to it as ever, and it is given back whole."""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Scratch, Volume, connection_of
from users import program_for

pytestmark = pytest.mark.usefixtures("tiers", "needs_root")
LARGE = os.urandom(9 << 20)


class Home(Volume):
    """A volume that is an adopted home directory."""

    def __init__(self, area: Scratch, user: pwd.struct_passwd) -> None:
        super().__init__(area.path / "login", area.connections)
        self.base.mkdir()
        self.user_name = user.pw_name
        self.mountpoint = Path(user.pw_dir)
        self.state = self.base / "unset"

    def adopt(self, *args: str) -> None:
        self.cli("adopt", *args, self.mountpoint)
        self.watch()
        self.state = Path(self.status()["state"])

    def leave(self) -> None:
        self.cli("leave", self.mountpoint)
        self._unwatch()

    def login(self, script: str) -> str:
        """What a login shell of the user says."""
        argv = ["su", "-", self.user_name, "-c", script]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done
        return done.stdout


@pytest.fixture
def home(area: Scratch, user: pwd.struct_passwd) -> Iterator[Home]:
    made = Home(area, user)
    yield made
    try:
        made.close()
    finally:
        made.base.rmdir()


def test_adopt_log_in_and_leave(home: Home, user: pwd.struct_passwd) -> None:
    (home.mountpoint / "large").write_bytes(LARGE)
    os.chown(home.mountpoint / "large", user.pw_uid, user.pw_gid)
    home.login("mkdir -p work; echo letter >work/letter; ln work/letter linked")
    home.login("echo 'export FOUND=yes' >>.profile")
    owner, inode = home.mountpoint.stat(), (home.mountpoint / "large").stat().st_ino
    home.adopt()
    found = home.mountpoint.stat()
    assert (found.st_uid, found.st_gid, found.st_mode) == (owner.st_uid, owner.st_gid, owner.st_mode)
    assert (home.mountpoint / "large").stat().st_ino == inode
    assert stat.S_IMODE(home.state.stat().st_mode) == 0o700
    home.cli("demote", "--wait", home.mountpoint)
    assert home.tier(home.mountpoint / "work" / "letter") == "stub"
    assert home.tier(home.mountpoint / "large") == "stub"
    assert home.tier(home.mountpoint / ".profile") == "resident", "a login waits for nothing"
    assert home.login("pwd; echo $FOUND; cat work/letter; id -un").split() == [
        user.pw_dir, "yes", "letter", user.pw_name
    ]  # fmt: skip
    home.login("echo more >>work/letter; cmp linked work/letter")
    home.login("printf x >new; chmod 600 new; mkdir .cache; mkfifo pipe")
    home.cli("demote", "--wait", home.mountpoint)
    home.leave()
    given_back(home, user)


def given_back(home: Home, user: pwd.struct_passwd) -> None:
    """A plain directory, nothing of ours in it or beside it."""
    assert connection_of(home.mountpoint) is None
    assert not home.pids()
    assert home.login("cat work/letter linked") == "letter\nmore\n" * 2
    assert (home.mountpoint / "large").read_bytes() == LARGE
    new = (home.mountpoint / "new").stat()
    assert (new.st_uid, stat.S_IMODE(new.st_mode)) == (user.pw_uid, 0o600)
    for at, directories, names in os.walk(home.mountpoint):
        for name in directories + names:
            path = os.path.join(at, name)
            assert not [item for item in os.listxattr(path, follow_symlinks=False) if "tierfs" in item]
    assert not [path.name for path in home.mountpoint.parent.iterdir() if path.name.startswith(".tierfs")]


def test_the_user_gives_orders_about_own_files_only(home: Home, user: pwd.struct_passwd) -> None:
    home.login("echo mine >mine")
    (home.mountpoint / "roots").write_text("not theirs")
    (home.mountpoint / "roots").chmod(0o600)
    program = program_for(user)
    home.adopt()


    def order(*args: str) -> subprocess.CompletedProcess:
        ids = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        env = {**home.environment, **program.env}
        return subprocess.run([*program.words, *args], env=env, cwd="/", capture_output=True, text=True, **ids)

    assert order("demote", "--wait", f"{home.mountpoint}/mine").returncode == 0
    assert home.tier(home.mountpoint / "mine") == "stub"
    refused = order("demote", "--wait", f"{home.mountpoint}/roots")
    assert refused.returncode == 1
    assert home.tier(home.mountpoint / "roots") == "resident"
    assert order("pin", f"{home.mountpoint}/roots").returncode == 1
    home.leave()


def test_adopt_refuses_what_is_in_the_way(home: Home, area: Scratch) -> None:
    home.adopt()
    again = home.cli("adopt", home.mountpoint, check=False)
    assert again.returncode == 1
    assert len(again.stderr.strip().splitlines()) == 1
    above = home.cli("adopt", home.mountpoint.parent, check=False)
    assert above.returncode == 1
    assert "mountpoint" in above.stderr
    home.leave()
    missing = home.cli("adopt", area.path / "absent", check=False)
    assert missing.returncode == 1
