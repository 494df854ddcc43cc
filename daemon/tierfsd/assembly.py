"""Puts the mover's parts together for one volume, and takes them down in order."""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
from urllib.parse import unquote, urlsplit

from tierfs import control, ownership, volume, wire
from tierfs.config import EMBEDDED_STORE, FILE_NAME, VolumeConfig
from tierfs.errors import BusyError, StoreError, StoreUnavailableError, VolumeError
from tierfs.heat_index import HeatIndex
from tierfs.index import Index
from tierfs.serverlink import ServerLink
from tierfs.store.base import ObjectStore
from tierfs.store.decorators import ReadOnlyStore
from tierfs.store.retry import RetryPolicy
from tierfs.store.urls import adapt, open_store
from tierfs.tier import Tier
from tierfs.tree import open_tree
from tierfsd import checking
from tierfsd.backend import TierBackend
from tierfsd.claiming import Fence, patience
from tierfsd.control_server import ControlServer, Job
from tierfsd.indexcare import INDEX_DAMAGED
from tierfsd.journalling import JournalKeeper
from tierfsd.priority import Priority
from tierfsd.scheduler import Scheduler
from tierfsd.scrubbing import Scrubber
from tierfsd.watcher import ConfigWatcher

log = logging.getLogger("mover")

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOTE_BYTES = 1 << 16  # more than what is written down of a claim
_CLAIM_SECONDS = 10.0  # between two attempts to take a store that does not answer
_BEGINNING_SECONDS = 5.0  # of processors: to load and to ask the store takes one or two
_LAST_WORDS_SECONDS = 0.3
_READING_SECONDS = 5.0  # a check that was cancelled ends with the piece that it reads
_WAITING = "the store has not answered yet"


class Mover:
    """Puts the parts together for one volume."""

    def __init__(self, home: volume.Volume, link_fd: int, control_fd: int, stopping: threading.Event) -> None:
        """`stopping` is set when it shall end. Raises TierError, OSError."""
        self.stopping = stopping
        self._priority = Priority()
        self.index_damaged = False
        self._lost = threading.Event()
        self._claiming = threading.Lock()
        self._reading = threading.Lock()
        self._home = home
        self._watcher = ConfigWatcher(home.path(FILE_NAME), home.identity.store, self._apply)
        config = self._watcher.current
        self._index = Index.open(home.path("index"))
        self._index.on_lost = _end_at_once
        self._tree = open_tree(home.path("tree"))
        self._store = _open_store(home, config)
        self._heat = HeatIndex(home.path("heat"), config.local_limit or self._tree.space().total)
        self._marks = os.open(home.path("marks"), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._link = ServerLink(wire.Link(socket.socket(fileno=link_fd), server=False))
        self._tier = Tier(
            self._tree, self._index, self._store, self._link, self._marks, config, self._make_room
        )
        self._tier.kit.withheld = _WAITING
        self._tier.kit.still_ours = self._verify_claim
        self._tier.kit.fence = Fence(
            self._verify_claim, lambda: patience(self._tier.kit.config), ownership.silence(home)
        ).check
        self._journal = JournalKeeper(self._tier, home.identity.volume, self._show_life)
        self._scheduler = Scheduler(self._tier, self._heat, _is_beside(home), home.path("ballast"))
        self._index.make_room = self._scheduler.make_index_room
        self._scheduler.eviction.tell_futile = lambda: self._link.send(wire.Futile())
        self._scrubber = Scrubber(self._tier, home.path("scrub.json"), home.store_url.startswith("file:"))
        backend = TierBackend(
            self._tier,
            self._heat,
            home,
            self._watcher,
            looked=self._scheduler.looked,
            verifying=lambda: self._scheduler.verifying,
            notes=self._scheduler.notes,
            check=self._check,
            journal=self._journal,
            collector=self._scheduler.collector,
            scrubber=self._scrubber,
            bring_pinned=self._scheduler.bring_pinned,
            never=self._scheduler.trials.never_leaves,
        )
        listener = socket.socket(fileno=control_fd)
        self._control = ControlServer(listener, self._tree.rootfd, backend, self._priority.hurry)

    def run(self) -> None:
        """Work until told to stop."""
        self._priority.start(self._is_waited_for, lambda: self._control.ordered)
        self._link.start(self)
        self._greet()
        self._scheduler.start()
        self._journal.start()
        if not self._home.identity.view:
            self._scrubber.start()
        self._watcher.start()
        self._control.start()
        claim = threading.Thread(target=self._claim, name="claim", daemon=True)
        claim.start()
        self.stopping.wait()
        # Of a server that has just ended in order the last report may still be on its way.
        self._lost.wait(_LAST_WORDS_SECONDS)
        self._priority.stop()
        self._control.close()
        self._tier.filler.stop()  # from here on a failure may come of our ending
        self._watcher.close()
        self._scrubber.stop()
        self._journal.stop()
        self._scheduler.stop()
        self._tier.close()
        self._index.close()
        self._heat.close()

    def _is_waited_for(self) -> bool:
        return (
            self._begins()
            or self._tier.filler.is_waited_for
            or self._control.asked
            or self._scheduler.eviction.is_waited_for
        )

    def _begins(self) -> bool:
        """Any order waits for the store's first answer; a store that is down is not what keeps us busy."""
        return not self._tier.kit.claim_tried.is_set() and time.process_time() < _BEGINNING_SECONDS

    def _greet(self) -> None:
        try:
            self._link.send(wire.Hello(os.getpid(), self._tier.drainer.position))
            self._send_limits(self._watcher.current)
        except BusyError as error:
            log.info("%s", error)  # ended already: what it left is taken in, and then we end as well

    def _claim(self) -> None:
        """Take the store for this mount; until then nothing is written to it. Reading needs no claim."""
        view = self._home.identity.view
        while not self.stopping.is_set():
            try:
                if not view:
                    with self._claiming:
                        ownership.renew(self._home, self._store, self._index.session.epoch)
                self._note_where_the_store_is()
            except VolumeError as error:
                self._withhold(str(error))
                log.critical("%s", error)
                self._tier.kit.claim_tried.set()
                return
            except StoreError as error:
                self._try_again(str(error))
            except OSError as error:
                # Of the note of what is claimed: without room for that nothing could leave and make room.
                self._try_again(f"{self._home.state}: {error.strerror or error}", full=error.errno in _FULL)
            except Exception as error:
                log.exception("the store cannot be claimed")
                self._try_again(f"the store cannot be claimed: internal error ({type(error).__name__})")
            else:
                self._tier.kit.withheld = "this is a view of the past" if view else ""
                self._tier.kit.claim_tried.set()
                return

    def _try_again(self, reason: str, *, full: bool = False) -> None:
        """It is not ours yet, because of this; `full`: the local disk is."""
        self._withhold(reason)
        self._tier.kit.claim_tried.set()
        if full:
            self._make_room(_NOTE_BYTES, True)
        self.stopping.wait(_CLAIM_SECONDS)

    def _note_where_the_store_is(self) -> None:
        """Raises StoreUnavailableError where it is gone again."""
        if self._scheduler.space.beside is None:
            try:
                self._scheduler.space.beside = _device_of(self._home.store_url) == self._tree.device
            except OSError as exc:
                raise StoreUnavailableError(f"{self._store.describe()}: {exc.strerror}") from exc

    def _verify_claim(self) -> None:
        """Nothing more is written to a store that another machine has taken over. Raises TierError, OSError."""
        if self._home.identity.view:
            return
        try:
            with self._claiming:
                ownership.verify(self._home, self._store)
                ownership.note_heard(self._home)
        except VolumeError as error:
            self._withhold(str(error))
            raise

    def _show_life(self, mounted: bool) -> None:
        process = ownership.this_process()
        ownership.show_life(self._store, self._index.session.epoch, mounted, process)

    def _withhold(self, reason: str) -> None:
        if self._tier.kit.withheld != reason:
            log.warning("nothing is copied out: %s", reason)
        self._tier.kit.withheld = reason

    def _make_room(self, count: int, failed: bool) -> None:
        self._scheduler.eviction.make_room(count, failed)

    def _check(self, request: control.Check, job: Job) -> control.Findings:
        if not request.read_data:
            return self._check_now(request, None, job)
        if not self._reading.acquire(timeout=_READING_SECONDS):
            raise BusyError("another check is reading the copies: wait for its end")
        try:
            reading = checking.Reading(self._home.path("check.json"), request.rate, request.from_start)
            return self._check_now(request, reading, job)
        finally:
            self._reading.release()

    def _check_now(
        self, request: control.Check, reading: checking.Reading | None, job: Job
    ) -> control.Findings:
        # What a look through the tree is about to put right is no finding, and no two put it right at once.
        while not self._scheduler.looked.wait(0.1):
            if job.cancelled.is_set():
                return control.Findings([])
        findings = checking.check(self._tier, request.repair, reading, job)
        if findings.renewing:
            log.critical("%s: the mover ends, for a new one to be made", findings.findings[0].what)
            self.index_damaged = True
            self.stopping.set()
        return findings

    def _apply(self, config: VolumeConfig) -> None:
        self._tier.reconfigure(config)
        at_once = config.uploads + config.fetches
        adapt(self._store, self._home.store_url, _patience(config), at_once, config.storage_class)
        self._scrubber.reconfigured()
        self._scheduler.reconfigured()
        self._heat.capacity = config.local_limit or self._tree.space().total
        self._send_limits(config)

    def _send_limits(self, config: VolumeConfig) -> None:
        self._link.send(wire.Limits(config.fetch_timeout, config.chunk_size))

    # --- the link -----------------------------------------------------------------------------------------

    def on_fetch(self, message: wire.Fetch, opath: int) -> None:
        """Content is asked for."""
        if not message.ordered:
            self._priority.hurry()
        self._tier.filler.on_fetch(message, opath, self._scheduler.scanners.brings(message))

    def on_cancel(self, message: wire.CancelFetch) -> None:
        """Nobody waits for that any more."""
        self._tier.filler.on_cancel(message)

    def on_touches(self, message: wire.Touches) -> None:
        """Heat."""
        self._scheduler.keeper.touches(message)

    def on_poke(self, message: wire.Poke) -> None:
        """New marks, or space is short."""
        if message.urgent:
            self._priority.hurry()
        self._scheduler.poke(message)

    def on_hurry(self) -> None:
        """Somebody waits for us."""
        self._priority.hurry()

    def on_lost(self) -> None:
        """The server is gone, and a new one will have a new mover."""
        self._lost.set()
        self.stopping.set()


def _end_at_once(reason: str, damaged: bool) -> None:
    """The index is damaged, or LMDB does nothing more: whatever is under way, nothing more may be written."""
    log.critical("%s: the mover ends", reason)
    os._exit(INDEX_DAMAGED if damaged else 1)


def _open_store(home: volume.Volume, config: VolumeConfig) -> ObjectStore:
    opened = open_store(home.store_url, capabilities=home.identity.capabilities)
    adapt(opened, home.store_url, _patience(config), config.uploads + config.fetches, config.storage_class)
    return ReadOnlyStore(opened) if home.identity.view else opened


def _patience(config: VolumeConfig) -> RetryPolicy:
    """A request must have given up before its readers do, so that they hear the reason."""
    return RetryPolicy(deadline=max(1.0, config.fetch_timeout * 0.75))


def _is_beside(home: volume.Volume) -> bool | None:
    """Whether the store is on the filesystem of the tree. Of a directory elsewhere that is known when the store
    has answered: where a disk of the network is not mounted, or hangs, nothing can be told."""
    if not home.store_url.startswith("file:"):
        return False
    return True if home.identity.store == EMBEDDED_STORE else None


def _device_of(url: str) -> int:
    """The device of a directory store. Raises OSError."""
    return os.stat(unquote(urlsplit(url).path)).st_dev
