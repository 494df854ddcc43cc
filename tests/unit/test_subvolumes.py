"""A subvolume in the tree (btrfs) has inode numbers of its own: nothing in it is a file of the volume."""

from __future__ import annotations

import errno
import os
import subprocess
import threading

import pytest
from tierfsd import checking
from tierfsd.credentials import Peer
from tierfsd.pinned import _stubs_beneath
from tierfsd.reach import Reach
from tiering import Job, Volume

from tierfs import adoption, locate
from tierfs.errors import VolumeError
from tierfs.survey import Survey

pytestmark = pytest.mark.usefixtures("needs_root")


@pytest.fixture
def mount():
    """Mounts another filesystem at a path: to what looks at device numbers it is as a subvolume."""
    places = []

    def at(path):
        os.mkdir(path)
        subprocess.run(["mount", "-t", "tmpfs", "tierfs-test", path], check=True)
        places.append(path)
        return path

    yield at
    for place in reversed(places):
        subprocess.run(["umount", place], check=True)


@pytest.fixture
def volume(tmp_path, mount):
    made = Volume(tmp_path)
    made.server.create(made.path("own"), b"own" * 1000)
    inner = mount(made.path("sub"))
    os.mkdir(os.path.join(inner, "dir"))
    for name in ("a", "dir/b"):
        with open(os.path.join(inner, name), "wb") as file:
            file.write(b"others" * 1000)
    yield made
    made.stop()


def test_the_look_through_the_tree_leaves_it_out(volume):
    assert Survey(volume.tier, lambda guesses: None, threading.Event()).run()
    totals = volume.index.totals()
    assert totals.files == 1
    assert volume.index.get_dir(os.stat(volume.path("sub")).st_ino) is None


def test_an_order_leaves_it_out(volume):
    reach, me = Reach(volume.tree.rootfd, volume.tree.handle_of), Peer(0, 0, ())
    targets, stayed = reach.targets(me, [b""], os.O_WRONLY, threading.Event())
    assert [target.path for target in targets] == [b"own"] and stayed == []
    for path in (b"sub", b"sub/a", b"sub/dir/b"):
        targets, stayed = reach.targets(me, [path], os.O_WRONLY, threading.Event())
        assert not len(targets) and stayed[0].reason == os.strerror(errno.EXDEV)


def test_a_check_leaves_it_out(volume):
    Survey(volume.tier, lambda guesses: None, threading.Event()).run()
    findings = checking.check(volume.tier, True, None, Job())
    assert findings.files == 1 and findings.findings == []


def test_a_pin_brings_nothing_into_it(volume):
    os.setxattr(volume.path("sub/a"), volume.tree.stub_name, b"\1")
    assert list(_stubs_beneath(volume.tier, b"")) == []


def test_a_directory_with_one_in_it_is_not_adopted(tmp_path, mount, monkeypatch):
    """Through the mount nobody would come by what is in it."""
    outer = mount(str(tmp_path / "disk"))
    home = os.path.join(outer, "home")
    os.makedirs(os.path.join(home, "plain", "deep"))
    monkeypatch.setattr(locate, "read_mounts", list)
    adoption.check_directory(home, os.path.join(outer, "state"))
    inner = mount(os.path.join(home, "plain", "deep", "inner"))
    with pytest.raises(VolumeError, match=f"subvolume of its own.*{inner}"):
        adoption.check_directory(home, os.path.join(outer, "state"))
