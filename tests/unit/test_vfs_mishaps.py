"""What fails halfway through an operation leaves nothing behind: no lookup, no handle, no half change."""

import errno
import os

import pytest
from test_vfs_data import as_stub, run
from test_vfs_names import ME, USER, World, fails

from tierfs import gate, openfiles
from tierfs.fuse import protocol as p
from tierfs.fuse.operations import Operations
from tierfs.marks import SEGMENT, Mark, MarkReader, MarkWriter
from tierfs.vfs import ROOT, Caller


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.close()


def readdirplus(world, fh):
    request = p.READ_IN.pack(fh, 0, 65536, 0, 0, 0, 0)
    return Operations(world.vfs).readdirplus(bytes(p.IN) + request, ROOT)


@pytest.mark.parametrize("broken", ["lookup", "listing"])
def test_a_listing_that_fails_midway_counts_no_lookups(world, monkeypatch, broken):
    nodes = [world.make(name) for name in (b"a", b"b", b"c")]
    for node in nodes:
        world.vfs.forget(node)
    before = len(world.vfs.nodes)
    fh = world.vfs.opendir(ROOT)
    calls, lookup, listing = [], world.vfs.lookup, world.vfs.readdir

    def failing_lookup(parent, name, *, listed):
        calls.append(name)
        if len(calls) == 3:
            raise RuntimeError("the index is damaged")
        return lookup(parent, name, listed=listed)

    def failing_listing(fh, offset):
        for number, entry in enumerate(listing(fh, offset)):
            if number == 4:
                raise OSError(errno.EIO, "the disk is damaged")
            yield entry

    if broken == "lookup":
        monkeypatch.setattr(world.vfs, "lookup", failing_lookup)
    else:
        monkeypatch.setattr(world.vfs, "readdir", failing_listing)
    with pytest.raises((RuntimeError, OSError)):
        readdirplus(world, fh)
    assert len(world.vfs.nodes) == before
    monkeypatch.undo()
    assert readdirplus(world, fh)
    assert len(world.vfs.nodes) == before + 3
    world.vfs.releasedir(fh)


def test_an_open_that_fails_late_keeps_no_handle(world, monkeypatch):
    node = world.make(b"f", b"content")

    def refused(_caller, _opath):
        raise PermissionError(errno.EPERM, "an immutable file")

    monkeypatch.setattr("tierfs.vfs.changed_by", refused)
    fails(errno.EPERM, world.vfs.open, node, os.O_WRONLY | os.O_TRUNC, USER, True)
    assert len(world.vfs.files) == 0
    assert not world.gate.states.inodes


def test_a_lookup_that_fails_late_is_not_counted(world, monkeypatch):
    (world.path / "f").touch()
    monkeypatch.setattr(world.vfs, "_attr", lambda st: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        world.vfs.lookup(ROOT, b"f")
    assert len(world.vfs.nodes) == 1


@pytest.mark.parametrize("what", ["unlink", "rename", "replace", "link", "mkdir", "chmod", "xattr"])
def test_what_cannot_be_marked_does_not_happen(world, monkeypatch, what):
    """The mark log is at the end of its segment, and the disk has no room for another."""
    node = as_stub(world, b"f", 100_000)
    world.make(b"g", b"other")
    marks = world.gate.marking.marks
    while marks.position % SEGMENT < SEGMENT - 2000:
        marks.append(Mark.NAMED, 1, name=b"x" * 200)

    def full(_marks, start, position):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {name: os.lstat(world.path / name) for name in os.listdir(world.path)}
    with monkeypatch.context() as patched:
        patched.setattr(MarkWriter, "_open", full)
        fails(errno.ENOSPC, *{
            "unlink": (world.vfs.unlink, ROOT, b"f"),
            "rename": (world.vfs.rename, ROOT, b"f", ROOT, b"new"),
            "replace": (world.vfs.rename, ROOT, b"g", ROOT, b"f"),
            "link": (world.vfs.link, node, ROOT, b"new"),
            "mkdir": (world.vfs.mkdir, ROOT, b"new", 0o755, ME),
            "chmod": (lambda: world.vfs.setattr(node, mode=0o600),),
            "xattr": (world.vfs.setxattr, node, b"user.a", b"b"),
        }[what])  # fmt: skip
    after = {name: os.lstat(world.path / name) for name in os.listdir(world.path)}
    assert [(n, st.st_ino, st.st_ctime_ns) for n, st in before.items()] == [
        (n, st.st_ino, st.st_ctime_ns) for n, st in after.items()
    ]
    world.vfs.unlink(ROOT, b"f")
    marks = MarkReader(world.marks_fd, None).read(1 << 20)
    assert [mark for mark in marks if mark.kind is Mark.GONE]


def test_one_request_copies_only_so_much(world):
    """There are few threads for what takes long: whoever copies more asks again."""
    source, target = world.make(b"a"), world.make(b"b")
    os.truncate(world.path / "a", openfiles.MOST_COPIED * 3)
    fh_in, _ = world.vfs.open(source, os.O_RDONLY, ME)
    fh_out, _ = world.vfs.open(target, os.O_RDWR, ME)
    copied = run(world.vfs.copy_file_range(fh_in, 0, fh_out, 0, 1 << 62))
    assert 0 < copied <= openfiles.MOST_COPIED
    world.vfs.release(fh_in)
    world.vfs.release(fh_out)


class Passthrough:
    """A kernel that takes every file."""

    def open(self, fd):
        return 1

    def close(self, backing_id):
        pass


@pytest.mark.parametrize(("uid", "written", "kept"), [(7, True, 0), (7, False, 0o6000), (0, True, 0o6000)])
def test_set_id_given_to_a_file_that_is_being_written(world, uid, written, kept):
    """A passthrough write does not reach us: whether the bits must go is found when the writer closes."""
    world.gate.states.backing = Passthrough()
    node = world.make(b"f", b"x")
    fh, _ = world.vfs.open(node, os.O_WRONLY, Caller(uid, uid))
    world.vfs.setattr(node, mode=0o6777)
    if written:
        os.utime(world.path / "f", ns=(0, os.stat(world.path / "f").st_ctime_ns + 1))
    world.vfs.release(fh)
    assert os.stat(world.path / "f").st_mode & 0o6000 == kept


def test_set_id_bits_that_cannot_be_taken_away_leave_no_handle_and_go_with_the_next(world, monkeypatch):
    world.gate.states.backing = Passthrough()
    node = world.make(b"f", b"x")
    first, second = (world.vfs.open(node, os.O_WRONLY, Caller(7, 7))[0] for _ in range(2))
    world.vfs.setattr(node, mode=0o6777)
    os.utime(world.path / "f", ns=(0, os.stat(world.path / "f").st_ctime_ns + 1))

    def refuse(opath):
        raise OSError(errno.EIO, "the disk is damaged")

    inode = world.gate.states.inodes[os.stat(world.path / "f").st_ino]
    with monkeypatch.context() as patch:
        patch.setattr(gate, "drop_set_id", refuse)
        with pytest.raises(OSError, match="damaged"):
            world.vfs.release(first)
    assert (inode.opens, inode.writers) == (1, 1)
    world.vfs.release(second)
    assert (inode.opens, inode.writers) == (0, 0)
    assert os.stat(world.path / "f").st_mode & 0o6000 == 0


@pytest.mark.parametrize("still_read", [True, False])
def test_set_id_given_to_a_file_that_is_being_read(world, still_read):
    """Who opens it for writing then takes the bits away, too; once nobody has it open it is not registered."""
    world.gate.states.backing = Passthrough()
    node = world.make(b"f", b"x")
    reading, _ = world.vfs.open(node, os.O_RDONLY, ME)
    world.vfs.setattr(node, mode=0o6777)
    if not still_read:
        world.vfs.release(reading)
    fh, handle = world.vfs.open(node, os.O_WRONLY, Caller(7, 7))
    assert bool(handle.backing_id) == still_read
    if still_read:
        os.utime(world.path / "f", ns=(0, os.stat(world.path / "f").st_ctime_ns + 1))
        world.vfs.release(fh)
        assert os.stat(world.path / "f").st_mode & 0o6000 == 0
        world.vfs.release(reading)
    else:
        world.vfs.release(fh)
