"""The nodes that the kernel knows, and how each is reached: by the descriptor of its parent, and its name.

A node's number is a slot and how often that was used, never the inode number, which the filesystem uses again.
A node has one last known name. Every access compares inode numbers; what no longer fits is ESTALE, upon which
the kernel looks the name up anew. A node whose name has gone is anchored:

    name known --name unlinked or replaced--> other names: by file handle (by O_PATH descriptor if not root)
                                       +----> no name, open: by O_PATH descriptor, until the last release
                                       +----> no name, not open: its last attributes, with no links
    anchored --another of its names looked up--> name known

Parents are kept by their children, and must not be forgotten before them (nor does the kernel do so).
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from tierfs.intents import packed_stat, unpacked_stat
from tierfs.ledger import SLOT_BITS, Kind, Ledger
from tierfs.tree import Tree

ROOT = 1
DIRECTORY_FDS = 1024  # at most an eighth of those that the process may have
_SLOT = (1 << SLOT_BITS) - 1
_GONE = int(Kind.GONE)

_OPATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_OPATH_DIR = _OPATH | os.O_DIRECTORY
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class GoneStat:
    """The last attributes of a file or directory without a name."""

    __slots__ = ("_packed", "_stat", "st_nlink")

    def __init__(self, packed: bytes) -> None:
        """As `packed_stat` packs them."""
        self._packed = packed
        self._stat: os.stat_result | None = None
        self.st_nlink = 0

    def __getattr__(self, name: str) -> int:
        if self._stat is None:
            self._stat = unpacked_stat(self._packed)
        return int(getattr(self._stat, name))


Anchor = int | bytes | GoneStat | None


class Node(msgspec.Struct, gc=False, eq=False):
    """One inode that the kernel knows. About 165 bytes with its numbers and its places in the tables, and 64 in
    the ledger, where its name and its lookups are.

    A structure without a garbage collector's header: a home has hundreds of thousands, and none forms a cycle.
    """

    id: int
    ino: int
    parent: Node | None
    anchor: Anchor = None

    @property
    def parent_ino(self) -> int:
        """The inode number of the directory of its last known name (its own for the root)."""
        return self.parent.ino if self.parent is not None else self.ino


def stale() -> OSError:
    """What the kernel understands as: look it up anew."""
    return OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def gone() -> OSError:
    """The file has no name and is not open."""
    return OSError(errno.ENOENT, os.strerror(errno.ENOENT))


class Tables(NamedTuple):
    """What a table of nodes consists of. Numbers are those of nodes, if not of inodes."""

    by_slot: list[Node | None]
    by_ino: dict[int, Node]
    dirs: OrderedDict[int, int]  # descriptors; one that is used is to be moved to the end
    opens: dict[int, int]
    former: dict[int, bytes]
    left: set[tuple[int, bytes]] | None


def _opened_dir(name: bytes, parent_fd: int) -> int:
    """Open a directory, O_PATH where it may not be read."""
    try:
        return os.open(name, _DIRECTORY, dir_fd=parent_fd)
    except PermissionError:
        return os.open(name, _OPATH_DIR, dir_fd=parent_fd)


class NodeTable:
    """All nodes, and a bounded number of directory descriptors. Not thread-safe."""

    def __init__(self, tree: Tree, ledger: Ledger | None = None, directory_fds: int = DIRECTORY_FDS) -> None:
        """`ledger` is a fresh one, or one from which `restore` is about to be called."""
        self._tree = tree
        self._ledger = ledger if ledger is not None else Ledger()
        self.root = Node(ROOT, tree.root_ino, None)
        # By the slot in their numbers. Not a dictionary: that would be five times the size.
        self._by_slot: list[Node | None] = [None, self.root]
        self._by_ino: dict[int, Node] = {tree.root_ino: self.root}
        if not self._ledger.serving:
            self._ledger.node(self._ledger.new_node(), tree.root_ino, 0, 1, b"")
        self._dirs: OrderedDict[int, int] = OrderedDict()  # node number -> descriptor
        self.most_dirs = max(min(directory_fds, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8), 2)
        self._opens: dict[int, int] = {}  # node number -> open files
        self._former: dict[int, bytes] = {}  # node number -> last name, of those that are anchored
        # (directory's number, name): names that nodes have no more, as it turned out. The kernel may go on
        # believing in them. None where nobody tells it.
        self.left: set[tuple[int, bytes]] | None = None
        # Told of descriptors without which a file would end with this process, and of the end of the need.
        self.keep: Callable[[int, int], None] = lambda ino, fd: None
        self.let_go: Callable[[int], None] = lambda ino: None
        self.ended: Callable[[int], None] = lambda ino: None  # told of inodes that the kernel knows no more

    def __len__(self) -> int:
        return sum(node is not None for node in self._by_slot)

    def close(self) -> None:
        """Close every descriptor."""
        for fd in self._dirs.values():
            os.close(fd)
        self._dirs.clear()
        for node in self._by_slot:
            if node is not None:
                self._unanchor(node)

    def restore(self, kept_fds: Mapping[int, int]) -> None:
        """Take over what the ledger says. `kept_fds`: O_PATH descriptors of nameless files, by inode number."""
        by_slot, by_ino, root = self._by_slot, self._by_ino, self.root
        by_slot.extend([None] * (self._ledger.node_slots - len(by_slot)))
        for number, ino, kind in self._ledger.load_nodes():
            if number == ROOT:
                continue
            node = by_slot[number & _SLOT] = Node(number, ino, root)
            if kind:
                self._restore_anchor(node, Kind(kind), kept_fds)
            if kind != _GONE:
                by_ino[ino] = node
        self._restore_parents()

    def _restore_anchor(self, node: Node, kind: Kind, kept_fds: Mapping[int, int]) -> None:
        if kind is Kind.GONE:
            node.anchor = GoneStat(self._ledger.content(node.id))
        elif node.ino in kept_fds:
            node.anchor = os.dup(kept_fds[node.ino])
        else:
            node.anchor = self._ledger.content(node.id)

    def _restore_parents(self) -> None:
        last, above = 0, None
        for number, parent in self._ledger.parents():
            node = self._find(number)
            if node is None or node is self.root:
                continue
            if parent != last:  # those of one directory mostly stand together
                # The kernel may have forgotten a directory of which a hard link was known: a stale name.
                last, above = parent, (self._find(parent) or self.root) if parent else None
            node.parent = above

    # --- the table ----------------------------------------------------------------------------------------

    def get(self, nodeid: int) -> Node:
        """Raises OSError(ESTALE) for a number that is not in use."""
        node = self._find(nodeid)
        if node is None:
            raise stale()
        return node

    def _find(self, nodeid: int) -> Node | None:
        slot = nodeid & _SLOT
        if slot >= len(self._by_slot):
            return None
        node = self._by_slot[slot]
        return node if node is not None and node.id == nodeid else None

    def _put(self, node: Node) -> None:
        slot = node.id & _SLOT
        while slot >= len(self._by_slot):
            self._by_slot.append(None)
        self._by_slot[slot] = node

    def name(self, node: Node) -> bytes:
        """The last known name of a node; b"" where only a server before us knew it."""
        return self._ledger.name(node.id) if node.anchor is None else self._former.get(node.id, b"")

    def known(self, ino: int) -> Node | None:
        """The node of this inode, if the kernel knows it."""
        return self._by_ino.get(ino)

    def all(self) -> Iterator[Node]:
        """All nodes; such as are made meanwhile perhaps, such as are forgotten not."""
        return (node for node in self._by_slot if node is not None)

    def found(self, st: os.stat_result, parent: Node | None, name: bytes) -> Node:
        """The node of an inode that has just been seen under this name; counts one lookup."""
        node = self._by_ino.get(st.st_ino)
        if node is None:
            if stat.S_ISDIR(st.st_mode) and st.st_dev != self._tree.device:
                # Inode numbers mean nothing across filesystems and subvolumes.
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), name)
            return self._enter(st.st_ino, parent, name)
        if node is not self.root:
            if not stat.S_ISDIR(st.st_mode) and (node.parent is not parent or self.name(node) != name):
                self._leave_name(node)
            self.moved(node, parent, name)
        self._ledger.looked_up(node.id)
        return node

    def _enter(self, ino: int, parent: Node | None, name: bytes) -> Node:
        node = Node(self._ledger.new_node(), ino, parent)
        self._ledger.node(node.id, ino, parent.id if parent is not None else 0, 1, name)
        self._by_ino[ino] = node
        self._put(node)
        return node

    def tables(self) -> Tables:
        """For whoever does this in our place: these very objects, for good."""
        return Tables(self._by_slot, self._by_ino, self._dirs, self._opens, self._former, self.left)

    def made(self, st: os.stat_result, parent: Node | None, name: bytes) -> Node:
        """The node of an inode that has just been made; counts one lookup."""
        old = self._by_ino.pop(st.st_ino, None)
        if old is not None:
            # Removed behind the mount: the number now means another file.
            self._leave_name(old)
            self._drop(old)
            self._end(old, st)
        return self.found(st, parent, name)

    def moved(self, node: Node, parent: Node | None, name: bytes) -> None:
        """The node has this name."""
        if node.anchor is None and node.parent is parent and self._ledger.name(node.id) == name:
            return
        self._unanchor(node)
        self._former.pop(node.id, None)
        node.parent = parent
        self._note(node, name)

    def _leave_name(self, node: Node) -> None:
        """It is about to be known by another name, or none, and not by a request: that of a directory alone has
        gone everywhere."""
        if self.left is not None and node.anchor is None and node.parent is not None:
            self.left.add((node.parent.id, self._ledger.name(node.id)))

    def name_gone(self, directory: Node, name: bytes) -> None:
        """Removed as the kernel has asked for: it knows nothing by this name any more, and need not be told."""
        if self.left:
            self.left.discard((directory.id, name))

    def _note(self, node: Node, content: bytes, kind: Kind = Kind.NAME) -> None:
        """Write down how it is reached now."""
        if kind is not Kind.NAME and node.id not in self._former:
            self._former[node.id] = self._ledger.name(node.id)
        above = node.parent.id if node.parent is not None else 0
        self._ledger.node(node.id, node.ino, above, max(self._ledger.lookups(node.id), 1), content, kind)

    def forget(self, nodeid: int, count: int) -> None:
        """The kernel gives back `count` lookups; with the last one goes the node."""
        node = self._find(nodeid)
        if node is None or node is self.root:
            return
        if self._ledger.given_back(nodeid, count):
            return
        self._former.pop(nodeid, None)
        self._by_slot[nodeid & _SLOT] = None
        self._ledger.drop_node(nodeid)
        if self._by_ino.get(node.ino) is node:
            del self._by_ino[node.ino]
            self.ended(node.ino)
        self._drop(node)

    def opened(self, node: Node) -> None:
        """One more open file of this node."""
        self._opens[node.id] = self._opens.get(node.id, 0) + 1

    def reopened(self, node: Node, opath: int) -> None:
        """An open file of this node, with this descriptor, has been taken over."""
        self.opened(node)
        if isinstance(node.anchor, bytes):
            node.anchor = os.dup(opath)

    def last_of(self, node: Node) -> os.stat_result | None:
        """The attributes of a file without a name that only one open file has; None of all others."""
        if self._opens[node.id] > 1 or type(node.anchor) is not int:
            return None
        st = os.fstat(node.anchor)
        return None if st.st_nlink else st

    def released(self, node: Node) -> None:
        """One open file less. What has no name ends with the last."""
        left = self._opens[node.id] - 1
        if left:
            self._opens[node.id] = left
            return
        del self._opens[node.id]
        if type(node.anchor) is not int:
            return
        st = os.fstat(node.anchor)
        if st.st_nlink:
            self._spare_descriptor(node)
        else:
            self._bury(node, st)

    # --- names that go ------------------------------------------------------------------------------------

    def unlinking(self, node: Node, parent: Node, name: bytes, st: os.stat_result) -> None:
        """Call before this name of the node is unlinked or replaced: keeps a way to what is still needed."""
        last = st.st_nlink <= 1 or stat.S_ISDIR(st.st_mode)
        if last and node.id not in self._opens:
            return
        if type(node.anchor) is int or (not last and (node.parent is not parent or self.name(node) != name)):
            return
        fd = os.open(name, _OPATH, dir_fd=self.dirfd(parent))
        if node.id in self._opens or not self._tree.privileged:
            self.anchor(node, fd)
        else:
            node.anchor = fd
            self._spare_descriptor(node)
            self._note(node, self._tree.handle_at(self.dirfd(parent), name), Kind.HANDLE)

    def unlinked(self, node: Node, st: os.stat_result) -> None:
        """Call after it is gone; `st` is from before."""
        if (st.st_nlink <= 1 or stat.S_ISDIR(st.st_mode)) and node.id not in self._opens:
            self._bury(node, st)

    def anchor(self, node: Node, fd: int) -> None:
        """Its name is none, or about to go: it is reached by this O_PATH descriptor, now the node's."""
        node.anchor = fd
        self.keep(node.ino, fd)
        self._note(node, self._tree.handle_of(fd), Kind.HANDLE)

    def _bury(self, node: Node, st: os.stat_result) -> None:
        self._drop(node)
        self._end(node, st)
        if self._by_ino.get(node.ino) is node:
            # The filesystem may give the number to a new file now.
            del self._by_ino[node.ino]
            self.ended(node.ino)

    def _end(self, node: Node, st: os.stat_result) -> None:
        packed = packed_stat(st)
        node.anchor = GoneStat(packed)
        self._note(node, packed, Kind.GONE)

    def _spare_descriptor(self, node: Node) -> None:
        """Anchor it by handle where that can be opened: a tree of hard links must not use up descriptors."""
        if self._tree.privileged and type(node.anchor) is int:
            fd = node.anchor
            node.anchor = self._tree.handle_of(fd)
            os.close(fd)
            self.let_go(node.ino)

    def _unanchor(self, node: Node) -> None:
        anchor, node.anchor = node.anchor, None
        if type(anchor) is int:
            os.close(anchor)
            self.let_go(node.ino)

    def _drop(self, node: Node) -> None:
        self._unanchor(node)
        fd = self._dirs.pop(node.id, None)
        if fd is not None:
            os.close(fd)

    # --- access -------------------------------------------------------------------------------------------

    def dirfd(self, node: Node) -> int:
        """A descriptor of a directory, valid until the next call but one. Raises ESTALE or ENOENT.

        It can be read where that is permitted, and is read by several in turn: seek first.
        """
        if node is self.root:
            return self._tree.rootfd
        fd = self._dirs.get(node.id)
        if fd is not None:
            self._dirs.move_to_end(node.id)
            return fd
        fd = self._walk_to(node)
        while len(self._dirs) >= self.most_dirs:
            os.close(self._dirs.popitem(last=False)[1])
        self._dirs[node.id] = fd
        return fd

    def readable(self, node: Node) -> int:
        """As `dirfd`, one that can be read. Raises OSError."""
        fd = self.dirfd(node)
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH:  # that was not permitted when it was opened
            now = os.open(".", _DIRECTORY, dir_fd=fd)
            os.dup2(now, fd, inheritable=False)
            os.close(now)
        return fd

    def _walk_to(self, node: Node) -> int:
        """A new descriptor, reached from the nearest ancestor that has one."""
        chain = [node]
        parent = node.parent
        while parent is not None and parent is not self.root and parent.id not in self._dirs:
            chain.append(parent)
            parent = parent.parent
        kept = self._tree.rootfd if parent is None or parent is self.root else self._dirs[parent.id]
        fd = kept
        for step in reversed(chain):
            try:
                below = self._open_dir(step, fd)
            finally:
                if fd != kept:
                    os.close(fd)
            fd = below
        return fd

    def _open_dir(self, node: Node, parent_fd: int) -> int:
        if node.anchor is not None:
            raise gone()
        try:
            fd = _opened_dir(self._ledger.name(node.id), parent_fd)
        except (FileNotFoundError, NotADirectoryError):
            raise stale() from None
        if os.fstat(fd).st_ino != node.ino:
            os.close(fd)
            raise stale()
        return fd

    def stat(self, node: Node) -> os.stat_result | GoneStat:
        """Its attributes now, its last ones where it is gone. Raises ESTALE where the name is another's."""
        parent = node.parent
        anchor = node.anchor
        if anchor is None and parent is not None:
            try:
                name = self._ledger.name(node.id)
                st = os.stat(name, dir_fd=self.dirfd(parent), follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                raise stale() from None
            if st.st_ino != node.ino:
                raise stale()
            return st
        if anchor is None:
            return os.fstat(self._tree.rootfd)
        if isinstance(anchor, GoneStat):
            return anchor
        if isinstance(anchor, int):
            return os.fstat(anchor)
        fd, st = self.reach(node)
        os.close(fd)
        return st

    def stat_of_kept(self, node: Node) -> os.stat_result | None:
        """A directory's attributes now, whatever its name is, by the descriptor that is kept of it; None where
        none is kept, or it has been removed. Names in it are reached by the same."""
        fd = self._dirs.get(node.id) if node.anchor is None else None
        st = os.fstat(fd) if fd is not None else None
        return st if st is not None and st.st_nlink else None

    def reach(self, node: Node) -> tuple[int, os.stat_result]:
        """A new O_PATH descriptor of the node, symlinks included, and its stat; the caller closes it.

        Raises OSError: ESTALE where the name is another's now, ENOENT where the node has none and is not open.
        """
        anchor = node.anchor
        if anchor is None and node.parent is not None:
            try:
                fd = os.open(self._ledger.name(node.id), _OPATH, dir_fd=self.dirfd(node.parent))
            except (FileNotFoundError, NotADirectoryError):
                raise stale() from None
        elif anchor is None:
            fd = os.open(".", _OPATH_DIR, dir_fd=self._tree.rootfd)
        elif isinstance(anchor, int):
            fd = os.dup(anchor)
        elif isinstance(anchor, bytes):
            fd = self._tree.open_handle(anchor, os.O_PATH | os.O_NOFOLLOW)
        else:
            raise gone()
        st = os.fstat(fd)
        if st.st_ino != node.ino:
            os.close(fd)
            raise stale()
        return fd, st
