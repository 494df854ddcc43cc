"""Which files leave first: an order kept at hand, so that victims are found without a crawl.

`Queues` is what a store of heat offers; the daemon keeps them in LMDB, the replay of traces in memory. Victims
come from probation while it holds more than its share, then by score, then from what is left of probation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from tierfs.policy.heat import PROBATION_SHARE


class Queues(Protocol):
    """Two orders over the files that are local: lowest score first, and oldest admission first."""

    def by_score(self) -> Iterator[tuple[int, int]]:
        """(file, size) of the files past probation, coldest first."""

    def by_admission(self) -> Iterator[tuple[int, int]]:
        """(file, size) of the files on probation, oldest first."""

    def probation_bytes(self) -> int:
        """How much they hold together."""


def victims(queues: Queues, local_bytes: int) -> Iterator[int]:
    """Files in the order in which they should leave. The caller skips those that may not, and stops."""
    excess = queues.probation_bytes() - int(PROBATION_SHARE * local_bytes)
    waiting = queues.by_admission()
    for file, size in waiting:
        if excess <= 0:
            break
        excess -= size
        yield file
    for file, _ in queues.by_score():
        yield file
    for file, _ in queues.by_admission():
        yield file
