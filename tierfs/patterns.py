"""Which files a list of patterns means, as .gitignore says it.

A pattern with a `/` before its end is a path from the volume's root, any other one names a file or directory
anywhere; what lies in a directory that is meant is meant too. A `/` at the end: directories only. A `!` before
it: what it names is not meant after all, whatever stands above it in the list; `!*/` so makes all above it
patterns of files only. Unlike in .gitignore, `*` in a path stands for a `/` too.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple


class _Run(NamedTuple):
    """Patterns that stand one after another and say the same of what they name."""

    meant: bool
    by_name: re.Pattern[str]
    by_path: re.Pattern[str]


def matcher(patterns: Iterable[str]) -> Callable[[bytes], bool]:
    """A function that says whether a file (by its path from the volume's root) is meant. Only of the last name
    the kind had to be told; whoever asks has a file."""
    listed = list(patterns)
    of_directories = _runs(listed)
    of_files = _runs([pattern for pattern in listed if not pattern.endswith("/")])

    def matches(path: bytes) -> bool:
        *above, name = os.fsdecode(path).strip("/").split("/")
        at = ""
        for directory in above:
            at = f"{at}/{directory}"
            if _is_meant(of_directories, directory, at):
                return True
        return _is_meant(of_files, name, f"{at}/{name}")

    return matches


def _is_meant(runs: list[_Run], name: str, path: str) -> bool:
    return next((run.meant for run in runs if run.by_name.match(name) or run.by_path.match(path)), False)


def _runs(patterns: list[str]) -> list[_Run]:
    """The last one first: it has the last word."""
    runs = []
    for negated, together in itertools.groupby(patterns, lambda pattern: pattern.startswith("!")):
        plain = [pattern[negated:].rstrip("/") for pattern in together]
        names = [fnmatch.translate(pattern) for pattern in plain if "/" not in pattern]
        paths = [fnmatch.translate("/" + pattern.lstrip("/")) for pattern in plain if "/" in pattern]
        runs.append(_Run(not negated, _any_of(names), _any_of(paths)))
    return runs[::-1]


def _any_of(expressions: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(expressions) or r"(?!)")
