"""A file that the compiled form has made and cannot keep is removed again, and one that it can keep is kept."""

import contextlib
import errno
import os
import resource
import subprocess

import pytest
from hotside import Side

from tierfs.fuse import protocol as p
from tierfs.vfs import ROOT


def created(side, name, flags=os.O_RDWR | os.O_EXCL):
    """Make it: (errno, whether it was left to Python)."""
    asked, table = [], side.session._table
    run = table[p.Op.CREATE]
    table[p.Op.CREATE] = lambda *request: (asked.append(request), run(*request))[1]
    number, _ = side.ask(p.Op.CREATE, ROOT, p.CREATE_IN.pack(flags, 0o100644, 0, 0) + name + b"\0")
    table[p.Op.CREATE] = run
    return number, bool(asked)


@contextlib.contextmanager
def no_descriptors():
    """Nothing more can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_a_descriptor_for_it_nothing_is_left_behind(tmp_path, monkeypatch, built):
    (tmp_path / "tree").mkdir()
    side = Side(tmp_path / "side", "compiled", monkeypatch, built)
    with no_descriptors():
        assert created(side, b"file") == (errno.EMFILE, True)
    assert os.listdir(side.path) == []
    assert created(side, b"file") == (0, False)
    side.close()


@pytest.fixture
def overlaid(tmp_path, needs_root):
    """A directory of overlayfs, whose layers are of two filesystems and which has file handles."""
    upper, lower, place = (tmp_path / name for name in ("upper", "lower", "tree"))
    with contextlib.ExitStack() as stack:
        for each in (upper, lower, place):
            each.mkdir()
        for each in (upper, lower):
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", each], check=True)
            stack.callback(subprocess.run, ["umount", "-l", each], check=True)
        for each in ("files", "work"):
            (upper / each).mkdir()
        layers = f"lowerdir={lower},upperdir={upper}/files,workdir={upper}/work"
        options = f"{layers},index=on,nfs_export=on,xino=off"
        if subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, place], check=False).returncode:
            pytest.skip("no overlayfs with file handles here")
        stack.callback(subprocess.run, ["umount", "-l", place], check=True)
        yield place


def test_a_file_whose_device_is_not_its_directorys_is_made(tmp_path, monkeypatch, built, overlaid):
    side = Side(tmp_path / "side", "compiled", monkeypatch, built, tree=overlaid)
    assert created(side, b"file") == (0, False)
    assert (overlaid / "file").stat().st_dev != overlaid.stat().st_dev
    side.close()
