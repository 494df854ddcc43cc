"""What is appended to the mark log: by whom it is read, and which of it has yet to be read.

A mark says what has happened to content or names. It is appended where a change takes effect, so that the order
of the log is that of the changes; room for it is asked for before the change (`need`).
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterable

from tierfs import wire
from tierfs.appearance import Appearance
from tierfs.handles import Inode
from tierfs.lasting import Lasting
from tierfs.ledger import Ledger
from tierfs.marks import MODE_BITS, Entry, Mark, MarkWriter
from tierfs.tree import Tree

log = logging.getLogger("gate")

POKE_SECONDS = 0.25  # how often the mover is told of new marks
_MARKS = 4096  # bytes; more than the marks of any one operation take


class Marking:
    """Belongs to the gate, and is called under its lock."""

    def __init__(
        self,
        tree: Tree,
        marks: MarkWriter,
        ledger: Ledger,
        recent: dict[int, int],
        appearance: Appearance,
        lasting: Lasting,
        post: Callable[[wire.Message], None],
    ) -> None:
        """`recent`: inode -> position of its newest mark that the mover has not drained; kept here.

        `post` hands a message to the mover.
        """
        self._tree = tree
        self.marks = marks
        self._ledger = ledger
        self.recent = recent
        self._appearance = appearance
        self._lasting = lasting
        self._post = post
        self.seals: set[int] = set()  # inodes that the mover is copying: a mark of writing breaks the seal
        self._next_poke = 0.0
        self._poked = marks.position

    # --- appending ----------------------------------------------------------------------------------------

    def need(self) -> None:
        """Call before a change that marks follow: what cannot be marked must not happen. Raises OSError."""
        self.marks.ensure(_MARKS)

    def append(
        self,
        kind: Mark,
        ino: int,
        generation: int = 0,
        parent: int = 0,
        a: int = 0,
        b: int = 0,
        handle: bytes = b"",
        name: bytes = b"",
    ) -> None:
        """A mark of an inode, which is neither sealed nor guarded before the mover has drained it."""
        self.recent[ino] = self.marks.append(kind, ino, generation, parent, a, b, handle, name)
        if kind is Mark.WRITE:
            self._lasting.written(ino)

    def write(self, inode: Inode) -> None:
        """Its content is about to change: the generation rises, and a seal is broken."""
        if not inode.handle:
            inode.handle = self._tree.handle_of(inode.opath)
        generation, handle = self.new_generation(), inode.handle
        self.append(Mark.WRITE, inode.ino, generation, inode.parent, handle=handle, name=inode.name)
        # Not before: on a full disk there may be no room for the mark, and the next writer must try again.
        inode.marked = True
        inode.shown = None
        self._appearance.changed(inode.ino)
        if inode.ino in self.seals:
            self.seals.discard(inode.ino)
            self._post(wire.SealBroken([inode.ino]))

    def closed(self, inode: Inode) -> None:
        """Its last writing handle is gone."""
        st = os.fstat(inode.opath)
        inode.size = st.st_size
        self.append(Mark.CLOSED, inode.ino, parent=inode.parent, a=st.st_size, b=st.st_blocks)
        inode.marked = False

    def gone(self, st: os.stat_result, handle: bytes, parent: int, name: bytes) -> None:
        """There is no such file any more; `st` is from before."""
        who = st.st_uid << MODE_BITS | st.st_mode
        self.append(Mark.GONE, st.st_ino, parent=parent, a=who, b=st.st_gid, handle=handle, name=name)

    def new_generation(self) -> int:
        """One that no content has had."""
        generation = self._ledger.generation + 1
        self._ledger.generation = generation
        return generation

    def made_dir(self, ino: int, parent: int, name: bytes) -> None:
        """A directory was made or renamed."""
        self.append(Mark.DIR, ino, parent=parent, name=name)

    # What the namespace journal is to look at is no content: it stands in nobody's way (`recent`).

    def entry(self, parent: int, name: bytes, removed_dir: int = 0) -> None:
        """A name has come, gone or changed its meaning; `removed_dir`: the directory that it was."""
        self.marks.append(Mark.ENTRY, 0, parent=parent, a=removed_dir, name=name)

    def attributes(self, st: os.stat_result, parent: int, name: bytes) -> None:
        """Mode, owner, times or extended attributes of an inode were set."""
        self.marks.append(Mark.ATTR, st.st_ino, parent=parent, a=int(stat.S_ISREG(st.st_mode)), name=name)

    # --- draining -----------------------------------------------------------------------------------------

    def take_over(self, undrained: Iterable[Entry]) -> None:
        """Begin where another server has ended: these are the marks that no mover has drained yet."""
        for entry in undrained:
            if entry.kind not in (Mark.ENTRY, Mark.ATTR):
                self.recent[entry.ino] = entry.end - 1

    def drained(self, position: int) -> None:
        """The mover has read the log up to there."""
        for ino in [ino for ino, at in self.recent.items() if at < position]:
            del self.recent[ino]

    @property
    def untold(self) -> bool:
        """There are marks of which the mover has not been told."""
        return self.marks.position != self._poked

    def space_is_short(self) -> None:
        """Tell the mover, with how far it is to read: what was removed makes room too."""
        self._post(wire.Poke(self.marks.position, urgent=True))

    def tick(self, now: float) -> None:
        """Keep room for what comes, and tell the mover of what there is, now and then."""
        if now < self._next_poke:
            return
        self._next_poke = now + POKE_SECONDS
        self._reserve()
        if self.untold:
            self._poked = self.marks.position
            self._post(wire.Poke(self._poked))

    def _reserve(self) -> None:
        try:
            self.marks.reserve()
        except OSError as error:
            log.warning("no room for the next part of the mark log: %s", error)
