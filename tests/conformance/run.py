"""The public POSIX suites on both bindings, beside the filesystem beneath: `make conformance`.

pjdfstest and fsx are installed with cargo where they are not there. fsx also runs while its file is demoted and
fetched over and over. pjdfstest in C and the Linux Test Project run from where CONFORMANCE_PJDFSTEST and
CONFORMANCE_LTP say (conformance.built). Other suites (xfstests' generic group, fsstress) run through a command
of one's own: CONFORMANCE_SUITE="/path/to/program and its words", called with a directory of each filesystem as
its last argument; exit code 0 is a pass. Exit code 1: something fails here that does not beneath.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import Scratch, Volume, scratch

from conformance import built, suites
from conformance.suites import Result, Unavailable

PLAIN, BINDINGS = "beneath", ("kernel", "fusepy")
SECONDS = 900.0
Suite = Callable[[Path, Path, "Volume | None"], Result]


class _Mover:
    """Demotes a file whenever it is shut, and has every third stub fetched; counts what became a stub."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.demoted = 0

    def __call__(self, path: Path) -> None:
        if self.volume.order("demote", path):
            return
        self.demoted += 1
        if self.demoted % 3 == 0:
            self.volume.order("fetch", path)


def _fsx(operations: int, length: int, seed: int) -> Suite:
    return lambda place, work, _: suites.fsx(place, work, operations, SECONDS, seed=seed, length=length)


def _fsx_moving(operations: int, length: int, seed: int) -> Suite:
    def run(place: Path, work: Path, volume: Volume | None) -> Result:
        if volume is None:
            raise Unavailable("nothing is ever demoted here")
        move = _Mover(volume)
        result = suites.fsx(place, work, operations, SECONDS, seed=seed, length=length, meanwhile=move)
        result.note = f"demoted {move.demoted} times. {result.note}"
        if not move.demoted:
            result.failed.add("was never demoted")
        return result

    return run


def _built(run: Callable[[Path, Path, float], Result], path: Path) -> Suite:
    return lambda place, work, _: run(path, place, SECONDS)


def all_suites(quick: bool) -> dict[str, Suite]:
    """By name, each to be run in an empty directory."""
    many, some = (5_000, 1_000) if quick else (30_000, 3_000)
    found: dict[str, Suite] = {
        "pjdfstest": lambda place, work, _: suites.pjdfstest(place, work, SECONDS),
        "fsx, 256 KiB": _fsx(many, 256 << 10, 1),
        "fsx, 12 MiB": _fsx(some, 12 << 20, 2),
        "fsx, 256 KiB, demoted meanwhile": _fsx_moving(some, 256 << 10, 3),
        "fsx, 12 MiB, demoted meanwhile": _fsx_moving(some // 2, 12 << 20, 4),
    }
    for variable, (name, run) in built.SUITES.items():
        if path := os.environ.get(variable):
            found[name] = _built(run, Path(path))
    words = shlex.split(os.environ.get("CONFORMANCE_SUITE", ""))
    if words:
        found[Path(words[0]).name] = lambda place, work, _: suites.command(words, place, 4 * SECONDS)
    return found


@contextlib.contextmanager
def _places(area: Scratch, bindings: tuple[str, ...]) -> Iterator[dict[str, tuple[Path, Volume | None]]]:
    """A directory of the filesystem beneath, and one volume a binding."""
    with contextlib.ExitStack() as stack:
        plain = area.path / "plain"
        plain.mkdir(mode=0o755)
        found: dict[str, tuple[Path, Volume | None]] = {PLAIN: (plain, None)}
        for binding in bindings:
            base = area.path / binding[:1]
            base.mkdir(mode=0o755)
            options = ("--binding", binding, "-o", "suid,dev")
            volume = Volume(base, area.connections, options=options, limit=8 * SECONDS)
            stack.callback(volume.close)
            volume.mount()
            volume.configure(quiet="0s", min_age="0s", min_size="0")
            found[binding] = volume.mountpoint, volume
        yield found


def _show(name: str, results: dict[str, Result | str]) -> set[str]:
    """Print a suite's lines; the failures that the filesystem beneath lacks."""
    beneath = results.get(PLAIN)
    known = beneath.failed if isinstance(beneath, Result) else set()
    fresh: set[str] = set()
    for where, result in results.items():
        if isinstance(result, str):
            print(f"| {name:<32} | {where:<8} | {'not run':>7} |         |         | {result}", flush=True)
            continue
        new = result.failed - known if where != PLAIN else set()
        fresh |= {f"{where}: {name}: {case}" for case in new}
        counts = f"{result.passed:>7} | {result.skipped:>7} | {len(result.failed):>7}"
        first = result.note.partition("\n")[0]
        print(f"| {name:<32} | {where:<8} | {counts} | {first}", flush=True)
        for case in sorted(result.failed):
            print(f"    {case}{'' if case in new else ' (beneath too)'}", flush=True)
        if new and result.note:
            print(result.note, flush=True)
    return fresh


def _run(suite: Suite, place: Path, volume: Volume | None) -> Result | str:
    directory = Path(tempfile.mkdtemp(prefix="", dir=place))
    directory.chmod(0o777)
    try:
        with tempfile.TemporaryDirectory(prefix="tierfs-conformance-") as work:
            return suite(directory, Path(work), volume)
    except Unavailable as error:
        return str(error)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer operations of fsx")
    parser.add_argument("--binding", action="append", choices=BINDINGS, help="only this one")
    parser.add_argument("--suite", action="append", help="only suites whose name begins so")
    given = parser.parse_args()
    fresh: set[str] = set()
    print(f"| {'suite':<32} | {'where':<8} | {'passed':>7} | {'skipped':>7} | {'failed':>7} |\n|{'-' * 34}|"
          f"{'-' * 10}|{'-' * 9}|{'-' * 9}|{'-' * 9}|")  # fmt: skip
    with scratch() as area, _places(area, tuple(given.binding or BINDINGS)) as places:
        for name, suite in all_suites(given.quick).items():
            if given.suite and not any(name.startswith(start) for start in given.suite):
                continue
            results = {where: _run(suite, place, volume) for where, (place, volume) in places.items()}
            fresh |= _show(name, results)
    for line in sorted(fresh):
        print(f"fails, and not beneath: {line}")
    return 1 if fresh else 0


if __name__ == "__main__":
    sys.exit(main())
