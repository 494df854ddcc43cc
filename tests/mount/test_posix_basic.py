"""Operations of a home directory on names, attributes and links; what touches content is tried on stubs too."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Volume

CONTENT = bytes(range(256)) * 64
Settle = Callable[..., None]
Open = Callable[..., int]
libc = ctypes.CDLL(None, use_errno=True)
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4


@pytest.fixture
def file(work: Path) -> Path:
    path = work / "file"
    path.write_bytes(CONTENT)
    return path


def getfacl(path: Path) -> str:
    return subprocess.run(["getfacl", "-cn", path], check=True, capture_output=True, text=True).stdout


def rename2(old: Path, new: Path, flags: int) -> None:
    if libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags):
        raise OSError(ctypes.get_errno(), "renameat2")


def test_create_write_read(work: Path) -> None:
    path = work / "new"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
    assert os.write(fd, CONTENT) == len(CONTENT)
    assert os.pread(fd, 100, 1000) == CONTENT[1000:1100]
    assert os.pread(fd, 100, len(CONTENT)) == b""
    assert os.fstat(fd).st_size == len(CONTENT)
    os.close(fd)
    with pytest.raises(FileExistsError):
        os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    "name",
    [b"new\nline", b"\xff\xfe invalid", b"a" * 255, "ünï🙂".encode(), b" leading", b"-rf", b"back\\slash"],
)
def test_names_are_bytes(work: Path, name: bytes) -> None:
    path = os.path.join(os.fsencode(work), name)
    with open(path, "wb") as out:
        out.write(CONTENT)
    assert os.listdir(os.fsencode(work)) == [name]
    os.rename(path, path[:-1] + b"X")
    with open(path[:-1] + b"X", "rb") as back:
        assert back.read() == CONTENT


def test_name_too_long(work: Path) -> None:
    with pytest.raises(OSError) as caught:
        (work / ("a" * 256)).touch()
    assert caught.value.errno == errno.ENAMETOOLONG


def test_directories(work: Path) -> None:
    deep = work / "a" / "b" / "c"
    deep.mkdir(parents=True)
    assert (work / "a").stat().st_nlink == 3
    with pytest.raises(OSError) as caught:
        (work / "a").rmdir()
    assert caught.value.errno == errno.ENOTEMPTY
    (deep.parent / "c").rmdir()
    assert not deep.exists()
    with pytest.raises(NotADirectoryError):
        (work / "plain").touch()
        os.rmdir(work / "plain")
    with pytest.raises(IsADirectoryError):
        os.unlink(work / "a")


def test_listing_of_many_names(work: Path) -> None:
    """More entries than fit one READDIRPLUS reply, removed while a listing is under way."""
    names = {f"{number:04}-{'x' * 40}" for number in range(1500)}
    for name in names:
        (work / name).touch()
    with os.scandir(work) as entries:
        seen = {entry.name: entry.stat(follow_symlinks=False).st_ino for entry in entries}
    assert seen.keys() == names
    assert len(set(seen.values())) == len(names)
    with os.scandir(work) as entries:
        removed = set()
        for entry in entries:
            os.unlink(entry.path)
            removed.add(entry.name)
    assert removed == names
    assert os.listdir(work) == []


def test_symlinks(work: Path, file: Path) -> None:
    link = work / "link"
    link.symlink_to("file")
    assert os.readlink(link) == "file"
    assert link.lstat().st_size == 4
    assert stat.S_ISLNK(link.lstat().st_mode)
    assert link.read_bytes() == CONTENT
    (work / "dangling").symlink_to("/no/such/\udcff")
    assert os.readlink(os.fsencode(work / "dangling")) == b"/no/such/\xff"
    with pytest.raises(FileNotFoundError):
        (work / "dangling").read_bytes()


def test_hard_links(work: Path, file: Path, settle: Settle) -> None:
    other = work / "other"
    settle(file)
    os.link(file, other)
    assert other.stat().st_ino == file.stat().st_ino
    assert file.stat().st_nlink == 2
    file.unlink()
    assert other.stat().st_nlink == 1
    assert other.read_bytes() == CONTENT


def test_fifo_and_socket(work: Path, opened: Open) -> None:
    fifo = work / "fifo"
    os.mkfifo(fifo, 0o600)
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(fifo, os.O_WRONLY)
    os.write(writer, b"through")
    assert os.read(reader, 10) == b"through"
    os.close(reader)
    os.close(writer)
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        where = f"/proc/self/fd/{opened(work, os.O_RDONLY)}/s"
        server.bind(where)
        server.listen(1)
        client.connect(where)
        assert stat.S_ISSOCK((work / "s").stat().st_mode)


def test_device_nodes(work: Path, needs_root: None) -> None:
    os.mknod(work / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    found = (work / "null").stat()
    assert stat.S_ISCHR(found.st_mode)
    assert found.st_rdev == os.makedev(1, 3)


def test_xattrs(file: Path, settle: Settle) -> None:
    os.setxattr(file, "user.colour", b"blue\0\xff")
    before = set(os.listxattr(file))
    settle(file)
    assert os.getxattr(file, "user.colour") == b"blue\0\xff"
    assert set(os.listxattr(file)) == before
    os.setxattr(file, "user.colour", b"red", os.XATTR_REPLACE)
    with pytest.raises(FileExistsError):
        os.setxattr(file, "user.colour", b"red", os.XATTR_CREATE)
    os.setxattr(file, "user.big", b"x" * 3000)
    assert os.getxattr(file, "user.big") == b"x" * 3000
    os.removexattr(file, "user.colour")
    with pytest.raises(OSError) as caught:
        os.getxattr(file, "user.colour")
    assert caught.value.errno == errno.ENODATA
    assert file.read_bytes() == CONTENT


@pytest.mark.usefixtures("tiers")
def test_own_xattrs_stay_ours(shared: Volume, file: Path, settle: Settle) -> None:
    """Virtual attributes are never listed, so that `cp -a` copies none; the internal ones cannot be touched."""
    settle(file)
    assert not [name for name in os.listxattr(file) if "tierfs" in name]
    space = "trusted" if os.geteuid() == 0 else "user"
    for name in (f"{space}.tierfs", f"{space}.tierfs_pin"):
        with pytest.raises(OSError):
            os.getxattr(file, name)
        with pytest.raises(OSError):
            os.setxattr(file, name, b"forged")
        with pytest.raises(OSError):
            os.removexattr(file, name)
    with pytest.raises(OSError):
        os.setxattr(file, "user.tierfs.tier", b"stub")
    assert file.read_bytes() == CONTENT


def test_acl(file: Path, settle: Settle) -> None:
    subprocess.run(["setfacl", "-m", "u:12345:rw,g:54321:r", file], check=True)
    settle(file)
    told = getfacl(file)
    assert "user:12345:rw-" in told
    assert "group:54321:r--" in told
    assert stat.S_IMODE(file.stat().st_mode) & 0o070 == 0o060


def test_default_acl_is_inherited(work: Path) -> None:
    subprocess.run(["setfacl", "-d", "-m", "u:12345:rwx,o::---", work], check=True)
    (work / "child").touch()
    (work / "below").mkdir()
    told = getfacl(work / "child")
    assert "user:12345:rwx" in told
    assert stat.S_IMODE((work / "child").stat().st_mode) & 0o007 == 0
    assert "default:user:12345:rwx" in getfacl(work / "below")


def test_times(file: Path, settle: Settle) -> None:
    settle(file)
    os.utime(file, ns=(1_234_567_890_123_456_789, 987_654_321_123_456_789))
    found = file.stat()
    assert (found.st_atime_ns, found.st_mtime_ns) == (1_234_567_890_123_456_789, 987_654_321_123_456_789)
    settle(file)
    assert file.stat().st_mtime_ns == 987_654_321_123_456_789
    os.utime(file)
    assert file.stat().st_mtime > 1.6e9
    assert file.read_bytes() == CONTENT
    os.utime(file.parent, ns=(1, 2))
    assert file.parent.stat().st_mtime_ns == 2


def test_times_of_a_symlink(work: Path) -> None:
    (work / "link").symlink_to("nowhere")
    os.utime(work / "link", ns=(5, 7), follow_symlinks=False)
    assert (work / "link").lstat().st_mtime_ns == 7


def test_chmod_chown(file: Path, settle: Settle, needs_root: None) -> None:
    settle(file)
    before = file.stat()
    file.chmod(0o4751)
    os.chown(file, 12345, 54321)
    found = file.stat()
    assert (found.st_uid, found.st_gid) == (12345, 54321)
    assert stat.S_IMODE(found.st_mode) == 0o751, "chown clears suid"
    assert found.st_mtime_ns == before.st_mtime_ns
    assert found.st_ctime_ns > before.st_ctime_ns
    settle(file)
    assert file.read_bytes() == CONTENT
    os.symlink("x", file.parent / "link")
    os.lchown(file.parent / "link", 7, 8)
    assert (file.parent / "link").lstat().st_uid == 7


def test_umask(work: Path) -> None:
    script = "umask 027; touch f; mkdir d; mkfifo p; stat -c %a f d p"
    told = subprocess.run(["sh", "-c", script], cwd=work, check=True, capture_output=True, text=True).stdout
    assert told.split() == ["640", "750", "640"]


def test_setgid_directory(work: Path, needs_root: None) -> None:
    os.chown(work, -1, 54321)
    work.chmod(0o2775)
    (work / "f").touch()
    (work / "d").mkdir()
    assert (work / "f").stat().st_gid == 54321
    assert (work / "d").stat().st_gid == 54321
    assert (work / "d").stat().st_mode & stat.S_ISGID


def test_rename(work: Path, file: Path, settle: Settle, opened: Open) -> None:
    settle(file)
    (work / "target").write_bytes(b"old")
    kept = opened(work / "target", os.O_RDONLY)
    os.rename(file, work / "target")
    assert (work / "target").read_bytes() == CONTENT
    assert os.pread(kept, 10, 0) == b"old"
    assert not file.exists()
    (work / "d").mkdir()
    os.rename(work / "target", work / "d" / "moved")
    assert (work / "d" / "moved").read_bytes() == CONTENT
    os.rename(work / "d", work / "e")
    assert (work / "e" / "moved").read_bytes() == CONTENT
    with pytest.raises(OSError) as caught:
        os.rename(work / "e", work / "e" / "inside")
    assert caught.value.errno == errno.EINVAL


def test_rename_flags(work: Path, file: Path, settle: Settle) -> None:
    other = work / "other"
    other.write_bytes(b"other")
    settle(file, other)
    with pytest.raises(FileExistsError):
        rename2(file, other, RENAME_NOREPLACE)
    rename2(file, other, RENAME_EXCHANGE)
    assert file.read_bytes() == b"other"
    assert other.read_bytes() == CONTENT
    rename2(file, work / "third", RENAME_NOREPLACE)
    assert (work / "third").read_bytes() == b"other"


def test_statfs(work: Path) -> None:
    found = os.statvfs(work)
    assert found.f_blocks * found.f_frsize >= found.f_bavail * found.f_frsize > 0
    assert found.f_namemax == 255


def test_fsync(work: Path, file: Path, settle: Settle, opened: Open) -> None:
    settle(file)
    fd = opened(file, os.O_RDONLY)
    os.fsync(fd)
    os.fdatasync(fd)
    os.fsync(opened(work, os.O_RDONLY))
    writer = os.open(file, os.O_WRONLY)
    os.pwrite(writer, b"!", 5)
    os.fsync(writer)
    os.close(writer)
    assert file.read_bytes() == CONTENT[:5] + b"!" + CONTENT[6:]


def test_locks(file: Path, settle: Settle) -> None:
    settle(file)
    script = "import fcntl,sys; f=open(sys.argv[1],'r+b'); fcntl.{}(f, fcntl.LOCK_EX|fcntl.LOCK_NB)"
    import fcntl

    with open(file, "r+b") as held:
        for call in ("lockf", "flock"):
            getattr(fcntl, call)(held, fcntl.LOCK_EX)
            tried = subprocess.run(["python3", "-c", script.format(call), file], capture_output=True, text=True)
            assert tried.returncode, call
            assert "BlockingIOError" in tried.stderr
            getattr(fcntl, call)(held, fcntl.LOCK_UN)
            subprocess.run(["python3", "-c", script.format(call), file], check=True)
