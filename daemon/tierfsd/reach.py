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
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tierfs import control
from tierfs.errors import NotPermittedError, PathError, TierError
from tierfs.kit import is_gone
from tierfsd.credentials import Peer, acting_as


class Target(NamedTuple):
    """A regular file that a request is about. `named`: it was given itself, not found in a directory."""

    path: bytes
    ino: int
    handle: bytes
    parent: int
    name: bytes
    size: int
    named: bool


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
    ) -> tuple[list[Target], list[control.Outcome]]:
        """All regular files that the paths name or contain, each once whatever its links, and what could not be
        reached."""
        targets: dict[int, Target] = {}
        stayed: list[control.Outcome] = []
        for path in paths:
            try:
                with self.find(peer, path, access) as found, acting_as(peer):
                    if stat.S_ISDIR(found.status.st_mode):
                        self._gather(peer, found.opath, path, access, targets, stayed, cancelled)
                    elif stat.S_ISREG(found.status.st_mode):
                        _add(targets, self._target(found, path, named=True))
                    else:
                        stayed.append(control.Outcome(path, "is not a regular file: it always stays local"))
            except (TierError, OSError) as exc:
                stayed.append(outcome_of(path, exc))
        return list(targets.values()), stayed

    def _target(self, found: Found, path: bytes, *, named: bool) -> Target:
        return Target(
            path,
            found.status.st_ino,
            self._handle_of(found.opath),
            found.parent,
            found.name,
            found.status.st_size,
            named,
        )

    def _gather(
        self,
        peer: Peer,
        top: int,
        path: bytes,
        access: int,
        targets: dict[int, Target],
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
                for text in _listed(directory):
                    name = os.fsencode(text)
                    with contextlib.suppress(FileNotFoundError, PermissionError, NotPermittedError):
                        child = self._child(peer, directory, parent, name, join(here, name), access)
                        if isinstance(child, Target):
                            _add(targets, child)
                        elif child is not None:
                            pending.append(child)
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
        self, peer: Peer, directory: int, parent: int, name: bytes, path: bytes, access: int
    ) -> Target | bytes | None:
        """One entry: a target, the path of a directory to look into, or nothing."""
        opath = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=directory)
        try:
            found = Found(opath, os.fstat(opath), parent, name)
            if found.status.st_dev != self._device:
                return None
            if stat.S_ISDIR(found.status.st_mode):
                return path
            if not stat.S_ISREG(found.status.st_mode):
                return None
            _permit(peer, found, access)
            return self._target(found, path, named=False)
        finally:
            os.close(opath)


def _listed(directory: int) -> list[str]:
    """The names in it; none where it has been removed meanwhile."""
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _add(targets: dict[int, Target], target: Target) -> None:
    """Two links to a file are one target; the one that was given itself counts, as its user is told of it."""
    if target.named or target.ino not in targets:
        targets[target.ino] = target


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
