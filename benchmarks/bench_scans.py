"""What scans do to what is in use: the policy that the mover runs, with and without its knowledge of scans.

Traces: at nine places one program reads every file of the trace, in order, 60 ms for each that is away. Counted
are the misses of everybody else. "one program": no scans, but all of the trace is one program's, as where a
server for others works on the mount; what is taken for a scan then is taken so wrongly.

A home: a person works in two of fifty projects a day, for thirty days; at night everything is read. The limit
is kept as the mover keeps it, from 95% to 90%, with ten minutes of `min_age`. "most": the most that was local,
to the limit. All of it is deterministic.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from bench_policy import TRACES, Access, Local, read

from tierfs.policy.victims import overdue, victims

SHARES = (0.05, 0.20)
SCANS = 9
REQUEST_SECONDS, BYTES_PER_SECOND = 0.06, 50e6
HIGH, LOW, MIN_AGE = 0.95, 0.90, 600.0
DAYS, DAY = 30, 86400.0
DIRECTORIES, EACH, PROJECT = 200, 40, 4  # directories, files in one, directories of a project
USES = 400  # a day
NIGHTS = {
    "no scans": range(0),
    "one scan": range(15, 16),
    "two, a day apart": range(15, 17),
    "every night": range(10, DAYS),
}
Files = list[list[tuple[int, int]]]  # (file, size) by directory


def fetch_seconds(size: int) -> float:
    """How long a miss takes."""
    return max(REQUEST_SECONDS, size / BYTES_PER_SECOND)


# --- traces -----------------------------------------------------------------------------------------------


def replay(accesses: list[Access], capacity: int, scans: int, knows: bool, server: bool) -> float:
    """The share of misses among the trace's own accesses."""
    local, misses = Local(capacity, False, knows), 0
    files = sorted({file: size for file, size, _ in accesses}.items())
    every = len(accesses) // (scans + 1) + 1 if scans else 0
    for number, (file, size, now) in enumerate(accesses):
        if every and number and number % every == 0:
            for each, its_size in files:
                now += 0.0 if local.use(each, its_size, now, 1_000 + number) else fetch_seconds(its_size)
        misses += not local.use(file, size, now, int(server))
    return misses / len(accesses)


def trace_table(path: Path, quick: bool) -> None:
    """Print it."""
    accesses = read(path)[: 20_000 if quick else None]
    footprint = sum({file: size for file, size, _ in accesses}.values())
    print(f"{path.name.removesuffix('.csv.zst')}: object miss ratio" + "".join(f"{s:9.0%}" for s in SHARES))
    for what, scans, knows, server in (
        ("no scans", 0, True, False),
        ("no scans, one program", 0, True, True),
        (f"{SCANS} scans, not known as such", SCANS, False, False),
        (f"{SCANS} scans", SCANS, True, False),
    ):
        found = (replay(accesses, int(share * footprint), scans, knows, server) for share in SHARES)
        print(f"    {what:32}" + "".join(f"{ratio:9.3f}" for ratio in found), flush=True)


# --- a home -----------------------------------------------------------------------------------------------


class Home(Local):
    """The same with the mover's watermarks and minimum age: one look a second."""

    def __init__(self, capacity: int, knows_scans: bool) -> None:
        super().__init__(capacity, False, knows_scans)
        self.most = 0
        self._next = 0.0

    def by_admission(self) -> Iterator[tuple[int, int]]:
        """As it is when asked: what is too young stays."""
        return iter(list(self.waiting.items()))

    def by_score(self) -> Iterator[tuple[int, int]]:
        """In the same way."""
        return iter([(file, self.heat[file].size) for file in sorted(self.scores, key=self.scores.__getitem__)])

    def by_lending(self) -> Iterator[tuple[int, int, float]]:
        """In the same way."""
        return iter([(file, size, self.heat[file].last) for file, size in self.lent.items()])

    def use(self, file: int, size: int, now: float, who: int = 0) -> bool:
        """One access, after a round of the mover's."""
        self.make_round(now)
        hit = super().use(file, size, now, who)
        self.most = max(self.most, self.used)
        return hit

    def make_room(self, size: int, now: float) -> None:
        """Nobody waits for that: rounds make it."""

    def make_round(self, now: float) -> None:
        """Have the coldest leave, where it is time."""
        if self.used <= HIGH * self.capacity or now < self._next:
            return
        self._next = now + 1.0
        for file in victims(self, self.used, now):
            if self.used <= LOW * self.capacity:
                return
            heat = self.heat[file]
            if self.is_local(file) and (heat.lent or now - heat.last >= MIN_AGE):
                self.remove(file)

    def let_go(self, now: float) -> None:
        """What leaves although there is room."""
        for file in overdue(self, self.capacity, now):
            self.remove(file)


def home() -> Files:
    """Files of a median of 20 kB."""
    draw = random.Random(1)
    sizes = iter(lambda: min(int(math.exp(draw.gauss(math.log(20e3), 1.8))) + 1, 64 << 20), 0)
    return [[(at * EACH + number, next(sizes)) for number in range(EACH)] for at in range(DIRECTORIES)]


def a_day(files: Files, order: list[int], draw: random.Random) -> Iterator[tuple[int, int]]:
    """What a person opens: mostly of two projects, some of it more often, a tenth of it anywhere."""
    todays = draw.choices(order, [1 / (1 + rank) for rank in range(len(order))], k=2)
    for _ in range(USES):
        if draw.random() < 0.1:
            yield draw.choice(draw.choice(files))
        else:
            at = draw.choice(todays) * PROJECT + min(int(draw.expovariate(0.8)), PROJECT - 1)
            yield files[at][min(int(draw.expovariate(0.08)), EACH - 1)]


def live(files: Files, share: float, nights: range, knows: bool) -> tuple[float, int, int, float]:
    """Share of misses, bytes that a person missed and that scans fetched, and the most that was local."""
    local = Home(int(share * sum(size for each in files for _, size in each)), knows)
    draw, order = random.Random(7), list(range(DIRECTORIES // PROJECT))
    draw.shuffle(order)
    misses = missed = scanned = 0
    for day in range(DAYS):
        if day % 10 == 9:
            order.insert(0, order.pop(draw.randrange(len(order))))
        for number, (file, size) in enumerate(a_day(files, order, draw)):
            if not local.use(file, size, day * DAY + 9 * 3600 + number * 60.0):
                misses, missed = misses + 1, missed + size
        local.let_go(day * DAY + 20 * 3600.0)
        now = day * DAY + 22 * 3600.0
        for file, size in (each for listed in files for each in listed) if day in nights else ():
            hit = local.use(file, size, now, day + 1)
            now += 0.0002 if hit else fetch_seconds(size)
            scanned += 0 if hit else size
    return misses / (DAYS * USES), missed, scanned, local.most / local.capacity


def home_table() -> None:
    """Print it."""
    files = home()
    total = sum(size for each in files for _, size in each)
    print(f"a home: {DIRECTORIES * EACH} files, {total >> 20} MiB")
    for share in SHARES:
        print(f"  local limit {share:4.0%}{'misses':>30}{'MiB missed':>12}{'MiB scanned':>13}{'most':>7}")
        for what, nights in NIGHTS.items():
            for knows in (False, True) if nights else (True,):
                ratio, missed, scanned, most = live(files, share, nights, knows)
                name = what if knows else f"{what}, not known as such"
                print(f"    {name:36}{ratio:6.3f}{missed >> 20:12}{scanned >> 20:13}{most:7.2f}", flush=True)


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=TRACES)
    parser.add_argument("--quick", action="store_true", help="the first 20,000 accesses of each trace")
    options = parser.parse_args()
    for path in sorted(options.traces.glob("*.csv.zst")):
        trace_table(path, options.quick)
    home_table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
