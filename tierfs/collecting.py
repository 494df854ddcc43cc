"""Removing objects that nothing refers to any more (custody rules 17 and 23).

    buried or abandoned → published in the store → the grace has passed → looked at once more → deleted

An object is only ever removed by its own tombstone or intent, never for being in a listing. Ages are believed
time (policy/aging.py), so neither a jump of this machine's clock nor one of the store's makes anything older.
The list under `gc/` tells whoever takes the volume over what this machine may be about to remove; before each
batch the store is asked whether it is still ours.

What the last two durable snapshots of the namespace may refer to stays. Nothing is looked up in them: one that
was begun after a burial does not know the object, so two such ones are waited for, and asked for while garbage
waits. No snapshot ever knew what was abandoned.

Before a delete the backing filesystem is synced, so that an unlink which a power cut could undo has become
final, and the file that the object belonged to is looked for once more, by its handle or at its old place.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter

from tierfs import failpoints
from tierfs.digests import SIDE_SUFFIX
from tierfs.errors import (
    BusyError,
    ObjectMissingError,
    StoreDeniedError,
    StoreError,
    StoreFullError,
    TierError,
)
from tierfs.index import Writer
from tierfs.kit import Kit, is_gone
from tierfs.model import Record, epoch_of, object_key
from tierfs.past import Buried, Listed, Version
from tierfs.spelling import quoted
from tierfs.store.priority import Priority, priority
from tierfs.syscalls import boot_id

log = logging.getLogger("mover")

_BATCH = 500  # with the side objects one request of S3's bulk delete
_PART = 50_000  # keys in one object of a list
_PREFIX = "gc/"
_CLOCK_KEY = _PREFIX + "clock"
_CLOCK = b"The date of this object tells how late it is by the store's clock.\n"
_ROOM = b"It is larger than need be, to leave room for one in a store that is full.\n" * 222
_REFUSALS = 10  # in a row: the store lets us remove nothing
_INTERVAL = 3600.0  # seconds between beats
_ABORT_INTERVAL = 6 * 3600.0
_EVER = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Candidate:
    """An object that will be removed, not before `may_go` (seconds since the epoch). `size` None: not known."""

    key: str
    size: int | None
    reason: str
    may_go: float


def _since_boot() -> tuple[float, str]:
    return time.clock_gettime(time.CLOCK_BOOTTIME), boot_id()


class Collector:
    """`since_boot` gives the seconds since the boot of that id."""

    def __init__(self, kit: Kit, since_boot: Callable[[], tuple[float, str]] = _since_boot) -> None:
        self._kit = kit
        self._since_boot = since_boot
        self._next = self._next_abort = 0.0
        self._asked = -math.inf  # when a snapshot was last asked for
        self._swept = False
        self._lock = threading.Lock()  # one run at a time
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Begin nothing more, and end after what is under way."""
        self._stopping.set()

    def run(self, now: bool = False) -> int:
        """Remove what may go; how many objects went. Without `now` only as often as it makes sense.

        Raises StoreError, VolumeError where the store is not ours any more, IndexError_, OSError.
        """
        with self._lock, priority(Priority.GARBAGE):
            return self._run(now)

    def _run(self, now: bool) -> int:
        kit = self._kit
        if self._stopping.is_set() or kit.withheld or not kit.index.surveyed or not self._has_garbage():
            return 0
        if not now and time.monotonic() < self._next:
            return 0
        self._next = time.monotonic() + min(_INTERVAL, max(1.0, kit.config.grace / 4))
        kit.still_ours()
        self._beat()
        self._forget_unknown_lists()
        self._abort_uploads()
        gone = sum(self._carry_out(listed) for listed in kit.index.lists() if self._is_ripe(listed))
        self._publish()
        self._ask_for_snapshot()
        return gone

    def _has_garbage(self) -> bool:
        index = self._kit.index
        return bool(index.tombstones(_EVER, limit=1) or index.orphans(_EVER, limit=1) or index.lists())

    # --- time ---------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Learn the store's date, by writing something and looking when it says that was."""
        store = self._kit.store
        try:
            store.put(_CLOCK_KEY, _CLOCK + _ROOM, len(_CLOCK + _ROOM))
        except StoreFullError:
            # Nothing that makes room in the end could be done without it.
            store.delete([_CLOCK_KEY])
            store.put(_CLOCK_KEY, _CLOCK, len(_CLOCK))
        server = store.head(_CLOCK_KEY).modified
        failpoints.hit(failpoints.GC_BEAT)
        clock = self._kit.index.past.clock.advanced(server, *self._since_boot())
        self._kit.index.commit(lambda w: w.beat(clock)).result()

    def _older_than(self, seconds: float) -> int:
        """The last beat at which something may have been buried that is so old now; -1: nothing is."""
        now = self._kit.index.past.believed
        return max((number - 1 for number, at in self._kit.index.beats() if now - at >= seconds), default=-1)

    def _is_ripe(self, listed: Listed) -> bool:
        return self._kit.index.past.believed - listed.at >= self._kit.config.grace

    @property
    def _unknown_to_snapshots(self) -> int:
        """The last beat of which nothing is in the last two snapshots."""
        return min(self._kit.index.past.snapshots) - 1

    def _ask_for_snapshot(self) -> None:
        """Often enough that two come before the time of what is kept is over, and only while something is."""
        index = self._kit.index
        past = index.past
        oldest, latest = past.snapshots
        after = (max(oldest, 0), "")
        if not index.tombstones(_EVER, after, 1):
            return
        taken = next((at for _, at in index.beats(latest, 1)), past.believed) if latest >= 0 else 0.0
        # One in which something is only remembered counts for nothing here, and the next would be no better.
        often = self._kit.config.kept_seconds / 3
        if (latest < 0 or past.believed - taken >= often) and past.believed - self._asked >= often:
            self._asked = past.believed
            self._kit.snapshot_wanted.set()

    # --- first phase --------------------------------------------------------------------------------------

    def _publish(self) -> None:
        """Write down what will go, where everybody sees it, and begin to wait."""
        index, config = self._kit.index, self._kit.config
        lists = index.lists()
        tombs_before = max((listed.tombs for listed in lists), default=-1)
        orphans_before = max((listed.orphans for listed in lists), default=-1)
        # So that it may go when its time is over, not a grace later.
        tombs, orphans = self._older_than(config.kept_seconds - config.grace), self._older_than(0.0)
        if not index.tombstones(tombs, (tombs_before + 1, ""), 1):
            tombs = tombs_before
        if not index.orphans(orphans, (orphans_before + 1, ""), 1):
            orphans = orphans_before
        if (tombs, orphans) == (tombs_before, orphans_before):
            return
        past = index.past
        key = f"{_PREFIX}{index.session.epoch:05x}-{past.beat:012x}-"
        parts = 0
        for part in _parts(self._new(tombs_before + 1, tombs, orphans_before + 1, orphans)):
            body = json.dumps({"format": 1, "keys": part}).encode()
            self._kit.store.put(f"{key}{parts}", body, len(body))
            parts += 1
        failpoints.hit(failpoints.GC_PUBLISHED)
        listed = Listed(past.beat, tombs, orphans, past.believed, key, parts)
        index.commit(lambda w: w.put_list(listed)).result()
        failpoints.hit(failpoints.GC_LISTED)

    def _new(self, first_tomb: int, last_tomb: int, first_orphan: int, last_orphan: int) -> Iterator[str]:
        index = self._kit.index
        for rows in _pages(lambda after: index.tombstones(last_tomb, after, _BATCH), (first_tomb, "")):
            yield from (key for _, key in rows)
        for rows in _pages(lambda after: index.orphans(last_orphan, after, _BATCH), (first_orphan, "")):
            yield from (key for _, key in rows)

    def _forget_unknown_lists(self) -> None:
        """What a crash published without noting it. Once; lists of a later owner are left alone."""
        if self._swept:
            return
        index = self._kit.index
        known = {f"{listed.key}{part}" for listed in index.lists() for part in range(listed.parts)}
        ours = f"{_PREFIX}{index.session.epoch:05x}-~"
        found = [info.key for info in self._kit.store.list(_PREFIX) if info.key != _CLOCK_KEY]
        self._kit.store.delete([key for key in found if key not in known and key < ours])
        self._swept = True

    # --- second phase -------------------------------------------------------------------------------------

    def _carry_out(self, listed: Listed) -> int:
        """Delete what is on a list, but for what has come back or is not old enough; how many objects went."""
        index = self._kit.index
        if not self._is_published(listed):
            index.commit(lambda w: w.drop_list(listed.number)).result()
            return 0
        self._kit.tree.sync()
        tombs = min(listed.tombs, self._older_than(self._kit.config.kept_seconds), self._unknown_to_snapshots)
        gone = 0
        for rows in _pages(lambda after: index.tombstones(tombs, after, _BATCH), None):
            gone += self._collect(rows, self._judge_tomb, Writer.drop_tombstone)
        for rows in _pages(lambda after: index.orphans(listed.orphans, after, _BATCH), None):
            gone += self._collect(rows, self._judge_orphan, Writer.drop_orphan)
        failpoints.hit(failpoints.GC_DROPPED)
        self._close(listed)
        if gone:
            log.info("%d objects that nothing refers to were removed", gone)
        return gone

    def _is_published(self, listed: Listed) -> bool:
        try:
            for part in range(listed.parts):
                self._kit.store.head(f"{listed.key}{part}")
        except ObjectMissingError:
            log.warning("a list of garbage is not in the store any more: it is published once more")
            return False
        return True

    def _close(self, listed: Listed) -> None:
        """A list on which nothing is left goes, and with it the beats that only it needed."""
        index = self._kit.index
        if index.tombstones(listed.tombs, limit=1) or index.orphans(listed.orphans, limit=1):
            return
        self._kit.store.delete([f"{listed.key}{part}" for part in range(listed.parts)])
        buried = index.tombstones(_EVER, limit=1) + index.orphans(_EVER, limit=1)
        oldest = min((beat for beat, _ in buried), default=index.past.beat)

        def commit(w: Writer) -> None:
            w.drop_list(listed.number)
            w.forget_beats(oldest)

        index.commit(commit).result()

    def _collect(
        self,
        rows: list[Buried],
        judge: Callable[[int, str], bool | None],
        drop: Callable[[Writer, int, str], None],
    ) -> int:
        kit = self._kit
        if self._stopping.is_set():
            raise BusyError("the daemon is stopping")
        kit.still_ours()
        gone: list[Buried] = []
        back: list[Buried] = []
        for beat, key in rows:
            verdict = None if key in kit.in_use or not self._is_ours(key) else judge(beat, key)
            if verdict is not None:
                (gone if verdict else back).append((beat, key))
        if gone:
            gone = self._delete(gone)
            failpoints.hit(failpoints.GC_DELETED)

        def commit(w: Writer) -> None:
            for _, key in gone:
                _drop_leaves(w, key)
            for beat, key in gone + back:
                drop(w, beat, key)

        if gone or back:
            kit.index.commit(commit).result()
        return len(gone)

    def _delete(self, rows: list[Buried]) -> list[Buried]:
        """Those that are gone. One that is locked in the store holds up none of the others.

        Raises StoreDeniedError where one after another is refused: it would be asked in vain for each.
        """
        store = self._kit.store
        try:
            store.delete(_objects(rows))
            return rows
        except StoreDeniedError:
            log.debug("not all at once: one by one", exc_info=True)
        gone: list[Buried] = []
        refused = in_a_row = 0
        for row in rows:
            try:
                store.delete(_objects([row]))
            except StoreDeniedError as exc:
                refused, in_a_row, why = refused + 1, in_a_row + 1, f"{row[1]}: {exc}"
                if in_a_row >= _REFUSALS:
                    raise
                continue
            in_a_row = 0
            gone.append(row)
        if refused:
            self._kit.troubles.note(f"{refused} objects cannot be removed from the store, the last {why}")
        return gone

    def _is_ours(self, key: str) -> bool:
        """No later owner has made it."""
        return epoch_of(_parse(key)[1]) <= self._kit.index.last_epoch

    def _judge_orphan(self, _beat: int, key: str) -> bool | None:
        return not self._is_referred(key)

    def _judge_tomb(self, beat: int, key: str) -> bool | None:
        """True: nothing refers to this object. False: something does. None: that is not final yet."""
        if self._is_referred(key):
            return False
        if self._has_twin(key):
            return None
        tree = self._kit.tree
        handle = self._kit.index.tombstone_handle(beat, key)
        if not handle:
            return True
        try:
            fd = tree.open_handle(handle, os.O_PATH) if tree.privileged else self._at_old_place(key)
        except OSError as error:
            return True if is_gone(error) else None  # too many files are open, perhaps: that says nothing of it
        try:
            stub = tree.read_stub(fd)
            if stub is None or stub.key != key:
                return True
            # Unlinked and open: its reader may still need the object. Linked: it is back after a power cut.
            return None if os.fstat(fd).st_nlink == 0 else False
        except TierError:
            return None
        finally:
            os.close(fd)

    def _has_twin(self, key: str) -> bool:
        """A stub that was copied behind the mount lives on: two walks of the tree have looked for such."""
        tree, index = self._kit.tree, self._kit.index
        for handle in index.twins(key):
            if not tree.privileged:
                return True  # nothing is opened by handle
            try:
                fd = tree.open_handle(handle, os.O_PATH)
            except OSError as error:
                if not is_gone(error):
                    return True
                index.post(partial(_drop_twin, key, handle))
                continue
            try:
                stub = tree.read_stub(fd)
            except TierError:
                return True
            finally:
                os.close(fd)
            if stub is not None and stub.key == key:
                return True
            index.post(partial(_drop_twin, key, handle))
        return False

    def _at_old_place(self, key: str) -> int:
        """Whatever is there, O_PATH: without privileges nothing is opened by handle. Raises OSError."""
        version = self._kit.index.version(key)
        path = version.path if version is not None else b""
        return os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._kit.tree.rootfd)

    def _is_referred(self, key: str) -> bool:
        record = self._kit.index.get_by_fid(_parse(key)[0])
        return record is not None and _key_of(record) == key

    # --- uploads cut short --------------------------------------------------------------------------------

    def _abort_uploads(self) -> None:
        """Parts of uploads that never ended cost money and are in no listing of objects."""
        if time.monotonic() < self._next_abort:
            return
        self._next_abort = time.monotonic() + _ABORT_INTERVAL
        before = self._kit.index.past.server - self._kit.config.grace
        try:
            count = self._kit.store.abort_uploads("data/", before, set(self._kit.index.intents()))
        except StoreError as error:
            log.warning("uploads that were cut short stay in the store: %s", error)
            return
        if count:
            log.info("%d uploads that were cut short were removed", count)

    # --- what is known ------------------------------------------------------------------------------------

    def kept_until(self, version: Version) -> float:
        """Seconds since the epoch, at least; by this machine's clock as it goes now."""
        return self._may_go(version.beat, self._kit.config.kept_seconds)

    def _may_go(self, beat: int, keep: float) -> float:
        past = self._kit.index.past
        begun = next((at for _, at in self._kit.index.beats(beat + 1, 1)), past.believed)
        return time.time() + max(0.0, keep - (past.believed - begun))

    def plan(self) -> Iterator[Candidate]:
        """What will be removed and when, oldest first. Raises IndexError_.

        Of thousands that are of one beat its time is looked up once."""
        index, config, known = self._kit.index, self._kit.config, self._unknown_to_snapshots
        for rows in _pages(lambda after: index.tombstones(_EVER, after, _BATCH), None):
            for beat, group in groupby(rows, key=itemgetter(0)):
                may_go = self._may_go(beat, config.kept_seconds)
                for _, key in group:
                    size, reason = _described(index.version(key))
                    if beat > known:
                        reason += ", perhaps still in a snapshot"
                    yield Candidate(key, size, reason, may_go)
        for rows in _pages(lambda after: index.orphans(_EVER, after, _BATCH), None):
            for beat, group in groupby(rows, key=itemgetter(0)):
                may_go = self._may_go(beat, config.grace)
                for _, key in group:
                    yield Candidate(key, None, "upload that became no copy", may_go)


def _described(version: Version | None) -> tuple[int | None, str]:
    """Size and reason."""
    if version is None:
        return None, "found in the store; nothing refers to it"
    how = "deleted" if version.deleted else "superseded"
    return version.size, f"{how} version of {quoted(version.path)}"


def _drop_twin(key: str, handle: bytes, w: Writer) -> None:
    w.drop_twin(key, handle)


def _drop_leaves(w: Writer, key: str) -> None:
    """Unless they are those of the present copy: it may be of the same content, and committed just now."""
    fid, generation = _parse(key)
    if not w.has_copy(fid, generation):
        w.drop_leaves(fid, generation)


def _pages(page: Callable[[Buried | None], list[Buried]], after: Buried | None) -> Iterator[list[Buried]]:
    while rows := page(after):
        yield rows
        after = rows[-1]


def _parts(keys: Iterator[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for key in keys:
        part.append(key)
        if len(part) >= _PART:
            yield part
            part = []
    if part:
        yield part


def _parse(key: str) -> tuple[bytes, int]:
    """File id and generation of a key."""
    _, _, name, version = key.split("/")
    return bytes.fromhex(name), int(version.partition("-")[0], 16)


def _key_of(record: Record) -> str:
    return object_key(record.fid, record.copy.generation, record.copy.tag) if record.copy is not None else ""


def _objects(rows: list[Buried]) -> list[str]:
    return [key for _, key in rows] + [key + SIDE_SUFFIX for _, key in rows]
