"""What the control server asks, answered by the mover's parts."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from tierfs import control, terminal, volume
from tierfs.collecting import Collector
from tierfs.copying import PIECE, Item
from tierfs.errors import BusyError, StoreUnavailableError, TierError
from tierfs.heat_index import HeatIndex
from tierfs.kit import GONE
from tierfs.model import Record, Residency, object_key
from tierfs.policy.aging import is_young
from tierfs.store.base import Body
from tierfs.tier import Tier
from tierfs.versions import Kept, beneath, content, of_path
from tierfsd.control_server import LIST_LIMIT, Job
from tierfsd.journalling import JournalKeeper
from tierfsd.reach import Target, Targets
from tierfsd.scrubbing import Scrubber
from tierfsd.waiting import waiting
from tierfsd.watcher import ConfigWatcher

Check = Callable[[control.Check, Job], control.Findings]

_DRAIN_SECONDS = 0.05  # facts are at most so old
_FIRST_ANSWER_SECONDS = 10.0  # what a store may take for its first answer after a mount
_OPEN_SECONDS = 10.0  # how long `--wait` waits for a file that is open, before it names it
_LOOK_SECONDS = 0.2  # between looks how far large files have come
_ROUND = 1000  # dirty files that are looked at together


class TierBackend:
    """Implements `control_server.Backend`.

    `looked` is set when the look through the tree is over, whatever came of it,
    `verifying` says how many copies have yet to be looked at after an unclean stop, `notes` what a person
    should know of the volume besides, `check` carries out a check, `journal` keeps the namespace journal,
    `scrubber` reads copies back, `bring_pinned` has what is pinned fetched in the background,
    `never` says whether an inode's file is known never to leave.
    """

    def __init__(
        self,
        tier: Tier,
        heat: HeatIndex,
        home: volume.Volume,
        watcher: ConfigWatcher,
        *,
        looked: threading.Event,
        verifying: Callable[[], int],
        notes: Callable[[], list[str]],
        check: Check,
        journal: JournalKeeper,
        collector: Collector,
        scrubber: Scrubber,
        bring_pinned: Callable[[], None],
        never: Callable[[int], bool],
    ) -> None:
        self._tier = tier
        self._kit = tier.kit
        self._heat = heat
        self._home = home
        self._watcher = watcher
        self._looked = looked
        self._verifying = verifying
        self._notes = notes
        self._journal = journal
        self.check = check
        self._collector = collector
        self._scrubber = scrubber
        self._bring_pinned = bring_pinned
        self._never = never
        self._drained = 0.0

    # --- what is known ------------------------------------------------------------------------------------

    def status(self) -> control.Status:
        """Facts of the volume."""
        self._tier.drain()
        index, runtime = self._kit.index, volume.read_runtime(self._home.state)
        totals, oldest = index.totals(), index.oldest_dirty()
        unsaved = [] if self._home.identity.view else waiting(self._kit, self._tier.places, self._never)
        return control.Status(
            volume=self._home.identity.volume,
            state=self._home.state,
            state_bytes=os.fsencode(self._home.state),
            store=self._kit.store.describe(),
            local_bytes=totals.local_bytes,
            local_limit=self._kit.config.local_limit,
            total_bytes=totals.total_bytes,
            files=totals.files,
            stubs=totals.stubs,
            lent_bytes=self._heat.lent_bytes(),
            dirty_files=totals.dirty_files,
            dirty_bytes=max(0, totals.dirty_bytes + sum(file.grown for file in unsaved)),
            queued=self._kit.uploads.queued + self._kit.fetches.queued,
            pids={**runtime.get("pids", {}), "mover": os.getpid()},
            errors=self._problems(),
            oldest_dirty=max(0.0, time.time() - oldest / 1e9) if oldest is not None else 0.0,
            upload_rate=self._kit.uploaded.per_second(),
            fetch_rate=self._kit.fetched.per_second(),
            verifying=self._verifying(),
            journal_behind_seconds=0.0 if self._home.identity.view else self._journal.behind,
            notes=self._all_notes(),
            binding=runtime.get("binding", {}),
            waiting=unsaved,
            scrub=None if self._home.identity.view else self._scrubber.status(),
            server_deaths=runtime.get("server_deaths", 0),
            mover_deaths=runtime.get("mover_deaths", 0),
            restarts=runtime.get("restarts", 0),
            ahead=self._ahead(),
        )

    def _ahead(self) -> control.Ahead:
        of = self._tier.neighbours.precision
        return control.Ahead(of.files, of.bytes, of.used_files, of.used_bytes)

    def _problems(self) -> list[control.Problem]:
        troubles = [control.Problem(trouble.at, trouble.what) for trouble in self._kit.troubles.list()]
        return sorted(troubles + self._scrubber.problems(), key=lambda problem: problem.at)

    def _all_notes(self) -> list[str]:
        notes = self._notes()
        if self._watcher.problem:
            notes.append(self._watcher.problem)
        if not self._kit.index.surveyed:
            notes.append("the tree is still being looked through: the figures are not complete")
        if held := self._journal.holds_back:
            notes.append(held)
        return notes

    def facts(self, opath: int, status: os.stat_result, path: bytes) -> control.Facts:
        """Facts of one name."""
        pinned = self._is_pinned(opath, path)
        if not stat.S_ISREG(status.st_mode):
            tier = "directory" if stat.S_ISDIR(status.st_mode) else "other"
            return control.Facts(path, tier, status.st_size, status.st_blocks * 512, pinned=pinned)
        now = time.monotonic()
        if now - self._drained > _DRAIN_SECONDS:
            self._tier.drain()
            self._drained = now
        record = self._kit.index.get(status.st_ino)
        if record is not None and record.handle != self.handle_of(opath):
            record = None
        return self._file_facts(opath, status, path, pinned, record)

    def _file_facts(
        self, opath: int, status: os.stat_result, path: bytes, pinned: bool, record: Record | None
    ) -> control.Facts:
        stub = self._kit.tree.read_stub(opath)
        if stub is not None:
            partial = record is not None and record.residency is Residency.PARTIAL
            tier, generation, key, dirty = "partial" if partial else "stub", stub.generation, stub.key, False
        else:
            tier, generation, key = "resident", record.generation if record else 0, ""
            dirty = record is None or record.dirty
            if record is not None and record.copy is not None and not dirty:
                key = object_key(record.fid, record.copy.generation, record.copy.tag)
        return control.Facts(
            path=path,
            tier=tier,
            size=status.st_size,
            local_bytes=status.st_blocks * 512,
            dirty=dirty,
            pinned=pinned,
            heat=self._heat.heat(status.st_ino),
            generation=generation,
            copy=key,
            reason=self._kit.troubles.of(status.st_ino),
            stays=self._stays(path, status, pinned) if stub is None else "",
        )

    def _stays(self, path: bytes, status: os.stat_result, pinned: bool) -> str:
        """As eviction looks at it."""
        reason = self._tier.stays(path, status, pinned, ordered=False)
        last = self._heat.last_use(status.st_ino) or 0.0
        if not reason and is_young(last, time.time(), self._kit.config.min_age):
            return "was used within min_age"
        return reason

    def _is_pinned(self, opath: int, path: bytes) -> bool:
        """Where it is renamed meanwhile it counts where it is then. Raises BusyError, OSError."""
        if not path:
            return self._kit.tree.is_pinned(opath)
        places = self._tier.places
        place = places.at(opath, path) or places.of_file(opath, 0, b"")
        if place is None:
            if not os.fstat(opath).st_nlink:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            raise BusyError("was moved just now: try again")
        return place.pinned

    def handle_of(self, opath: int) -> bytes:
        """The kernel file handle."""
        return self._kit.tree.handle_of(opath)

    def pins(self) -> Iterable[bytes]:
        """The paths of all pins."""
        self._tier.drain()
        return self._tier.pins()

    # --- orders -------------------------------------------------------------------------------------------

    def demote(self, targets: Targets, job: Job) -> control.Done:
        """Carry out an order to demote."""
        with _Count(len(targets), _size(targets), job) as count:
            items = count.watched(map(_item, targets))
            return _done(self._tier.demoted(items, job.cancelled, count), targets)

    def fetch(self, targets: Targets, job: Job) -> control.Done:
        """Carry out an order to fetch."""
        with _Count(len(targets), _size(targets), job) as count:
            items, tell = count.watched(map(_item, targets)), count.tell if job.awaited else None
            return _done(self._tier.fetched(items, job.cancelled, count, tell), targets)

    def set_pin(self, opath: int, status: os.stat_result, parent: int, name: bytes, on: bool) -> None:
        """Pin or unpin one file or directory."""
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise TierError("is neither a file nor a directory: it always stays local")
        self._tier.set_pin(opath, parent, name, on)
        if on:
            self._bring_pinned()

    def drain(self, job: Job) -> control.Done:
        """Copy out all that is dirty, young or not; what is open is named when it stays so."""
        if self._home.identity.view:
            return control.Done()  # nothing of it is for the store
        while not self._looked.wait(0.2):
            if job.cancelled.is_set():
                return control.Done()
        if not self._kit.index.surveyed:
            reason = "the tree could not be looked through, `tierfs status` says why"
            return control.Done(0, [control.Outcome(b"", reason, failed=True)])
        copied = 0
        deadline = time.monotonic() + _OPEN_SECONDS
        while True:
            position = self._tier.drain()
            totals = self._kit.index.totals()
            with _Count(totals.dirty_files, totals.dirty_bytes, job) as count:
                items = count.watched(self._dirty(totals.dirty_files + _ROUND))
                done = self._copied_out(self._tier.demoted(items, job.cancelled, count, punch=False))
            copied += done.files
            failed = any(outcome.failed for outcome in done.stayed)
            if not done.stayed or failed or time.monotonic() > deadline or job.cancelled.is_set():
                stayed = done.stayed
                problem = self._journal.catch_up(job.cancelled)
                if problem:
                    reason = f"names and attributes are not all in the store: {problem}"
                    stayed.append(control.Outcome(b"", reason, failed=True))  # of the volume as a whole
                return control.Done(copied, stayed, position)
            job.cancelled.wait(0.2)

    def _copied_out(self, items: Iterable[Item]) -> control.Done:
        """How many have been copied, and what stays although it may leave."""
        copied, stayed = 0, _Stayed()
        for item in items:
            if not item.reason:
                copied += 1
            elif not item.reason.startswith("never leaves"):
                stayed.add(self._unsaved(item))
        return control.Done(copied, stayed.named)

    def _unsaved(self, item: Item) -> control.Outcome:
        """With how long it has been so."""
        outcome, since = _outcome(item), self._kit.index.dirty_since(item.ino)
        if not since or outcome.failed:
            return outcome
        age = terminal.age(max(0.0, time.time() - since / 1e9))
        return control.Outcome(outcome.path, f"{outcome.reason}: not in the store for {age}")

    def _dirty(self, most: int) -> Iterator[Item]:
        """The dirty files that the index knows of, longest waiting first."""
        at = 0, 0
        while most > 0:
            rows = self._kit.index.queued(at, 1 << 63, min(_ROUND, most))
            for _, ino in rows:
                record = self._kit.index.get(ino)
                if record is not None and record.dirty:
                    yield Item.of(record, ordered=True)
            if len(rows) < _ROUND:
                return
            most -= len(rows)
            at = rows[-1][0], rows[-1][1] + 1

    # --- the past -----------------------------------------------------------------------------------------

    def versions(self, path: bytes, opath: int | None) -> list[Kept]:
        """All that is kept of a path."""
        self._tier.drain()
        record = None
        if opath is not None:
            record = self._kit.index.get(os.fstat(opath).st_ino)
            if record is not None and record.handle != self.handle_of(opath):
                record = None
        return of_path(self._kit, path, record)

    def versions_beneath(self, path: bytes) -> Iterable[Kept]:
        """All that ended beneath a directory."""
        self._tier.drain()
        return beneath(self._kit, path)

    def kept_until(self, kept: Kept) -> float | None:
        """Seconds since the epoch; None: as long as its file has it."""
        return self._collector.kept_until(kept.version) if kept.version is not None else None

    def content(self, kept: Kept) -> Iterator[tuple[int, Body]]:
        """(offset, bytes) of its data, checked."""
        return content(self._kit, kept)

    def collect(self, dry_run: bool, job: Job) -> Iterator[control.Garbage | control.Done]:
        """Remove what may go from the store, or name what will."""
        self._tier.drain()
        if not dry_run:
            if not self._kit.claim_tried.wait(_FIRST_ANSWER_SECONDS):
                raise StoreUnavailableError(f"nothing is removed: {self._kit.withheld}: try again when it has")
            if self._kit.withheld:
                raise StoreUnavailableError(f"nothing is removed: {self._kit.withheld}")
            yield control.Done(self._collector.run(now=True))
            return
        count = 0
        for candidate in self._collector.plan():
            if job.cancelled.is_set():
                break
            count += 1
            yield control.Garbage(candidate.key, candidate.size, candidate.reason, candidate.may_go)
        yield control.Done(count)

    def reload(self) -> None:
        """Read the configuration anew. Raises ConfigError."""
        self._watcher.reload()


class _Count:
    """Turns finished items into progress, and while it is entered also what has come of large ones.

    It is told how many there are, and then knows only those that are `watched` and not yet finished.
    """

    def __init__(self, files: int, size: int, job: Job) -> None:
        self._job = job
        self._lock = threading.Lock()
        self._files_total, self._bytes_total = files, size
        self._files = self._bytes = 0
        self._large: dict[int, Item] = {}
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="progress", daemon=True)
        job.report(control.Progress(0, self._files_total, 0, self._bytes_total))

    def __enter__(self) -> _Count:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._watcher.ident is not None:
            self._watcher.join()

    def watched(self, items: Iterable[Item]) -> Iterator[Item]:
        """They are being worked on from now on."""
        for item in items:
            if item.size > PIECE:
                with self._lock:
                    self._large[item.ino] = item
                if self._watcher.ident is None:
                    self._watcher.start()
            yield item

    def __call__(self, item: Item) -> None:
        with self._lock:
            self._files += 1
            self._bytes += item.size
            self._large.pop(item.ino, None)
            progress = self._progress(item)
        self._job.report(progress)

    def tell(self, note: str) -> None:
        """Something that who waits should know. To be told again: now and then some progress is left out."""
        with self._lock:
            progress = self._progress(None, note)
        self._job.report(progress)

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            with self._lock:
                moving = [item for item in self._large.values() if item.moved]
                progress = self._progress(moving[0]) if moving else None
            if progress is not None:
                self._job.report(progress)

    def _progress(self, of: Item | None, note: str = "") -> control.Progress:
        moved = min(
            self._bytes + sum(min(item.moved, item.size) for item in self._large.values()), self._bytes_total
        )
        path = (of.path or of.name) if of is not None else b""
        return control.Progress(self._files, self._files_total, moved, self._bytes_total, path, note=note)


def _item(target: Target) -> Item:
    return Item(target.ino, target.handle, target.path, target.parent, target.name, target.size, ordered=True)


def _size(targets: Targets) -> int:
    return sum(target.size for target in targets)


def _outcome(item: Item) -> control.Outcome:
    return control.Outcome(item.path or item.name, item.reason, item.failed)


class _Stayed:
    """What stays, as far as one answer names it: those that have failed before all."""

    def __init__(self) -> None:
        self._failed: list[control.Outcome] = []
        self._others: list[control.Outcome] = []

    def add(self, outcome: control.Outcome) -> None:
        """One more."""
        named = self._failed if outcome.failed else self._others
        if len(named) < LIST_LIMIT:
            named.append(outcome)

    @property
    def named(self) -> list[control.Outcome]:
        """Those to name."""
        return (self._failed + self._others)[:LIST_LIMIT]


def _done(items: Iterable[Item], targets: Targets) -> control.Done:
    """Of what was found in a directory and has gone since nobody wants to hear; of a store that does not answer
    once, not for each file."""
    named = {target.ino for target in targets if target.named}
    files = away = 0
    stayed, first_away = _Stayed(), control.Outcome(b"", "")
    for item in items:
        if item.away:
            away += 1
            first_away = first_away if first_away.reason else _outcome(item)
        elif not item.reason:
            files += 1
        elif item.reason != GONE or item.ino in named:
            stayed.add(_outcome(item))
    if away > 1:
        why = f"the store does not answer ({first_away.reason}): try again later"
        first_away = control.Outcome(b"", f"{away} files were not fetched, {why}", failed=True)
    return control.Done(files, [*([first_away] if away else []), *stayed.named])
