"""A store in a directory: a NAS, a second disk. An object is a file whose path below the root is its key.

An object is written as `.tmp/<random>`, synced, renamed to its place, and the directories that changed are
synced: after a crash it is there whole or not at all. What a crash leaves in `.tmp` is removed by an opening of
the store a day later or more. `.lock` makes conditional writes atomic between processes. Long runs of zeros are
holes: a disk image takes no more room here than where it came from.

The root is never made again once it is gone: an unmounted NAS leaves an empty directory, and copies written
into that would be on the wrong disk. Every call compares the root with the one first opened.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from urllib.parse import quote

from tierfs.errors import (
    BucketMissingError,
    ObjectMissingError,
    PreconditionError,
    StoreUnavailableError,
    UsageError,
)
from tierfs.store.base import Body, Capabilities, ObjectInfo, ObjectStore, Put
from tierfs.store.disk_errors import DiskErrors
from tierfs.store.groupsync import GroupSync
from tierfs.store.keys import check_key, check_prefix, check_range, exactly, too_short

_TMP, _LOCK = ".tmp", ".lock"
_MARKER = "volume.json"  # a root that had it and has it no more is another directory
_STALE = 24 * 3600  # seconds
_PIECE = 2 * 1024 * 1024
_CACHED = 1024 * 1024  # for who works on a piece: it is in the processor's cache then
_READ_AT_ONCE = 256 * 1024 * 1024
_ZEROS = bytes(64 * 1024)  # as long a run is not written
# A link or a pipe that somebody put there is no object, and opening it may not hang.
_OBJECT = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class DirectoryStore(ObjectStore):
    """Objects below `root`, which is opened at the first call. `create`: make the root (not its parents)."""

    capabilities = Capabilities(conditional_put=True, partial_content=True, client="directory")

    def __init__(self, root: str, create: bool = False) -> None:
        self._path = os.path.abspath(root)
        self._create = create
        self._lock = threading.Lock()
        self._fd = -1
        self._identity: tuple[int, int] | None = None
        self._marked = False
        self._durable: set[str] = set()  # directories that are never removed and whose names are synced
        self._syncs = GroupSync()

    def put(self, key: str, body: bytes | Iterable[bytes], size: int) -> Put:
        _check(key)
        temporary = f"{_TMP}/{secrets.token_hex(8)}"
        with DiskErrors(self._path, key):
            root = self._root()
            fd = _new_file(root, temporary)
        try:
            for piece in exactly(key, body, size):  # not in DiskErrors: its errors are not the store's
                with DiskErrors(self._path, key):
                    _write_all(fd, piece)
            with DiskErrors(self._path, key):
                found = _settle(fd, size)
                self._publish(root, temporary, key)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=root)
            raise
        finally:
            os.close(fd)
        self._marked = self._marked or key == _MARKER
        return Put(_etag(found), verified=False)

    def put_if(self, key: str, body: bytes, etag: str | None) -> Put:
        _check(key)
        with self._locked(key):
            try:
                present: str | None = self.head(key).etag
            except ObjectMissingError:
                present = None
            if present != etag:
                raise PreconditionError(f"{self.describe()}: {key} is not the expected version")
            return self.put(key, body, len(body))

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        with DiskErrors(self._path, key):
            fd = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self._root())
        try:
            with DiskErrors(self._path, key):
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _publish(self, root: int, temporary: str, key: str) -> None:
        """Give a synced file its name, and sync that."""
        directory = os.path.dirname(key)
        for attempt in range(3):
            fresh = self._make_directories(root, directory)
            try:
                os.rename(temporary, key, src_dir_fd=root, dst_dir_fd=root)
                break
            except FileNotFoundError:  # `delete` removed the directory, empty at that moment
                self._durable.discard(directory)
                if attempt == 2:
                    raise
        for changed in dict.fromkeys([directory, *fresh]):
            self._syncs.sync(root, changed)
        self._durable.update(name for name in fresh if name.count("/") < 2)

    def _make_directories(self, root: int, directory: str) -> list[str]:
        """Make `directory` and those above; returns the ones to sync so that new names last."""
        if not directory or directory in self._durable:
            return []
        above = os.path.dirname(directory)
        changed = self._make_directories(root, above)
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o700, dir_fd=root)
        return [directory, above, *changed]

    def get(self, key: str, start: int = 0, length: int | None = None) -> Body:
        return b"".join(self._pieces(key, start, length, _READ_AT_ONCE))

    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        return self._pieces(key, start, length, _PIECE)

    def pieces(self, key: str, start: int, length: int) -> Iterator[Body]:
        return self._pieces(key, start, length, _CACHED)

    def _pieces(self, key: str, start: int, length: int | None, most: int) -> Iterator[bytes]:
        _check(key)
        check_range(start, length)
        with DiskErrors(self._path, key):
            fd = os.open(key, _OBJECT, dir_fd=self._root())
        try:
            with DiskErrors(self._path, key):
                size = _regular(fd, key).st_size
            end = size if length is None else start + length
            if start > size or end > size:
                raise too_short(key, start, length, max(0, size - start))
            while start < end:
                with DiskErrors(self._path, key):
                    piece = os.pread(fd, min(most, end - start), start)
                if not piece:
                    raise too_short(key, start, end - start, 0)
                start += len(piece)
                yield piece
        finally:
            os.close(fd)

    def head(self, key: str) -> ObjectInfo:
        _check(key)
        with DiskErrors(self._path, key):
            found = os.stat(key, dir_fd=self._root(), follow_symlinks=False)
            if not stat.S_ISREG(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, "not an object", key)
        return _info(key, found)

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            _check(key)
            with DiskErrors(self._path, key):
                root = self._root()
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    os.unlink(key, dir_fd=root)
                if key.count("/") > 2:  # a file's own directory goes with its last version
                    with contextlib.suppress(OSError):
                        os.rmdir(os.path.dirname(key), dir_fd=root)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        with DiskErrors(self._path, prefix):
            root = self._root()
        waiting = [os.path.dirname(prefix)]
        while waiting:
            directory = waiting.pop()
            for name, found in self._entries(root, directory).items():
                key = f"{directory}/{name}" if directory else name
                if stat.S_ISDIR(found.st_mode):
                    if f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/"):
                        waiting.append(key)
                elif stat.S_ISREG(found.st_mode) and key.startswith(prefix):
                    yield _info(key, found)

    def _entries(self, root: int, directory: str) -> dict[str, os.stat_result]:
        """Names and attributes in a directory; nothing of one that is gone."""
        found: dict[str, os.stat_result] = {}
        with DiskErrors(self._path, directory), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            fd = os.open(directory or ".", _DIRECTORY | os.O_NOFOLLOW, dir_fd=root)
            try:
                with os.scandir(fd) as entries:
                    for entry in entries:
                        if directory or entry.name not in (_TMP, _LOCK):
                            with contextlib.suppress(FileNotFoundError):
                                found[entry.name] = entry.stat(follow_symlinks=False)
            finally:
                os.close(fd)
        return found

    def describe(self) -> str:
        return f"file://{quote(os.fsencode(self._path))}"

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1

    def _root(self) -> int:
        """The root's descriptor, after a look whether it still is the root. Raises as the class says."""
        try:
            now = os.stat(self._path)
        except (FileNotFoundError, NotADirectoryError) as exc:
            made = self._first_root() if self._create else None
            if made is None:
                raise BucketMissingError(f"{self._path} does not exist: mount it, or correct the URL") from exc
            now = made
        if (now.st_dev, now.st_ino) == self._identity and self._fd >= 0:
            return self._fd
        with self._lock:
            return self._open_root()

    def _first_root(self) -> os.stat_result | None:
        """A root where none has ever been; None where the one that was is gone."""
        with self._lock:
            if self._identity is None:
                return self._make_root()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return os.stat(self._path)  # another thread has made it since we looked
        return None

    def _make_root(self) -> os.stat_result:
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self._path, 0o700)
            above = os.open(os.path.dirname(self._path), _DIRECTORY)
        except FileNotFoundError as exc:
            raise BucketMissingError(f"{os.path.dirname(self._path)} does not exist: mount or make it") from exc
        try:
            os.fsync(above)
        finally:
            os.close(above)
        return os.stat(self._path)

    def _open_root(self) -> int:
        """Open the root, or the root that came back (a NAS mounted again has another device number)."""
        try:
            fd = os.open(self._path, _DIRECTORY)
        except NotADirectoryError as exc:
            raise BucketMissingError(f"{self._path} is not a directory: correct the URL") from exc
        found = os.fstat(fd)
        identity = (found.st_dev, found.st_ino)
        if identity == self._identity and self._fd >= 0:
            os.close(fd)
            return self._fd
        marked = _exists(fd, _MARKER)
        if self._marked and not marked:
            os.close(fd)
            raise StoreUnavailableError(f"{self._path} is not the store that it was: is it mounted?")
        _clean(fd)  # first: other threads use the root as soon as it is known
        # The old descriptor stays open: another thread may be using it, and closed numbers are used again.
        self._durable.clear()
        self._fd, self._identity, self._marked = fd, identity, marked
        return fd


def _check(key: str) -> None:
    """Raises UsageError for what is no key, or one of the store's own names."""
    check_key(key)
    if key.split("/", 1)[0] in (_TMP, _LOCK):
        raise UsageError(f"not a key for a directory store: {key!r}")


def _new_file(root: int, temporary: str) -> int:
    """A descriptor of a new unfinished object; a directory that is only looked at gets nothing of ours."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(temporary, flags, 0o600, dir_fd=root)
    except FileNotFoundError:
        with contextlib.suppress(FileExistsError):
            os.mkdir(_TMP, 0o700, dir_fd=root)
        return os.open(temporary, flags, 0o600, dir_fd=root)


def _write_all(fd: int, piece: bytes) -> None:
    """Write what is not zeros, and go on behind those that are."""
    for start, end, zeros in _runs(piece):
        rest = memoryview(piece)[start:end]
        if zeros:
            os.lseek(fd, len(rest), os.SEEK_CUR)
        while rest and not zeros:
            rest = rest[os.write(fd, rest) :]


def _runs(piece: bytes) -> Iterator[tuple[int, int, bool]]:
    """(start, end, whether it is zeros) of what to write and what to leave out, of whole blocks each. What is
    looked at are the bytes: what filesystems say of holes has been wrong before."""
    start, before = 0, False
    for at in range(0, len(piece), len(_ZEROS)):
        zeros = not piece[at] and piece[at : at + len(_ZEROS)] == _ZEROS
        if zeros != before and at > start:
            yield start, at, before
            start = at
        before = zeros
    if piece:
        yield start, len(piece), before


def _settle(fd: int, size: int) -> os.stat_result:
    """Sync a finished file and forget its pages: who verifies it shall read the disk, and it is cold anyway."""
    os.ftruncate(fd, size)  # it may end in a hole
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return os.fstat(fd)


def _regular(fd: int, key: str) -> os.stat_result:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "not an object", key)
    return found


def _etag(found: os.stat_result) -> str:
    """Every version is a new inode; the time tells apart those that got the number of a removed one."""
    return f'"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"'


def _info(key: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, found.st_size, _etag(found), found.st_mtime)


def _exists(root: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=root, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _clean(root: int) -> None:
    """Remove the unfinished objects that a crash left there long ago."""
    with contextlib.suppress(OSError):  # there are none, or the store can only be read
        fd = os.open(_TMP, _DIRECTORY | os.O_NOFOLLOW, dir_fd=root)
        try:
            for name in os.listdir(fd):
                if time.time() - os.stat(name, dir_fd=fd, follow_symlinks=False).st_mtime > _STALE:
                    os.unlink(name, dir_fd=fd)
        finally:
            os.close(fd)
