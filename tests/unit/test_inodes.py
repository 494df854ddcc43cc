"""Sets of inode numbers are sets, and small."""

import random
import tracemalloc

from tierfs.inodes import InodeSet


def test_it_is_a_set_of_numbers():
    inos, known = InodeSet(), set()
    rng = random.Random(7)
    for ino in [0, 1, 255, 256, (1 << 64) - 1, *(rng.randrange(1 << 12) for _ in range(3000))]:
        assert inos.add(ino) == (ino not in known)
        known.add(ino)
        assert ino in inos and len(inos) == len(known)
    assert all((ino in inos) == (ino in known) for ino in range(1 << 12))


def test_numbers_go_one_by_one_some_together_and_into_another_set():
    inos, other, rng = InodeSet(), InodeSet(), random.Random(8)
    known = {rng.randrange(1 << 11) for _ in range(500)}
    for ino in known:
        inos.add(ino)
    for ino in [*list(known)[::3], 1 << 40]:
        inos.discard(ino)
        known.discard(ino)
    for ino in range(100):
        other.add(ino)
    inos.take_in(other)
    known |= set(range(100))
    assert len(inos) == len(known) and all(ino in inos for ino in known)
    taken = []
    while some := inos.take(7):
        assert len(some) <= 7
        taken += some
    assert sorted(taken) == sorted(known) and len(inos) == 0 and not any(ino in inos for ino in known)


def test_numbers_that_stand_together_take_next_to_nothing():
    """As they do on ext4, and by 64 on XFS."""
    for step, most in ((1, 2), (256, 8)):
        tracemalloc.start()
        inos = InodeSet()
        for chunk in range(1000):
            for ino in range(64):
                inos.add(chunk * 64 * step + ino)
        taken, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert taken < most * len(inos)
