"""Names, links, renames and attributes through the vfs, against the directory beneath. No FUSE."""

import errno
import itertools
import os
import random
import stat

import pytest

from tierfs import syscalls
from tierfs.gate import Gate
from tierfs.marks import Mark, MarkReader, MarkWriter
from tierfs.tree import open_tree
from tierfs.vfs import NOW, ROOT, Caller, Vfs

AS_ROOT = os.geteuid() == 0
ME = Caller(os.geteuid(), os.getegid(), umask=0o022)
USER = Caller(12345, 23456, umask=0o027)
needs_root = pytest.mark.skipif(not AS_ROOT, reason="needs root")


class World:
    """A backing tree, a gate without a mover, and a vfs over both."""

    def __init__(self, path, **options):
        for name in ("tree", "marks"):
            (path / name).mkdir()
        (path / "tree").chmod(0o755)
        self.path = path / "tree"
        self.tree = open_tree(str(self.path))
        self.marks_fd = os.open(path / "marks", os.O_RDONLY)
        self.gate = Gate(self.tree, None, MarkWriter(self.marks_fd), 1)
        self.vfs = Vfs(self.tree, self.gate, **options)

    def make(self, name, content=b"", parent=ROOT):
        """A file with this content; its node number."""
        node, _, fh, _ = self.vfs.create(parent, name, os.O_RDWR | os.O_EXCL, 0o644, ME)
        if content:
            self.vfs.write(fh, 0, content)
        self.vfs.release(fh)
        return node

    def entries(self, *kinds):
        return [entry for entry in MarkReader(self.marks_fd, None).read() if entry.kind in kinds]

    def close(self):
        self.vfs.close()
        self.gate.mover.connect(None)
        self.gate.marking.marks.close()
        self.tree.close()
        os.close(self.marks_fd)


@pytest.fixture
def world(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    world = World(tmp_path)
    yield world
    world.close()
    assert len(os.listdir("/proc/self/fd")) <= before, "descriptors are left"


def fails(number, call, *args, **options):
    with pytest.raises(OSError) as caught:
        call(*args, **options)
    assert caught.value.errno == number, caught.value


@pytest.mark.parametrize("name", [b"plain", b"new\nline", b"bad\xff\xfe", b"n" * 255, b"-rf *"])
def test_names_are_bytes(world, name):
    node = world.make(name, b"content")
    found, attr = world.vfs.lookup(ROOT, name)
    assert (found, attr.st_size) == (node, 7)
    assert os.listdir(os.fsencode(world.path)) == [name]
    world.vfs.rename(ROOT, name, ROOT, b"moved")
    assert world.vfs.getattr(node).st_size == 7
    world.vfs.unlink(ROOT, b"moved")
    fails(errno.ENOENT, world.vfs.lookup, ROOT, b"moved")


def test_too_long_a_name(world):
    fails(errno.ENAMETOOLONG, world.vfs.lookup, ROOT, b"n" * 256)


def test_node_numbers_are_never_used_again(world):
    seen = set()
    for _ in range(20):
        node = world.make(b"same")
        assert node not in seen
        seen.add(node)
        world.vfs.unlink(ROOT, b"same")
        world.vfs.forget(node, 1)
    assert len(world.vfs.nodes) == 1


def test_lookups_are_counted(world):
    node = world.make(b"f")
    world.vfs.lookup(ROOT, b"f")
    world.vfs.forget(node, 1)
    assert world.vfs.getattr(node)
    world.vfs.forget(node, 1)
    fails(errno.ESTALE, world.vfs.getattr, node)
    assert world.vfs.lookup(ROOT, b"f")[0] != node


def test_a_renamed_directory_keeps_its_nodes(world):
    top, _ = world.vfs.mkdir(ROOT, b"a", 0o755, ME)
    below, _ = world.vfs.mkdir(top, b"b", 0o755, ME)
    node = world.make(b"f", b"x", below)
    other, _ = world.vfs.mkdir(ROOT, b"c", 0o755, ME)
    world.vfs.rename(ROOT, b"a", other, b"z")
    assert world.vfs.getattr(node).st_size == 1
    assert world.vfs.lookup(below, b"f")[0] == node
    assert (world.path / "c/z/b/f").exists()
    assert [(m.name, m.parent) for m in world.entries(Mark.DIR)][-1] == (b"z", os.stat(world.path / "c").st_ino)


def test_few_directory_descriptors_suffice_for_a_deep_tree(tmp_path):
    world = World(tmp_path, directory_fds=2)
    nodes = [ROOT]
    for _ in range(1200):
        nodes.append(world.vfs.mkdir(nodes[-1], b"d", 0o755, ME)[0])
    leaf = world.make(b"f", b"deep", nodes[-1])
    for number in (3, 600, 1199):
        assert world.vfs.getattr(nodes[number]).st_nlink == 3
    world.vfs.rename(nodes[-1], b"f", nodes[600], b"g")
    world.vfs.rename(nodes[600], b"g", nodes[-1], b"f")
    assert world.vfs.getattr(leaf).st_size == 4
    for parent in reversed(nodes[1:]):
        if parent == nodes[-1]:
            world.vfs.unlink(parent, b"f")
    for parent in reversed(nodes[:-1]):
        world.vfs.rmdir(parent, b"d")
    world.close()


def test_what_changes_behind_the_mount_is_stale_not_wrong(world):
    node = world.make(b"f", b"mine")
    sub, _ = world.vfs.mkdir(ROOT, b"d", 0o755, ME)
    world.make(b"g", b"", sub)
    (world.path / "other").write_bytes(b"another file")
    os.rename(world.path / "other", world.path / "f")
    fails(errno.ESTALE, world.vfs.getattr, node)
    fails(errno.ESTALE, world.vfs.open, node, os.O_RDONLY, ME)
    fails(errno.ESTALE, world.vfs.setattr, node, mode=0o600)
    again, attr = world.vfs.lookup(ROOT, b"f")
    assert again != node and attr.st_size == 12


def test_hard_links_are_one_node_that_outlives_each_name(world):
    node = world.make(b"a", b"content")
    linked, attr = world.vfs.link(node, ROOT, b"b")
    assert (linked, attr.st_nlink) == (node, 2)
    world.vfs.unlink(ROOT, b"b")  # the name last seen
    assert world.vfs.getattr(node).st_nlink == 1
    fh, _ = world.vfs.open(node, os.O_RDONLY, ME)
    assert world.vfs.read(fh, 0, 10) == b"content"
    world.vfs.release(fh)
    assert not world.entries(Mark.GONE)
    assert world.vfs.lookup(ROOT, b"a")[0] == node
    world.vfs.unlink(ROOT, b"a")
    assert world.vfs.getattr(node).st_nlink == 0
    assert [m.ino for m in world.entries(Mark.GONE)] == [attr.st_ino]


def test_link_gets_its_name_marked(world):
    node = world.make(b"a")
    _, attr = world.vfs.link(node, ROOT, b"b")
    assert [(m.ino, m.name) for m in world.entries(Mark.NAMED)] == [(attr.st_ino, b"b")]
    fails(errno.EEXIST, world.vfs.link, node, ROOT, b"b")


def test_many_hard_links_use_no_descriptors(world):
    nodes = []
    for number in range(200):
        node = world.make(b"a%d" % number, b"x")
        world.vfs.link(node, ROOT, b"b%d" % number)
        nodes.append(node)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(200):
        world.vfs.unlink(ROOT, b"b%d" % number)
    if world.tree.privileged:
        assert len(os.listdir("/proc/self/fd")) == before
    assert all(world.vfs.getattr(node).st_nlink == 1 for node in nodes)


def test_an_unlinked_open_file_works_until_its_last_release(world):
    node = world.make(b"f", b"content")
    fh, handle = world.vfs.open(node, os.O_RDWR, ME)
    ino = world.vfs.getattr(node).st_ino
    world.vfs.unlink(ROOT, b"f")
    assert world.vfs.getattr(node).st_nlink == 0
    assert world.vfs.write(fh, 7, b" more") == 5
    assert world.vfs.getattr(node, fh).st_size == 12
    assert world.vfs.setattr(node, fh, mode=0o600).st_mode & 0o777 == 0o600
    assert world.vfs.setattr(node, mtime_ns=5).st_mtime_ns == 5
    second, _ = world.vfs.open(node, os.O_RDONLY, ME)  # through /proc/self/fd
    assert world.vfs.read(second, 0, 20) == b"content more"
    world.vfs.release(second)
    world.vfs.release(fh)
    attr = world.vfs.getattr(node)
    assert (attr.st_nlink, attr.st_size) == (0, 12)
    fails(errno.ENOENT, world.vfs.open, node, os.O_RDONLY, ME)
    gone = world.entries(Mark.GONE)
    assert {m.ino for m in gone} == {ino}
    assert gone[0].handle == handle.inode.handle


def test_gone_is_marked_by_the_handle_of_the_file_that_went(world):
    world.make(b"a")
    handle = world.tree.handle_at(world.tree.rootfd, b"a")
    world.make(b"b")
    other = world.tree.handle_at(world.tree.rootfd, b"b")
    world.vfs.rename(ROOT, b"a", ROOT, b"b")
    world.vfs.unlink(ROOT, b"b")
    assert [m.handle for m in world.entries(Mark.GONE)] == [other, handle]


def test_a_name_made_again_is_another_node(world):
    node = world.make(b"f", b"old")
    world.vfs.unlink(ROOT, b"f")
    again = world.make(b"f", b"newer")
    assert again != node
    assert world.vfs.getattr(node).st_nlink == 0
    assert world.vfs.getattr(again).st_size == 5


def test_rename_over_an_open_file(world):
    target = world.make(b"b", b"target")
    fh, _ = world.vfs.open(target, os.O_RDONLY, ME)
    source = world.make(b"a", b"source!")
    world.vfs.rename(ROOT, b"a", ROOT, b"b")
    assert world.vfs.read(fh, 0, 10) == b"target"
    assert world.vfs.getattr(target).st_nlink == 0
    assert world.vfs.getattr(source).st_size == 7
    assert world.vfs.lookup(ROOT, b"b")[0] == source
    world.vfs.release(fh)


def test_rename_between_two_names_of_one_file_keeps_both(world):
    node = world.make(b"a")
    world.vfs.link(node, ROOT, b"b")
    world.vfs.rename(ROOT, b"a", ROOT, b"b")
    assert sorted(os.listdir(world.path)) == ["a", "b"]
    assert not world.entries(Mark.GONE)


def test_rename_flags(world):
    one, two = world.make(b"a", b"1"), world.make(b"b", b"22")
    fails(errno.EEXIST, world.vfs.rename, ROOT, b"a", ROOT, b"b", syscalls.RENAME_NOREPLACE)
    world.vfs.rename(ROOT, b"a", ROOT, b"b", syscalls.RENAME_EXCHANGE)
    assert world.vfs.lookup(ROOT, b"a")[0] == two
    assert (world.vfs.getattr(one).st_size, world.vfs.getattr(two).st_size) == (1, 2)
    fails(errno.ENOENT, world.vfs.rename, ROOT, b"a", ROOT, b"none", syscalls.RENAME_EXCHANGE)
    world.vfs.rename(ROOT, b"a", ROOT, b"c", syscalls.RENAME_NOREPLACE)
    assert world.vfs.getattr(two).st_size == 2
    assert not world.entries(Mark.GONE)


def test_exchange_of_a_file_and_a_directory(world):
    file = world.make(b"f", b"1")
    directory, _ = world.vfs.mkdir(ROOT, b"d", 0o755, ME)
    inner = world.make(b"x", b"22", directory)
    world.vfs.rename(ROOT, b"f", ROOT, b"d", syscalls.RENAME_EXCHANGE)
    assert world.vfs.getattr(inner).st_size == 2
    assert world.vfs.lookup(ROOT, b"d")[0] == file


@needs_root
def test_whiteout(world):
    world.make(b"a")
    world.vfs.rename(ROOT, b"a", ROOT, b"b", syscalls.RENAME_WHITEOUT)
    _, attr = world.vfs.lookup(ROOT, b"a")
    assert stat.S_ISCHR(attr.st_mode) and attr.st_rdev == 0


def test_removed_directory_answers_its_last_attributes(world):
    node, attr = world.vfs.mkdir(ROOT, b"d", 0o700, ME)
    fails(errno.EISDIR, world.vfs.unlink, ROOT, b"d")
    world.vfs.rmdir(ROOT, b"d")
    last = world.vfs.getattr(node)
    assert (last.st_ino, last.st_nlink) == (attr.st_ino, 0)
    fails(errno.ENOENT, world.vfs.mkdir, node, b"x", 0o700, ME)
    fails(errno.ENOENT, world.vfs.rmdir, ROOT, b"d")


def test_rmdir_and_rename_refuse_what_posix_refuses(world):
    directory, _ = world.vfs.mkdir(ROOT, b"d", 0o755, ME)
    world.make(b"f", b"", directory)
    fails(errno.ENOTEMPTY, world.vfs.rmdir, ROOT, b"d")
    fails(errno.ENOTDIR, world.vfs.rmdir, directory, b"f")
    other, _ = world.vfs.mkdir(ROOT, b"e", 0o755, ME)
    fails(errno.ENOTEMPTY, world.vfs.rename, ROOT, b"e", ROOT, b"d")
    fails(errno.EINVAL, world.vfs.rename, ROOT, b"d", directory, b"inside")
    assert world.vfs.getattr(other).st_nlink == 2
    assert world.vfs.lookup(directory, b"f")


def test_rename_over_an_empty_directory(world):
    old, _ = world.vfs.mkdir(ROOT, b"old", 0o755, ME)
    new, _ = world.vfs.mkdir(ROOT, b"new", 0o755, ME)
    world.make(b"f", b"", new)
    world.vfs.rename(ROOT, b"new", ROOT, b"old")
    assert world.vfs.getattr(old).st_nlink == 0
    assert world.vfs.lookup(new, b"f")


def test_symlinks(world):
    node, attr = world.vfs.symlink(ROOT, b"l", b"to/no\xffwhere", ME)
    assert stat.S_ISLNK(attr.st_mode)
    assert world.vfs.readlink(node) == b"to/no\xffwhere"
    assert world.vfs.setattr(node, mtime_ns=-7).st_mtime_ns == -7
    linked, attr = world.vfs.link(node, ROOT, b"m")
    assert (linked, attr.st_nlink) == (node, 2)
    file = world.make(b"f")
    fails(errno.EINVAL, world.vfs.readlink, file)
    if AS_ROOT:
        assert world.vfs.setattr(node, uid=7, gid=8).st_uid == 7


def test_create_opens_nothing_that_is_there(world):
    """Made behind the mount: the kernel has checked no permission yet, and does so when it looks again."""
    world.make(b"f", b"content")
    world.vfs.symlink(ROOT, b"l", b"f", ME)
    fails(errno.EEXIST, world.vfs.create, ROOT, b"f", os.O_RDWR | os.O_EXCL, 0o644, ME)
    for name in (b"f", b"l"):
        fails(errno.ESTALE, world.vfs.create, ROOT, name, os.O_RDWR | os.O_TRUNC, 0o600, ME)
    assert (world.path / "f").read_bytes() == b"content"


def test_a_file_without_a_name_can_get_one(world):
    node, attr, fh, _ = world.vfs.tmpfile(ROOT, os.O_RDWR, 0o640, ME)
    assert (attr.st_nlink, attr.st_mode & 0o777) == (0, 0o640)
    world.vfs.write(fh, 0, b"content")
    assert world.vfs.getattr(node).st_size == 7
    assert os.listdir(world.path) == []
    linked, attr = world.vfs.link(node, ROOT, b"named")
    assert (linked, attr.st_nlink) == (node, 1)
    world.vfs.release(fh)
    assert (world.path / "named").read_bytes() == b"content"
    assert world.vfs.getattr(node).st_size == 7
    assert not world.entries(Mark.GONE)


def test_a_file_that_never_had_a_name_is_gone_with_its_release(world):
    node, attr, fh, _ = world.vfs.tmpfile(ROOT, os.O_RDWR | os.O_EXCL, 0o600, ME)
    fails(errno.ENOENT, world.vfs.link, node, ROOT, b"named")
    world.vfs.release(fh)
    assert [m.ino for m in world.entries(Mark.GONE)] == [attr.st_ino]
    assert world.vfs.getattr(node).st_nlink == 0


@pytest.mark.parametrize("when", [-1, -2_000_000_001, 0, 5_000_000_000_123_456_789])
def test_times(world, when):
    node = world.make(b"f")
    attr = world.vfs.setattr(node, atime_ns=when)
    assert attr.st_atime_ns == when
    before = attr.st_mtime_ns
    attr = world.vfs.setattr(node, atime_ns=NOW, mtime_ns=when)
    assert attr.st_mtime_ns == when and attr.st_atime_ns >= before
    assert world.vfs.setattr(node, mtime_ns=NOW).st_mtime_ns >= before


def test_truncate_by_node_and_by_handle(world):
    node = world.make(b"f", b"0123456789")
    assert world.vfs.setattr(node, size=4).st_size == 4
    fh, _ = world.vfs.open(node, os.O_RDWR, ME)
    assert world.vfs.setattr(node, fh, size=100_000).st_size == 100_000
    assert world.vfs.read(fh, 0, 6) == b"0123\0\0"
    world.vfs.release(fh)
    fails(errno.EISDIR, world.vfs.setattr, ROOT, size=0)


def test_statfs_counts_what_can_be_evicted(tmp_path):
    world = World(tmp_path, evictable=lambda: 1 << 20)
    fs = world.vfs.statfs()
    real = os.statvfs(world.path)
    assert fs.blocks == real.f_blocks and fs.namelen == real.f_namemax
    assert abs(fs.bavail * fs.frsize - real.f_bavail * real.f_frsize - (1 << 20)) < 64 << 20
    world.close()


def test_birth_time(world):
    born = world.vfs.birth_time(world.make(b"f"))
    assert born is None or abs(born - os.stat(world.path / "f").st_mtime_ns) < 10**10


@needs_root
def test_new_files_belong_to_the_caller(world):
    world.vfs.create(ROOT, b"f", os.O_RDWR, 0o6777, USER)
    world.vfs.mkdir(ROOT, b"d", 0o1777, USER)
    world.vfs.symlink(ROOT, b"l", b"x", USER)
    world.vfs.mknod(ROOT, b"p", stat.S_IFIFO | 0o666, 0, USER)
    world.vfs.mknod(ROOT, b"s", stat.S_IFSOCK | 0o666, 0, USER)
    world.vfs.mknod(ROOT, b"c", stat.S_IFCHR | 0o666, os.makedev(1, 3), USER)
    world.vfs.mknod(ROOT, b"r", stat.S_IFREG | 0o666, 0, USER)
    for name in ("f", "d", "l", "p", "s", "c", "r"):
        st = os.lstat(world.path / name)
        assert (st.st_uid, st.st_gid) == (USER.uid, USER.gid), name
    modes = {name: stat.S_IMODE(os.lstat(world.path / name).st_mode) for name in ("f", "d", "p", "r")}
    assert modes == {"f": 0o6750, "d": 0o1750, "p": 0o640, "r": 0o640}
    assert os.stat(world.path / "c").st_rdev == os.makedev(1, 3)
    assert len(world.entries(Mark.WRITE)) == 2
    for fh in list(world.vfs.files.handles):
        world.vfs.release(fh)


@needs_root
def test_set_group_id_directories_pass_on_their_group(world):
    directory, _ = world.vfs.mkdir(ROOT, b"d", 0o755, ME)
    world.vfs.setattr(directory, gid=777)
    world.vfs.setattr(directory, mode=0o2775)
    _, made, fh, _ = world.vfs.create(directory, b"f", os.O_RDWR, 0o644, USER)
    assert (made.st_uid, made.st_gid) == (USER.uid, 777)
    _, below = world.vfs.mkdir(directory, b"e", 0o755, USER)
    assert (below.st_gid, stat.S_IMODE(below.st_mode)) == (777, 0o2750)
    _, link = world.vfs.symlink(directory, b"l", b"x", USER)
    assert (link.st_uid, link.st_gid) == (USER.uid, 777)
    world.vfs.release(fh)


@needs_root
def test_changing_owner_or_content_takes_set_id_bits_away(world):
    node = world.make(b"f", b"content")
    world.vfs.setattr(node, mode=0o6755)
    assert stat.S_IMODE(world.vfs.setattr(node, uid=5, gid=6).st_mode) == 0o755
    world.vfs.setattr(node, mode=0o6755)
    assert stat.S_IMODE(world.vfs.setattr(node, size=3, kill_suidgid=True).st_mode) == 0o755
    world.vfs.setattr(node, mode=0o6755)
    fh, _ = world.vfs.open(node, os.O_RDWR, USER)
    world.vfs.write(fh, 0, b"x", kill_suidgid=True)
    assert stat.S_IMODE(world.vfs.getattr(node).st_mode) == 0o755
    world.vfs.setattr(node, mode=0o6744)
    world.vfs.fallocate(fh, 0, 0, 10, USER._replace(gid=6))
    assert stat.S_IMODE(world.vfs.getattr(node).st_mode) == 0o2744  # mandatory locking's old sign stays
    world.vfs.fallocate(fh, 0, 0, 10, USER)
    assert stat.S_IMODE(world.vfs.getattr(node).st_mode) == 0o744  # but not when a stranger to the group writes
    world.vfs.release(fh)


def test_umask_is_left_alone(world):
    before = os.umask(0o077)
    try:
        world.make(b"f")
        assert os.umask(0o077) == 0o077
        assert stat.S_IMODE(os.stat(world.path / "f").st_mode) == 0o644
    finally:
        os.umask(before)


def test_random_renames_and_links_agree_with_the_tree(world):
    chance = random.Random(7)
    dirs = [(ROOT, world.path)]
    for number in range(4):
        dirs.append((world.vfs.mkdir(ROOT, b"d%d" % number, 0o755, ME)[0], world.path / f"d{number}"))
    counter = itertools.count()
    nodes = {}
    for _ in range(600):
        (parent, path), (other, other_path) = chance.choice(dirs), chance.choice(dirs)
        names = [n for n in os.listdir(path) if not n.startswith("d")]
        action = chance.choice("cculrrr")
        if action == "c" or not names:
            name = f"f{next(counter)}"
            node = world.make(name.encode(), name.encode(), parent)
            nodes[node] = os.stat(path / name).st_ino
            continue
        name = chance.choice(names)
        node, _ = world.vfs.lookup(parent, name.encode())
        assert nodes[node] == os.stat(path / name).st_ino
        if action == "u":
            world.vfs.unlink(parent, name.encode())
        elif action == "l":
            world.vfs.link(node, other, f"f{next(counter)}".encode())
        else:
            taken = [n for n in os.listdir(other_path) if not n.startswith("d")]
            new = chance.choice([*taken, f"f{next(counter)}"])
            world.vfs.rename(parent, name.encode(), other, new.encode())
    present = {e.stat().st_ino for _, path in dirs for e in os.scandir(path) if e.is_file()}
    for node, ino in nodes.items():
        attr = world.vfs.getattr(node)
        if attr.st_nlink:
            assert attr.st_ino == ino and ino in present
