"""Names that go or change: unlink, rmdir and rename.

What a name means is looked at before it goes: the kernel may know the inode, somebody may have it open, and the
mover must hear of a file whose last name is gone, by its file handle, since inode numbers are used again.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from tierfs import syscalls
from tierfs.gate import Gate
from tierfs.intents import Doing, Intent
from tierfs.nodes import Node, NodeTable
from tierfs.tree import Tree

_OPATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_STAYS = syscalls.RENAME_EXCHANGE | syscalls.RENAME_NOREPLACE


class _Going:
    """A name that is about to be removed or replaced."""

    __slots__ = ("_gate", "_node", "_nodes", "_place", "_st", "_watch", "handle", "told")

    def __init__(
        self,
        gate: Gate,
        nodes: NodeTable,
        place: tuple[int, bytes],
        st: os.stat_result,
        node: Node | None,
        handle: bytes,
        watch: int,
        *,
        last: bool,
    ) -> None:
        """`handle` of a regular file; `watch`, O_PATH, of one that has other names (not `last`)."""
        self._gate = gate
        self._nodes = nodes
        self._place = place
        self._st = st
        self._node = node
        self.handle = handle
        self._watch = watch
        self.told = last and bool(handle)  # the mark of its end names its place

    def gone(self) -> None:
        """It has been removed."""
        if self._node is not None:
            self._nodes.unlinked(self._node, self._st)
        if self.told:
            self._gate.gone(self._st, self.handle, *self._place)
        elif self._watch >= 0:
            self._gate.after_change(self._st.st_ino, os.fstat(self._watch))
            self._gate.marking.attributes(self._st, *self._place)  # one link less moves its ctime

    def close(self) -> None:
        """Removed or not, done."""
        if self._watch >= 0:
            os.close(self._watch)


class Names:
    """Operations on names; directories go by node number."""

    def __init__(self, tree: Tree, gate: Gate, nodes: NodeTable) -> None:
        self._tree = tree
        self._gate = gate
        self._marking = gate.marking
        self._nodes = nodes
        self._ledger = gate.ledger

    def _begun(self, doing: Doing) -> Intent | None:
        """What a killed server had begun to do for the request being served."""
        intent = self._ledger.replayed
        return intent if intent is not None and intent.doing is doing else None

    def _child(self, parent: int, name: bytes) -> tuple[Node, int, os.stat_result]:
        """The directory, its descriptor, and the stat of a name in it."""
        directory = self._nodes.get(parent)
        dirfd = self._nodes.dirfd(directory)
        return directory, dirfd, os.stat(name, dir_fd=dirfd, follow_symlinks=False)

    def unlink(self, parent: int, name: bytes) -> None:
        """Remove a name that is no directory's. Raises Blocked, OSError."""
        begun = self._begun(Doing.UNLINK)
        if begun is not None and begun.first is not None and self._means_other(parent, name, begun.first):
            going = self._resumed(parent, name, begun.first, begun.handle)
            self._unlinked(self._nodes.get(parent), name, going)
            return
        directory, dirfd, st = self._child(parent, name)
        if stat.S_ISDIR(st.st_mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), name)
        self._marking.need()
        going = self._going(directory, dirfd, name, st)
        try:
            self._ledger.intend(Doing.UNLINK, st, handle=going.handle)
            os.unlink(name, dir_fd=dirfd)
        except BaseException:
            going.close()
            raise
        self._unlinked(directory, name, going)

    def _unlinked(self, directory: Node, name: bytes, going: _Going) -> None:
        self._nodes.name_gone(directory, name)
        try:
            going.gone()
        finally:
            going.close()
        if not going.told:
            self._marking.entry(directory.ino, name)

    def _means_other(self, parent: int, name: bytes, before: os.stat_result) -> bool:
        """The name is no longer that of what it was before."""
        try:
            return self._child(parent, name)[2].st_ino != before.st_ino
        except FileNotFoundError:
            return True

    def _resumed(self, parent: int, name: bytes, st: os.stat_result, handle: bytes) -> _Going:
        """As `_going`, of a name that has gone already."""
        others = stat.S_ISREG(st.st_mode) and st.st_nlink > 1
        watch = -1
        if others:
            with suppress(OSError):  # the last of the others is gone too, behind the mount
                watch = self._tree.open_handle(handle, os.O_PATH)
        node = self._nodes.known(st.st_ino)
        place = self._nodes.get(parent).ino, name
        return _Going(self._gate, self._nodes, place, st, node, handle, watch, last=not others)

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory. Raises OSError."""
        begun = self._begun(Doing.RMDIR)
        if begun is not None and begun.first is not None and self._means_other(parent, name, begun.first):
            directory, st = self._nodes.get(parent), begun.first
        else:
            directory, dirfd, st = self._child(parent, name)
            self._ledger.intend(Doing.RMDIR, st)
            os.rmdir(name, dir_fd=dirfd)
        node = self._nodes.known(st.st_ino)
        if node is not None:
            self._nodes.unlinked(node, st)
        self._marking.entry(directory.ino, name, st.st_ino)

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0) -> list[int]:
        """All flags of renameat2(2). Which nodes have other names now. Raises Blocked, OSError."""
        begun = self._begun(Doing.RENAME)
        was = begun.first if begun is not None else None
        if begun is not None and was is not None and not self._means_other(new_parent, new_name, was):
            there, going = begun.second, None
            if there is not None and not flags & _STAYS:
                going = self._resumed(new_parent, new_name, there, begun.handle)
            return self._moved(parent, name, new_parent, new_name, flags, was, there, going)
        _, source_fd, st = self._child(parent, name)
        target = self._nodes.get(new_parent)
        target_fd = self._nodes.dirfd(target)
        try:
            there = os.stat(new_name, dir_fd=target_fd, follow_symlinks=False)
        except FileNotFoundError:
            there = None
        if there is not None and there.st_ino == st.st_ino and not flags:
            return []  # two names of one file: both stay
        self._marking.need()
        exchange = bool(flags & syscalls.RENAME_EXCHANGE)
        if stat.S_ISREG(st.st_mode):
            self._gate.before_change(st.st_ino, registered=True)
        if exchange and there is not None and stat.S_ISREG(there.st_mode):
            self._gate.before_change(there.st_ino, registered=True)
        replaced = None if flags & _STAYS else there
        going = self._going(target, target_fd, new_name, replaced) if replaced is not None else None
        try:
            self._ledger.intend(Doing.RENAME, st, there, going.handle if going is not None else b"")
            if flags:
                syscalls.renameat2(source_fd, name, target_fd, new_name, flags)
            else:
                os.rename(name, new_name, src_dir_fd=source_fd, dst_dir_fd=target_fd)
        except BaseException:
            if going is not None:
                going.close()
            raise
        return self._moved(parent, name, new_parent, new_name, flags, st, there, going)

    def _moved(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int,
        st: os.stat_result, there: os.stat_result | None, going: _Going | None,
    ) -> list[int]:  # fmt: skip
        """Tell everyone. `st` and `there` are from before the rename, `going` of what it has replaced."""
        source, target = self._nodes.get(parent), self._nodes.get(new_parent)
        source_fd, target_fd = self._nodes.dirfd(source), self._nodes.dirfd(target)
        if going is not None:
            try:
                going.gone()
            finally:
                going.close()
        moved = [self._renamed(st, target, target_fd, new_name)]
        if there is not None and flags & syscalls.RENAME_EXCHANGE:
            moved.append(self._renamed(there, source, source_fd, name))
        if going is not None and there is not None and stat.S_ISDIR(there.st_mode):
            self._marking.entry(target.ino, new_name, there.st_ino)
        self._marking.entry(source.ino, name)
        return [node.id for node in moved if node is not None]

    def _renamed(self, before: os.stat_result, directory: Node, dirfd: int, name: bytes) -> Node | None:
        """Tell everyone of a file's new name."""
        node = self._nodes.known(before.st_ino)
        if node is not None:
            self._nodes.moved(node, directory, name)
        if stat.S_ISDIR(before.st_mode):
            self._marking.made_dir(before.st_ino, directory.ino, name)
        elif stat.S_ISREG(before.st_mode):
            self._gate.named(before.st_ino, directory.ino, name)
            self._gate.after_change(before.st_ino, os.stat(name, dir_fd=dirfd, follow_symlinks=False))
        else:
            self._marking.entry(directory.ino, name)
        return node

    def _going(self, directory: Node, dirfd: int, name: bytes, st: os.stat_result) -> _Going:
        """Prepare for this name's end. Raises Blocked, OSError; nothing has changed yet."""
        regular = stat.S_ISREG(st.st_mode)
        others = regular and st.st_nlink > 1
        if others:
            known = self._gate.known_by(st.st_ino, directory.ino, name)
            self._gate.before_change(st.st_ino, registered=not known)
        handle = self._tree.handle_at(dirfd, name) if regular else b""
        node = self._nodes.known(st.st_ino)
        if node is not None:
            self._nodes.unlinking(node, directory, name, st)
        watch = os.open(name, _OPATH, dir_fd=dirfd) if others else -1
        place = directory.ino, name
        return _Going(self._gate, self._nodes, place, st, node, handle, watch, last=not others)
