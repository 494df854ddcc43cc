"""Uses of files on their way into the heat index, with what has come and gone of local content."""

from __future__ import annotations

import logging
import threading

from tierfs import wire
from tierfs.errors import IndexError_
from tierfs.heat_index import HeatIndex
from tierfs.kit import Kit
from tierfs.policy.ahead import Precision
from tierfsd.scanning import Scanners

log = logging.getLogger("scheduler")


class HeatKeeper:
    """Used by several threads."""

    def __init__(self, kit: Kit, heat: HeatIndex, ahead: Precision, scanners: Scanners) -> None:
        """`ahead` hears which files are used, and knows which have come before that."""
        self._kit = kit
        self._ahead = ahead
        self._heat = heat
        self._scanners = scanners
        self._touches: dict[int, tuple[int, int]] = {}
        self._waits = False  # it could not be written, and has been complained of
        self._lock = threading.Lock()

    def touches(self, message: wire.Touches) -> None:
        """Uses of files."""
        self._ahead.used(touch.ino for touch in message.touches)
        with self._lock:
            for touch in filter(self._scanners.counts, message.touches):
                count, _ = self._touches.get(touch.ino, (0, 0))
                self._touches[touch.ino] = count + touch.count, touch.size

    def flush(self) -> None:
        """Write what is known by now; what finds no room waits."""
        with self._lock:
            touches, self._touches = self._touches, {}
        here, left, gone = self._kit.movements.take()
        try:
            if here:
                unused = self._ahead.unused(ino for ino, *_ in here)
                admitted = [(ino, size, grown) for ino, size, grown, lent in here if not lent]
                self._heat.admit_many(admitted, unused=unused)
                here = [each for each in here if each[3]]
            if here:
                self._heat.lend_many((ino, size) for ino, size, *_ in here)
                here = []
            if found := self._scanners.found():
                self._heat.lend_known(found)
            if left:
                self._heat.left(left)
                left = set()
            if gone:
                self._heat.forget(gone)
                gone = set()
            if touches:
                self._heat.touch_many((ino, count, size) for ino, (count, size) in touches.items())
        except IndexError_ as error:
            # On a full disk room is made by what is known: nobody's read fails for want of heat.
            if not self._waits:
                log.warning("%s: it is kept until it can be", error)
            self._waits = True
            self._kit.movements.give_back(here, left, gone)
            with self._lock:
                for ino, (count, size) in touches.items():
                    newer = self._touches.get(ino, (0, size))
                    self._touches[ino] = count + newer[0], newer[1]
        else:
            self._waits = False
