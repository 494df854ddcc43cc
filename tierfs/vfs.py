"""The POSIX operations of a mount, over the backing tree. Knows nothing of FUSE and nothing of the store.

Nodes go by number (ROOT is the mount's own directory), open files and directories by handle number; names are
bytes. An operation raises OSError or TierError, or Blocked before it has changed anything: then it is to be run
again when the wait fires. It may return Slow. Permissions are the kernel's business (default_permissions).
Attributes are stat results, or objects with the same st_* fields. Not thread-safe: one thread, or one lock.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from tierfs import syscalls
from tierfs.dirs import Directories
from tierfs.gate import Gate
from tierfs.handles import Handle, Shown
from tierfs.intents import Doing
from tierfs.ledger import MOST_NAME
from tierfs.making import Caller, Maker, changed_by, in_group
from tierfs.marks import Entry
from tierfs.names import Names
from tierfs.nodes import DIRECTORY_FDS, ROOT, GoneStat, Node, NodeTable
from tierfs.openfiles import OpenFiles
from tierfs.told import Told
from tierfs.tree import Tree, fd_path
from tierfs.xattrs import Xattrs

__all__ = ["NOW", "ROOT", "Attr", "Caller", "Statfs", "Vfs"]

Attr = Shown | GoneStat
NOW = 1 << 70  # a time to be set: the present one, by the backing filesystem's own clock

_BILLION = 1_000_000_000
_SET_ID = stat.S_ISUID | stat.S_ISGID
_EXECUTABLE = stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH


class Statfs(NamedTuple):
    """Sizes of the filesystem in blocks of `frsize` bytes."""

    bsize: int
    frsize: int
    blocks: int
    bfree: int
    bavail: int
    files: int
    ffree: int
    namelen: int


def _stays_fit(st: os.stat_result, mode: int | None) -> bool:
    """With this mode a file is as fit for passthrough as before (states.States.register): what can be run may
    have file capabilities, which were not asked for before."""
    if mode is None:
        return not st.st_mode & _SET_ID
    runs = mode & _EXECUTABLE and not st.st_mode & _EXECUTABLE
    return not (runs or (st.st_mode | mode) & _SET_ID)


def _error(number: int, name: bytes | None = None) -> OSError:
    return OSError(number, os.strerror(number), name)


def _there(dirfd: int, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=dirfd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _timespec(when: int | None) -> tuple[int, int]:
    if when is None:
        return 0, syscalls.UTIME_OMIT
    if when == NOW:
        return 0, syscalls.UTIME_NOW
    return divmod(when, _BILLION)


class Vfs:
    """See the module's docstring. `readdirplus` is `readdir` with a `lookup` of each name but . and .. ."""

    def __init__(
        self,
        tree: Tree,
        gate: Gate,
        evictable: Callable[[], int] = lambda: 0,
        heat: Callable[[int], bytes | None] = lambda ino: None,
        directory_fds: int = DIRECTORY_FDS,
    ) -> None:
        """`evictable`: bytes that can be freed at once; `heat`: what `user.tierfs.heat` of an inode says."""
        self.tree = tree
        self.gate = gate
        self.ledger = gate.ledger
        self.nodes = NodeTable(tree, gate.ledger, directory_fds)
        self.nodes.ended = gate.lasting.ended
        self.told = Told()
        self.files = OpenFiles(gate, self.nodes)
        self._evictable = evictable
        self._maker = Maker()
        self.dirs = Directories(self.nodes, gate.ledger)
        names = Names(tree, gate, self.nodes)
        xattrs = Xattrs(tree, gate, self.nodes, heat)
        self.read = self.files.read
        self.stretch = self.files.stretch
        self.write = self.files.write
        self.release = self.files.release
        self.flush = self.files.flush
        self.fsync = self.files.fsync
        self.fallocate = self.files.fallocate
        self.lseek = self.files.lseek
        self.copy_file_range = self.files.copy_file_range
        self.opendir = self.dirs.open
        self.readdir = self.dirs.read
        self.releasedir = self.dirs.release
        self.fsyncdir = self.dirs.fsync
        self.entries = self.dirs.entries
        self.syncdir = self.dirs.sync
        self.unlink = names.unlink
        self.rmdir = names.rmdir
        self.rename = names.rename
        self.getxattr = xattrs.get
        self.listxattr = xattrs.list
        self.setxattr = xattrs.set
        self.removexattr = xattrs.remove

    def close(self) -> None:
        """Close all descriptors of nodes and directories."""
        self.dirs.close()
        self.nodes.close()

    def take_over(self, undrained: Iterable[Entry], kept_fds: Mapping[int, int]) -> None:
        """Go on where a killed server has stopped, by what it left in the ledger.

        `undrained`: marks that no mover has seen; `kept_fds`: descriptors of nameless files, by inode number.
        """
        self.ledger.load_intents()
        self.nodes.restore(kept_fds)
        self.gate.marking.take_over(undrained)
        self.gate.succession.begin()
        self.files.restore()
        self.dirs.restore()
        if not self.files.late:
            self.gate.succession.end()

    def again(self, request: int) -> None:
        """Call before a request is run that was sent again: what its first run opened is closed."""
        self.files.undo(request)
        self.dirs.undo(request)
        self.ledger.replayed = self.ledger.pending(request)

    def done_again(self, *, last: bool) -> None:
        """Call when a request that was sent again has been carried out, and with `last` when all have been.
        What was open under a name that a killed server had just changed is where the ledger says by now."""
        self.dirs.restore_late(last=last)
        if self.files.late:
            self.files.restore_late(last=last)
            if not self.files.late:
                self.gate.succession.end()

    def _intend_to_make(self, directory: Node, dirfd: int, name: bytes) -> None:
        """Something new is about to have this name; what a killed server made of the same request goes first.

        The kernel asks for what it knows to be absent, and nobody has been told of it: it is ours, and empty.
        """
        begun = self.ledger.replayed
        if begun is not None and begun.doing is Doing.MAKE:
            born = syscalls.birth_time(dirfd, name) if _there(dirfd, name) else None
            if born is not None and born >= begun.when:
                self._unmake(directory, dirfd, name)
        self.ledger.intend(Doing.MAKE)

    def _unmake(self, directory: Node, dirfd: int, name: bytes) -> None:
        """Remove it, unless something is in it. The killed server may have marked that it is there.

        The mark of its end goes first: one that is killed in between leaves the name, and it is done again.
        """
        st = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
        is_dir, regular = stat.S_ISDIR(st.st_mode), stat.S_ISREG(st.st_mode)
        if regular and st.st_size:
            return
        self.gate.marking.need()
        if regular:
            self.gate.gone(st, self.tree.handle_at(dirfd, name), directory.ino, name)
        else:
            self.gate.marking.entry(directory.ino, name, st.st_ino if is_dir else 0)
        (os.rmdir if is_dir else os.unlink)(name, dir_fd=dirfd)
        node = self.nodes.known(st.st_ino)
        if node is not None:
            self.nodes.unlinked(node, st)

    def holds(self) -> dict[str, int]:
        """How many nodes, open files and open directories there are."""
        return {"nodes": len(self.nodes), "files": len(self.files), "directories": len(self.dirs)}

    # --- nodes and attributes -----------------------------------------------------------------------------

    def _attr(self, st: os.stat_result) -> Attr:
        return self.gate.appearance.shown(st) if stat.S_ISREG(st.st_mode) else st

    def lookup(self, parent: int, name: bytes, *, listed: bool = False) -> tuple[int, Attr]:
        """The node of a name, and its attributes; counts one lookup. Raises OSError.

        `listed`: nobody has asked for it yet, but many are asked for then.
        """
        directory = self.nodes.get(parent)
        dirfd = self.nodes.dirfd(directory)
        if len(name) > MOST_NAME:  # some filesystems have longer ones, and the kernel asks for them
            raise _error(errno.ENAMETOOLONG, name)
        st = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
        if not listed and self.nodes.known(st.st_ino) is None:
            self.gate.lasting.believe(st)
        elif self.gate.lasting.prove(dirfd, name, st):
            st = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
        attr = self._attr(st)
        return self.nodes.found(st, directory, name).id, attr

    def confirm(self, most: int) -> list[int]:
        """Prove what was believed, so many files at most; of which nodes the kernel was told what is not so."""
        believed = self.gate.lasting.believed
        wrong = []
        for ino in list(itertools.islice(believed, most)):
            ctime, node = believed.pop(ino), self.nodes.known(ino)
            if node is not None and not self._is_confirmed(node, ctime):
                wrong.append(node.id)
        return wrong

    def disbelieve(self, most: int) -> list[int]:
        """Of what was believed, so many files at most that are to be proven when they are asked for again."""
        lasting = self.gate.lasting
        nodes = []
        for ino in list(itertools.islice(lasting.believed, most)):
            del lasting.believed[ino]
            node = self.nodes.known(ino)
            if node is not None:
                lasting.unproven.add(ino)
                nodes.append(node.id)
        return nodes

    def _is_confirmed(self, node: Node, ctime: int) -> bool:
        if node.anchor is not None or node.parent is None:
            return False
        try:
            dirfd, name = self.nodes.dirfd(node.parent), self.nodes.name(node)
        except OSError:
            return False  # its directory is not where it was
        return self.gate.lasting.confirm(dirfd, name, node.ino, ctime)

    def told_lately(self, parent: int, name: bytes, ino: int) -> bool:
        """The kernel need not be told what this name in a listing is."""
        node = self.nodes.known(ino)
        if node is None or node.anchor is not None or node.parent is not self.nodes.get(parent):
            return False
        return self.told.lasts(node.id) and self.nodes.name(node) == name

    def forget(self, nodeid: int, count: int = 1) -> None:
        """Take back lookups."""
        self.nodes.forget(nodeid, count)

    def getattr(self, nodeid: int, fh: int | None = None) -> Attr:
        """Attributes now. Raises OSError."""
        handle = self.files.find(fh)
        if handle is not None:
            return self._attr(os.fstat(handle.inode.opath))
        node = self.nodes.get(nodeid)
        kept = self.nodes.stat_of_kept(node) if self.gate.lasting.watched else None
        if kept is not None:
            return self._attr(kept)
        st = self.nodes.stat(node)
        if not isinstance(st, GoneStat) and node.anchor is None and node.parent is not None:
            dirfd, name = self.nodes.dirfd(node.parent), self.nodes.name(node)
            if self.gate.lasting.is_restless(st):
                self.gate.lasting.doubt(st)
            elif self.gate.lasting.prove(dirfd, name, st):
                st = self.nodes.stat(node)
        return st if isinstance(st, GoneStat) else self._attr(st)

    def birth_time(self, nodeid: int) -> int | None:
        """When it was made, nanoseconds; None where that is not known. Raises OSError."""
        fd, _ = self.nodes.reach(self.nodes.get(nodeid))
        try:
            return syscalls.birth_time(fd, b"")
        finally:
            os.close(fd)

    def setattr(
        self,
        nodeid: int,
        fh: int | None = None,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        kill_suidgid: bool = False,
        caller: Caller | None = None,
    ) -> Attr:
        """Change what is given (times may be NOW); the new attributes. Raises Blocked, OSError."""
        node = self.nodes.get(nodeid)
        handle = self.files.find(fh)
        opath, st = self._reach(node, handle)
        try:
            regular = stat.S_ISREG(st.st_mode)
            if regular:
                self.gate.before_change(st.st_ino, registered=size is None and _stays_fit(st, mode))
            if size is not None:
                self._resize(node, handle, opath, st, size)
            path = fd_path(opath)
            owner = uid is not None or gid is not None
            if owner:  # the kernel beneath takes the set-id bits that go with it
                os.chown(path, -1 if uid is None else uid, -1 if gid is None else gid)
                if caller is not None and mode is None:
                    self._drop_set_gid_of_stranger(path, st, caller)
            if mode is not None:
                os.chmod(path, stat.S_IMODE(mode))
            elif (kill_suidgid and not owner) or (size is not None and caller is not None and caller.uid != 0):
                changed_by(caller, opath)
            if atime_ns is not None or mtime_ns is not None:
                times = (*_timespec(atime_ns), *_timespec(mtime_ns))
                syscalls.utimensat(syscalls.AT_FDCWD, os.fsencode(path), times, 0)
            st = os.fstat(opath)
            if regular:
                self.gate.after_change(st.st_ino, st, mtime_set=mtime_ns is not None)
                if mode is not None and mode & _SET_ID:
                    self.gate.given_set_id(st.st_ino, st)
            self.gate.marking.attributes(st, node.parent_ino, self.nodes.name(node))
        finally:
            os.close(opath)
        return self._attr(st)

    def _drop_set_gid_of_stranger(self, path: str, before: os.stat_result, caller: Caller) -> None:
        """A change of owner drops set-group-id also without group execution, unless a member of the group asks.

        The kernel beneath sees us in the caller's place.
        """
        lone = before.st_mode & (stat.S_ISGID | stat.S_IXGRP) == stat.S_ISGID
        if lone and stat.S_ISREG(before.st_mode) and caller.uid != 0 and not in_group(caller, before.st_gid):
            os.chmod(path, stat.S_IMODE(os.stat(path).st_mode) & ~stat.S_ISGID)

    def _reach(self, node: Node, handle: Handle | None) -> tuple[int, os.stat_result]:
        if handle is None:
            return self.nodes.reach(node)
        opath = os.dup(handle.inode.opath)
        return opath, os.fstat(opath)

    def _resize(self, node: Node, handle: Handle | None, opath: int, st: os.stat_result, size: int) -> None:
        if not stat.S_ISREG(st.st_mode):
            raise _error(errno.EISDIR if stat.S_ISDIR(st.st_mode) else errno.EINVAL, self.nodes.name(node))
        if handle is not None and not self.tree.privileged:
            # The mode may forbid what the open descriptor allows.
            with self.gate.contents.borrowed(handle, True) as fd:
                os.ftruncate(fd, size)
        else:
            self.gate.contents.truncate(opath, st, size, node.parent_ino, self.nodes.name(node))

    def statfs(self) -> Statfs:
        """The local space; free is also what can be evicted at once. Raises OSError."""
        fs = os.fstatvfs(self.tree.rootfd)
        more = self._evictable() // fs.f_frsize
        return Statfs(
            bsize=fs.f_bsize,
            frsize=fs.f_frsize,
            blocks=fs.f_blocks,
            bfree=min(fs.f_bfree + more, fs.f_blocks),
            bavail=min(fs.f_bavail + more, fs.f_blocks),
            files=fs.f_files,
            ffree=fs.f_ffree,
            namelen=fs.f_namemax,
        )

    # --- making -------------------------------------------------------------------------------------------

    def create(
        self, parent: int, name: bytes, flags: int, mode: int, caller: Caller
    ) -> tuple[int, Attr, int, Handle]:
        """Make a file and open it: (node, attributes, number, handle).

        One that is there already was made behind the mount: ESTALE has the kernel look again, and then ask
        whether the caller may open it.
        """
        self.gate.need_room()
        directory = self.nodes.get(parent)
        dirfd = self.nodes.dirfd(directory)
        self._intend_to_make(directory, dirfd, name)
        try:
            fd, st = self._maker.file(dirfd, name, mode, caller)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            raise _error(errno.ESTALE, name) from None
        handle = self._take(fd, st, flags, directory, name, lambda: os.unlink(name, dir_fd=dirfd))
        handle.uid = caller.uid
        node = self.nodes.made(st, directory, name)
        return node.id, st, self.files.add(node, handle), handle

    def _take(
        self, fd: int, st: os.stat_result, flags: int, directory: Node, name: bytes, undo: Callable[[], None]
    ) -> Handle:
        try:
            return self.gate.created(fd, st, flags, directory.ino, name)
        except BaseException:
            os.close(fd)
            undo()
            raise

    def tmpfile(self, parent: int, flags: int, mode: int, caller: Caller) -> tuple[int, Attr, int, Handle]:
        """A file without a name, as `create` otherwise."""
        self.gate.need_room()
        directory = self.nodes.get(parent)
        begun = self.ledger.replayed
        if begun is not None and begun.first is not None:
            # It ended with its server, which may have marked it: nobody else would tell of its end.
            self.gate.marking.need()
            self.gate.marking.gone(begun.first, begun.handle, directory.ino, b"")
        fd, st = self._maker.nameless(self.nodes.dirfd(directory), flags, mode, caller)
        opath = self.tree.reopen(fd, os.O_PATH)
        self.ledger.intend(Doing.MAKE, st, handle=self.tree.handle_of(opath))
        handle = self._take(fd, st, flags, directory, b"", lambda: os.close(opath))
        node = self.nodes.made(st, None, b"")
        self.nodes.anchor(node, opath)
        return node.id, st, self.files.add(node, handle), handle

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> tuple[int, Attr]:
        """Make a file, fifo, socket or device node."""
        directory = self.nodes.get(parent)
        dirfd = self.nodes.dirfd(directory)
        self._intend_to_make(directory, dirfd, name)
        if stat.S_IFMT(mode) in (0, stat.S_IFREG):
            fd, st = self._maker.file(dirfd, name, mode, caller)
            handle = self._take(fd, st, os.O_WRONLY, directory, name, lambda: os.unlink(name, dir_fd=dirfd))
            self.gate.release(handle)
        else:
            st = self._maker.special(dirfd, name, mode, rdev, caller)
            self.gate.marking.entry(directory.ino, name)
        return self.nodes.made(st, directory, name).id, st

    def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> tuple[int, Attr]:
        """Make a directory."""
        directory = self.nodes.get(parent)
        self.gate.marking.need()
        dirfd = self.nodes.dirfd(directory)
        self._intend_to_make(directory, dirfd, name)
        st = self._maker.directory(dirfd, name, mode, caller)
        self.gate.marking.made_dir(st.st_ino, directory.ino, name)
        return self.nodes.made(st, directory, name).id, st

    def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> tuple[int, Attr]:
        """Make a symbolic link."""
        directory = self.nodes.get(parent)
        dirfd = self.nodes.dirfd(directory)
        self._intend_to_make(directory, dirfd, name)
        st = self._maker.symlink(dirfd, name, target, caller)
        self.gate.marking.entry(directory.ino, name)
        return self.nodes.made(st, directory, name).id, st

    def readlink(self, nodeid: int) -> bytes:
        """Where a symbolic link points. Raises OSError."""
        fd, st = self.nodes.reach(self.nodes.get(nodeid))
        try:
            if not stat.S_ISLNK(st.st_mode):
                raise _error(errno.EINVAL)
            return os.readlink(b"", dir_fd=fd)
        finally:
            os.close(fd)

    def link(self, nodeid: int, parent: int, name: bytes) -> tuple[int, Attr]:
        """Give a file one more name; counts one lookup. Raises Blocked, OSError."""
        directory = self.nodes.get(parent)
        fd, st = self.nodes.reach(self.nodes.get(nodeid))
        try:
            regular = stat.S_ISREG(st.st_mode)
            if regular:
                self.gate.before_change(st.st_ino, registered=True)
            dirfd = self.nodes.dirfd(directory)
            begun, linked = self.ledger.replayed, False
            if begun is not None and begun.doing is Doing.LINK and _there(dirfd, name):
                linked = os.stat(name, dir_fd=dirfd, follow_symlinks=False).st_ino == st.st_ino
            if not linked:
                self.ledger.intend(Doing.LINK)
                os.link(fd_path(fd), name, dst_dir_fd=dirfd)
            st = os.fstat(fd)
        finally:
            os.close(fd)
        if regular:
            self.gate.after_change(st.st_ino, st)
            self.gate.named(st.st_ino, directory.ino, name)
        else:
            self.gate.marking.entry(directory.ino, name)
        attr = self._attr(st)
        return self.nodes.found(st, directory, name).id, attr

    # --- opening ------------------------------------------------------------------------------------------

    def open(
        self, nodeid: int, flags: int, caller: Caller, kill_suidgid: bool = False, looks: bool = False
    ) -> tuple[int, Handle]:
        """Open a regular file: number and handle. `looks`: perhaps nothing will be read.

        Raises Blocked, OSError, TierError.
        """
        node = self.nodes.get(nodeid)
        # The node of a removed file stays while somebody has a descriptor; its number may be another file's.
        own = self.nodes.known(node.ino) is node
        known = self.gate.reopen(node.ino, flags, caller.pid) if own else None
        if known is not None:
            known.uid = caller.uid
            return self.files.add(node, known), known
        opath, st = self.nodes.reach(node)
        try:
            if not stat.S_ISREG(st.st_mode):
                raise _error(errno.EISDIR if stat.S_ISDIR(st.st_mode) else errno.ENXIO, self.nodes.name(node))
            name = self.nodes.name(node)
            handle = self.gate.open(opath, st, flags, node.parent_ino, name, caller.pid, looks)
        except BaseException:
            os.close(opath)
            raise
        handle.uid = caller.uid
        fh = self.files.add(node, handle)
        try:
            if kill_suidgid and flags & os.O_TRUNC:
                changed_by(caller, handle.inode.opath)
        except BaseException:
            self.files.release(fh)
            raise
        return fh, handle
