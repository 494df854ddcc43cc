"""Edits behind the mount, as they happen: what of the kernel's knowledge they change, and how it is told.

fanotify watches the whole filesystem of the backing tree. What the mount server does itself the kernel knows
already. Everybody else's events are looked at by the thread that serves, between two requests: so each comes
after the answer that was prepared before it, and is told after that. Only names and inodes that the kernel has
been told of matter. A process of its own tells it (see `telling`).
"""

from __future__ import annotations

import logging
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Set

from tierfs import syscalls
from tierfs.fuse import compiled, telling
from tierfs.fuse import protocol as p
from tierfs.fuse.mounting import filesystem_of
from tierfs.nodes import Node, NodeTable
from tierfs.vfs import Vfs

log = logging.getLogger("fuse")

SWITCH = "TIERFS_WATCH"  # an environment variable; 0: do without
OLDEST = (6, 2)  # Linux: EXPIRE_ONLY
# Where a file handle says the inode number as _INO_GEN does.
_FILESYSTEMS = frozenset({"ext4"})
_INO_GEN = struct.Struct("<II")
_INO_GEN_TYPE = 1

_EVENT = struct.Struct("<IBBHQii")  # length, version, -, length of this head, mask, descriptor, process
_INFO = struct.Struct("<BBH8xIi")  # type, -, length, filesystem, length of the handle, its type
_FID, _DFID_NAME, _OLD_DFID_NAME, _NEW_DFID_NAME = 1, 2, 10, 12
_OF_NAMES = frozenset({_DFID_NAME, _OLD_DFID_NAME, _NEW_DFID_NAME})
_MODIFY, _ATTRIB, _CLOSE_WRITE = 0x2, 0x4, 0x8
_CREATE, _DELETE, _RENAME = 0x100, 0x200, 0x10000000
_OVERFLOW, _ONDIR = 0x4000, 0x40000000
_NAMES = _RENAME | _CREATE | _DELETE
# Not each write: that would make one through the mount half as slow again.
_WANTED = _NAMES | _ATTRIB | _CLOSE_WRITE | _ONDIR

SOON = 0.02  # seconds from one look to the next, where somebody edits
LATER = 0.5  # and where all there was is of no interest: the rest of the filesystem may be busy day and night
_BUFFER = 1 << 16
_READS = 32  # at one go; about a thousand events each
_SWEEP = 500  # nodes at one go


# What has happened (fanotify's mask), to which kind of record, to which node, and to which name in it. No node:
# some events have been lost.
Event = tuple[int, int, Node | None, bytes]


def foreign(
    buffer: bytearray, size: int, us: int, by_ino: Mapping[int, Node], unproven: Set[int]
) -> Iterator[Event]:
    """Of these events those that are not of process `us` and concern a node, or tell that some were lost.

    Not those of files that are `unproven` and were closed: they were opened through the mount by whoever writes
    to them, and nothing is believed of them for long. Programs that write make nearly all events.
    """
    at = 0
    while at < size:
        length, _, _, head, mask, _, pid = _EVENT.unpack_from(buffer, at)
        if mask & _OVERFLOW:
            yield mask, 0, None, b""
        elif pid != us:
            yield from _records(buffer, at + head, at + length, mask, by_ino, unproven)
        at += length


def _records(
    buffer: bytearray, at: int, end: int, mask: int, by_ino: Mapping[int, Node], unproven: Set[int]
) -> Iterator[Event]:
    while at < end:
        kind, _, length, size, handle = _INFO.unpack_from(buffer, at)
        if handle == _INO_GEN_TYPE and size >= _INO_GEN.size:
            ino, _ = _INO_GEN.unpack_from(buffer, at + _INFO.size)
            node = by_ino.get(ino)
            if node is not None and not _is_known(kind, mask, ino, unproven):
                name = buffer[at + _INFO.size + size : at + length] if kind in _OF_NAMES else b""
                yield mask, kind, node, bytes(name).split(b"\0", 1)[0]
        at += length


def _is_known(kind: int, mask: int, ino: int, unproven: Set[int]) -> bool:
    """It is no news: a file in a directory has changed, not the directory, or an unproven file was closed."""
    if kind in _OF_NAMES:
        return not mask & (_NAMES | _ONDIR)
    return mask & ~_ONDIR == _CLOSE_WRITE and ino in unproven


class Watch:
    """See the module's docstring. Not thread-safe."""

    def __init__(
        self, fd: int, teller: socket.socket, vfs: Vfs, sift: Callable[..., Iterable[Event]] = foreign
    ) -> None:
        """`fd`, of fanotify, and `teller`, of one that has /dev/fuse, become the Watch's. `sift` does what
        `foreign` does."""
        self._fd = fd
        self._teller = teller
        self._nodes: NodeTable = vfs.nodes
        self._by_ino = vfs.nodes.tables().by_ino
        self._sift = sift
        self._unproven = vfs.gate.lasting.unproven
        self._buffer = bytearray(_BUFFER)
        self._us = os.getpid()
        self._pending: dict[bytes, None] = {}
        self._swept: Iterator[None] | None = None

    def fileno(self) -> int:
        """For poll: events are there."""
        return self._fd

    @property
    def busy(self) -> bool:
        """Something is still to be told: call `tell` soon."""
        return bool(self._pending) or self._swept is not None

    @property
    def hurried(self) -> bool:
        """Call it at once."""
        return bool(self._nodes.left) or (self._swept is not None and not self._pending)

    def hear(self) -> float:
        """Take events, between two requests; for how many seconds no more need be taken. Raises OSError."""
        told = False
        for _ in range(_READS):
            try:
                size = os.readv(self._fd, [self._buffer])
            except BlockingIOError:
                return SOON if told else LATER
            told |= self._take(size)
        return 0.0

    def _take(self, size: int) -> bool:
        """Whether there was something to be told in these bytes."""
        before = len(self._pending)
        for mask, kind, node, name in self._sift(self._buffer, size, self._us, self._by_ino, self._unproven):
            if node is not None:
                self._seen(mask, kind, node, name)
            else:
                log.warning("more edits behind the mount than could be told one by one")
                self.doubt()
        return len(self._pending) > before

    def _seen(self, mask: int, kind: int, node: Node, name: bytes) -> None:
        """An event says this of a node: of it, or of a name in it."""
        if kind in _OF_NAMES and mask & _NAMES:
            self._pending[p.inval_name(node.id, name, self._how(node, name))] = None
        self._pending[p.inval_attributes(node.id)] = None

    def _how(self, directory: Node, name: bytes) -> int:
        """A directory that still has this name is only to be looked up anew: it may be somebody's own, or have
        something mounted in it."""
        try:
            st = os.stat(name, dir_fd=self._nodes.dirfd(directory), follow_symlinks=False)
        except OSError:
            return 0
        node = self._nodes.known(st.st_ino) if stat.S_ISDIR(st.st_mode) else None
        if node is None or node.parent is not directory or self._nodes.name(node) != name:
            return 0
        return p.EXPIRE_ONLY

    def doubt(self) -> None:
        """What the kernel knows may have changed unseen: all of it is to be asked for anew."""
        self._swept = self._sweep()

    def outdated(self, nodeids: Iterable[int]) -> None:
        """Tell it of the attributes of these nodes, and again where it does not know them yet."""
        for nodeid in nodeids:
            self._pending[p.inval_attributes(nodeid)] = None

    def _sweep(self) -> Iterator[None]:
        for number, node in enumerate(self._nodes.all()):
            self._pending[p.inval_attributes(node.id)] = None
            if node.parent is not None and node.anchor is None:
                name = self._nodes.name(node)
                self._pending[p.inval_name(node.parent.id, name, p.EXPIRE_ONLY)] = None
            if number % _SWEEP == _SWEEP - 1:
                yield

    def tell(self) -> None:
        """Have the kernel told, as much as can be at once. Raises OSError."""
        while self._nodes.left:
            # What is told when something went unseen knows a node by its last name only.
            self._pending[p.inval_name(*self._nodes.left.pop(), p.EXPIRE_ONLY)] = None
        if self._swept is not None and len(self._pending) < _SWEEP:
            try:
                next(self._swept)
            except StopIteration:
                self._swept = None
        while self._pending:
            batch, size = [], 0
            for message in self._pending:
                size += len(message)
                if size > telling.MOST:
                    break
                batch.append(message)
            try:
                self._teller.send(b"".join(batch))
            except BlockingIOError:
                return
            for message in batch:
                del self._pending[message]

    def close(self) -> None:
        """Tell nobody anything any more. The teller ends by itself."""
        os.close(self._fd)
        self._teller.close()


def begin(teller: socket.socket, device: int, vfs: Vfs, *, takeover: bool) -> Watch | None:
    """Watch the filesystem of the backing tree, from now on; None where that cannot be, as the log says.

    Takes the teller; `device`, /dev/fuse, stays the caller's. Call it before there is a session. Raises
    OSError, in a takeover also where there is no watching: the kernel relies on what it was told before.
    """
    why_not = _why_not(vfs)
    if not why_not:
        try:
            fd = syscalls.fanotify(vfs.tree.rootfd, _WANTED)
        except OSError as error:
            if takeover:
                raise
            why_not = str(error)
        else:
            vfs.gate.lasting.watched = True
            vfs.nodes.left = set()
            socket.send_fds(teller, [b"\0"], [device])
            module, _ = compiled.find()
            return Watch(fd, teller, vfs, module.foreign if module is not None else foreign)
    teller.close()
    log.info("edits behind the mount show after a second, when asked for: %s", why_not)
    return None


def _why_not(vfs: Vfs) -> str:
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} says so"
    release = os.uname().release.split(".")
    if tuple(int(part) for part in release[:2]) < OLDEST:
        return f"Linux is older than {OLDEST[0]}.{OLDEST[1]}"
    if not vfs.tree.privileged:
        return "only root may watch a filesystem"
    kind = filesystem_of(vfs.tree.device)
    if kind not in _FILESYSTEMS:
        return f"the filesystem is {kind}"
    handle = vfs.tree.handle_of(vfs.tree.rootfd)
    if len(handle) < 12 or _INO_GEN.unpack_from(handle, 4)[0] != vfs.tree.root_ino:
        return "its file handles are of another form"
    return ""
