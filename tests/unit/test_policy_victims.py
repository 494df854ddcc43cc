"""The order of victims that is kept at hand, beside the one that a look at every file would give."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tierfs.heat_index import HeatIndex, _pack, _unpack
from tierfs.policy.heat import PROBATION_SHARE, Heat, admitted, lent, score, touched
from tierfs.policy.scans import LENT_SHARE

CAPACITY = 1000
INOS = st.integers(1, 5)
SIZES = st.integers(1, 400)
KINDS = ("touch", "admit", "lend", "left", "forget")
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), INOS, SIZES), max_size=50)


class Plain:
    """The same files in dictionaries, looked through as a whole for each answer."""

    def __init__(self) -> None:
        self.heat: dict[int, Heat] = {}
        self.here: dict[int, int] = {}  # local files: when they came
        self.volume = self.came = 0

    def touch(self, ino, size):
        heat = self.heat.get(ino, Heat())
        if heat.lent:
            self.volume += heat.size
            self._come(ino)
        self.heat[ino] = stored(touched(heat, self.volume / CAPACITY, 5.0, 1, size, ino in self.here))

    def admit(self, ino, size):
        self.volume += size
        if ino in self.here and not self.heat[ino].lent:
            self.heat[ino] = replace(self.heat[ino], size=size)
            return
        self._come(ino)
        self.heat[ino] = stored(admitted(self.heat.get(ino), self.volume / CAPACITY, 5.0, size))

    def lend(self, ino, size):
        if ino in self.here and not self.heat[ino].lent:
            self.heat[ino] = replace(self.heat[ino], size=size)
            return
        if ino not in self.here:
            self._come(ino)
        self.heat[ino] = stored(lent(self.heat.get(ino), 5.0, size))

    def _come(self, ino):
        self.came += 1
        self.here[ino] = self.came

    def left(self, ino, _size):
        if self.here.pop(ino, None):
            self.heat[ino] = replace(self.heat[ino], lent=False)

    def forget(self, ino, _size):
        self.here.pop(ino, None)
        self.heat.pop(ino, None)

    def victims(self, local_bytes):
        order = sorted((ino for ino in self.here if self.heat[ino].probation), key=self.here.__getitem__)
        given = [ino for ino in order if self.heat[ino].lent]
        waiting = [ino for ino in order if not self.heat[ino].lent]
        first = [
            *self._beyond(given, LENT_SHARE * local_bytes),
            *self._beyond(waiting, PROBATION_SHARE * local_bytes),
        ]
        rest = [ino for ino in self.here if not self.heat[ino].probation]
        return first, sorted(rest, key=lambda ino: (score(self.heat[ino]), ino)), waiting, given

    def _beyond(self, inos, share):
        excess, found = self.bytes(inos) - int(share), []
        for ino in inos:
            if excess <= 0:
                break
            excess -= self.heat[ino].size
            found.append(ino)
        return found

    def bytes(self, inos):
        return sum(self.heat[ino].size for ino in inos)


def stored(heat):
    """Rounded as it is when it is kept: at the very edge of the probation that decides."""
    found = _unpack(_pack(heat, b""))
    assert found is not None
    return replace(found[0], lent=heat.lent)


@settings(max_examples=60, deadline=None)
@given(STEPS, st.integers(0, 2000))
@example([("admit", 1, 1), ("admit", 1, 100), ("touch", 1, 1)], 0)
def test_victims_come_in_the_order_that_a_crawl_would_find(steps, local_bytes):
    path = tempfile.mkdtemp(prefix="tierfs-heat-")
    kept, plain = HeatIndex(path, CAPACITY), Plain()
    try:
        for what, ino, size in steps:
            getattr(plain, what)(ino, size)
            if what == "touch":
                kept.touch_many([(ino, 1, size)], 5.0)
            elif what == "admit":
                kept.admit(ino, size, size, 5.0)
            elif what == "lend":
                kept.lend_many([(ino, size)], 5.0)
            else:
                getattr(kept, what)([ino])
        first, rest, waiting, given = plain.victims(local_bytes)
        assert list(kept.victims(local_bytes, 5.0)) == first + rest + waiting + given
        assert (kept.probation_bytes(), kept.lent_bytes()) == (plain.bytes(waiting), plain.bytes(given))
    finally:
        kept.close()
        shutil.rmtree(path)
