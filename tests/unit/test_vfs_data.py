"""Data, directories and extended attributes through the vfs. No FUSE."""

import errno
import fcntl
import itertools
import os
import stat
import struct
import subprocess
import sys

import pytest
from test_gate import FakeBacking
from test_vfs_names import ME, USER, World, fails, needs_root

from tierfs import syscalls
from tierfs.marks import Mark
from tierfs.model import Stub
from tierfs.openfiles import seek_extents
from tierfs.vfs import ROOT, Vfs
from tierfs.waits import Blocked, Slow


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.close()


def run(result):
    """What the bindings do with an answer that takes long."""
    return result.run() if isinstance(result, Slow) else result


def listed(world, node=ROOT):
    fh = world.vfs.opendir(node)
    try:
        return [name for _, name, _, _ in world.vfs.readdir(fh, 0)]
    finally:
        world.vfs.releasedir(fh)


# --- data ------------------------------------------------------------------------------------------------


def test_read_write_append_and_sync(world):
    _, _, fh, handle = world.vfs.create(ROOT, b"f", os.O_RDWR | os.O_APPEND, 0o644, ME)
    assert world.vfs.write(fh, 0, b"hello") == 5
    assert world.vfs.write(fh, 5, memoryview(b" world")) == 6
    assert world.vfs.read(fh, 3, 100) == b"lo world"
    assert world.vfs.read(fh, 100, 5) == b""
    world.vfs.flush(fh)
    assert run(world.vfs.fsync(fh, True)) is None
    assert run(world.vfs.fsync(fh, False)) is None
    assert handle.writable
    world.vfs.release(fh)
    fails(errno.EBADF, world.vfs.read, fh, 0, 1)
    assert [m.a for m in world.entries(Mark.CLOSED)] == [11]


@pytest.mark.parametrize(("flag", "name"), [(os.O_SYNC, "fsync"), (os.O_DSYNC, "fdatasync")])
def test_what_is_written_synchronously_keeps_nobody_waiting(world, monkeypatch, flag, name):
    """The disk's flush is not the write's, but a slow call of its own, before which nothing is answered."""
    synced = []
    monkeypatch.setattr(os, name, lambda fd: synced.append((world.path / "f").read_bytes()))
    node, _, fh, made = world.vfs.create(ROOT, b"f", os.O_RDWR | flag, 0o644, ME)
    again, opened = world.vfs.open(node, os.O_WRONLY | flag, ME)
    for handle in (made, opened):
        assert not fcntl.fcntl(handle.fd, fcntl.F_GETFL) & os.O_DSYNC
    for number, content in ((fh, b"made"), (again, b"again")):
        answer = world.vfs.write(number, 0, content, flags=os.O_WRONLY | flag)
        assert isinstance(answer, Slow) and not synced
        assert answer.run() == len(content) and synced.pop().startswith(content)
    assert world.vfs.write(fh, 0, b"later", flags=os.O_RDWR) == 5
    world.vfs.release(fh)
    world.vfs.release(again)


def test_what_the_mode_forbids_an_open_descriptor_allows(world):
    node, _, fh, _ = world.vfs.create(ROOT, b"f", os.O_RDWR, 0o444, ME)
    world.vfs.write(fh, 0, b"content")
    assert world.vfs.setattr(node, fh, size=3).st_size == 3
    assert world.vfs.setattr(node, fh, size=0).st_size == 0
    world.vfs.setattr(node, mode=0)
    world.vfs.write(fh, 0, b"x")
    assert run(world.vfs.fsync(fh, False)) is None
    world.vfs.release(fh)
    assert world.vfs.getattr(node).st_size == 1
    assert world.vfs.getxattr(node, b"user.tierfs.tier") == b"resident"
    assert world.vfs.setattr(node, mode=0o200).st_mode & 0o777 == 0o200
    fh, _ = world.vfs.open(node, os.O_WRONLY, ME)
    world.vfs.write(fh, 1, b"y")
    world.vfs.release(fh)
    assert stat.S_IMODE(world.vfs.getattr(node).st_mode) == 0o200


def test_open_of_what_is_no_regular_file(world):
    directory, _ = world.vfs.mkdir(ROOT, b"d", 0o755, ME)
    fifo, _ = world.vfs.mknod(ROOT, b"p", stat.S_IFIFO | 0o600, 0, ME)
    fails(errno.EISDIR, world.vfs.open, directory, os.O_RDONLY, ME)
    fails(errno.ENXIO, world.vfs.open, fifo, os.O_RDONLY, ME)
    fails(errno.ESTALE, world.vfs.open, 999, os.O_RDONLY, ME)


@pytest.mark.parametrize("length", [5000, 3 << 20])
def test_fallocate_modes(world, length):
    node, _, fh, _ = world.vfs.create(ROOT, b"f", os.O_RDWR, 0o644, ME)
    assert run(world.vfs.fallocate(fh, 0, 0, length)) is None
    assert world.vfs.getattr(node).st_size == length
    world.vfs.write(fh, 0, b"x" * 8192)
    run(world.vfs.fallocate(fh, syscalls.FALLOC_KEEP_SIZE | syscalls.FALLOC_PUNCH_HOLE, 0, 4096))
    assert world.vfs.read(fh, 4095, 2) == b"\0x"
    run(world.vfs.fallocate(fh, syscalls.FALLOC_KEEP_SIZE, 0, 2 * length))
    assert world.vfs.getattr(node).st_size == max(length, 8192)
    fails(errno.EOPNOTSUPP, world.vfs.fallocate, fh, 0x1000, 0, 10)
    world.vfs.release(fh)


@pytest.mark.parametrize("length", [1000, 3 << 20])
def test_copy_file_range(world, length):
    content = os.urandom(length)
    source = world.make(b"a", content)
    fh_in, _ = world.vfs.open(source, os.O_RDONLY, ME)
    _, _, fh_out, _ = world.vfs.create(ROOT, b"b", os.O_RDWR, 0o644, ME)
    copied = 0
    while copied < length:
        count = run(world.vfs.copy_file_range(fh_in, copied, fh_out, copied, length - copied))
        assert count
        copied += count
    assert (world.path / "b").read_bytes() == content
    fails(errno.EINVAL, world.vfs.copy_file_range, fh_in, 0, fh_out, 0, 1, 1)
    world.vfs.release(fh_in)
    world.vfs.release(fh_out)


def test_all_of_a_small_file_is_copied_without_a_thread(world):
    source = world.make(b"a", b"content")
    fh_in, _ = world.vfs.open(source, os.O_RDONLY, ME)
    _, _, fh_out, _ = world.vfs.create(ROOT, b"b", os.O_RDWR, 0o644, ME)
    for offset, copied in ((0, 7), (5, 2), (7, 0), (1 << 40, 0)):
        assert world.vfs.copy_file_range(fh_in, offset, fh_out, 0, 1 << 62) == copied
    assert (world.path / "b").read_bytes() == b"ntntent"
    world.vfs.release(fh_in)
    world.vfs.release(fh_out)


def test_seek_in_a_resident_sparse_file(world):
    node = world.make(b"f")
    world.vfs.setattr(node, size=1 << 20)
    fh, _ = world.vfs.open(node, os.O_RDWR, ME)
    world.vfs.write(fh, 524288, b"x" * 4096)
    assert world.vfs.lseek(fh, 0, os.SEEK_DATA) == 524288
    assert world.vfs.lseek(fh, 524288, os.SEEK_HOLE) == 528384
    fails(errno.ENXIO, world.vfs.lseek, fh, 528384, os.SEEK_DATA)
    fails(errno.EINVAL, world.vfs.lseek, fh, 0, os.SEEK_SET)
    world.vfs.release(fh)


def test_seek_by_recorded_extents_agrees_with_the_filesystem(tmp_path):
    fd = os.open(tmp_path / "s", os.O_RDWR | os.O_CREAT)
    size = 10 * 65536 + 17
    os.ftruncate(fd, size)
    extents = [(65536, 2 * 65536), (4 * 65536, 6 * 65536), (9 * 65536, size)]
    for start, end in extents:
        os.pwrite(fd, b"x" * (end - start), start)
    for offset in sorted({0, 1, size - 1, size, size + 5, *(n * 32768 for n in range(22))}):
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            try:
                real = os.lseek(fd, offset, whence)
            except OSError as error:
                fails(error.errno, seek_extents, extents, size, offset, whence)
            else:
                assert seek_extents(extents, size, offset, whence) == real
    fails(errno.ENXIO, seek_extents, [], 100, 0, os.SEEK_DATA)
    assert seek_extents([], 100, 5, os.SEEK_HOLE) == 5
    assert seek_extents([(0, 50), (50, 100)], 100, 5, os.SEEK_HOLE) == 100
    os.close(fd)


def as_stub(world, name, size):
    """Make a stub as the mover leaves it: no blocks, and the attribute."""
    node = world.make(name, b"x" * size)
    fd = os.open(world.path / os.fsdecode(name), os.O_RDWR)
    try:
        world.tree.write_stub(fd, Stub(b"f" * 16, 1, b"t" * 8, b"d" * 32))
        world.tree.punch(fd, os.fstat(fd))
    finally:
        os.close(fd)
    return node


def test_what_needs_a_stubs_content_is_blocked_and_changes_nothing(world):
    node = as_stub(world, b"f", 100_000)
    other = world.make(b"g", b"y" * 10)
    before = os.stat(world.path / "f")
    for call in (
        lambda: world.vfs.open(node, os.O_RDONLY, ME),
        lambda: world.vfs.open(node, os.O_RDWR, ME),
        lambda: world.vfs.setattr(node, size=5, mode=0o600),
    ):
        with pytest.raises(Blocked):
            call()
    after = os.stat(world.path / "f")
    assert (after.st_size, after.st_mode, after.st_ctime_ns) == (100_000, before.st_mode, before.st_ctime_ns)
    assert world.vfs.getxattr(node, b"user.tierfs.tier") == b"stub"
    assert world.vfs.getxattr(other, b"user.tierfs.tier") == b"resident"
    assert world.vfs.getxattr(node, b"user.tierfs.digest").startswith(b"sha256:6464")


def test_a_stub_is_renamed_linked_and_removed_without_its_content(world):
    node = as_stub(world, b"f", 100_000)
    world.vfs.rename(ROOT, b"f", ROOT, b"g")
    assert world.vfs.link(node, ROOT, b"h")[1].st_nlink == 2
    assert world.vfs.setattr(node, mode=0o600).st_size == 100_000
    world.vfs.unlink(ROOT, b"g")
    world.vfs.unlink(ROOT, b"h")
    assert len(world.entries(Mark.GONE)) == 1


def test_truncating_a_stub_on_open_fetches_nothing(world):
    node = as_stub(world, b"f", 100_000)
    fh, _ = world.vfs.open(node, os.O_WRONLY | os.O_TRUNC, ME)
    assert world.vfs.getattr(node, fh).st_size == 0
    world.vfs.release(fh)
    assert world.vfs.getxattr(node, b"user.tierfs.tier") == b"resident"


# --- directories -----------------------------------------------------------------------------------------


def test_listing_of_names_and_kinds(world):
    names = [b"plain", b"new\nline", b"bad\xff", b"n" * 255]
    nodes = {name: world.make(name) for name in names}
    world.vfs.mkdir(ROOT, b"d", 0o755, ME)
    fh = world.vfs.opendir(ROOT)
    entries = {name: (ino, kind) for _, name, ino, kind in world.vfs.readdir(fh, 0)}
    assert set(entries) == {*names, b"d", b".", b".."}
    assert entries[b"d"][1] == stat.S_IFDIR >> 12
    for name in names:
        assert entries[name][0] == world.vfs.getattr(nodes[name]).st_ino
    assert run(world.vfs.fsyncdir(fh, False)) is None
    world.vfs.releasedir(fh)
    fails(errno.EBADF, world.vfs.readdir, fh, 0)
    fails(errno.ESTALE, world.vfs.opendir, nodes[b"plain"])


@pytest.fixture(params=["opened", "not opened"])
def reading(world, request):
    """How a directory is read: from an offset on."""
    opened = []

    def begin(node):
        if request.param == "not opened":
            return lambda offset: world.vfs.entries(node, offset)
        opened.append(world.vfs.opendir(node))
        return lambda offset, fh=opened[-1]: world.vfs.readdir(fh, offset)

    yield begin
    for fh in opened:
        world.vfs.releasedir(fh)


def test_offsets_stay_good_while_the_directory_changes(world, reading):
    names = {b"%05d" % number + b"x" * 100 for number in range(2500)}  # several blocks
    for name in names:
        os.close(os.open(os.fsencode(world.path) + b"/" + name, os.O_CREAT | os.O_WRONLY))
    read = reading(ROOT)
    seen, offset = [], 0
    while True:
        part = [entry for entry, _ in zip(read(offset), range(97))]
        if not part:
            break
        for _, name, _, _ in part:
            if name in names:
                os.unlink(os.fsencode(world.path) + b"/" + name)  # as rm -r does
        seen += [name for _, name, _, _ in part]
        offset = part[-1][0]
    assert sorted(seen) == sorted([*names, b".", b".."])
    assert len(list(read(0))) == 2, "offset 0 reads anew"


def test_seeking_back_gives_the_same_entries(world, reading):
    for number in range(50):
        world.make(b"f%d" % number)
    read = reading(ROOT)
    entries = list(read(0))
    for number, entry in enumerate(entries):
        assert list(read(entry[0])) == entries[number + 1 :]


def test_several_read_one_directory_in_turn(world, reading):
    for number in range(1500):  # more than a block
        os.close(os.open(os.path.join(world.path, f"{number:060}"), os.O_CREAT | os.O_WRONLY))
    node, _ = world.vfs.mkdir(ROOT, b"below", 0o755, ME)
    read, other = reading(ROOT), reading(node)
    offsets, seen = [0, 0, 0], [[], [], []]
    for turn in itertools.cycle((0, 1, 1, 2)):
        part = list(itertools.islice(read(offsets[turn]), 40 + turn))
        assert len(list(other(0))) == 2
        if not part:
            break
        seen[turn] += [name for _, name, _, _ in part]
        offsets[turn] = part[-1][0]
    seen[0] += [name for _, name, _, _ in read(offsets[0])]
    names = [os.fsencode(name) for name in (*os.listdir(world.path), ".", "..")]
    assert sorted(seen[0]) == sorted(seen[1]) == sorted(names)
    assert set(seen[2]) < set(seen[0])


def test_the_listing_of_a_directory_without_entries(world):
    node, _ = world.vfs.mkdir(ROOT, b"d", 0o755, ME)
    assert sorted(listed(world, node)) == [b".", b".."]
    fh = world.vfs.opendir(node)
    world.vfs.rmdir(ROOT, b"d")
    assert list(world.vfs.readdir(fh, 0)) == []
    world.vfs.releasedir(fh)


def test_a_directory_that_nobody_has_opened_is_synced(world, monkeypatch):
    node, _ = world.vfs.mkdir(ROOT, b"d", 0o755, ME)
    synced = []
    for how in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, how, lambda fd, how=how: synced.append((how, os.fstat(fd).st_ino)))
    for which in (node, ROOT):
        run(world.vfs.syncdir(which, False))
        run(world.vfs.syncdir(which, True))
    inos = [os.stat(path).st_ino for path in (os.path.join(world.path, "d"), world.path)]
    assert synced == [(how, ino) for ino in inos for how in ("fsync", "fdatasync")]
    world.vfs.rmdir(ROOT, b"d")
    run(world.vfs.syncdir(node, False))  # it has no entries that could be lost
    fails(errno.ENOENT, world.vfs.entries, node, 0)


def test_a_directory_that_may_be_read_only_now_is_read(world, monkeypatch):
    os.makedirs(os.path.join(world.path, "d", "below"))
    node, _ = world.vfs.lookup(ROOT, b"d")
    there, forbidden = os.open, True

    def opened(path, flags, **more):
        if forbidden and flags & os.O_DIRECTORY and not flags & os.O_PATH:
            raise PermissionError(errno.EACCES, "no")
        return there(path, flags, **more)

    monkeypatch.setattr(os, "open", opened)
    below, _ = world.vfs.lookup(node, b"below")
    fails(errno.EACCES, world.vfs.entries, node, 0)
    forbidden = False
    assert sorted(name for _, name, _, _ in world.vfs.entries(node, 0)) == [b".", b"..", b"below"]
    assert world.vfs.lookup(node, b"below")[0] == below


# --- extended attributes ---------------------------------------------------------------------------------


def test_user_attributes_pass_through(world):
    node = world.make(b"f")
    world.vfs.setxattr(node, b"user.a\xff", b"value\0")
    assert world.vfs.getxattr(node, b"user.a\xff") == b"value\0"
    assert world.vfs.listxattr(node) == b"user.a\xff\0"
    fails(errno.EEXIST, world.vfs.setxattr, node, b"user.a\xff", b"", os.XATTR_CREATE)
    fails(errno.ENODATA, world.vfs.setxattr, node, b"user.b", b"", os.XATTR_REPLACE)
    world.vfs.removexattr(node, b"user.a\xff")
    fails(errno.ENODATA, world.vfs.getxattr, node, b"user.a\xff")
    assert world.vfs.listxattr(node) == b""


def test_internal_attributes_are_invisible_and_refused(world):
    node = as_stub(world, b"f", 100)
    directory, _ = world.vfs.mkdir(ROOT, b"d", 0o755, ME)
    world.vfs.setxattr(directory, b"user.tierfs.pin", b"1")
    for number in (node, directory):
        assert b"tierfs" not in world.vfs.listxattr(number)
        for name in (os.fsencode(world.tree.stub_name), os.fsencode(world.tree.pin_name), b"trusted.tierfs_x"):
            fails(errno.ENODATA, world.vfs.getxattr, number, name)
            fails(errno.EPERM, world.vfs.setxattr, number, name, b"1")
            fails(errno.EPERM, world.vfs.removexattr, number, name)


def test_virtual_attributes(world):
    node = world.make(b"f", b"x")
    directory, _ = world.vfs.mkdir(ROOT, b"d", 0o755, ME)
    link, _ = world.vfs.symlink(ROOT, b"l", b"f", ME)
    assert world.vfs.getxattr(node, b"user.tierfs.tier") == b"resident"
    assert world.vfs.getxattr(directory, b"user.tierfs.tier") == b"directory"
    assert world.vfs.getxattr(link, b"user.tierfs.tier") == b"other"
    fails(errno.ENODATA, world.vfs.getxattr, node, b"user.tierfs.digest")
    fails(errno.ENODATA, world.vfs.getxattr, node, b"user.tierfs.heat")
    fails(errno.ENODATA, world.vfs.getxattr, node, b"user.tierfs.other")
    for name in (b"tier", b"heat", b"digest", b"other"):
        fails(errno.EPERM, world.vfs.setxattr, node, b"user.tierfs." + name, b"x")
        fails(errno.EPERM, world.vfs.removexattr, node, b"user.tierfs." + name)


def test_heat_comes_from_whoever_knows_it(world):
    node = world.make(b"f")
    warm = Vfs(world.tree, world.gate, heat=lambda ino: b"1.5")
    number, _ = warm.lookup(ROOT, b"f")
    assert warm.getxattr(number, b"user.tierfs.heat") == b"1.5"
    warm.close()
    assert world.vfs.getattr(node)


def test_pins_by_attribute(world):
    top, _ = world.vfs.mkdir(ROOT, b"d", 0o755, ME)
    below, _ = world.vfs.mkdir(top, b"e", 0o755, ME)
    node = world.make(b"f", b"x", below)
    pin = b"user.tierfs.pin"
    assert world.vfs.getxattr(node, pin) == b"0"
    fails(errno.ENODATA, world.vfs.removexattr, node, pin)
    fails(errno.EINVAL, world.vfs.setxattr, node, pin, b"maybe")
    fails(errno.ENODATA, world.vfs.setxattr, node, pin, b"1", os.XATTR_REPLACE)
    world.vfs.setxattr(top, pin, b"1", os.XATTR_CREATE)
    fails(errno.EEXIST, world.vfs.setxattr, top, pin, b"1", os.XATTR_CREATE)
    assert world.vfs.getxattr(top, pin) == b"1"
    assert world.vfs.getxattr(node, pin) == b"inherited"
    world.vfs.setxattr(node, pin, b"yes\n")
    assert world.vfs.getxattr(node, pin) == b"1"
    world.vfs.setxattr(node, pin, b"0")
    world.vfs.removexattr(top, pin)
    assert world.vfs.getxattr(node, pin) == b"0"
    assert [(m.name, m.a) for m in world.entries(Mark.PIN)] == [(b"d", 1), (b"f", 1), (b"f", 0), (b"d", 0)]


@needs_root
def test_attributes_of_symlinks_and_special_files(world):
    link, _ = world.vfs.symlink(ROOT, b"l", b"nowhere", ME)
    fifo, _ = world.vfs.mknod(ROOT, b"p", stat.S_IFIFO | 0o600, 0, ME)
    for node in (link, fifo):
        world.vfs.setxattr(node, b"trusted.x", b"1")
        assert world.vfs.listxattr(node) == b"trusted.x\0"
        assert world.vfs.getxattr(node, b"trusted.x") == b"1"
        fails(errno.EPERM, world.vfs.setxattr, node, b"user.x", b"1")
        fails(errno.EPERM, world.vfs.setxattr, node, b"trusted.y", b"1", 0, USER)
        fails(errno.EPERM, world.vfs.setxattr, node, b"user.tierfs.pin", b"1")


def acl(*entries):
    """The wire form of a POSIX ACL: (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def test_acls_pass_through_and_move_the_mode(world):
    none = 0xFFFFFFFF
    access = acl((1, 6, none), (2, 4, 1234), (4, 0, none), (16, 4, none), (32, 0, none))
    node = world.make(b"f")
    world.vfs.setxattr(node, b"system.posix_acl_access", access)
    assert world.vfs.getxattr(node, b"system.posix_acl_access") == access
    assert world.vfs.listxattr(node) == b"system.posix_acl_access\0"
    assert world.vfs.getattr(node).st_mode & 0o777 == 0o640


def test_a_default_acl_takes_the_place_of_the_umask(world):
    none = 0xFFFFFFFF
    default = acl((1, 7, none), (2, 6, 1234), (4, 7, none), (16, 7, none), (32, 5, none))
    directory, _ = world.vfs.mkdir(ROOT, b"d", 0o755, ME)
    world.vfs.setxattr(directory, b"system.posix_acl_default", default)
    _, attr, fh, _ = world.vfs.create(directory, b"f", os.O_RDWR, 0o666, USER)
    assert attr.st_mode & 0o777 == 0o664
    world.vfs.release(fh)
    below, attr = world.vfs.mkdir(directory, b"e", 0o777, USER)
    assert world.vfs.getxattr(below, b"system.posix_acl_default") == default


@needs_root
def test_an_acl_can_take_set_group_id_away(world):
    none = 0xFFFFFFFF
    node = world.make(b"f")
    world.vfs.setattr(node, mode=0o2755)
    plain = acl((1, 7, none), (4, 5, none), (32, 5, none))
    world.vfs.setxattr(node, b"system.posix_acl_access", plain, kill_sgid=True)
    assert stat.S_IMODE(world.vfs.getattr(node).st_mode) == 0o755


# --- memory ----------------------------------------------------------------------------------------------

MEASURE = """
import os, resource, sys
sys.path[:0] = sys.argv[3:]
from tierfs.nodes import NodeTable, ROOT
from tierfs.tree import open_tree
tree = open_tree(sys.argv[1])
nodes = NodeTable(tree)
count = int(sys.argv[2])

def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

real = os.stat(sys.argv[1])
for number in range(count + 1000):
    if number == 1000:
        before = rss()
    # As the system gives it: a sum would have room for a carry.
    ino = int.from_bytes(((1 << 40) + number).to_bytes(8, "little"), "little")
    st = os.stat_result((0o100644, ino, *tuple(real)[2:]))
    nodes.found(st, nodes.root, b"some-file-name-%06d.txt" % number)
print((rss() - before) / count)
"""


def test_a_node_takes_few_bytes(tmp_path):
    """With its place in the ledger, and growing tables."""
    (tmp_path / "tree").mkdir()
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "tree"), "200000", *sys.path]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert float(found.stdout) <= 250, f"{found.stdout.strip()} bytes a node"


def test_what_has_no_name_any_more_is_marked_under_its_last_one(world):
    node, _, fh, _ = world.vfs.create(ROOT, b"first", os.O_RDWR, 0o644, ME)
    world.vfs.rename(ROOT, b"first", ROOT, b"last" * 20, 0)
    world.vfs.unlink(ROOT, b"last" * 20)
    nodes = world.vfs.nodes
    assert nodes.name(nodes.get(node)) == b"last" * 20
    world.vfs.release(fh)
    assert nodes.name(nodes.get(node)) == b"last" * 20
    world.vfs.forget(node, 1)
    assert not nodes._former


def test_a_file_marked_again_after_its_last_name_is_gone_is_gone_once_more(world):
    node, _, fh, _ = world.vfs.create(ROOT, b"f", os.O_RDWR, 0o644, ME)
    world.vfs.unlink(ROOT, b"f")
    again, _ = world.vfs.open(node, os.O_RDWR, ME)
    world.vfs.release(fh)
    world.vfs.write(again, 0, b"x")
    world.vfs.release(again)
    kinds = [mark.kind for mark in world.entries(*Mark)]
    assert kinds[-1] == Mark.GONE and kinds.count(Mark.GONE) == 2


# --- files that the kernel still has registered -------------------------------------------------------------


@needs_root
def test_the_node_of_a_removed_file_does_not_open_the_next_one_of_its_number(world):
    """As through /proc/self/fd of an O_PATH descriptor, for which the kernel keeps the node."""
    world.gate.states.backing = FakeBacking()
    old, st, fh, _ = world.vfs.create(ROOT, b"old", os.O_RDWR, 0o644, ME)
    world.vfs.release(fh)
    world.vfs.unlink(ROOT, b"old")
    for number in range(200):
        new, made, fh, _ = world.vfs.create(ROOT, b"%d" % number, os.O_RDWR, 0o644, ME)
        world.vfs.release(fh)
        if made.st_ino == st.st_ino:
            break
    else:
        pytest.skip("this filesystem does not use the number again at once")
    assert made.st_ino in world.gate.states.backing.live.values() and new != old
    fails(errno.ENOENT, world.vfs.open, old, os.O_RDONLY, ME)
    fh, _ = world.vfs.open(new, os.O_RDONLY, ME)
    world.vfs.release(fh)


@needs_root
def test_what_loses_its_last_name_is_let_go_at_once(world):
    world.gate.states.backing = FakeBacking()
    for remove in (lambda: world.vfs.unlink(ROOT, b"a"), lambda: world.vfs.rename(ROOT, b"b", ROOT, b"a")):
        for name in (b"a", b"b"):
            _, _, fh, _ = world.vfs.create(ROOT, name, os.O_RDWR, 0o644, ME)
            world.vfs.release(fh)
        gone = os.stat(world.path / "a").st_ino
        assert gone in world.gate.states.backing.live.values()
        remove()
        assert gone not in world.gate.states.backing.live.values()
        for name in os.listdir(world.path):
            world.vfs.unlink(ROOT, os.fsencode(name))
