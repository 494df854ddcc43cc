"""Where a file stands in the backing tree, and whether something above it is pinned.

From the index's hints of (parent, name), each verified by inode number; what cannot be verified is unknown.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tierfs.index import Index
from tierfs.kit import is_gone, is_passing
from tierfs.tree import Tree, fd_path

_DEPTH = 512
_LOOKS = 5  # where a file is that is being moved
_MOST = 20_000  # directories that are known: five megabytes
_LONG = 4000  # bytes: a system call takes 4095 of a path
_STEP = 12  # components that always fit
_WAY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Place(NamedTuple):
    """A directory: its path from the root, and whether it or an ancestor is pinned."""

    path: bytes
    pinned: bool


class Directory(NamedTuple):
    """A directory that is to be listed: what it is known by for good, and where it was seen."""

    ino: int
    handle: bytes
    path: bytes

    @classmethod
    def root(cls, tree: Tree) -> Directory:
        """At which a walk begins."""
        return cls(tree.root_ino, tree.handle_of(tree.rootfd), b"")


class Places:
    """Answers are kept until `forget`. Safe to use from several threads."""

    def __init__(self, tree: Tree, index: Index) -> None:
        self._tree = tree
        self._index = index
        self._lock = threading.Lock()
        self._known: dict[int, Place] = {}
        self._forgotten = 0  # how often
        self._root = os.fsencode(os.path.realpath(tree.path))

    def forget(self) -> None:
        """Directories or pins may have changed."""
        with self._lock:
            self._known = {}
            self._forgotten += 1

    def directory(self, ino: int, depth: int = 0) -> Place | None:
        """The directory with this inode number; None where the hints lead elsewhere."""
        with self._lock:
            known = self._known.get(ino)
            began = self._forgotten
        if known is not None:
            return known
        if ino == self._tree.root_ino:
            place = Place(b"", self._tree.is_pinned(self._tree.rootfd))
        else:
            hint = self._index.get_dir(ino)
            above = self.directory(hint[0], depth + 1) if hint is not None and depth < _DEPTH else None
            if hint is None or above is None:
                return None
            found = self._look(ino, above, hint[1])
            if found is None:
                return None
            place = found
        with self._lock:
            # What was looked up before a rename or a pin must not be believed after it.
            if began == self._forgotten:
                if len(self._known) >= _MOST:
                    self._known = {}  # those that are in use come back one by one
                self._known[ino] = place
        return place

    def _look(self, ino: int, above: Place, name: bytes) -> Place | None:
        path = join(above.path, name)
        try:
            with self._near(path) as (near, rest):
                fd = os.open(rest, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=near)
        except OSError:
            return None  # renamed or removed since: the next mark will say
        try:
            st = os.fstat(fd)
            if st.st_ino != ino or st.st_dev != self._tree.device:
                return None
            return Place(path, above.pinned or self._tree.is_pinned(fd))
        finally:
            os.close(fd)

    def look_at(self, ino: int) -> int:
        """An O_PATH descriptor of the directory of this number, -1 where its place is not known."""
        place = self.directory(ino)
        if place is None:
            return -1
        try:
            with self._near(place.path) as (near, rest):
                fd = os.open(rest, _WAY, dir_fd=near)
        except OSError:
            return -1
        st = os.fstat(fd)
        if (st.st_ino, st.st_dev) == (ino, self._tree.device):
            return fd
        os.close(fd)
        return -1

    def opened(self, directory: Directory) -> int:
        """A descriptor to list a directory by, wherever it is by now: never of what somebody has put in its
        place, or of where a link on the way leads.

        Raises OSError: ESTALE or the like where it is gone, or nobody knows where it is.
        """
        if self._tree.privileged:
            try:
                return self._tree.open_handle(directory.handle, _LIST)
            except OSError as error:
                if is_passing(error):
                    raise
        # By its handle whatever cannot be read is gone to the kernel; its name tells more.
        try:
            return self._opened_at(directory, directory.path)
        except OSError as error:
            place = None if self._tree.privileged or is_passing(error) else self.directory(directory.ino)
            if place is None or place.path == directory.path:
                raise
            try:
                return self._opened_at(directory, place.path)
            except OSError as elsewhere:  # where it was once: that says nothing of what is there and closed
                raise error if is_gone(elsewhere) else elsewhere from None

    def _opened_at(self, directory: Directory, path: bytes) -> int:
        with self._near(path) as (above, rest):
            return self._tree.open_at(rest, directory.handle, _LIST, above)

    def of_file(self, fd: int, parent: int, name: bytes) -> Place | None:
        """The path of what is open there, and whether it is pinned by itself or from above; None where it is
        gone, or moved at each look. `parent`, `name`: where it may be; 0: nowhere. Raises OSError."""
        above = self.directory(parent) if parent else None
        if above is not None and self._is(fd, join(above.path, name)):
            return Place(join(above.path, name), above.pinned or self._tree.is_pinned(fd))
        for _ in range(_LOOKS):  # a move is over by the next one
            path = self._path_now(fd)
            if path is None:
                return None
            place = self.at(fd, path)
            if place is not None:
                return place
        return None

    def at(self, fd: int, path: bytes) -> Place | None:
        """What is open there, and whether it is pinned by itself or from above; None where this is not its
        path, or no longer. Raises OSError."""
        if not self._is(fd, path):
            return None
        try:
            is_link = stat.S_ISLNK(os.fstat(fd).st_mode)  # which has no attributes of ours
            pinned = not is_link and self._tree.is_pinned(fd)
            place = Place(path, pinned or self._pinned_above(path))
        except OSError as error:
            if not is_gone(error):
                raise
            return None
        # What has taken the place of a directory meanwhile says nothing of this file.
        return place if self._is(fd, path) else None

    def _path_now(self, fd: int) -> bytes | None:
        """What the kernel says; None where it is gone, or too deep for the kernel to tell."""
        try:
            path = os.readlink(os.fsencode(fd_path(fd)))
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            return None
        if not path.startswith(self._root + b"/") or not os.fstat(fd).st_nlink:
            return None
        return path[len(self._root) + 1 :]

    def _is(self, fd: int, path: bytes) -> bool:
        try:
            with self._near(path) as (near, rest):
                there = os.stat(rest, dir_fd=near, follow_symlinks=False)
        except OSError:
            return False
        return os.path.samestat(there, os.fstat(fd))

    @contextmanager
    def _near(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        """A descriptor of a directory on the way to a place in the tree, and what is left of its path: not too
        long for a system call. Raises OSError."""
        if len(path) < _LONG:
            yield self._tree.rootfd, path or b"."
            return
        parts = path.split(b"/")
        fd = os.dup(self._tree.rootfd)
        try:
            while len(parts) > _STEP:
                on = os.open(b"/".join(parts[:_STEP]), _WAY, dir_fd=fd)
                os.close(fd)
                fd, parts = on, parts[_STEP:]
            yield fd, b"/".join(parts)
        finally:
            os.close(fd)

    def _pinned_above(self, path: bytes) -> bool:
        parts = path.split(b"/")[:-1]
        for depth in range(len(parts) + 1):
            fd = os.open(b"/".join(parts[:depth]) or b".", os.O_PATH | os.O_DIRECTORY, dir_fd=self._tree.rootfd)
            try:
                if self._tree.is_pinned(fd):
                    return True
            finally:
                os.close(fd)
        return False


def join(directory: bytes, name: bytes) -> bytes:
    """A path below a directory; b"" is the root."""
    return directory + b"/" + name if directory else name
