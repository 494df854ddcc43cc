"""The nodes that the kernel knows, and how each is reached: by the descriptor of its parent, and its name.

A node's number comes from a counter, never from the inode number, which the filesystem uses again. A node has
one last known name. Every access compares inode numbers; what no longer fits is ESTALE, upon which the kernel
looks the name up anew. A node whose name has gone is anchored:

    name known --name unlinked or replaced--> other names: by file handle (by O_PATH descriptor if not root)
                                       +----> no name, open: by O_PATH descriptor, until the last release
                                       +----> no name, not open: its last attributes, with no links
    anchored --another of its names looked up--> name known

Parents are kept by their children, and must not be forgotten before them (nor does the kernel do so).
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator

import msgspec

from tierfs.tree import Tree

ROOT = 1
DIRECTORY_FDS = 1024
_SEGMENT_SHIFT = 8
_SEGMENT = 1 << _SEGMENT_SHIFT

_OPATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_OPATH_DIR = _OPATH | os.O_DIRECTORY


class GoneStat:
    """The last attributes of a file or directory without a name."""

    __slots__ = ("_stat", "st_nlink")

    def __init__(self, last: os.stat_result) -> None:
        self._stat = last
        self.st_nlink = 0

    def __getattr__(self, name: str) -> int:
        return int(getattr(self._stat, name))


Anchor = int | bytes | GoneStat | None


class Node(msgspec.Struct, gc=False, eq=False):
    """One inode that the kernel knows. About 270 bytes with its name, numbers and table entries.

    A structure without a garbage collector's header: a home has hundreds of thousands, and none forms a cycle.
    """

    id: int
    ino: int
    parent: Node | None
    name: bytes
    lookups: int = 0
    anchor: Anchor = None

    @property
    def parent_ino(self) -> int:
        """The inode number of the directory of its last known name (its own for the root)."""
        return self.parent.ino if self.parent is not None else self.ino


def stale(node: Node) -> OSError:
    """What the kernel understands as: look it up anew."""
    return OSError(errno.ESTALE, os.strerror(errno.ESTALE), node.name)


def gone(node: Node) -> OSError:
    """The file has no name and is not open."""
    return OSError(errno.ENOENT, os.strerror(errno.ENOENT), node.name)


class _Numbers:
    """Nodes by number, in segments: a fifth of a dictionary's memory. A segment goes with its last node."""

    def __init__(self) -> None:
        self._segments: dict[int, list[Node | None]] = {}
        self._live: dict[int, int] = {}

    def __len__(self) -> int:
        return sum(self._live.values())

    def __iter__(self) -> Iterator[Node]:
        for segment in self._segments.values():
            yield from (node for node in segment if node is not None)

    def get(self, number: int) -> Node | None:
        segment = self._segments.get(number >> _SEGMENT_SHIFT)
        return segment[number & _SEGMENT - 1] if segment is not None else None

    def add(self, node: Node) -> None:
        at = node.id >> _SEGMENT_SHIFT
        segment = self._segments.get(at)
        if segment is None:
            segment = self._segments[at] = [None] * _SEGMENT
            self._live[at] = 0
        segment[node.id & _SEGMENT - 1] = node
        self._live[at] += 1

    def remove(self, node: Node) -> None:
        at = node.id >> _SEGMENT_SHIFT
        self._segments[at][node.id & _SEGMENT - 1] = None
        self._live[at] -= 1
        if not self._live[at]:
            del self._segments[at], self._live[at]


class NodeTable:
    """All nodes, and a bounded number of directory descriptors. Not thread-safe."""

    def __init__(self, tree: Tree, directory_fds: int = DIRECTORY_FDS) -> None:
        self._tree = tree
        self.root = Node(ROOT, tree.root_ino, None, b"")
        self._by_id = _Numbers()
        self._by_id.add(self.root)
        self._by_ino: dict[int, Node] = {tree.root_ino: self.root}
        self._next = ROOT
        self._dirs: OrderedDict[int, int] = OrderedDict()  # node number -> O_PATH descriptor
        self._most_dirs = max(directory_fds, 2)
        self._opens: dict[int, int] = {}  # node number -> open files

    def __len__(self) -> int:
        return len(self._by_id)

    def close(self) -> None:
        """Close every descriptor."""
        for fd in self._dirs.values():
            os.close(fd)
        self._dirs.clear()
        for node in self._by_id:
            self._unanchor(node)

    # --- the table ----------------------------------------------------------------------------------------

    def get(self, nodeid: int) -> Node:
        """Raises OSError(ESTALE) for a number that is not in use."""
        node = self._by_id.get(nodeid)
        if node is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return node

    def known(self, ino: int) -> Node | None:
        """The node of this inode, if the kernel knows it."""
        return self._by_ino.get(ino)

    def found(self, st: os.stat_result, parent: Node | None, name: bytes) -> Node:
        """The node of an inode that has just been seen under this name; counts one lookup."""
        node = self._by_ino.get(st.st_ino)
        if node is None:
            if stat.S_ISDIR(st.st_mode) and st.st_dev != self._tree.device:
                # Inode numbers mean nothing across filesystems and subvolumes.
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), name)
            self._next += 1
            node = Node(self._next, st.st_ino, parent, name)
            self._by_ino[st.st_ino] = node
            self._by_id.add(node)
        elif node is not self.root:
            self.moved(node, parent, name)
        node.lookups += 1
        return node

    def made(self, st: os.stat_result, parent: Node | None, name: bytes) -> Node:
        """The node of an inode that has just been made; counts one lookup."""
        old = self._by_ino.pop(st.st_ino, None)
        if old is not None:
            # Removed behind the mount: the number now means another file.
            self._drop(old)
            old.anchor = GoneStat(st)
        return self.found(st, parent, name)

    def moved(self, node: Node, parent: Node | None, name: bytes) -> None:
        """The node has this name."""
        if node.anchor is not None:
            self._unanchor(node)
        if node.parent is not parent or node.name != name:
            node.parent = parent
            node.name = name

    def forget(self, nodeid: int, count: int) -> None:
        """The kernel gives back `count` lookups; with the last one goes the node."""
        node = self._by_id.get(nodeid)
        if node is None or node is self.root:
            return
        node.lookups -= count
        if node.lookups > 0:
            return
        self._by_id.remove(node)
        if self._by_ino.get(node.ino) is node:
            del self._by_ino[node.ino]
        self._drop(node)

    def opened(self, node: Node) -> None:
        """One more open file of this node."""
        self._opens[node.id] = self._opens.get(node.id, 0) + 1

    def released(self, node: Node) -> os.stat_result | None:
        """One open file less. The last attributes where that was the last of a file without a name."""
        left = self._opens[node.id] - 1
        if left:
            self._opens[node.id] = left
            return None
        del self._opens[node.id]
        if type(node.anchor) is not int:
            return None
        st = os.fstat(node.anchor)
        if st.st_nlink:
            self._spare_descriptor(node, node.anchor)
            return None
        self._bury(node, st)
        return st

    # --- names that go ------------------------------------------------------------------------------------

    def unlinking(self, node: Node, parent: Node, name: bytes, st: os.stat_result) -> None:
        """Call before this name of the node is unlinked or replaced: keeps a way to what is still needed."""
        last = st.st_nlink <= 1 or stat.S_ISDIR(st.st_mode)
        if last and node.id not in self._opens:
            return
        if type(node.anchor) is int or (not last and (node.parent is not parent or node.name != name)):
            return
        fd = os.open(name, _OPATH, dir_fd=self.dirfd(parent))
        node.anchor = fd
        if node.id not in self._opens:
            self._spare_descriptor(node, fd)

    def unlinked(self, node: Node, st: os.stat_result) -> None:
        """Call after it is gone; `st` is from before."""
        if (st.st_nlink <= 1 or stat.S_ISDIR(st.st_mode)) and node.id not in self._opens:
            self._bury(node, st)

    def anchor(self, node: Node, fd: int) -> None:
        """A new file has no name (O_TMPFILE): it is reached by this O_PATH descriptor, now the node's."""
        node.anchor = fd

    def _bury(self, node: Node, st: os.stat_result) -> None:
        self._drop(node)
        node.anchor = GoneStat(st)
        if self._by_ino.get(node.ino) is node:
            # The filesystem may give the number to a new file now.
            del self._by_ino[node.ino]

    def _spare_descriptor(self, node: Node, fd: int) -> None:
        """Anchor it by handle where that can be opened: a tree of hard links must not use up descriptors."""
        if self._tree.privileged:
            node.anchor = self._tree.handle_of(fd)
            os.close(fd)

    def _unanchor(self, node: Node) -> None:
        anchor, node.anchor = node.anchor, None
        if type(anchor) is int:
            os.close(anchor)

    def _drop(self, node: Node) -> None:
        self._unanchor(node)
        fd = self._dirs.pop(node.id, None)
        if fd is not None:
            os.close(fd)

    # --- access -------------------------------------------------------------------------------------------

    def dirfd(self, node: Node) -> int:
        """An O_PATH descriptor of a directory, valid until the next call but one. Raises ESTALE or ENOENT."""
        if node is self.root:
            return self._tree.rootfd
        fd = self._dirs.get(node.id)
        if fd is not None:
            self._dirs.move_to_end(node.id)
            return fd
        fd = self._walk_to(node)
        while len(self._dirs) >= self._most_dirs:
            os.close(self._dirs.popitem(last=False)[1])
        self._dirs[node.id] = fd
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
            raise gone(node)
        try:
            fd = os.open(node.name, _OPATH_DIR, dir_fd=parent_fd)
        except (FileNotFoundError, NotADirectoryError):
            raise stale(node) from None
        if os.fstat(fd).st_ino != node.ino:
            os.close(fd)
            raise stale(node)
        return fd

    def stat(self, node: Node) -> os.stat_result | GoneStat:
        """Its attributes now, its last ones where it is gone. Raises ESTALE where the name is another's."""
        parent = node.parent
        anchor = node.anchor
        if anchor is None and parent is not None:
            try:
                st = os.stat(node.name, dir_fd=self.dirfd(parent), follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                raise stale(node) from None
            if st.st_ino != node.ino:
                raise stale(node)
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

    def reach(self, node: Node) -> tuple[int, os.stat_result]:
        """A new O_PATH descriptor of the node, symlinks included, and its stat; the caller closes it.

        Raises OSError: ESTALE where the name is another's now, ENOENT where the node has none and is not open.
        """
        anchor = node.anchor
        if anchor is None and node.parent is not None:
            try:
                fd = os.open(node.name, _OPATH, dir_fd=self.dirfd(node.parent))
            except (FileNotFoundError, NotADirectoryError):
                raise stale(node) from None
        elif anchor is None:
            fd = os.open(".", _OPATH_DIR, dir_fd=self._tree.rootfd)
        elif isinstance(anchor, int):
            fd = os.dup(anchor)
        elif isinstance(anchor, bytes):
            fd = self._tree.open_handle(anchor, os.O_PATH | os.O_NOFOLLOW)
        else:
            raise gone(node)
        st = os.fstat(fd)
        if st.st_ino != node.ino:
            os.close(fd)
            raise stale(node)
        return fd, st
