"""Which files leave first: an order kept at hand, so that victims are found without a crawl.

`Queues` is what a store of heat offers; the daemon keeps them in LMDB, the replay of traces in memory. Victims
are first what scans have brought, but for a share of what is newest of it; then those on probation while they
hold more than their share, then by score, then from what is left of probation and of the scans.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from tierfs.policy.heat import PROBATION_SHARE
from tierfs.policy.scans import LENT_SECONDS, LENT_SHARE


class Queues(Protocol):
    """Three orders over the files that are local: lowest score first, and oldest first of two kinds."""

    def by_score(self) -> Iterator[tuple[int, int]]:
        """(file, size) of the files past probation, coldest first."""

    def by_admission(self) -> Iterator[tuple[int, int]]:
        """(file, size) of the files on probation, oldest first."""

    def by_lending(self) -> Iterator[tuple[int, int, float]]:
        """(file, size, when it was read) of the files that are lent, oldest first."""

    def probation_bytes(self) -> int:
        """How much those on probation hold together."""

    def lent_bytes(self) -> int:
        """How much those hold that are lent."""


def victims(queues: Queues, local_bytes: int, now: float) -> Iterator[int]:
    """Files in the order in which they should leave. The caller skips those that may not, and stops."""
    excess = queues.lent_bytes() - int(LENT_SHARE * local_bytes)
    for file, size, since in queues.by_lending():
        if excess <= 0 and now - since < LENT_SECONDS:
            break
        excess -= size
        yield file
    excess = queues.probation_bytes() - int(PROBATION_SHARE * local_bytes)
    for file, size in queues.by_admission():
        if excess <= 0:
            break
        excess -= size
        yield file
    for file, _ in queues.by_score():
        yield file
    for file, _ in queues.by_admission():
        yield file
    for file, *_ in queues.by_lending():
        yield file


def overdue(queues: Queues, capacity: int, now: float) -> Iterator[int]:
    """Files that leave although there is room: a scan must not fetch the whole store for good."""
    excess = queues.lent_bytes() - int(LENT_SHARE * capacity)
    for file, size, since in queues.by_lending():
        if excess <= 0 or now - since < LENT_SECONDS:
            break
        excess -= size
        yield file
