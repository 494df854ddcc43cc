"""What commands show: sizes, names, lines on stderr, progress bars."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tierfs.errors import TierError
from tierfs.spelling import shown as shown

if TYPE_CHECKING:
    from tierfs.control import Progress

_DRAW_SECONDS = 0.1
_NAMED = 50  # outcomes shown one by one
_BAR_WIDTH = 12
_RATE_WIDTH = 9
_OTHER_COLUMNS = _BAR_WIDTH + _RATE_WIDTH + 8 + 6  # the time that is left, and a blank between each two
_LONGEST_NAME, _LEAST_NAME = 30, 5


def size(count: int) -> str:
    """Bytes for people: 0, 512, 4.0K, 1.3G."""
    value = float(count)
    for unit in ("", "K", "M", "G", "T"):
        if value < 1023.95:
            return f"{value:.1f}{unit}" if unit else f"{count}"
        value /= 1024
    return f"{value:.1f}P"


def count(number: int, noun: str) -> str:
    """1 file, 2 files, 2 copies."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun[:-1]}ies" if noun.endswith("y") else f"{number} {noun}s"


def age(seconds: float) -> str:
    """A duration for people: 45 s, 12 min, 3 h, 5 d."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} d"


def print_json(value: Any) -> None:
    """One JSON document. Bytes that are no UTF-8 become lone surrogates, as `os.fsencode` takes them back."""
    with writing():
        print(json.dumps(value, indent=2))


def tell(line: str) -> None:
    """One line of a result. Not with click, which writes UTF-8 where ASCII was asked for."""
    with writing():
        print(shown(line))


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Output is written. Raises BrokenPipeError where its reader has gone, TierError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise TierError(f"the output cannot be written: {exc.strerror}") from exc


def say(text: str) -> None:
    """One line on stderr: stdout is for results."""
    print(f"tierfs: {shown(text)}", file=sys.stderr, flush=True)


def complain(path: str, reason: str) -> None:
    """One line on stderr about one path."""
    say(f"{path}: {reason}")


def complain_all(lines: list[tuple[str, str]]) -> None:
    """Lines on stderr about (path, reason) pairs; many are cut short."""
    for path, reason in lines[:_NAMED]:
        complain(path, reason)
    if len(lines) > _NAMED:
        say(f"… and {len(lines) - _NAMED} more")


def _cut(name: str, room: int) -> str:
    """What there is room for; of too little nothing at all, as it says nothing."""
    if len(name) <= room:
        return name
    return name[: room - 1] + "…" if room >= _LEAST_NAME else ""


class Bar:
    """A progress bar on stderr where that is a terminal, nothing elsewhere."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._progress: Any = None
        self._task: Any = None

    def show(self, progress: Progress) -> None:
        """Draw how far it is."""
        if not sys.stderr.isatty():
            return
        if self._progress is None:
            self._begin()
        by_bytes = progress.bytes_total > 0
        files = f"{progress.files_done}/{progress.files_total} files"
        moved = f"{size(progress.bytes_done)}/{size(progress.bytes_total)}" if by_bytes else ""
        room = self._progress.console.width - len(self._title) - len(files) - len(moved) - _OTHER_COLUMNS
        self._progress.update(
            self._task,
            total=progress.bytes_total if by_bytes else progress.files_total,
            completed=progress.bytes_done if by_bytes else progress.files_done,
            files=files,
            moved=moved,
            rate=by_bytes,
            current=_cut(shown(os.path.basename(progress.path)), min(room, _LONGEST_NAME)),
        )

    def _begin(self) -> None:
        from rich import progress
        from rich.console import Console
        from rich.table import Column

        class Rate(progress.ProgressColumn):
            def render(self, task: progress.Task) -> str:
                return f"{size(int(task.speed))}/s" if task.speed and task.fields["rate"] else ""

        def text(field: str) -> progress.ProgressColumn:
            return progress.TextColumn(field, markup=False, table_column=Column(no_wrap=True))

        self._progress = progress.Progress(
            text("{task.description}"),
            progress.BarColumn(bar_width=_BAR_WIDTH),
            text("{task.fields[files]}"),
            text("{task.fields[moved]}"),
            Rate(table_column=Column(no_wrap=True, min_width=_RATE_WIDTH)),
            progress.TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            text("{task.fields[current]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._progress.start()
        self._task = self._progress.add_task(self._title, files="", moved="", rate=False, current="")

    def close(self) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.stop()


@contextlib.contextmanager
def steps() -> Iterator[Callable[[str, int, int], None]]:
    """A function that shows (what is being done, how many are done, of how many) on a terminal's last line."""
    drawn = 0.0

    def show(what: str, done: int, of: int) -> None:
        nonlocal drawn
        now = time.monotonic()
        if now - drawn >= _DRAW_SECONDS and sys.stderr.isatty():
            drawn = now
            print(f"\r\033[K{what} {f'{done} of {of}' if of else ''}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if drawn:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def bar(title: str) -> Iterator[Bar]:
    """A bar for as long as the block runs."""
    shown_bar = Bar(title)
    try:
        yield shown_bar
    finally:
        shown_bar.close()
