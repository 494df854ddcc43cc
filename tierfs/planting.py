"""A tree of stubs from what a journal tells, and the records that go with it.

What a journal says is data from the store, which others may be able to write. Nothing in it reaches a place
outside of the new tree: every name is one checked component, made anew (never opened if it is there) beneath a
descriptor of a directory that was made here; nothing follows a symbolic link. A directory gets one place, other
names of it are refused; what cannot be made is named and left out, and the rest goes on.

Content that no copy has is not made up: a file without any copy is *lost* and left out (an empty one is made),
one with only an older copy comes back as of that copy and is named too. One of which there is a rescue copy
(rescuing.py) comes back as of that, under a title of its own.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from tierfs import manifest
from tierfs.errors import VolumeError
from tierfs.manifest import AnyInode, Directory, File, Special, Symlink
from tierfs.model import Copy, Record, Residency, Stub, epoch_of, new_fid
from tierfs.namespace import MOST_DEPTH
from tierfs.namespace import Tree as Namespace
from tierfs.spelling import quoted
from tierfs.tree import Tree, fd_path

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_KINDS = {"fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK, "char": stat.S_IFCHR, "block": stat.S_IFBLK}
_SET_ID = stat.S_ISUID | stat.S_ISGID
_FIRST_GENERATION = 1
_MOST_EPOCHS = 1024  # more than a session can run through: a journal that lies must not use them up
_STEP = 12  # components of a path that are opened at once: twelve names always fit
_CAPABILITY = "security.capability"


@dataclass(frozen=True, slots=True)
class Left:
    """A file that did not come back as it was last. `since` (ns): since when the store lacks its content."""

    path: bytes
    size: int
    since: int
    copied: int = 0  # mtime (ns) of the older content that came back instead; when a rescue copy was taken


@dataclass(slots=True)
class Outcome:
    """What became of a restore. `content`: bytes of all files; `refused`: what could not be made as told."""

    files: int = 0
    directories: int = 0
    others: int = 0
    content: int = 0
    lost: list[Left] = field(default_factory=list)
    older: list[Left] = field(default_factory=list)
    rescued: list[Left] = field(default_factory=list)
    refused: list[tuple[bytes, str]] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        """Sum up."""
        self.files += other.files
        self.directories += other.directories
        self.others += other.others
        self.content += other.content
        self.lost += other.lost
        self.older += other.older
        self.rescued += other.rescued
        self.refused += other.refused


@dataclass(slots=True)
class Planted:
    """A regular file that was made. `extents` of a sparse one. `pinned` itself."""

    record: Record
    extents: list[tuple[int, int]] | None = None
    pinned: bool = False


@dataclass(slots=True)
class Place:
    """A directory that was made: its path, its inode number, and its line."""

    path: bytes
    ino: int
    parent: int
    name: bytes
    line: Directory


def run_on(names: Namespace, epoch: int) -> int:
    """This epoch, or the last one into which the generations of a session of the former machine have run on."""
    lines = (line for file in names.files() for line in (file.copy, file.rescue) if line is not None)
    used = (epoch_of(line.generation) for line in lines)
    return max([epoch, *(each for each in used if each <= epoch + _MOST_EPOCHS)])


class Planter:
    """Makes one tree: `directories`, then `fill` for each of them in any order, `link`, and last `finish`."""

    def __init__(self, tree: Tree, names: Namespace, epoch: int, special: bool = True) -> None:
        """`epoch`: generations of later ones are refused. Not `special`: without devices, set-id bits and file
        capabilities."""
        self._tree = tree
        self._names = names
        self._epoch = epoch
        self._special = special
        self._uid = os.geteuid()
        self._several = _several(names)
        self._foreign = False
        self.outcome = Outcome()

    # --- directories --------------------------------------------------------------------------------------

    def directories(self) -> list[Place]:
        """Make all directories, empty and with rights for us only; those above come before those below.

        Raises VolumeError where there is no root.
        """
        root = self._names.inodes.get(self._names.root)
        if not isinstance(root, Directory):
            raise VolumeError("the journal has no root directory")
        places = [Place(b"", self._tree.root_ino, 0, b"", root)]
        entered = {root.id}
        depths = [0]
        at = 0
        while at < len(places):
            place, depth = places[at], depths[at]
            at += 1
            below = [
                (name, inode)
                for name, inode in self._names.children(place.line.id)
                if isinstance(inode, Directory)
            ]
            if not below:
                continue
            with self.opened(place.path) as fd:
                for name, inode in below:
                    path = place.path + b"/" + name if place.path else name
                    if inode.id in entered or depth >= MOST_DEPTH:
                        self._refuse(path, "is one directory in two places, or too deep")
                        continue
                    entered.add(inode.id)
                    with self._refusing(path):
                        os.mkdir(name, 0o700, dir_fd=fd)
                        ino = os.stat(name, dir_fd=fd, follow_symlinks=False).st_ino
                        places.append(Place(path, ino, place.ino, name, inode))
                        depths.append(depth + 1)
        self.outcome.directories = len(places)
        return places

    @contextlib.contextmanager
    def opened(self, path: bytes) -> Iterator[int]:
        """A descriptor of a directory made here, however long its path is."""
        fd = os.dup(self._tree.rootfd)
        try:
            parts = path.split(b"/") if path else []
            for start in range(0, len(parts), _STEP):
                below = os.open(b"/".join(parts[start : start + _STEP]), _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)

    # --- what is in them ----------------------------------------------------------------------------------

    def fill(self, place: Place, keep: Callable[[Planted], None]) -> None:
        """Make everything in a directory but directories, and what has several names; `keep` gets the files."""
        with self.opened(place.path) as fd:
            for name, inode in self._names.children(place.line.id):
                if isinstance(inode, Directory) or inode.id in self._several:
                    continue
                path = place.path + b"/" + name if place.path else name
                with self._refusing(path):
                    made = self._make(fd, name, path, inode, place.ino)
                    if made is not None:
                        keep(made)

    def link(self, places: list[Place], keep: Callable[[Planted], None]) -> None:
        """Make what has several names: once, and then links to it."""
        if not self._several:
            return
        names: dict[str, list[tuple[Place, bytes]]] = {}
        for place in places:
            for name, inode in self._names.children(place.line.id):
                if inode.id in self._several and not isinstance(inode, Directory):
                    names.setdefault(inode.id, []).append((place, name))
        for ident, where in names.items():
            first, name = where[0]
            path = first.path + b"/" + name if first.path else name
            with self._refusing(path), self.opened(first.path) as fd:
                made = self._make(fd, name, path, self._names.inodes[ident], first.ino)
                if made is None and not _exists(fd, name):
                    continue
                for place, other in where[1:]:
                    with self._refusing(place.path + b"/" + other), self.opened(place.path) as there:
                        os.link(name, other, src_dir_fd=fd, dst_dir_fd=there, follow_symlinks=False)
                if made is not None:
                    # A link moves the ctime by which the index knows that nobody else has touched the file.
                    ctime = os.stat(name, dir_fd=fd, follow_symlinks=False).st_ctime_ns
                    made.record = _with_ctime(made.record, ctime)
                    keep(made)

    def finish(self, places: list[Place]) -> None:
        """Give directories their owners, modes and times, those below first."""
        for place in reversed(places):
            with self._refusing(place.path), self.opened(place.path) as fd:
                self._dress(fd, place.path, place.line, stat.S_IFDIR)

    # --- one inode ----------------------------------------------------------------------------------------

    def _make(self, dirfd: int, name: bytes, path: bytes, inode: AnyInode, parent: int) -> Planted | None:
        if isinstance(inode, File):
            return self._file(dirfd, name, path, inode, parent)
        if isinstance(inode, Symlink):
            os.symlink(manifest.raw(inode.target), name, dir_fd=dirfd)
        elif isinstance(inode, Special):
            kind = _KINDS.get(inode.kind)
            if kind is None or (kind in (stat.S_IFCHR, stat.S_IFBLK) and not self._special):
                self._refuse(path, f"is a special file that is not made: {inode.kind}")
                return None
            os.mknod(name, kind | 0o600, inode.rdev, dir_fd=dirfd)
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dirfd)
        try:
            self._dress(fd, path, inode, os.fstat(fd).st_mode)
        finally:
            os.close(fd)
        self.outcome.others += 1
        return None

    def _file(self, dirfd: int, name: bytes, path: bytes, file: File, parent: int) -> Planted | None:
        copy = self._copy_of(file)
        if copy is None and file.size:
            self.outcome.lost.append(Left(path, file.size, file.since))
            return None
        if copy is not None and file.dirty and file.rescue is not None:
            self.outcome.rescued.append(Left(path, file.size, file.since, file.rescued))
        elif copy is not None and file.dirty:
            self.outcome.older.append(Left(path, file.size, file.since, copy.mtime))
        fid = bytes.fromhex(file.fid) if copy is not None else new_fid()
        size = copy.size if copy is not None else 0
        fd = os.open(name, _NEW, 0o600, dir_fd=dirfd)
        try:
            if size and copy is not None:
                os.ftruncate(fd, size)
                self._tree.write_stub(fd, Stub.of(fid, copy))
            self._dress(fd, path, file, stat.S_IFREG, copy.mtime if copy is not None and file.dirty else None)
            st, handle = os.fstat(fd), self._tree.handle_of(fd)
        except BaseException:
            os.unlink(name, dir_fd=dirfd)
            raise
        finally:
            os.close(fd)
        self.outcome.files += 1
        self.outcome.content += size
        record = Record(
            st.st_ino, handle, fid, copy.generation if copy is not None else _FIRST_GENERATION,
            Residency.STUB if size else Residency.RESIDENT, size, _blocks(file, size), 0, parent, name, copy,
            st.st_ctime_ns if copy is not None else 0,
        )  # fmt: skip
        return Planted(record, _extents(file, size) if size and not file.dirty else None, file.pinned)

    def _copy_of(self, file: File) -> Copy | None:
        """The copy that the file comes back from, with the times that it will show. Raises ValueError."""
        line = file.rescue if file.dirty and file.rescue is not None else file.copy
        if line is None:
            return None
        if len(bytes.fromhex(file.fid)) != 16 or epoch_of(line.generation) > self._epoch:
            raise ValueError("its copy is none that this volume could have made")
        copy = line.copy()
        if file.dirty:
            return copy
        if copy.size != file.size:
            raise ValueError(f"is {file.size} bytes long, its copy {copy.size}")
        return Copy(
            copy.generation, copy.tag, copy.digest, copy.size, file.mtime, file.ctime, 0, copy.chunk_shift
        )

    def _dress(self, fd: int, path: bytes, inode: AnyInode, kind: int, mtime: int | None = None) -> None:
        """Owner, attributes, mode, times, in this order: a new owner takes capabilities and set-id away."""
        place, mode = fd_path(fd), inode.mode
        if self._uid == 0:
            os.chown(place, inode.uid, inode.gid)
        elif inode.uid != self._uid and not self._foreign:
            self._foreign = True
            self._refuse(path, "and others belonged to another user: only root can give them back")
        for text, value in (inode.xattrs or {}).items():
            self._set_xattr(place, path, text, value)
        if inode.pinned and stat.S_IFMT(kind) in (stat.S_IFREG, stat.S_IFDIR):
            self._tree.set_pin(fd, True)
        if mode & _SET_ID and not stat.S_ISDIR(kind) and not self._special:
            self._refuse(path, "comes back without its set-id bits")
            mode &= ~_SET_ID
        if not stat.S_ISLNK(kind):
            os.chmod(place, mode)
        when = inode.mtime if mtime is None else mtime
        os.utime(place, ns=(when, when))

    def _set_xattr(self, place: str, path: bytes, text: str, value: str) -> None:
        name = os.fsdecode(manifest.raw(text))
        if name.startswith(("trusted.tierfs", "user.tierfs")) or (name == _CAPABILITY and not self._special):
            self._refuse(path, f"comes back without its attribute {quoted(name)}")
            return
        try:
            os.setxattr(place, name, base64.b64decode(value, validate=True))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            self._refuse(path, f"comes back without its attribute {quoted(name)}: {reason}")

    # --- what is refused ----------------------------------------------------------------------------------

    def _refuse(self, path: bytes, reason: str) -> None:
        self.outcome.refused.append((path, reason))

    @contextlib.contextmanager
    def _refusing(self, path: bytes) -> Iterator[None]:
        """What one name cannot be is no reason to leave out the others; a full disk is."""
        try:
            yield
        except (ValueError, OverflowError) as error:
            self._refuse(path, str(error))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE):
                raise
            self._refuse(path, f"cannot be made: {error.strerror}")


def _several(names: Namespace) -> set[str]:
    """Ids of what has more than one name."""
    seen: set[str] = set()
    several: set[str] = set()
    for entries in names.names.values():
        for ident in entries.values():
            if ident in seen:
                several.add(ident)
            else:
                seen.add(ident)
    return several


def _exists(dirfd: int, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=dirfd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _with_ctime(record: Record, ctime: int) -> Record:
    if record.copy is None:
        return record
    return replace(record, left_ctime=ctime)


def _blocks(file: File, size: int) -> int:
    """What `stat` will show."""
    most = -(-size // 4096) * 8
    return min(file.blocks, most + 8) if file.blocks and not file.dirty else most


def _extents(file: File, size: int) -> list[tuple[int, int]] | None:
    """Those of a sparse file, if they make sense."""
    if file.extents is None:
        return None
    end = 0
    for start, stop in file.extents:
        if not end <= start < stop <= size:
            return None
        end = stop
    return list(file.extents)
