"""The command as other users may run it: an environment's interpreter often lies in a private directory."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import sysconfig
from typing import NamedTuple

import pytest
from harness import REPO

_RUN = "import sys; sys.argv[0] = 'tierfs'; from tierfs.cli import main; main()"


class Program(NamedTuple):
    """How a user runs `tierfs`: the words before its arguments, and what the environment needs."""

    words: tuple[str, ...]
    env: dict[str, str]


def program_for(user: pwd.struct_passwd) -> Program:
    """Find an interpreter of our version that this user may run; skips the test where there is none, or where
    the user does not reach these sources."""
    look, ids = ["test", "-r", REPO / "tierfs" / "cli.py"], {"user": user.pw_uid, "group": user.pw_gid}
    if subprocess.run(look, **ids, extra_groups=[], cwd="/").returncode:
        pytest.skip("a directory above these sources is closed to other users: chmod o+x opens it")
    for candidate in (sys.executable, f"/usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}"):
        try:
            subprocess.run([candidate, "-c", ""], **ids, extra_groups=[], check=True, cwd="/")
        except (OSError, subprocess.CalledProcessError):
            continue
        path = os.pathsep.join((str(REPO), str(REPO / "daemon"), sysconfig.get_paths()["purelib"]))
        env = {"HOME": user.pw_dir, "USER": user.pw_name, "XDG_STATE_HOME": f"{user.pw_dir}/.state"}
        env["XDG_RUNTIME_DIR"] = f"{user.pw_dir}/.run"
        return Program((candidate, "-c", _RUN), {**env, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"})
    pytest.skip("no interpreter of this version that other users may run")
