"""What `make setup` asks the system for, and what it does without. The system's commands are stood in for."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Machine:
    """`known`: the packages that apt has; `library`: whether there is a libfuse 2 already."""

    def __init__(self, path: Path, known: set[str], library: bool = False, missing: str = "") -> None:
        self.path, self.asked = path, path / "asked"
        (path / "bin").mkdir()
        (path / "venv" / "bin").mkdir(parents=True)
        self.asked.touch()
        known_one = f"case ' {' '.join(sorted(known))} ' in *\" $package \"*)"
        shown = f'shift; for package; do {known_one} echo "Package: $package";; esac; done'
        asked = f'echo "$*" >> {self.asked}; [ $1 = update ] || {known_one} ;; *) exit 100;; esac'
        there = f'[[ -n "{missing}" && "${{@: -1}}" = {missing}* ]] || echo ok installed'
        self._command("bin/dpkg-query", there)
        self._command("bin/apt-cache", shown)
        self._command("bin/apt-get", f"package=${{@: -1}}; {asked}")
        self._command("bin/sudo", 'exec "$@"')
        self._command("python", f"case \"$*\" in *find_library*) exit {int(not library)};; esac")
        self._command("venv/bin/python", f'echo "$*" >> {path}/done')

    def _command(self, name: str, script: str) -> None:
        file = self.path / name
        file.write_text(f"#!/bin/bash\n{script}\n")
        file.chmod(0o755)

    def set_up(self) -> subprocess.CompletedProcess[str]:
        path = f"PATH={self.path}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        given = (f"VENV={self.path}/venv", f"PYTHON={self.path}/python")
        command = ["env", path, "make", "-C", ROOT, "setup", *given]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    def installed(self) -> list[str]:
        orders = map(shlex.split, self.asked.read_text().splitlines())
        return [order[-1] for order in orders if order[0] == "install"]


@pytest.mark.parametrize("package", ["libfuse2", "libfuse2t64"])
def test_libfuse_2_is_installed_by_the_name_that_it_has(tmp_path, package):
    machine = Machine(tmp_path, {package})
    done = machine.set_up()
    assert done.returncode == 0, done.stderr
    assert machine.installed() == [package]
    assert "libfuse" not in done.stderr


def test_a_system_that_has_no_libfuse_2_any_more_is_set_up(tmp_path):
    machine = Machine(tmp_path, set())
    done = machine.set_up()
    assert done.returncode == 0, done.stderr
    assert machine.installed() == []
    assert "no libfuse 2 to be had: --binding fusepy cannot be used" in done.stderr
    assert (tmp_path / "venv" / ".installed").exists()


def test_where_all_is_there_nothing_is_asked_of_apt(tmp_path):
    machine = Machine(tmp_path, {"libfuse2"}, library=True)
    assert machine.set_up().returncode == 0
    assert machine.asked.read_text() == ""


def test_what_cannot_be_done_without_is_named(tmp_path):
    done = Machine(tmp_path, set(), library=True, missing="strace").set_up()
    assert done.returncode != 0
    assert "make setup: strace cannot be installed: install it by hand" in done.stderr


def test_what_is_set_up_is_compiled_for_those_who_may_not_write_there(tmp_path):
    assert Machine(tmp_path, set(), library=True).set_up().returncode == 0
    assert "-m compileall -q tierfs daemon" in (tmp_path / "done").read_text().splitlines()[-1]


def test_no_process_that_tests_start_compiles_the_sources_anew():
    command = [sys.executable, "-v", "-c", "import tierfs.index, tierfsd.mover"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stderr
    for name in ("tierfs/index", "daemon/tierfsd/mover"):
        assert f"matches {ROOT}/{name}.py" in said
