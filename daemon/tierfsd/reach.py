"""From a path in a request to the files behind it, with the rights of who asks.

Root and the daemon's own user reach everything. Others need search permission along a path and read permission
to see or fetch it, and must own what they pin or demote. Paths are walked beneath the backing tree's root, one
component at a time and without following symlinks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from tierfs import control
from tierfs.errors import NotPermittedError, PathError, TierError
from tierfs.inodes import InodeSet
from tierfs.kit import is_gone
from tierfsd.credentials import Peer, acting_as

_PACKED = struct.Struct("<QqHH")  # inode number, size, and the lengths of handle and name


class Target(NamedTuple):
    """A regular file that a request is about. `named`: it was given itself, not found in a directory."""

    path: bytes
    ino: int
    handle: bytes
    parent: int
    name: bytes
    size: int
    named: bool


class Targets(Protocol):
    """The files of an order, each once. They may be looked at several times."""

    def __len__(self) -> int:
        """How many there are."""

    def __iter__(self) -> Iterator[Target]:
        """One after another."""


class Gathered:
    """Targets as they are found. Those in directories are kept packed, in about sixty bytes each."""

    def __init__(self) -> None:
        self._named: dict[int, Target] = {}
        self._beneath: list[tuple[bytes, int, bytearray]] = []  # path and number of a directory, what is in it
        self._inos = InodeSet()

    def __len__(self) -> int:
        return len(self._inos)

    def __iter__(self) -> Iterator[Target]:
        yield from self._named.values()
        for directory, parent, packed in self._beneath:
            at = 0
            while at < len(packed):
                ino, size, handle_size, name_size = _PACKED.unpack_from(packed, at)
                middle = at + _PACKED.size + handle_size
                handle = bytes(packed[at + _PACKED.size : middle])
                at = middle + name_size
                name = bytes(packed[middle:at])
                if ino not in self._named:
                    yield Target(join(directory, name), ino, handle, parent, name, size, named=False)

    def add_named(self, target: Target) -> None:
        """One that was given itself: of two links to a file that one counts, as its user is told of it."""
        self._named[target.ino] = target
        self._inos.add(target.ino)

    def enter(self, directory: bytes, parent: int) -> None:
        """What is found next is in this directory."""
        if self._beneath and not self._beneath[-1][2]:
            self._beneath.pop()  # it had no files
        self._beneath.append((directory, parent, bytearray()))

    def add(self, ino: int, size: int, handle: bytes, name: bytes) -> None:
        """A file in the directory that was entered last."""
        if self._inos.add(ino):
            self._beneath[-1][2].extend(_PACKED.pack(ino, size, len(handle), len(name)) + handle + name)


class Found(NamedTuple):
    """One name: an O_PATH descriptor of it, its status, and where it stands (0 and b"" for the root)."""

    opath: int
    status: os.stat_result
    parent: int
    name: bytes


class Reach:
    """Finds files below a directory descriptor; `handle_of` gives the kernel file handle of an O_PATH one."""

    def __init__(self, rootfd: int, handle_of: Callable[[int], bytes]) -> None:
        self._rootfd = rootfd
        self._device = os.fstat(rootfd).st_dev
        self._handle_of = handle_of

    @contextlib.contextmanager
    def find(self, peer: Peer, path: bytes, access: int) -> Iterator[Found]:
        """The name behind a path, if the peer may have `access` to it (O_WRONLY: must own it)."""
        with acting_as(peer):
            found = self._walk_to(path)
            try:
                _permit(peer, found, access)
            except BaseException:
                os.close(found.opath)
                raise
        try:
            yield found
        finally:
            os.close(found.opath)

    def exists(self, peer: Peer, path: bytes) -> bool:
        """Whether there is such a name now. Raises OSError where the peer may not look, NotPermittedError."""
        with acting_as(peer):
            try:
                os.close(self._walk_to(path).opath)
            except (FileNotFoundError, NotADirectoryError):
                return False
        return True

    def _walk_to(self, path: bytes) -> Found:
        """Walk down from the root. Raises PathError; OSError as the kernel judges the acting user."""
        opath = os.open(".", os.O_PATH | os.O_DIRECTORY, dir_fd=self._rootfd)
        parent, name = 0, b""
        try:
            for name in path.split(b"/") if path else []:
                if name in (b"", b".", b".."):
                    raise PathError("is not a plain path inside the volume")
                parent = os.fstat(opath).st_ino
                below = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=opath)
                os.close(opath)
                opath = below
                if os.fstat(opath).st_dev != self._device:  # its inode numbers mean others here
                    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), name)
            return Found(opath, os.fstat(opath), parent, name)
        except BaseException:
            os.close(opath)
            raise

    def targets(
        self, peer: Peer, paths: list[bytes], access: int, cancelled: threading.Event
    ) -> tuple[Gathered, list[control.Outcome]]:
        """All regular files that the paths name or contain, each once whatever its links, and what could not be
        reached."""
        targets = Gathered()
        stayed: list[control.Outcome] = []
        for path in paths:
            try:
                with self.find(peer, path, access) as found, acting_as(peer):
                    if stat.S_ISDIR(found.status.st_mode):
                        self._gather(peer, found.opath, path, access, targets, stayed, cancelled)
                    elif stat.S_ISREG(found.status.st_mode):
                        targets.add_named(self._target(found, path))
                    else:
                        stayed.append(control.Outcome(path, "is not a regular file: it always stays local"))
            except (TierError, OSError) as exc:
                stayed.append(outcome_of(path, exc))
        return targets, stayed

    def _target(self, found: Found, path: bytes) -> Target:
        status, handle = found.status, self._handle_of(found.opath)
        return Target(path, status.st_ino, handle, found.parent, found.name, status.st_size, named=True)

    def _gather(
        self,
        peer: Peer,
        top: int,
        path: bytes,
        access: int,
        targets: Gathered,
        stayed: list[control.Outcome],
        cancelled: threading.Event,
    ) -> None:
        """Add the regular files below a directory; what the peer may not have is passed over."""
        pending = [path]
        while pending and not cancelled.is_set():
            here = pending.pop()
            try:
                directory = self._open_below(top, path, here)
            except OSError as exc:
                if here == path or not is_gone(exc):
                    stayed.append(outcome_of(here, exc))
                continue
            try:
                parent = os.fstat(directory).st_ino
                targets.enter(here, parent)
                for text in _listed(directory):
                    name = os.fsencode(text)
                    try:
                        if self._child(peer, directory, parent, name, access, targets):
                            pending.append(join(here, name))
                    except (FileNotFoundError, PermissionError, NotPermittedError):
                        continue
                    except OSError as exc:
                        stayed.append(outcome_of(join(here, name), exc))
            except OSError as exc:  # a disk that cannot read one directory keeps no order from the others
                stayed.append(outcome_of(here, exc))
            finally:
                os.close(directory)

    def _open_below(self, top: int, root: bytes, path: bytes) -> int:
        """A readable descriptor of a directory at or below `top`, whose own path is `root`."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        fd = os.open(".", os.O_PATH | os.O_DIRECTORY, dir_fd=top)
        rest = path[len(root) :].strip(b"/")
        try:
            for name in rest.split(b"/") if rest else []:
                below = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
                os.close(fd)
                fd = below
            return os.open(".", flags, dir_fd=fd)
        finally:
            os.close(fd)

    def _child(
        self, peer: Peer, directory: int, parent: int, name: bytes, access: int, targets: Gathered
    ) -> bool:
        """One entry, which may be a target; whether it is a directory to look into."""
        opath = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=directory)
        try:
            found = Found(opath, os.fstat(opath), parent, name)
            if found.status.st_dev != self._device:
                return False
            if stat.S_ISDIR(found.status.st_mode):
                return True
            if stat.S_ISREG(found.status.st_mode):
                _permit(peer, found, access)
                targets.add(found.status.st_ino, found.status.st_size, self._handle_of(opath), name)
            return False
        finally:
            os.close(opath)


def _listed(directory: int) -> list[str]:
    """The names in it; none where it has been removed meanwhile."""
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _permit(peer: Peer, found: Found, access: int) -> None:
    """Judge the last component; the peer's rights are in force. Raises NotPermittedError."""
    if peer.trusted:
        return
    if access == os.O_WRONLY:
        if found.status.st_uid != peer.uid:
            raise NotPermittedError("belongs to another user")
    elif not stat.S_ISLNK(found.status.st_mode) and not os.access(
        f"/proc/self/fd/{found.opath}", os.R_OK, effective_ids=True
    ):
        raise NotPermittedError("you may not read it")


def outcome_of(path: bytes, exc: Exception) -> control.Outcome:
    """An error as what is told of one path."""
    if isinstance(exc, TierError):
        return control.Outcome(path, str(exc), failed=True)
    reasons = {
        errno.ENOENT: "does not exist",
        errno.ENOTDIR: "does not exist",
        errno.EACCES: "you may not reach it",
        errno.ELOOP: "passes through a symbolic link",
    }
    number = exc.errno if isinstance(exc, OSError) and exc.errno else errno.EIO
    return control.Outcome(path, reasons.get(number, os.strerror(number)), failed=True)


def join(directory: bytes, name: bytes) -> bytes:
    """A path below a directory; b"" is the root."""
    return directory + b"/" + name if directory else name
