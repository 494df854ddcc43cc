"""From the mark log into the index: each mark is applied once, in order, in the commit that moves the position.

What each mark does to a record stands in `apply`; a batch of them is folded (folding.py). A mark that names an
inode by its file handle replaces a record of a former inode of that number.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from tierfs import failpoints, transitions, wire
from tierfs.errors import BusyError
from tierfs.folding import Folded
from tierfs.index import Index, Writer
from tierfs.kit import Movements
from tierfs.marks import MODE_BITS, Entry, Mark, MarkReader
from tierfs.model import Record, Residency, new_fid
from tierfs.past import Ending
from tierfs.restless import Restless
from tierfs.serverlink import ServerLink

_BATCH = 10_000
_OF_PLACES = frozenset({Mark.PIN, Mark.DIR, Mark.NAMED})


class Drain:
    """Reads the log. `pinned` is set once something is pinned, or came beneath a pin, of which content may be
    away; `moved` is called where places have changed."""

    def __init__(
        self,
        marks_dirfd: int,
        index: Index,
        server: ServerLink,
        movements: Movements,
        restless: Restless,
        moved: Callable[[], None],
        times: Callable[[int, int, int], None] = lambda ino, mtime, ctime: None,
        pinned_at: Callable[[int], bool] = lambda ino: False,
    ) -> None:
        """`times` hears of times that somebody has set (inode, mtime, ctime), within the commit; `pinned_at`
        says whether what is in a directory is pinned from above."""
        self._index = index
        self._movements = movements
        self._server = server
        self._lock = threading.Lock()
        self._reader = MarkReader(marks_dirfd, index.log_position())
        self._told = -1
        self.pinned = threading.Event()
        self._restless = restless
        self._moved = moved
        self._times = times
        self._pinned_at = pinned_at
        self._moved_into: set[int] | None = None

    def note_moves(self, on: bool) -> set[int]:
        """The directories into which something was moved since this was last called to note that, and whether
        to go on noting it."""
        with self._lock:
            noted, self._moved_into = self._moved_into or set(), set() if on else None
            return noted

    @property
    def position(self) -> int:
        """All marks before it are in the index."""
        return self._reader.position

    def run(self) -> int:
        """Apply all marks that are there now; the position reached. Raises IndexError_, OSError.

        Not those that come meanwhile: while a program makes and removes files there would be no end of them.
        Nor those that came while another thread had its turn: each of those that wait would apply what the
        storm has left meanwhile, one after another, and the last wait for all of them.
        """
        newest = self._reader.newest_end()
        with self._lock:
            while self._reader.position < newest and self._step():
                pass
            position = self._reader.position
            if position != self._told:
                self._told = position
                with contextlib.suppress(BusyError):  # a server that has ended needs to know no more
                    self._server.send(wire.Drained(position))
            return position

    def _step(self) -> bool:
        """Apply one batch; whether there may be more that was there before it."""
        before = self._reader.position
        entries = list(self._reader.read(_BATCH))
        if not entries:
            return False
        position = self._reader.position

        def commit(w: Writer) -> None:
            now, folded = time.time_ns(), Folded(w)
            for entry in entries:
                apply(folded, entry, now)
                if entry.kind is Mark.TIMES:
                    self._times(entry.ino, entry.a, entry.b)
            folded.finish()
            w.set_log_position(position)

        try:
            moves = self._moves(entries)
            self._index.commit(commit).result()
        except BaseException:
            self._reader.position = before
            raise
        failpoints.hit(failpoints.DRAIN_COMMITTED)
        self._tell(entries)
        if any(self._pinned_at(new) and not self._pinned_at(old) for old, new in moves):
            self.pinned.set()
        self._reader.forget(position)
        return len(entries) == _BATCH

    def _tell(self, entries: list[Entry]) -> None:
        """Whoever goes by content that has come and gone, by places and by pins."""
        now = time.monotonic()
        here: dict[int, tuple[int, int]] = {}  # inode -> size, and how much of it is new
        gone: set[int] = set()
        for entry in entries:
            if entry.kind in (Mark.WRITE, Mark.NAMED) and entry.name:
                self._restless.changed(entry.ino, entry.parent, entry.name, now)
            if entry.kind is Mark.CLOSED:
                size = entry.b * 512
                here[entry.ino] = size, here.get(entry.ino, (0, 0))[1] + size
                gone.discard(entry.ino)
            elif entry.kind is Mark.GONE:
                here.pop(entry.ino, None)
                gone.add(entry.ino)
            elif entry.kind is Mark.PIN and entry.a:
                self.pinned.set()
            elif entry.kind in (Mark.NAMED, Mark.DIR) and self._moved_into is not None:
                self._moved_into.add(entry.parent)
        self._movements.many(here, gone)
        if any(entry.kind in _OF_PLACES for entry in entries):
            self._moved()

    def _moves(self, entries: list[Entry]) -> set[tuple[int, int]]:
        """(from, to): directories between which a directory or a file whose content is away has moved; none
        where nothing is pinned. The marks have not been applied yet."""
        moves: set[tuple[int, int]] = set()
        if not self._index.has_pins:
            return moves
        for entry in entries:
            if entry.kind is Mark.NAMED:
                record = self._index.get(entry.ino)
                if record is not None and record.residency is not Residency.RESIDENT:
                    moves.add((record.parent, entry.parent))
            elif entry.kind is Mark.DIR:
                place = self._index.get_dir(entry.ino)
                if place is not None:
                    moves.add((place[0], entry.parent))
        return {(old, new) for old, new in moves if old != new}


def apply(w: Writer | Folded, entry: Entry, now: int) -> None:
    """Apply one mark within a write transaction. `now` in nanoseconds since the epoch."""
    match entry.kind:
        case Mark.WRITE:
            _write(w, entry)
        case Mark.CLOSED:
            record = w.get(entry.ino)
            if record is not None:
                w.put(transitions.closed(record, entry.a, entry.b), touched=True)
                w.note(entry.ino)
        case Mark.GONE:
            record = w.get(entry.ino)
            if record is not None and record.handle == entry.handle:
                forget(w, record, _ending(entry, now))
            w.drop_pin(entry.ino)
            w.note(entry.parent, entry.name)
        case Mark.NAMED:
            record = w.get(entry.ino)
            if record is not None:
                w.put(replace(record, parent=entry.parent, name=entry.name))
            w.note(entry.parent, entry.name)
        case Mark.DIR:
            w.put_dir(entry.ino, entry.parent, entry.name)
            w.note(entry.parent, entry.name)
        case Mark.TIMES:
            record = w.get(entry.ino)
            if record is not None and record.copy is not None:
                w.put(replace(record, copy=replace(record.copy, mtime=entry.a, ctime=entry.b)))
        case Mark.PIN:
            if entry.a:
                w.put_pin(entry.ino, entry.parent, entry.name)
            else:
                w.drop_pin(entry.ino)
            w.note(entry.parent, entry.name)
        case Mark.ENTRY:
            if entry.a:
                w.drop_dir(entry.a)
                w.drop_pin(entry.a)  # its number may be another directory's soon
            w.note(entry.parent, entry.name)
        case Mark.ATTR if entry.a:
            w.note(entry.ino)
        case Mark.ATTR:
            w.note(entry.parent, entry.name)


def _write(w: Writer | Folded, entry: Entry) -> None:
    """The content changes: resident, with a generation that has no copy. The last copy's object stays until a
    newer one replaces it."""
    w.given(entry.generation)
    record = w.get(entry.ino)
    if record is not None and record.handle != entry.handle:
        forget(w, record, Ending(time.time_ns()))
        record = None
    if record is None:
        if entry.name:
            w.note(entry.parent, entry.name)
        w.put(
            Record(entry.ino, entry.handle, new_fid(), entry.generation, parent=entry.parent, name=entry.name)
        )
        return
    w.put(transitions.wrote(record, entry.generation, entry.parent, entry.name))


def _ending(entry: Entry, now: int) -> Ending:
    return Ending(
        now,
        parent=entry.parent,
        name=entry.name,
        mode=entry.a & (1 << MODE_BITS) - 1,
        uid=entry.a >> MODE_BITS,
        gid=entry.b,
    )


def forget(w: Writer | Folded, record: Record, ending: Ending) -> None:
    """The file is gone: its record goes, its copy becomes a version."""
    w.end(record, ending)
    w.delete(record.ino)
