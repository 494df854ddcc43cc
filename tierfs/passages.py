"""Content that went past a full disk: checked by the mover, handed over in memory, kept for a moment.

What is here is not local: only a read may use it. A write, a mapping of the backing file or a system call that
works on the file itself needs the bytes in the file.
"""

from __future__ import annotations

import os
import time
from typing import NamedTuple

_SECONDS = 5.0  # a reader comes at once
_MOST = 16  # of one file: each a chunk (a small file) or about 1 MiB


class Passage(NamedTuple):
    """Bytes [start, end) in a memory file; `until` in seconds of CLOCK_MONOTONIC."""

    start: int
    end: int
    fd: int
    until: float


class Passages:
    """Those of one file, newest last."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: list[Passage] = []

    def take(self, start: int, end: int, fd: int) -> None:
        """Keep bytes [start, end), which stand at the beginning of `fd`; that is ours from now on."""
        self._kept.append(Passage(start, end, fd, time.monotonic() + _SECONDS))
        while len(self._kept) > _MOST:
            os.close(self._kept.pop(0).fd)

    def cover(self, start: int, end: int) -> bool:
        """All of [start, end) can be had here."""
        return self._covering(start, end) is not None

    def fill_in(self, data: bytes, offset: int, start: int, end: int) -> bytes:
        """`data`, read from the file at `offset`, with its part of [start, end), which `cover` has said is
        here. Raises OSError."""
        passage = self._covering(start, end)
        assert passage is not None
        low, high = max(start, offset), min(end, offset + len(data))
        part = os.pread(passage.fd, high - low, low - passage.start)
        return data[: low - offset] + part + data[high - offset :]

    def expire(self, now: float) -> None:
        """Let go of what nobody came for."""
        while self._kept and self._kept[0].until <= now:
            os.close(self._kept.pop(0).fd)

    def close(self) -> None:
        """Let go of all."""
        while self._kept:
            os.close(self._kept.pop().fd)

    def _covering(self, start: int, end: int) -> Passage | None:
        return next((p for p in self._kept if p.start <= start and p.end >= end), None)
