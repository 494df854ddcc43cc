"""How requests come in: read from the kernel one by one, the simplest perhaps answered before Python sees them.

Two forms of one interface. The compiled one (`_hot.c`) answers by itself what it finds plainly there: LOOKUP,
GETATTR and SETATTR, listings, an OPEN of what is resident and its RELEASE, names and links that come, go or
change, and FORGET; it has no other meaning than vfs, nodes, names, dirs, openfiles, gate and operations give
the request, and leaves all else to them. The pure one leaves all.
"""

from __future__ import annotations

import io
import logging
import os
import select
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, Protocol

from tierfs import idle, told
from tierfs.fuse import compiled
from tierfs.fuse import protocol as p
from tierfs.fuse.backing import KernelBacking
from tierfs.fuse.operations import listed_entry
from tierfs.handles import Handle, Inode
from tierfs.index import Index
from tierfs.lasting import FILES, FRESH, LONG, MOST_BELIEVED, MOST_PROVEN, RESTLESS
from tierfs.marks import SEGMENT
from tierfs.nodes import GoneStat, Node
from tierfs.vfs import Vfs

log = logging.getLogger("fuse")


class Receiver(Protocol):
    """Where requests come from.

    `others`: a descriptor that ends a sleep as well when it can be read; -1: none.
    """

    others: int

    @property
    def answered(self) -> int:
        """How many requests the last `receive` has answered itself."""

    def receive(self, most: int, until: float, /) -> int | None:
        """Put the next request that is not answered here into the buffer: its size.

        0 where `most` have been answered, or some and no more are there; None where nothing is. Sleeps before
        it says that no more are, `until` then (CLOCK_MONOTONIC; 0: not at all) or `others`. Raises OSError.
        """

    def entry(self, nodeid: int, name: bytes, /) -> bytes | None:
        """The packed entry of a name, with one lookup counted; None: look it up by the vfs."""

    def disbelieve(self, most: int, /) -> list[int] | None:
        """What `vfs.disbelieve` does, and the kernel is told; the nodes that it does not know. None: not."""

    def anybody_told(self) -> None:
        """A request has been answered that `receive` had given long before: others have been since."""

    def close(self) -> None:
        """Let go of the memory that it was given. Not to be used after."""


class Pure:
    """Reads, and answers nothing."""

    answered = 0

    def __init__(self, fd: int, buffer: bytearray) -> None:
        self.others = -1
        self._fd = fd
        self._device = io.FileIO(fd, "r+", closefd=False)
        self._buffer = buffer

    def receive(self, _most: int, until: float, /) -> int | None:
        size = self._device.readinto(self._buffer)
        if size is None and until > 0 and self._awaited(until):
            size = self._device.readinto(self._buffer)
        return size

    def _awaited(self, until: float) -> bool:
        left = until - time.monotonic()
        if left <= 0:
            return False
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if self.others >= 0:
            poll.register(self.others, select.POLLIN)
        return [fd for fd, _ in poll.poll(left * 1000)] == [self._fd]

    def entry(self, _nodeid: int, _name: bytes, /) -> bytes | None:
        return None

    def disbelieve(self, _most: int, /) -> None:
        return None

    def anybody_told(self) -> None:
        pass

    def close(self) -> None:
        pass


Told = Callable[[int, Any], None]
Receivers = Callable[[int, bytearray, Vfs, Told, Told], Receiver]


def pure(fd: int, buffer: bytearray, _vfs: Vfs, _refused: Told, _failed: Told) -> Receiver:
    """The pure form."""
    return Pure(fd, buffer)


def _records(module: ModuleType, index: Index | None) -> Any:
    """The index's file, for looks that take no transaction; None where there is none."""
    if not isinstance(index, Index):
        return None
    path, lock, size, page = index.file
    try:
        with open(path, "rb") as data, open(lock, "rb") as locks:
            return module.Records(data.fileno(), locks.fileno(), size, page)
    except (OSError, ValueError) as error:
        log.info("the index's file is not mapped a second time: %s", error)  # a limit of address space
        return None


def receiver(fd: int, buffer: bytearray, vfs: Vfs, refused: Told, failed: Told) -> Receiver:
    """The compiled form where it can be had, else the pure one; a line in the log says where one is no good.

    `refused` is told of a reply that the kernel did not take: the request's number, and an errno. `failed` of a
    request that is to be answered with an exception, and of that.
    """
    module, why_not = compiled.find()
    if why_not:
        log.warning("the compiled part is not used: %s", why_not)
    if module is None:
        return Pure(fd, buffer)
    gate, ledger = vfs.gate, vfs.ledger.form()
    made = module.Hot(
        fd=fd,
        buffer=buffer,
        root_fd=vfs.tree.rootfd,
        device=vfs.tree.device,
        memory=ledger.memory,
        parts=ledger.parts,
        free=ledger.free,
        longs=ledger.longs,
        free_longs=ledger.free_longs,
        intents_at=ledger.intents,
        segment=SEGMENT,
        directory_fds=vfs.nodes.most_dirs,
        low=gate.room.low,
        entry_seconds=p.ENTRY_SECONDS,
        attr_seconds=p.ATTR_SECONDS,
        long_seconds=LONG if gate.lasting.watched else 0,
        file_seconds=FILES,
        fresh=FRESH,
        restless=RESTLESS,
        most_believed=MOST_BELIEVED,
        most_proven=MOST_PROVEN,
        idle_seconds=idle.SECONDS,
        told=vfs.told.memory,
        told_left=told.LEFT,
        objects={
            **vfs.nodes.tables()._asdict(),
            **_objects(vfs),
            "records": _records(module, gate.appearance.index),
            "refused": refused,
            "failed": failed,
        },
    )
    gate.states.idle.retire = made.retire  # thousands may end at once
    compiled_form: Receiver = made
    return compiled_form


def _objects(vfs: Vfs) -> dict[str, object]:
    """What the compiled form works on, by its names for it."""
    gate, nodes = vfs.gate, vfs.nodes

    def holds(ino: int, ctime: int, blocks: int) -> int:
        """For how many seconds attributes as they are hold; -1 where others are shown."""
        if not gate.appearance.is_itself(ino, ctime, blocks):
            return -1
        return 0 if gate.writers_open(ino) else p.ATTR_SECONDS

    return {
        "root": nodes.root,
        "node": Node,
        "forget": nodes.forget,
        "listed": partial(listed_entry, vfs),
        "plain": gate.appearance.plain,
        "inodes": gate.appearance.inodes,
        "holds": holds,
        "states": gate.states,
        "kernel_backing": KernelBacking,
        "idle": gate.states.idle,
        "idle_inodes": gate.states.idle.inodes,
        "touched": gate.heat.touched,
        "besides": gate.heat.besides,
        "files": vfs.files.handles,
        "inode": Inode(0, 0, b""),
        "handle": Handle(Inode(0, 0, b""), -1, 0, 0),
        "stub_name": os.fsencode(vfs.tree.stub_name),
        "marks": gate.marking.marks,
        "recent": gate.marking.recent,
        "seals": gate.marking.seals,
        "late": gate.appearance.late,
        "changed": gate.appearance.changed,
        "gone_stat": GoneStat(b""),
        "nodes": nodes,
        "privileged": vfs.tree.privileged,
        "unproven": gate.lasting.unproven,
        "believed": gate.lasting.believed,
        "proven": gate.lasting.proven,
    }


def form(receiver: Receiver) -> str:
    """`pure` or `compiled`."""
    return "pure" if isinstance(receiver, Pure) else "compiled"
