"""Miss ratios of TierFS's policy on public traces, beside LRU: the very functions that the mover runs.

Local capacity is a share of the trace's footprint; sizes are the largest seen; first touches count as misses.
The ratio is the geometric mean over the shares against LRU: below 1 is better. Traces are read from the sibling
directory `../shared/traces` (`--traces DIR` for another); without them there is nothing to measure.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import io
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import zstandard

from tierfs.policy.heat import Heat, admitted, lent, score, touched
from tierfs.policy.scans import Scans
from tierfs.policy.victims import victims

TRACES = Path(__file__).resolve().parent.parent.parent / "shared" / "traces"
SHARES = (0.01, 0.05, 0.10, 0.20, 0.50)
Access = tuple[int, int, float]  # file, size, seconds
Cache = Callable[[list[Access], int], tuple[int, int]]  # (accesses, capacity) -> misses, bytes missed


def read(path: Path) -> list[Access]:
    """(file, size, time) in order."""
    with open(path, "rb") as raw:
        text = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), "utf-8")
        rows = [(row["file_id"], int(row["size_bytes"]), float(row["time_s"])) for row in csv.DictReader(text)]
    numbers: dict[str, int] = {}
    largest: dict[int, int] = {}
    files = [numbers.setdefault(name, len(numbers)) for name, *_ in rows]
    for file, (_, size, _) in zip(files, rows, strict=True):
        largest[file] = max(largest.get(file, 1), size)
    return [(file, largest[file], now) for file, (*_, now) in zip(files, rows, strict=True)]


def lru(accesses: list[Access], capacity: int) -> tuple[int, int]:
    """Least recently used leaves first."""
    here: OrderedDict[int, int] = OrderedDict()
    used = misses = missed = 0
    for file, size, _ in accesses:
        if file in here:
            here.move_to_end(file)
            continue
        misses, missed = misses + 1, missed + size
        if size > capacity:
            continue
        while used + size > capacity:
            used -= here.popitem(last=False)[1]
        here[file] = size
        used += size
    return misses, missed


class Local:
    """A local tier in memory: the queues that the mover keeps in LMDB. `knows_scans`: scans are told apart."""

    def __init__(self, capacity: int, by_bytes: bool, knows_scans: bool = True) -> None:
        self.capacity, self.by_bytes = capacity, by_bytes
        self.scans = Scans() if knows_scans else None
        self.used = self.volume = 0
        self.heat: dict[int, Heat] = {}
        self.waiting: OrderedDict[int, int] = OrderedDict()  # on probation, oldest first
        self.waiting_bytes = 0
        self.lent: OrderedDict[int, int] = OrderedDict()  # brought by scans, oldest first
        self.lent_total = 0
        self.scores: dict[int, float] = {}  # of those past it
        self.heap: list[tuple[float, int]] = []

    def by_admission(self) -> Iterator[tuple[int, int]]:
        """Oldest first; the caller removes what it is given before it asks again."""
        while self.waiting:
            yield next(iter(self.waiting.items()))

    def by_score(self) -> Iterator[tuple[int, int]]:
        """Coldest first, in the same way. Entries whose score has risen are dropped on the way."""
        while self.heap:
            value, file = self.heap[0]
            if self.scores.get(file) != value:
                heapq.heappop(self.heap)
                continue
            yield file, self.heat[file].size

    def by_lending(self) -> Iterator[tuple[int, int, float]]:
        """Oldest first, in the same way."""
        while self.lent:
            file, size = next(iter(self.lent.items()))
            yield file, size, self.heat[file].last

    def probation_bytes(self) -> int:
        """What the files on probation hold together."""
        return self.waiting_bytes

    def lent_bytes(self) -> int:
        """What those hold that are lent."""
        return self.lent_total

    def is_local(self, file: int) -> bool:
        """Whether it is here."""
        return file in self.waiting or file in self.scores or file in self.lent

    @property
    def clock(self) -> float:
        """V, in turnovers."""
        return self.volume / self.capacity

    def use(self, file: int, size: int, now: float, who: int = 0) -> bool:
        """One access; whether it was a hit. `who`: a program, 0 where each access is another's."""
        if self.is_local(file):
            self.touch(file, size, now, who)
            return True
        if size > self.capacity:
            return False
        self.make_room(size, now)
        self.used += size
        if self.brings(file, size, now, who):
            self.place(file, lent(self.heat.get(file), now, size))
        else:
            self.volume += size
            self.place(file, admitted(self.heat.get(file), self.clock, now, size))
        self.touch(file, size, now, who)
        return False

    def make_room(self, size: int, now: float) -> None:
        """Have the coldest leave."""
        for victim in victims(self, self.used, now):
            if self.used + size <= self.capacity:
                break
            self.remove(victim)

    def brings(self, file: int, size: int, now: float, who: int) -> bool:
        """Whether a file comes for a scan."""
        if self.scans is None or not who:
            return False
        scans, known = self.scans.brings(who, file, size, self.capacity, now)
        for each, brought in known:
            if self.is_local(each) and self.heat[each].last <= brought:
                self.place(each, lent(self.heat[each], now, self.heat[each].size))
        return scans

    def touch(self, file: int, size: int, now: float, who: int) -> None:
        """A use of what is local, if it is one."""
        if self.scans is not None and who and not self.scans.counts(who, file, self.capacity, now):
            return
        self.volume += self.heat[file].size if self.heat[file].lent else 0
        self.place(file, touched(self.heat[file], self.clock, now, 1, size))

    def place(self, file: int, heat: Heat) -> None:
        """Set heat and queue of a local file."""
        self.heat[file] = heat
        if not heat.lent:
            self.lent_total -= self.lent.pop(file, 0)
        elif file not in self.lent:
            self.waiting_bytes -= self.waiting.pop(file, 0)
            self.scores.pop(file, None)
            self.lent[file] = heat.size
            self.lent_total += heat.size
        if heat.probation:
            if not heat.lent and file not in self.waiting:
                self.waiting[file] = heat.size
                self.waiting_bytes += heat.size
            return
        self.waiting_bytes -= self.waiting.pop(file, 0)
        value = score(heat, self.by_bytes)
        if self.scores.get(file) != value:
            self.scores[file] = value
            heapq.heappush(self.heap, (value, file))

    def remove(self, file: int) -> None:
        """Demote it."""
        self.used -= self.heat[file].size
        self.heat[file] = replace(self.heat[file], lent=False)
        self.lent_total -= self.lent.pop(file, 0)
        self.waiting_bytes -= self.waiting.pop(file, 0)
        self.scores.pop(file, None)


def tierfs(by_bytes: bool) -> Cache:
    """The policy with one of its two costs of a miss."""

    def replay(accesses: list[Access], capacity: int) -> tuple[int, int]:
        local = Local(capacity, by_bytes)
        misses = missed = 0
        for file, size, now in accesses:
            if not local.use(file, size, now):
                misses, missed = misses + 1, missed + size
        return misses, missed

    return replay


CACHES: dict[str, Cache] = {"LRU": lru, "TierFS, latency": tierfs(False), "TierFS, bytes": tierfs(True)}


def measure(accesses: list[Access]) -> dict[str, tuple[list[float], list[float]]]:
    """Object and byte miss ratios at each share, by policy."""
    footprint = sum({file: size for file, size, _ in accesses}.values())
    total = sum(size for _, size, _ in accesses)
    found = {}
    for name, cache in CACHES.items():
        results = [cache(accesses, max(1, int(share * footprint))) for share in SHARES]
        found[name] = ([m / len(accesses) for m, _ in results], [b / total for _, b in results])
    return found


def mean_ratio(ours: list[float], theirs: list[float]) -> float:
    """Geometric mean of ours/theirs."""
    return math.exp(sum(math.log(a / b) for a, b in zip(ours, theirs, strict=True)) / len(ours))


def main() -> int:
    """Print one table a trace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=TRACES)
    parser.add_argument("--quick", action="store_true", help="the first 20,000 accesses of each trace")
    options = parser.parse_args()
    traces = sorted(options.traces.glob("*.csv.zst"))
    if not traces:
        print(f"no traces (*.csv.zst) in {options.traces}: nothing was measured", file=sys.stderr)
        return 0
    shares = "  ".join(f"{share:5.0%}" for share in SHARES)
    for path in traces:
        accesses = read(path)[: 20_000 if options.quick else None]
        files = len({file for file, *_ in accesses})
        print(f"{path.name.removesuffix('.csv.zst')}: {len(accesses)} accesses, {files} files")
        found = measure(accesses)
        for kind, what in enumerate(("object miss ratio", "byte miss ratio")):
            print(f"  {what:24}{shares}   / LRU")
            for name, ratios in found.items():
                row = "  ".join(f"{ratio:5.3f}" for ratio in ratios[kind])
                print(f"    {name:22}{row}   {mean_ratio(ratios[kind], found['LRU'][kind]):5.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
