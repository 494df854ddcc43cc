"""The backing tree against the filesystem that holds the temporary directory."""

import errno
import fcntl
import os
import stat
import threading
from contextlib import ExitStack

import pytest

from tierfs import syscalls
from tierfs.dirs import Listing
from tierfs.errors import ForeignStubError
from tierfs.lent import Lent
from tierfs.model import Stub
from tierfs.tree import fd_path, open_tree, pwrite_all

ROOT = os.geteuid() == 0
STUB = Stub(fid=b"f" * 16, generation=(1 << 28) + 7, tag=b"t" * 8, digest=b"d" * 32)


@pytest.fixture
def tree(tmp_path):
    tree = open_tree(str(tmp_path))
    yield tree
    tree.close()


@pytest.fixture
def made(tree, tmp_path):
    """An open file of 100,001 bytes."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(100_001))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def test_handle_is_the_same_by_every_way(tree, made):
    opath = tree.reopen(made, os.O_PATH)
    try:
        handle = tree.handle_of(opath)
        assert handle == tree.handle_of(made) == tree.handle_at(tree.rootfd, b"file")
    finally:
        os.close(opath)
    assert len(handle) > 4


def test_handles_tell_inodes_apart_and_buffers_are_per_thread(tree, tmp_path):
    names = [f"f{i}".encode() for i in range(50)]
    for name in names:
        (tmp_path / os.fsdecode(name)).touch()
    expected = {name: tree.handle_at(tree.rootfd, name) for name in names}
    assert len(set(expected.values())) == len(names)
    wrong = []

    def check():
        for _ in range(20):
            wrong.extend(name for name in names if tree.handle_at(tree.rootfd, name) != expected[name])

    threads = [threading.Thread(target=check) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_open_handle_follows_the_inode_not_the_name(tree, made, tmp_path):
    if not tree.privileged:
        pytest.skip("needs root, and a filesystem with file handles")
    handle = tree.handle_of(made)
    os.rename(tmp_path / "file", tmp_path / "moved")
    (tmp_path / "file").write_bytes(b"another")
    fd = tree.open_handle(handle, os.O_RDONLY)
    try:
        assert os.fstat(fd).st_ino == os.fstat(made).st_ino
    finally:
        os.close(fd)


def test_a_filesystem_without_handles_gets_stand_ins(tree, made, monkeypatch):
    def refuse(dirfd, name):
        raise OSError(errno.EOPNOTSUPP, "no handles here")

    monkeypatch.setattr(syscalls, "name_to_handle", refuse)
    handle = tree.handle_of(made)
    assert handle == tree.handle_at(tree.rootfd, b"file") != tree.handle_of(tree.rootfd)
    with pytest.raises(PermissionError):
        tree.open_handle(handle, os.O_PATH)


def test_open_handle_of_a_deleted_file_is_stale(tree, tmp_path):
    if not tree.privileged:
        pytest.skip("needs root, and a filesystem with file handles")
    (tmp_path / "x").touch()
    handle = tree.handle_at(tree.rootfd, b"x")
    (tmp_path / "x").unlink()
    with pytest.raises(OSError) as caught:
        tree.open_handle(handle, os.O_PATH)
    assert caught.value.errno == errno.ESTALE


def test_stub_attribute_survives_and_goes(tree, made):
    opath = tree.reopen(made, os.O_PATH)
    try:
        assert tree.read_stub(opath) is None
        tree.clear_stub(opath)
        tree.write_stub(made, STUB)
        assert tree.read_stub(opath) == tree.read_stub(made) == STUB
        tree.clear_stub(made)
        assert tree.read_stub(opath) is None
    finally:
        os.close(opath)


@pytest.mark.parametrize("raw", [b"", b"\x01", b"\x02" + b"\0" * 63, b"\x01\xff" + b"\0" * 62])
def test_unknown_stub_is_foreign(tree, made, raw):
    os.setxattr(made, tree.stub_name, raw)
    with pytest.raises(ForeignStubError):
        tree.read_stub(made)


def test_stub_of_an_ordinary_file_fits_the_inode(tree, tmp_path):
    (tmp_path / "empty").touch()
    fd = os.open(tmp_path / "empty", os.O_RDWR)
    try:
        tree.write_stub(fd, STUB)
        os.fsync(fd)
        assert os.fstat(fd).st_blocks == 0
    finally:
        os.close(fd)


def test_pins(tree, made):
    for fd in (made, tree.rootfd):
        assert not tree.is_pinned(fd)
        tree.set_pin(fd, True)
        assert tree.is_pinned(fd)
        tree.set_pin(fd, False)
        tree.set_pin(fd, False)
        assert not tree.is_pinned(fd)


@pytest.mark.parametrize("preallocated", [0, 3 << 20])
@pytest.mark.parametrize("size", [1, 4096, 100_001])
def test_punch_frees_every_block_and_keeps_the_size(tree, tmp_path, size, preallocated):
    fd = os.open(tmp_path / "p", os.O_RDWR | os.O_CREAT)
    try:
        pwrite_all(fd, b"x" * size, 0)
        if preallocated:
            syscalls.fallocate(fd, syscalls.FALLOC_KEEP_SIZE, 0, preallocated)
        os.fsync(fd)
        assert os.fstat(fd).st_blocks > 0
        tree.punch(fd, os.fstat(fd))
        assert (os.fstat(fd).st_size, os.fstat(fd).st_blocks) == (size, 0)
        assert os.pread(fd, size, 0) == bytes(size)
    finally:
        os.close(fd)


@pytest.mark.skipif(not ROOT, reason="file capabilities need root")
def test_punch_keeps_set_id_bits_and_capabilities(tree, tmp_path):
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    fd = os.open(tmp_path / "p", os.O_RDWR | os.O_CREAT)
    try:
        pwrite_all(fd, b"x" * 50_000, 0)
        os.fchmod(fd, 0o6755)
        os.setxattr(fd, "security.capability", capability)
        tree.punch(fd, os.fstat(fd))
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o6755
        assert os.getxattr(fd, "security.capability") == capability
        with tree.keeping_privileges(fd):
            pwrite_all(fd, b"x" * 50_000, 0)
        assert os.getxattr(fd, "security.capability") == capability
    finally:
        os.close(fd)


def test_a_mode_set_while_content_comes_back_stays(tree, tmp_path):
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with tree.keeping_privileges(fd):
            os.fchmod(fd, 0o600)  # the file's owner, through the mount
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
    finally:
        os.close(fd)


def test_extents_of_a_file_that_is_truncated_meanwhile(tree, made, monkeypatch):
    seek = os.lseek

    def truncating(fd, at, whence):
        if whence == os.SEEK_HOLE:
            os.ftruncate(fd, 0)
        return seek(fd, at, whence)

    monkeypatch.setattr(os, "lseek", truncating)
    assert tree.extents(made, 100_001) == []


def test_extents_of_a_sparse_file(tree, tmp_path):
    fd = os.open(tmp_path / "s", os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(fd, 1 << 20)
        assert tree.extents(fd, 1 << 20) == []
        os.pwrite(fd, b"x" * 65536, 131072)
        os.pwrite(fd, b"x" * 100, (1 << 20) - 100)
        found = tree.extents(fd, 1 << 20)
        assert found[0] == (131072, 196608)
        assert found[-1][1] == 1 << 20
        assert tree.extents(fd, 140000) == [(131072, 140000)]
    finally:
        os.close(fd)


@pytest.mark.parametrize("when", [-1, -1_500_000_001, 5_000_000_000_123_456_789])
def test_times_before_1970_and_after_2038(tree, made, when):
    tree.set_times(made, when, when)
    st = os.fstat(made)
    assert (st.st_atime_ns, st.st_mtime_ns) == (when, when)


def test_leases_see_other_descriptors(tree, tmp_path):
    (tmp_path / "l").write_bytes(b"x")
    reader = os.open(tmp_path / "l", os.O_RDONLY)
    writer = os.open(tmp_path / "l", os.O_RDWR)
    try:
        assert not tree.try_lease(reader, fcntl.F_RDLCK)
        os.close(writer)
        writer = -1
        assert tree.try_lease(reader, fcntl.F_RDLCK)
        assert tree.lease_kind(reader) == fcntl.F_RDLCK
        tree.unlease(reader)
        assert tree.lease_kind(reader) == fcntl.F_UNLCK
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)


def test_an_opath_descriptor_does_not_hinder_a_lease(tree, tmp_path):
    (tmp_path / "l").write_bytes(b"x")
    fd = os.open(tmp_path / "l", os.O_RDWR)
    opath = tree.reopen(fd, os.O_PATH)
    try:
        assert tree.try_lease(fd, fcntl.F_WRLCK)
        tree.unlease(fd)
    finally:
        os.close(fd)
        os.close(opath)


def test_a_broken_lease_does_not_end_the_process(tree, tmp_path):
    (tmp_path / "l").write_bytes(b"x")
    fd = os.open(tmp_path / "l", os.O_RDWR)
    try:
        assert tree.try_lease(fd, fcntl.F_WRLCK)
        with pytest.raises(BlockingIOError):
            os.open(tmp_path / "l", os.O_RDONLY | os.O_NONBLOCK)
        assert tree.lease_kind(fd) != fcntl.F_WRLCK
        tree.unlease(fd)
    finally:
        os.close(fd)


def test_listing_keeps_bytes_and_types(tree, tmp_path):
    names = {b"plain", b"new\nline", b"bad\xff\xfeutf8", b"n" * 255}
    for name in names:
        os.close(os.open(os.fsencode(tmp_path) + b"/" + name, os.O_CREAT | os.O_WRONLY))
    os.symlink(b"nowhere", os.fsencode(tmp_path) + b"/link")
    listing = Listing(os.dup(tree.rootfd))
    found = {name: (ino, kind) for _, name, ino, kind in listing.read(0)}
    listing.close()
    assert set(found) == names | {b"link", b".", b".."}
    assert found[b"link"][1] == stat.S_IFLNK >> 12
    assert found[b"plain"] == (os.stat(tmp_path / "plain").st_ino, stat.S_IFREG >> 12)


def test_renameat2_flags(tree, tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    with pytest.raises(FileExistsError):
        syscalls.renameat2(tree.rootfd, b"a", tree.rootfd, b"b", syscalls.RENAME_NOREPLACE)
    syscalls.renameat2(tree.rootfd, b"a", tree.rootfd, b"b", syscalls.RENAME_EXCHANGE)
    assert (tmp_path / "a").read_bytes() == b"b"


def test_birth_time(tree, made):
    born = syscalls.birth_time(made, b"")
    assert born is None or abs(born - os.fstat(made).st_mtime_ns) < 60_000_000_000


def test_symlink_descriptors_mean_the_link_itself(tree, tmp_path):
    os.symlink("nowhere", tmp_path / "link")
    opath = os.open(tmp_path / "link", os.O_PATH | os.O_NOFOLLOW)
    try:
        tree.set_times(opath, 1, 2)
        assert os.lstat(tmp_path / "link").st_mtime_ns == 2
        if ROOT:
            os.setxattr(fd_path(opath), "trusted.x", b"1")
            assert os.listxattr(tmp_path / "link", follow_symlinks=False) == ["trusted.x"]
    finally:
        os.close(opath)


def test_a_mode_that_is_opened_for_a_moment_by_two_is_as_it_was_in_the_end(tmp_path):
    """As by the mount server and the mover, in whichever order they are done."""
    path = tmp_path / "closed"
    path.write_bytes(b"")
    os.chmod(path, 0)
    fd = os.open(path, os.O_PATH)
    lent = Lent(str(tmp_path / "lent"), lambda fd: b"%d" % os.fstat(fd).st_ino)

    def for_a_moment():
        return lent.lending(fd, fd_path(fd), stat.S_IRUSR)

    try:
        first, second = for_a_moment(), for_a_moment()
        with ExitStack() as last:
            with first:
                last.enter_context(second)
                assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o400
            assert stat.S_IMODE(os.fstat(fd).st_mode) == 0
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0
        with for_a_moment():
            os.chmod(path, 0o060)
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o060, "its owner's change is undone"
    finally:
        os.close(fd)


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_what_two_lend_one_after_the_other_is_all_taken_back(tmp_path, first_ends_first):
    """One to read an attribute, one to write: neither takes the other's moment for the file's own mode."""
    path = tmp_path / "closed"
    path.write_bytes(b"")
    os.chmod(path, 0)
    fd = os.open(path, os.O_PATH)
    lent = Lent(str(tmp_path / "lent"), lambda fd: b"%d" % os.fstat(fd).st_ino)
    stacks = ExitStack(), ExitStack()
    try:
        for stack, bits in zip(stacks, (stat.S_IRUSR, stat.S_IWUSR), strict=True):
            stack.enter_context(lent.lending(fd, fd_path(fd), bits))
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
        for stack in stacks if first_ends_first else reversed(stacks):
            stack.close()
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0 and not os.listdir(tmp_path / "lent")
    finally:
        os.close(fd)


def test_what_cannot_be_told_apart_is_closed_again(tree, monkeypatch):
    handle = tree.handle_of(tree.rootfd)
    opened, usual = [], os.open
    monkeypatch.setattr(os, "open", lambda *args, **more: opened.append(usual(*args, **more)) or opened[-1])

    def fail(fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(type(tree), "handle_of", lambda tree, fd: fail(fd))
    with pytest.raises(OSError, match="Input/output"):
        tree.open_at(b"", handle, os.O_RDONLY)
    (fd,) = opened
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_space(tree):
    space = tree.space()
    assert 0 < space.available <= space.free <= space.total


def test_content_is_written_in_pieces_for_which_memory_is_at_hand(tmp_path, monkeypatch):
    written, write = [], os.pwrite

    def pwrite(fd, data, offset):
        written.append(len(data))
        return write(fd, data, offset)

    content = os.urandom(5 * (1 << 20) + 12345)
    with open(tmp_path / "file", "w+b", buffering=0) as file:
        monkeypatch.setattr(os, "pwrite", pwrite)
        pwrite_all(file.fileno(), content, 4096)
    assert (tmp_path / "file").read_bytes() == bytes(4096) + content
    assert max(written) == 1 << 20 and len(written) == 6
