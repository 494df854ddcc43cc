"""A set of inode numbers that takes a bit for each where they are close together, as those of a tree are."""

from __future__ import annotations

_SHIFT = 8  # numbers that share an integer: on XFS 64 stand together, on ext4 thousands
_MASK = (1 << _SHIFT) - 1


class InodeSet:
    """As `set[int]`, which takes 70 to 100 bytes a number: too much for each file. One thread adds to it."""

    def __init__(self) -> None:
        self._bits: dict[int, int] = {}
        self._count = 0

    def add(self, ino: int) -> bool:
        """Whether it is new."""
        at, bit = ino >> _SHIFT, 1 << (ino & _MASK)
        bits = self._bits.get(at, 0)
        if bits & bit:
            return False
        self._bits[at] = bits | bit
        self._count += 1
        return True

    def __contains__(self, ino: int) -> bool:
        return bool(self._bits.get(ino >> _SHIFT, 0) >> (ino & _MASK) & 1)

    def __len__(self) -> int:
        return self._count
