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
