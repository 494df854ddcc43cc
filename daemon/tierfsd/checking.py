"""`tierfs check`: every check of recovery.py over every regular file, then the store against the index."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial

from tierfs import control
from tierfs.digests import SIDE_SUFFIX
from tierfs.errors import ForeignStubError, IndexDamagedError, IndexError_, ObjectMissingError
from tierfs.index import Writer
from tierfs.inodes import InodeSet
from tierfs.kit import is_gone, is_passing
from tierfs.model import Record, object_key
from tierfs.past import is_object
from tierfs.places import Directory, join
from tierfs.readback import Pace, Pass, Place, load_place
from tierfs.recovery import CHECKS, Case, Found, check_object, finish_pending
from tierfs.store.priority import Priority, priority
from tierfs.survey import forget_gone, gone
from tierfs.tier import Tier
from tierfs.walking import walk
from tierfsd.control_server import Job

_READERS = 8  # small copies at once
_MOST = 50_000  # findings in one answer
_MOMENT = 0.5  # seconds


@dataclass(frozen=True, slots=True)
class Reading:
    """How all copies are to be read. `path`: of the file that keeps the place; `rate`: bytes a second, or 0."""

    path: str
    rate: int = 0
    from_start: bool = False


def check(tier: Tier, repair: bool, reading: Reading | None, job: Job) -> control.Findings:
    """Carry out a check; `reading`: also read all copies. Raises StoreError where the store cannot be asked,
    IndexError_, OSError."""
    damage = _damage(tier)
    if damage:
        # No more is read of it than must be.
        return control.Findings([control.Finding(damage, repaired=repair)], renewing=repair)
    finish_pending(tier)
    total = tier.kit.index.totals().files
    findings = _Findings()
    strange: set[str] = set()  # objects of stubs that are not what the index says
    bad: set[str] = set()
    seen = InodeSet()
    for case in _cases(tier, repair, reading is not None, findings, seen):
        if job.cancelled.is_set():
            break
        job.report(control.Progress(len(seen), max(len(seen), total), 0, 0, case.path))
        for each in CHECKS:
            try:
                found = [_finding(one) for one in each(case)]
            except OSError as error:
                findings.unread(case.path, error)
                break
            findings.extend(found)
            if found and each is check_object:
                bad.add(found[0].what.rpartition(" ")[2])
        if case.stub is not None and case.stub.key != _key_of(case.record):
            strange.add(case.stub.key)
    files = len(seen)
    if not job.cancelled.is_set():
        mend = repair and not findings.partial
        if not findings.partial:  # else what was not seen may be there, and need what nothing else refers to
            findings.extend(_finding(found) for found in _gone(tier, repair, seen))
        findings.extend(_finding(found) for found in _totals(tier, repair))
        findings.extend(_finding(found) for found in _orphans(tier, mend, strange))
    resumed, place = Place(), Place()
    if reading is not None and not job.cancelled.is_set():
        resumed, place = _read_all(tier, repair, reading, frozenset(bad), findings, job)
    return control.Findings(
        findings.told(), files, False, place.files, place.bytes, resumed.files, resumed.bytes
    )


def _read_all(
    tier: Tier, repair: bool, reading: Reading, bad: frozenset[str], findings: _Findings, job: Job
) -> tuple[Place, Place]:
    """Read all copies but the `bad` ones: where that began, and where it ended. Raises as `check`."""
    place = (None if reading.from_start else load_place(reading.path)) or Place(began=time.time())
    resumed = copy(place)
    totals = tier.kit.index.totals()
    files, size = totals.files - totals.dirty_files, totals.total_bytes - totals.dirty_bytes

    def report(place: Place, name: bytes) -> None:
        done = max(files, place.files), max(size, place.bytes)
        job.report(control.Progress(place.files, done[0], place.bytes, done[1], name, resumed.bytes))

    pace = Pace(lambda: reading.rate, job.cancelled)
    reader = Pass(
        tier.kit, tier.places, tier.drain, reading.path, place, pace, repair=repair, workers=_READERS, known=bad
    )
    report(place, b"")
    with priority(Priority.UPLOAD):
        for damage in reader.run(report):
            findings.append(control.Finding(damage.what, damage.path, damage.repaired))
    if place.ended:
        os.unlink(reading.path)
    return resumed, place


class _Findings:
    """As many as one answer takes, and how many more there are: of a store that is empty each file is one."""

    def __init__(self) -> None:
        self._named: list[control.Finding] = []
        self._more = 0
        self._all_repaired = True  # of those
        self.partial = False  # something that is there could not be read

    def append(self, finding: control.Finding) -> None:
        """One more."""
        if len(self._named) < _MOST:
            self._named.append(finding)
        else:
            self._more += 1
            self._all_repaired = self._all_repaired and finding.repaired

    def unread(self, path: bytes, error: OSError) -> None:
        """What is there and cannot be read is one; what has vanished meanwhile is none. Raises the error where
        it is so just now only."""
        if is_passing(error):
            raise error
        if not is_gone(error):
            self.partial = True
            self.append(control.Finding(f"cannot be read: {error.strerror}", path))

    def extend(self, findings: Iterable[control.Finding]) -> None:
        """Some more."""
        for finding in findings:
            self.append(finding)

    def told(self) -> list[control.Finding]:
        """For the answer."""
        if not self._more:
            return self._named
        rest = control.Finding(f"... and {self._more} more findings", repaired=self._all_repaired)
        return [*self._named, rest]


def _damage(tier: Tier) -> str:
    """What is wrong with the index below the level of records."""
    try:
        tier.kit.index.verify()
    except IndexDamagedError as error:
        return f"the index is damaged: {error}"
    return ""


def _finding(found: Found) -> control.Finding:
    return control.Finding(found.what, found.path, found.repaired)


def _cases(
    tier: Tier, repair: bool, read_data: bool, findings: _Findings, seen: InodeSet
) -> Iterator[Case]:
    """Every regular file of the tree, once for each inode, which is then `seen`."""
    tree = tier.kit.tree
    for found in walk(tree, tier.places, Directory.root(tree), findings.unread):
        if stat.S_ISREG(found.st.st_mode) and seen.add(found.st.st_ino):
            try:
                yield _case(tier, found.path, found.opath, found.st, repair, read_data)
            except ForeignStubError as error:
                findings.append(control.Finding(str(error), found.path))
            except OSError as error:
                findings.unread(found.path, error)


def _case(tier: Tier, path: bytes, opath: int, st: os.stat_result, repair: bool, read_data: bool) -> Case:
    tier.drain()
    record = tier.kit.index.get(st.st_ino)
    if record is not None and record.handle != tier.kit.tree.handle_of(opath):
        record = None
    stub = tier.kit.tree.read_stub(opath)
    return Case(tier.kit, path, opath, st, stub, record, repair, read_data, tier.drain)


def _gone(tier: Tier, repair: bool, seen: InodeSet) -> Iterator[Found]:
    """Records of files that are not there any more: each is counted for ever, and keeps its objects."""
    found = list(gone(tier.kit, seen))
    if found:
        time.sleep(_MOMENT)  # what was removed just now has its mark by then
        tier.drain()
    for record in found:
        now = tier.kit.index.get(record.ino)
        if now is None or now.handle != record.handle:
            continue
        if repair:
            tier.kit.index.commit(partial(forget_gone, record)).result()
        above = tier.places.directory(record.parent) if record.parent else None
        path = join(above.path, record.name) if above is not None else record.name
        yield Found("the index has a file that is not there any more", path, repair)


def _totals(tier: Tier, repair: bool) -> Iterator[Found]:
    """The sums that `status` shows are those of the records, none is damaged, and the dirty are queued."""
    kept, counted, damaged, misqueued = tier.kit.index.commit(lambda w: w.recount(repair)).result()
    if damaged:
        yield Found(f"{damaged} records of the index are damaged", b"", repair)
    if misqueued:
        yield Found(f"{misqueued} entries of the queue of files to copy are wrong or missing", b"", repair)
    if kept != counted:
        yield Found(f"the index's sums are {kept}, its records make {counted}", b"", repair)


def _orphans(tier: Tier, repair: bool, strange: set[str]) -> Iterator[Found]:
    """Objects that neither a file nor a tombstone refers to: those of a former index, or of a fenced owner.

    What the index refers to is looked up in it, object by object: a list of it would be as long as the store.
    """
    kit = tier.kit
    unknown = [
        (info.key, key)
        for info in kit.store.list("data/")
        if is_object(key := info.key.removesuffix(SIDE_SUFFIX))
        and key not in strange
        and not _is_referred(tier, key)
    ]
    # Not before: what was put while the store was listed is intended by now, or something refers to it.
    expected = _expected(tier) if unknown else set[str]()
    for whole, key in unknown:
        # Asked for last: a collection that has removed it since it was listed has forgotten it, too.
        if key in expected or _is_referred(tier, key) or not _is_stored(tier, whole):
            continue
        repaired = False
        if repair:
            # Never removed for being in a listing: it may be younger than the look at the tree.
            kit.index.commit(partial(_bury, key)).result()
            repaired = True
        yield Found(f"nothing refers to this object: {whole}", b"", repaired)


def _expected(tier: Tier) -> set[str]:
    """Keys whose end is being waited for, that are being put, or are rescue copies."""
    index, ever = tier.kit.index, (1 << 63) - 1
    intended = set(index.intents())  # first: what is given up meanwhile is an orphan then
    buried = index.tombstones(ever, limit=1 << 30) + index.orphans(ever, limit=1 << 30)
    return {key for _, key in buried} | intended | set(index.rescue_keys())


def _is_stored(tier: Tier, key: str) -> bool:
    try:
        tier.kit.store.head(key)
    except ObjectMissingError:
        return False
    return True


def _bury(key: str, w: Writer) -> None:
    if not w.intended(key):
        w.bury_found(key)


def _is_referred(tier: Tier, key: str) -> bool:
    """Looked up anew: the file may have been copied out since it was looked at."""
    try:
        record = tier.kit.index.get_by_fid(bytes.fromhex(key.split("/")[2]))
    except IndexError_:
        return True  # a damaged record says nothing: its object is no orphan as yet
    return _key_of(record) == key


def _key_of(record: Record | None) -> str:
    if record is None or record.copy is None:
        return ""
    return object_key(record.fid, record.copy.generation, record.copy.tag)
