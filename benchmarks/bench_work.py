"""Real work: what people do in a home directory, beside ext4 and other FUSE filesystems.

Every contender has a fresh ext4 of its own, in memory. Where it says "first", the filesystem was just mounted
and the ext4 beneath knows the files; "again", that a person has thought for three seconds in between. The
goals: never slower than bindfs, pinned or free; what mostly reads (git status, find, the build) at most 1.2
times ext4's time, pinned.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

from bench_metadata import CONTENDERS, SETTLED, Bindfs, Kernel, Plain, fresh_ext4
from common import Scratch, affinity, arguments, forms, median, scratch, table
from peers import Missing

FILES, QUICK = 50_000, 5_000
PAUSE = 3.0  # seconds
AGAIN = " again"
GIT = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b"}
GIT |= {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
Step = tuple[str, bool, Callable[[], None]]  # title, whether on a mount that has just begun, what to do
PACKAGE = "botocore"  # two thousand files, 14 MB of them packed


def tree_of(where: Path, count: int) -> Path:
    """An archive of so many files in directories of twenty, of the sizes that sources have."""
    places, archive = random.Random(1), where / f"tree{count}.tar"
    text = bytes(places.choices(b"abcdefgh (){};\n", k=1 << 16))
    with tarfile.open(archive, "w") as tar:
        for number in range(count):
            about = tarfile.TarInfo(f"tree/d{number // 1000}/e{number // 20 % 50}/f{number}.c")
            about.size = min(int(places.lognormvariate(8, 1.2)), len(text))
            tar.addfile(about, io.BytesIO(text[: about.size]))
    return archive


def project_of(where: Path, count: int) -> Path:
    """Sources of a C program, with a Makefile."""
    place = where / "project"
    place.mkdir()
    for number in range(count):
        body = "\n".join(
            f'int f{number}_{k}(int a) {{ return a * {k} + (int)strlen("{k}"); }}' for k in range(60)
        )
        head = "".join(f"#include <{name}.h>\n" for name in ("stdio", "string", "stdlib", "math"))
        (place / f"m{number}.c").write_text(f"{head}{body}\n")
    (place / "main.c").write_text("int main(void) { return 0; }\n")
    objects = " ".join(f"m{number}.o" for number in range(count))
    (place / "Makefile").write_text(f"all: main.o {objects}\n\tgcc -o all main.o {objects}\n")
    return place


def wheel_of(where: Path) -> Path | None:
    """The package's wheel; None where it cannot be had."""
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(where), PACKAGE]
    subprocess.run(argv, capture_output=True, check=False, timeout=300)
    return next(where.glob("*.whl"), None)


class Work:
    """What is worked on, and the steps."""

    def __init__(self, where: Path, count: int) -> None:
        self.tree = tree_of(where, count)
        self.small = tree_of(where, count // 10)
        self.project = project_of(where, 40)
        self.wheel = wheel_of(where)
        self.missing: list[str] = []

    def steps(self, top: Path) -> list[Step]:
        def run(*argv: object, cwd: Path = top) -> Callable[[], None]:
            def go() -> None:
                environment = {**os.environ, **GIT}
                done = subprocess.run([str(arg) for arg in argv], cwd=cwd, env=environment, capture_output=True)
                assert done.returncode == 0, (argv, done.stderr[-1000:])

            return go

        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", "site")
        repository = top / "repository"
        steps: list[tuple[str, bool, Callable[[], None] | None]] = [
            ("unpack the tree", False, run("tar", "-xf", self.tree)),
            ("find by size, first", True, run("find", "tree", "-size", "+1G")),
            ("find by size again", False, run("find", "tree", "-size", "+1G")),
            ("read all of it, first", True, run("sh", "-c", "find tree -type f -exec cat {} + > /dev/null")),
            ("rsync -a", False, run("rsync", "-a", "tree/", "copy") if shutil.which("rsync") else None),
            ("delete the tree", False, run("rm", "-rf", "tree")),
            ("git add and commit", False, lambda: self.commit(run, repository)),
            ("git status, first", True, run("git", "status", cwd=repository)),
            ("git status again", False, run("git", "status", cwd=repository)),
            ("C build", False, lambda: self.build(run, top)),
            ("pip install", False, run(*pip, self.wheel) if self.wheel else None),
        ]
        self.missing = [title for title, _, go in steps if go is None]
        return [(title, first, go) for title, first, go in steps if go is not None]

    def commit(self, run: Callable[..., Callable[[], None]], repository: Path) -> None:
        repository.mkdir()
        run("tar", "-xf", self.small, cwd=repository)()
        for words in (("init", "-q"), ("add", "."), ("commit", "-qm", "one")):
            run("git", "-c", "gc.auto=0", *words, cwd=repository)()

    def build(self, run: Callable[..., Callable[[], None]], top: Path) -> None:
        run("cp", "-r", self.project, "project")()
        run("make", "-s", cwd=top / "project")()


def one_round(area: Scratch, work: Work, kind: type[Plain], number: int) -> dict[str, float]:
    """Seconds of each step."""
    place, found = area.path / f"{kind.__name__}{number}", {}
    with contextlib.ExitStack() as stack:
        contender = kind(area, place, stack.enter_context(fresh_ext4(place, 8 << 30)), stack)
        top = contender.directory / "work"
        top.mkdir()
        time.sleep(SETTLED)
        for title, first, go in work.steps(top):
            if first:
                contender.again()
                time.sleep(SETTLED)
            if title.endswith(AGAIN):
                time.sleep(PAUSE)
            began = time.perf_counter()
            go()
            found[title] = time.perf_counter() - began
    shutil.rmtree(place, ignore_errors=True)
    return found


def run(area: Scratch, work: Work, form: str, kinds: list[type[Plain]], rounds: int) -> None:
    figures: dict[type[Plain], list[dict[str, float]]] = {}
    missing = []
    for number in range(rounds):
        for kind in kinds:
            try:
                figures.setdefault(kind, []).append(one_round(area, work, kind, number))
            except Missing as exc:
                missing.append(str(exc))
    found = {kind: {t: median([one[t] for one in got]) for t in got[0]} for kind, got in figures.items() if got}
    head = ["", *(f"{kind.name}" for kind in found), "TierFS / ext4", "TierFS / bindfs"]
    rows = []
    for title in found[Plain]:
        row = [title, *(f"{seconds[title]:.2f} s" for seconds in found.values())]
        for other in (Plain, Bindfs):
            both = {other, Kernel} <= set(found)
            row.append(f"{found[Kernel][title] / found[other][title]:.2f}" if both else "")
        rows.append(row)
    table(f"**Real work** ({form}), seconds; ratios of time", head, rows)
    for what in sorted({*missing, *(f"{title}: not to be had here" for title in work.missing)}):
        print(f"(missing: {what})")


def main() -> None:
    named = {kind.__name__.lower(): kind for kind in CONTENDERS}
    options = arguments(
        __doc__,
        ("--form", {"choices": forms, "help": "one form alone"}),
        ("--rounds", {"type": int, "default": 1}),
        ("--only", {"default": "kernel,bindfs,mergerfs", "help": ",".join(named)}),
    )
    kinds = [Plain, *(named[name] for name in options.only.split(","))]
    with scratch() as area:
        place = area.path / "given"
        place.mkdir()
        work = Work(place, QUICK if options.quick else FILES)
        for form in [options.form] if options.form else forms:
            with affinity(form):
                run(area, work, form, kinds, options.rounds)


if __name__ == "__main__":
    main()
