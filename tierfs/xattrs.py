"""Extended attributes as the mount shows them.

TierFS's own attributes on the backing inode are invisible and refused. The virtual ones, `user.tierfs.*`, are
answered by name and never listed (else `cp -a` would pin copies); of them only the pin can be set or removed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tierfs.gate import Gate
from tierfs.intents import Doing
from tierfs.making import Caller
from tierfs.nodes import Node, NodeTable
from tierfs.tree import Tree, fd_path

_VIRTUAL = b"user.tierfs."
_PIN = b"user.tierfs.pin"
_ON = frozenset({b"1", b"yes", b"true", b"on"})
_OFF = frozenset({b"0", b"no", b"false", b"off"})


def _error(number: int, name: bytes) -> OSError:
    return OSError(number, os.strerror(number), name)


class Xattrs:
    """Operations on the attributes of a node; within, `opath` is an O_PATH descriptor of it, `st` its stat."""

    def __init__(self, tree: Tree, gate: Gate, nodes: NodeTable, heat: Callable[[int], bytes | None]) -> None:
        """`heat` answers `user.tierfs.heat` of an inode number; None: unknown."""
        self._tree = tree
        self._gate = gate
        self._nodes = nodes
        self._ledger = gate.ledger
        self._heat = heat
        hidden = [b"trusted.tierfs"] if tree.privileged else [b"trusted.tierfs", b"user.tierfs"]
        self._hidden = frozenset([*hidden, os.fsencode(tree.pin_name)])

    def _internal(self, name: bytes) -> bool:
        return name in self._hidden or name.startswith(b"trusted.tierfs")

    def _reserved(self, name: bytes) -> bool:
        return self._internal(name) or name.startswith(_VIRTUAL)

    def _refuse(self, name: bytes, caller: Caller | None) -> None:
        """Raises EPERM for what may not be changed. Not every binding has a kernel that guards trusted.* ."""
        foreign = name.startswith(b"trusted.") and caller is not None and caller.uid != 0
        if foreign or (self._reserved(name) and name != _PIN):
            raise _error(errno.EPERM, name)

    def get(self, nodeid: int, name: bytes) -> bytes:
        """The value. Raises OSError: ENODATA where there is none or none to be seen."""
        if self._internal(name):
            raise _error(errno.ENODATA, name)
        node = self._nodes.get(nodeid)
        # The kernel asks this at the first write to each file that is open.
        inode = self._gate.appearance.inodes.get(node.ino) if self._nodes.known(node.ino) is node else None
        if inode is not None and inode.opens and not name.startswith(_VIRTUAL):
            return os.getxattr(fd_path(inode.opath), name)
        fd, st = self._nodes.reach(node)
        try:
            if name.startswith(_VIRTUAL):
                return self._virtual(node, fd, st, name)
            return os.getxattr(fd_path(fd), name)
        finally:
            os.close(fd)

    def list(self, nodeid: int) -> bytes:
        """All visible names, each with a zero byte behind it. Raises OSError."""
        fd, _ = self._nodes.reach(self._nodes.get(nodeid))
        try:
            names = [os.fsencode(name) for name in os.listxattr(fd_path(fd))]
        finally:
            os.close(fd)
        return b"".join(name + b"\0" for name in names if not self._reserved(name))

    def set(
        self,
        nodeid: int,
        name: bytes,
        value: bytes | memoryview,
        flags: int = 0,
        caller: Caller | None = None,
        kill_sgid: bool = False,
    ) -> None:
        """Set one; `kill_sgid`: an ACL that takes set-group-id away.

        Raises Blocked and OSError: EPERM for names that are TierFS's own, EINVAL for a pin neither on nor off.
        """
        self._refuse(name, caller)
        with self._changing(nodeid) as (node, fd, st):
            if name == _PIN:
                self._set_pin(node, fd, st, bytes(value), flags)
                return
            self._set(fd, name, value, flags)
            mode = os.fstat(fd).st_mode if kill_sgid else 0
            if mode & stat.S_ISGID:
                os.chmod(fd_path(fd), stat.S_IMODE(mode) & ~stat.S_ISGID)

    def remove(self, nodeid: int, name: bytes, caller: Caller | None = None) -> None:
        """Raises Blocked and OSError: EPERM for names that are TierFS's own, ENODATA where there is none."""
        self._refuse(name, caller)
        with self._changing(nodeid) as (node, fd, st):
            if name != _PIN:
                self._remove(fd, name)
            elif self._tree.is_pinned(fd):
                self._pin(node, fd, st, on=False)
            else:
                raise _error(errno.ENODATA, name)

    # What a killed server had begun is not there to be made, or to be removed, a second time.

    def _set(self, opath: int, name: bytes, value: bytes | memoryview, flags: int) -> None:
        begun = self._ledger.replayed
        if flags and begun is not None and begun.doing is Doing.XATTR:
            flags = 0
        elif flags:
            self._must_be(opath, name, there=not flags & os.XATTR_CREATE)
            self._ledger.intend(Doing.XATTR)
        os.setxattr(fd_path(opath), name, value, flags)

    def _remove(self, opath: int, name: bytes) -> None:
        begun = self._ledger.replayed
        again = begun is not None and begun.doing is Doing.XATTR
        if not again:
            self._must_be(opath, name, there=True)
            self._ledger.intend(Doing.XATTR)
        try:
            os.removexattr(fd_path(opath), name)
        except OSError as error:
            if not again or error.errno != errno.ENODATA:
                raise

    def _must_be(self, opath: int, name: bytes, *, there: bool) -> None:
        """Raises ENODATA or EEXIST, as the change itself would, before it is said to have begun."""
        try:
            os.getxattr(fd_path(opath), name)
        except OSError as error:
            if error.errno != errno.ENODATA or there:
                raise
        else:
            if not there:
                raise _error(errno.EEXIST, name)

    @contextmanager
    def _changing(self, nodeid: int) -> Iterator[tuple[Node, int, os.stat_result]]:
        node = self._nodes.get(nodeid)
        fd, st = self._nodes.reach(node)
        try:
            regular = stat.S_ISREG(st.st_mode)
            if regular:
                self._gate.before_change(st.st_ino)
            yield node, fd, st
            if regular:
                self._gate.after_change(st.st_ino, os.fstat(fd))
            self._gate.marking.attributes(st, node.parent_ino, self._nodes.name(node))
        finally:
            os.close(fd)

    # --- user.tierfs.* ------------------------------------------------------------------------------------

    def _virtual(self, node: Node, opath: int, st: os.stat_result, name: bytes) -> bytes:
        regular = stat.S_ISREG(st.st_mode)
        value: bytes | None = None
        match name[len(_VIRTUAL) :]:
            case b"tier":
                if regular:
                    value = self._gate.appearance.tier_of(st, opath)
                else:
                    value = b"directory" if stat.S_ISDIR(st.st_mode) else b"other"
            case b"pin":
                value = self._pinned(node, opath)
            case b"heat" if regular:
                value = self._heat(st.st_ino)
            case b"digest" if regular:
                value = self._gate.appearance.digest_of(st, opath)
        if value is None:
            raise _error(errno.ENODATA, name)
        return value

    def _pinned(self, node: Node, opath: int) -> bytes:
        """`1`: pinned itself; `inherited`: one of the directories above is; `0`: no."""
        if self._tree.is_pinned(opath):
            return b"1"
        above = node.parent
        while above is not None:
            if self._tree.is_pinned(self._nodes.dirfd(above)):
                return b"inherited"
            above = above.parent
        return b"0"

    def _set_pin(self, node: Node, opath: int, st: os.stat_result, value: bytes, flags: int) -> None:
        word = value.strip(b"\0\n ").lower()
        if word not in _ON and word not in _OFF:
            raise _error(errno.EINVAL, _PIN)
        if flags:
            pinned = self._tree.is_pinned(opath)
            if flags & os.XATTR_CREATE and pinned:
                raise _error(errno.EEXIST, _PIN)
            if flags & os.XATTR_REPLACE and not pinned:
                raise _error(errno.ENODATA, _PIN)
        self._pin(node, opath, st, on=word in _ON)

    def _pin(self, node: Node, opath: int, st: os.stat_result, *, on: bool) -> None:
        if not (stat.S_ISREG(st.st_mode) or stat.S_ISDIR(st.st_mode)):
            raise _error(errno.EPERM, _PIN)
        self._gate.set_pin(opath, st, on, node.parent_ino, self._nodes.name(node))
