"""The background scrub: every `scrub_every` all copies are read back, slowly, and compared with their digests.

One pass is one `readback.Pass`, its place kept in `scrub.json` of the state directory: a daemon that is stopped
or killed goes on where it was, and a start costs one small file however many files the volume has. A bad copy
of a file that is all here is dropped, so that it goes out again; what cannot be had back any more is named
until it is well, changed or removed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from tierfs import control
from tierfs.errors import StoreError, TierError
from tierfs.model import Residency
from tierfs.readback import Bad, Pace, Pass, Place, Ref, load_place
from tierfs.spelling import quoted
from tierfs.store.priority import Priority, priority
from tierfs.tier import Tier

log = logging.getLogger("scrub")

AUTO_SECONDS = 90 * 86400.0  # where reading costs nothing
_LOOK_SECONDS = 5.0
_END_SECONDS = 5.0  # a store that does not answer keeps nobody from unmounting
_AGAIN_SECONDS = 60.0  # after the store gave no answer


class Scrubber:
    """Start with `start`, end with `stop`."""

    def __init__(self, tier: Tier, path: str, free: bool, now: Callable[[], float] = time.time) -> None:
        """`path`: of the file that keeps the place. `free`: nobody counts what is read from the store.

        `now` is the wall clock, in seconds.
        """
        self._tier = tier
        self._path = path
        self._free = free
        self._now = now
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._running = False
        self._place = load_place(path)
        self._pace = Pace(lambda: tier.kit.config.scrub_rate, self._stopping, lambda: tier.filler.waiting > 0)
        self._thread = threading.Thread(target=self._run, name="scrub", daemon=True)

    def start(self) -> None:
        """Work in a thread of its own."""
        self._thread.start()

    def stop(self) -> None:
        """End after the piece that is being read; the place is kept."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(_END_SECONDS)

    def reconfigured(self) -> None:
        """Look now whether a pass is due."""
        self._wake.set()

    # --- what is known ------------------------------------------------------------------------------------

    @property
    def every(self) -> float:
        """Seconds from the beginning of one pass to that of the next; 0: never."""
        every = self._tier.kit.config.scrub_every
        return every if every is not None else AUTO_SECONDS if self._free else 0.0

    def status(self) -> control.Scrub:
        """How far it is."""
        place = self._place or Place()
        return control.Scrub(
            every=self.every,
            running=self._running,
            began=place.began,
            ended=place.ended,
            files=place.files,
            bytes=place.bytes,
            damaged=place.lost - len(place.bad) + len(self.problems()),
        )

    def problems(self) -> list[control.Problem]:
        """The copies that cannot be had back, of files that still need them."""
        return [
            control.Problem(bad.at, f"{quoted(bad.path)}: {bad.what}: its content cannot be had back")
            for bad in list((self._place or Place()).bad)
            if self._needs(bad)
        ]

    def _needs(self, bad: Bad) -> bool:
        """The file still is what it was, and not all here."""
        record = self._tier.kit.index.get(bad.ino)
        ref = Ref.of_record(record)
        local = record is None or record.residency is Residency.RESIDENT
        return ref is not None and ref.key == bad.key and not local

    # --- passes -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with priority(Priority.GARBAGE):
            while not self._stopping.is_set():
                done = self.turn()
                self._wake.wait(_LOOK_SECONDS if done else _AGAIN_SECONDS)
                self._wake.clear()

    def turn(self) -> bool:
        """Begin a pass, or go on with one, if that is due; False where it failed."""
        try:
            if self._is_due():
                self._pass()
        except StoreError as error:
            log.info("reading copies back waits: %s", error)
        except Exception as error:
            if self._stopping.is_set():
                pass  # what it worked with is being closed
            elif isinstance(error, (TierError, OSError)):
                self._tier.kit.troubles.note(f"copies cannot be read back: {error}")
            else:
                log.exception("a scrub failed")
        else:
            return True
        return False

    def _is_due(self) -> bool:
        """Whether a pass is to be begun, or gone on with; `self._place` is it then."""
        if not self.every or self._tier.kit.withheld:
            return False
        now, place = self._now(), self._place
        if place is None:
            # Copies are verified when they are made: the first pass is a whole time from now.
            self._place = Place(began=now, ended=now)
            self._reader(self._place).save()
            return False
        if not place.ended:
            return True
        if place.began > now:
            place.began = now  # the clock was set back
        if now - place.began < self.every:
            return False
        self._place = Place(began=now, lost=place.lost, bad=place.bad)
        return True

    def _reader(self, place: Place) -> Pass:
        tier = self._tier
        return Pass(tier.kit, tier.places, tier.drain, self._path, place, self._pace, repair=True)

    def _pass(self) -> None:
        assert self._place is not None
        place, self._running, archived = self._place, True, 0
        log.info("copies are read back, from inode %d on", place.ino)
        try:
            for found in self._reader(place).run():
                name = quoted(found.path)
                if found.archived:
                    archived += 1
                elif found.repaired:
                    log.error("%s: %s: it is all here, and will be copied out again", name, found.what)
                else:
                    log.critical("%s: %s: its content cannot be had back", name, found.what)
        finally:
            self._running = False
        if archived:
            log.warning("%d copies cannot be read back: the provider has put them into an archive", archived)
        if place.ended:
            log.info("%d copies were read back, %d bytes; %d are bad", place.files, place.bytes, place.lost)
