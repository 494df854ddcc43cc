"""A set of inode numbers that takes a bit for each where they are close together, as those of a tree are."""

from __future__ import annotations

_SHIFT = 8  # numbers that share an integer: on XFS 64 stand together, on ext4 thousands
_MASK = (1 << _SHIFT) - 1


class InodeSet:
    """As `set[int]`, which takes 70 to 100 bytes a number: too much for each file. One thread changes it."""

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

    def discard(self, ino: int) -> None:
        """It is none of them."""
        if ino in self:
            at = ino >> _SHIFT
            left = self._bits[at] & ~(1 << (ino & _MASK))
            self._keep(at, left)
            self._count -= 1

    def take_in(self, other: InodeSet) -> None:
        """All of another set are of this one, too."""
        for at, bits in other._bits.items():
            before = self._bits.get(at, 0)
            self._bits[at] = before | bits
            self._count += (bits & ~before).bit_count()

    def take(self, most: int) -> list[int]:
        """So many of them, any, which are none of them any more."""
        taken: list[int] = []
        while self._bits and len(taken) < most:
            at, bits = next(reversed(self._bits.items()))
            while bits and len(taken) < most:
                last = bits & -bits
                taken.append(at << _SHIFT | last.bit_length() - 1)
                bits ^= last
            self._keep(at, bits)
        self._count -= len(taken)
        return taken

    def _keep(self, at: int, bits: int) -> None:
        if bits:
            self._bits[at] = bits
        else:
            del self._bits[at]

    def __contains__(self, ino: int) -> bool:
        return bool(self._bits.get(ino >> _SHIFT, 0) >> (ino & _MASK) & 1)

    def __len__(self) -> int:
        return self._count
