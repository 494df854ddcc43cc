"""Tier: demote, copy out, fetch and pin. With its parts the only place that changes records and moves content.

    RESIDENT dirty --copying.py--> RESIDENT clean --punching.py--> STUB --filling.py--> PARTIAL
         ^                              ^                                                  |
         +------ a WRITE mark ----------+------------------- settling.py ------------------+

One inode is in one pair of hands at a time (Claims). Every change of a record is a function that is run inside
the index's next commit and looks at the record again there. Marks come in the same way (draining.py).
Locks, in the order in which they may be taken together: Filler's, then an Arrival's. Claims come before both.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from tierfs.bringing import Bringer, Report, Tell
from tierfs.config import VolumeConfig
from tierfs.copying import CHANGED, Copier, Item
from tierfs.draining import Drain
from tierfs.errors import ForeignStubError, TierError, VolumeError
from tierfs.filling import Filler
from tierfs.index import Index, Writer
from tierfs.kit import GONE, READ_FLAGS, Kit, unopened
from tierfs.model import Record, Residency
from tierfs.neighbours import Neighbours
from tierfs.places import Places
from tierfs.policy.aging import is_young
from tierfs.punching import BATCH, Puncher
from tierfs.rescuing import Rescuer
from tierfs.serverlink import ServerLink
from tierfs.settling import Settler
from tierfs.spelling import quoted
from tierfs.store.base import ObjectStore
from tierfs.transfer import Pool, flow
from tierfs.tree import Tree

log = logging.getLogger("mover")

_AT_ONCE = 4  # batches under way
_IN_HAND = 2 * _AT_ONCE  # and with those that wait for a thread
_BATCH_BYTES = 256 << 20
_CLAIM_SECONDS = (0.05, 0.2, 0.5)
_PATIENCE = 60.0  # seconds that an order waits for files that others work on, all in all
_BUSY = "is being worked on"


class Tier:
    """The mover's view of one volume. All methods may be called from several threads."""

    def __init__(
        self,
        tree: Tree,
        index: Index,
        store: ObjectStore,
        server: ServerLink,
        marks_dirfd: int,
        config: VolumeConfig,
        make_room: Callable[[int, bool], None] = lambda count, failed: None,
    ) -> None:
        """`make_room(bytes, a write has failed)` is called where a fetch finds no room on the local disk."""
        fetches = Pool(config.fetches, "fetch")
        uploads = Pool(config.uploads, "upload")
        now = index.session
        self.kit = Kit(tree, index, store, server, config, now.custody, now.taken, fetches, uploads)
        self.places = Places(tree, index)
        index.commit(partial(_begin, tree.root_ino)).result()
        self.drainer = Drain(
            marks_dirfd, index, server, self.kit.movements, self.kit.restless, self.places.forget,
            lambda ino, mtime, ctime: self.filler.times_set(ino, mtime, ctime), self._pinned_at,
        )  # fmt: skip
        self._copier = Copier(self.kit, self.drain)
        self._rescuer = Rescuer(self.kit, self.drain)
        self._puncher = Puncher(self.kit, self.drain, self.places)
        self._settler = Settler(self.kit, self.drain)
        self.neighbours = Neighbours(self.kit)
        self.filler = Filler(
            self.kit, self._settler.add, make_room, self._settler.hurry,
            self.neighbours.asked, self.neighbours.ended,
        )  # fmt: skip
        self._never, self._kept = config.never.matcher(), config.keep.matcher()
        self._batches = ThreadPoolExecutor(_AT_ONCE, "batch")
        self._bringer = Bringer(self.kit, self.filler, self._hint)
        self._settler.start(self.filler)

    def reconfigure(self, config: VolumeConfig) -> None:
        """Use these settings from now on."""
        self.kit.config = config
        self.kit.fetches.resize(config.fetches)
        self.kit.uploads.resize(config.uploads)
        self._never, self._kept = config.never.matcher(), config.keep.matcher()

    def close(self) -> None:
        """End in order: what is here is settled, what runs is finished, bits are committed."""
        self.filler.stop()
        self.neighbours.close()
        self._bringer.close()
        self._batches.shutdown(cancel_futures=True)
        self.kit.fetches.close()
        self._settler.stop()
        self.kit.uploads.close()

    def drain(self) -> int:
        """Bring the index up to date with the mark log; the position reached."""
        return self.drainer.run()

    # --- out ----------------------------------------------------------------------------------------------

    def demote(
        self,
        items: Iterable[Item],
        cancelled: threading.Event | None = None,
        report: Report | None = None,
        *,
        punch: bool = True,
    ) -> list[Item]:
        """Copy out what is dirty and (`punch`) free its blocks. The items come back, with reasons."""
        listed = list(items)
        for _ in self.demoted(listed, cancelled, report, punch=punch):
            pass
        return listed

    def demoted(
        self,
        items: Iterable[Item],
        cancelled: threading.Event | None = None,
        report: Report | None = None,
        *,
        punch: bool = True,
    ) -> Iterator[Item]:
        """As `demote`, each item when it is done with: there may be as many as a volume has files."""
        stop = cancelled if cancelled is not None else threading.Event()
        held_up: list[Item] = []
        for item in self._in_batches(items, stop, punch, report):
            if _is_held_up(item):
                held_up.append(item)
            else:
                yield item
        until = time.monotonic() + _PATIENCE
        for item in held_up:
            while _is_held_up(item) and self._comes_free(item.ino, until, stop):
                item.reason = ""
                list(self._in_batches([item], stop, punch, report))
            if _is_held_up(item):
                self._tell([item], report)
            yield item

    def _in_batches(
        self, items: Iterable[Item], stop: threading.Event, punch: bool, report: Report | None
    ) -> Iterator[Item]:
        def submit(batch: list[Item]) -> Future[None]:
            if stop.is_set():  # the daemon may be ending, and takes nothing more
                future = Future[None]()
                future.cancel()
                return future
            return self._batches.submit(self._batch, batch, stop, punch, report)

        for batch, future in flow(_batched(items), submit, _IN_HAND):
            try:
                future.result()
            except (TierError, OSError) as error:
                for item in batch:
                    if item.going and not item.demoted:
                        item.stay(str(error), failed=True)
            except CancelledError:  # it had not begun
                for item in batch:
                    item.stay("was cancelled")
                self._tell(batch, report)
            yield from batch

    def _batch(self, batch: list[Item], cancelled: threading.Event, punch: bool, report: Report | None) -> None:
        claimed: list[int] = []
        try:
            if cancelled.is_set():
                for item in batch:
                    item.stay("was cancelled")
                return
            if self._is_fenced(batch):
                return
            self.drain()
            for item in batch:
                if self._claim(item.ino):
                    claimed.append(item.ino)
                    try:
                        self._prepare(item, punch)
                    except (ForeignStubError, OSError) as error:  # of this file, and no reason for the others
                        item.stay(str(error), failed=True)
                else:
                    item.stay(_BUSY)
            self._copier.bring_up(batch, cancelled)
            self._once_more(batch, cancelled)
            going = [item for item in batch if item.going]
            # Asked again: copying may have taken hours.
            if punch and going and not self._is_fenced(going):
                self._puncher.punch(going)
        finally:
            for item in batch:
                if item.reason and item.fd >= 0 and not os.fstat(item.fd).st_nlink:
                    item.stay(GONE)
                item.close()
            for ino in claimed:
                self.kit.claims.give(ino)
            self._tell([item for item in batch if not _is_held_up(item)], report)

    def _comes_free(self, ino: int, until: float, stop: threading.Event) -> bool:
        """Wait until nobody works on an inode. For one at a time, while none is claimed: batches hold many."""
        while not stop.is_set() and time.monotonic() < until:
            if self._claim(ino):
                self.kit.claims.give(ino)
                return True
        return False

    def _is_fenced(self, batch: list[Item]) -> bool:
        """Another machine has the store: it may remove what copies here rely on, so nothing leaves any more."""
        try:
            self.kit.fence()
        except VolumeError as error:
            for item in batch:
                item.stay(str(error), failed=True)
            return True
        return False

    def _claim(self, ino: int) -> bool:
        """Claim an inode; one that is only kept open since it was last read is let go of first."""
        for seconds in (0.0, *_CLAIM_SECONDS):
            if self.kit.claims.take(ino, seconds):
                return True
            arrival = self.filler.arrival(ino)
            if arrival is not None and not arrival.requests:
                self._settler.release(arrival)
        return False

    def _once_more(self, batch: list[Item], cancelled: threading.Event) -> None:
        """An order is tried twice where only the survey, or a moment's use, came in between."""
        changed = [item for item in batch if item.ordered and item.reason == CHANGED and item.fd >= 0]
        again = [item for item in changed if os.fstat(item.fd).st_nlink]
        for item in again:
            record = self.kit.index.get(item.ino)
            item.record = record if record is not None and record.handle == item.handle else None
            item.reason, item.failed = "", False
        if again:
            self._copier.bring_up(again, cancelled)

    def _tell(self, batch: list[Item], report: Report | None) -> None:
        for item in batch:
            if item.failed:
                name = quoted(item.path or item.name)
                self.kit.troubles.note(f"{name} cannot be copied out: {item.reason}", item.ino)
            elif item.going:
                self.kit.troubles.solved(item.ino)
            if report is not None:
                report(item)

    def _prepare(self, item: Item, punch: bool) -> None:
        """Open the file and find out whether it may go; its reason says why not."""
        kit = self.kit
        try:
            item.fd = kit.open(item.ino, item.handle, READ_FLAGS, item.path or self._hint(item))
            st = item.st = os.fstat(item.fd)
        except OSError as error:
            item.stay(unopened(error))
            return
        item.size = st.st_size
        if not stat.S_ISREG(st.st_mode):
            item.stay("is not a regular file")
        elif kit.tree.read_stub(item.fd) is not None:
            item.already = not punch or not kit.tree.extents(item.fd, st.st_size)
            item.again = not item.already
        else:
            self._consider(item, st, punch)

    def _hint(self, item: Item) -> bytes | None:
        above = self.places.directory(item.parent) if item.parent and not self.kit.tree.privileged else None
        return os.path.join(above.path, item.name) if above is not None else None

    def _consider(self, item: Item, st: os.stat_result, punch: bool) -> None:
        record = self.kit.index.get(item.ino)
        if record is not None and record.handle == item.handle:
            if record.residency is not Residency.RESIDENT:
                record = self._put_right(item.ino)
            item.record = record
        place = self.places.of_file(item.fd, item.parent, item.name)
        if place is None:
            item.stay("was moved just now" if os.fstat(item.fd).st_nlink else GONE)
            return
        item.path = place.path
        if punch:
            reason = self.stays(place.path, st, place.pinned, item.ordered)
        else:
            reason = self._never_leaves(place.path)
        if reason:
            item.stay(reason)

    def stays(self, path: bytes, st: os.stat_result, pinned: bool, ordered: bool) -> str:
        """Why a resident file is not demoted, whatever room there is; "" where it may be. `ordered`: somebody
        has asked for it, and age and size do not count."""
        config = self.kit.config
        if reason := self._never_leaves(path):
            return reason
        if pinned:
            return "is pinned"
        if self._kept(path):
            return "is kept here: its name matches a pattern of [keep]"
        if st.st_blocks == 0:
            return "is empty"
        if ordered:
            return ""
        if st.st_size < config.min_size:
            return "is smaller than min_size"
        return "is younger than min_age" if _is_young(st, config.min_age) else ""

    def _never_leaves(self, path: bytes) -> str:
        return "never leaves: its name matches a pattern of [never]" if self._never(path) else ""

    def _put_right(self, ino: int) -> Record | None:
        """A file without stub attribute is resident, whatever the index says; nothing of its record is believed
        but its identity."""

        def commit(w: Writer) -> None:
            record = w.get(ino)
            if record is not None and record.residency is not Residency.RESIDENT:
                w.put(replace(record, residency=Residency.RESIDENT, left_ctime=0))

        self.kit.index.commit(commit).result()
        return self.kit.index.get(ino)

    def rescue(self, record: Record, stopping: threading.Event) -> bool:
        """Take a rescue copy of a file that somebody is writing; whether one was taken. Raises as `Rescuer`."""
        path = self._path_of(record)
        return path is not None and not self._never(path) and self._rescuer.rescue(record, path, stopping)

    def may_leave(self, record: Record) -> bool:
        """No pattern of [never] speaks against it, as far as its place is known."""
        path = self._path_of(record)
        return path is not None and not self._never(path)

    def _path_of(self, record: Record) -> bytes | None:
        above = self.places.directory(record.parent)
        return os.path.join(above.path, record.name) if above is not None else None

    # --- in -----------------------------------------------------------------------------------------------

    def fetch(
        self,
        items: Iterable[Item],
        cancelled: threading.Event | None = None,
        report: Report | None = None,
        tell: Tell | None = None,
    ) -> list[Item]:
        """Bring files back as a whole; the items with what became of them. `tell`: see bringing.py."""
        listed = list(items)
        for _ in self.fetched(listed, cancelled, report, tell):
            pass
        return listed

    def fetched(
        self,
        items: Iterable[Item],
        cancelled: threading.Event | None = None,
        report: Report | None = None,
        tell: Tell | None = None,
    ) -> Iterator[Item]:
        """As `fetch`, each item when it is done with: there may be as many as a volume has files."""
        return self._bringer.fetch(items, cancelled or threading.Event(), report, tell)

    # --- pins ---------------------------------------------------------------------------------------------

    def set_pin(self, opath: int, parent: int, name: bytes, on: bool) -> None:
        """Pin or unpin a file or directory itself. Raises OSError, IndexError_."""
        ino = os.fstat(opath).st_ino
        with self.kit.writable(opath):
            self.kit.tree.set_pin(opath, on)
        # A mark of a former file of this inode number, applied later, would drop the pin from the list.
        self.drain()
        self.kit.index.commit(lambda w: w.put_pin(ino, parent, name) if on else w.drop_pin(ino)).result()
        self.places.forget()

    def pins(self) -> Iterator[bytes]:
        """The paths of everything that is pinned itself; what is not there any more is left out."""
        self.places.forget()
        for ino, parent, name in self.kit.index.pins():
            if ino == self.kit.tree.root_ino:
                yield b""
                continue
            record = self.kit.index.get(ino)
            if record is not None:
                parent, name = record.parent, record.name
            else:
                parent, name = self.kit.index.get_dir(ino) or (parent, name)
            above = self.places.directory(parent)
            path = os.path.join(above.path, name) if above is not None else b""
            try:
                st = os.stat(path, dir_fd=self.kit.tree.rootfd, follow_symlinks=False)
            except OSError:
                continue
            if path and st.st_ino == ino:
                yield path

    def _pinned_at(self, directory: int) -> bool:
        place = self.places.directory(directory)
        return place is not None and place.pinned


def _begin(root_ino: int, w: Writer) -> None:
    """What a mover before this one was putting, nothing will refer to."""
    w.set_root(root_ino)
    w.abandon_all()


def _is_young(st: os.stat_result, age: float) -> bool:
    now = time.time()
    return is_young(st.st_mtime, now, age) or is_young(st.st_ctime, now, age)


def _is_held_up(item: Item) -> bool:
    """Somebody named it, and it is only that others work on it just now: as when it is being replicated."""
    return item.ordered and item.reason == _BUSY


def _batched(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Batches that share commits: few enough not to keep each other waiting."""
    batch: list[Item] = []
    size = 0
    for item in items:
        if batch and (len(batch) >= BATCH // 2 or size + item.size > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += item.size
    if batch:
        yield batch


__all__ = ["Item", "Tier"]
