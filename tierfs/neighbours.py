"""Small files that come before they are asked for, because others of their directory are being read.

Whoever reads one small stub after another waits for the store each time. Where that has happened twice in a
moment in a directory, the next of its files are fetched ahead: a few at first, more each time the reader gets
to their end (policy/ahead.py says which). They come as an order does, through the mount server, behind what
anybody waits for. What is not used was in vain; where most is, nothing is brought ahead for a while.

    miss, miss -> 16 files ahead ... a miss among the last or right behind them -> 32 -> 64
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import queue
import stat
import threading
import time
from collections import OrderedDict, deque
from contextlib import suppress
from dataclasses import dataclass

from tierfs import wire
from tierfs.errors import TierError
from tierfs.kit import Kit
from tierfs.policy.ahead import SECONDS, Listing, Precision, Run
from tierfs.tree import fd_path

log = logging.getLogger("mover")

MOST_BYTES = 8 << 20  # ahead at once
_SHARE = 64  # of local_limit, at most this part
_MOST_LISTED = 10_000  # names: a larger directory takes too long to be put in order
_LISTINGS = 4  # that are kept
_IDLE_SECONDS = 30.0  # then nothing is
_LISTED_SECONDS = 10.0
_RUNS = 64  # directories
_LOST_SECONDS = 10.0  # the mount server may leave alone what it is asked to bring


@dataclass(slots=True)
class _Ahead:
    """A stub that is to come, by a descriptor of its own until it is asked for."""

    ino: int
    size: int
    fd: int
    pid: int  # for which thread


@dataclass(slots=True)
class _Asked:
    size: int
    pid: int
    since: float


class Neighbours:
    """In a thread of its own; `asked`, `ended`, `pid_of` and `precision` may be used from any."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self.precision = Precision()
        self._jobs: queue.SimpleQueue[tuple[bytes, int] | tuple[int, int] | None] = queue.SimpleQueue()
        self._runs: OrderedDict[bytes, Run] = OrderedDict()
        self._waiting: deque[_Ahead] = deque()
        self._asked: dict[int, _Asked] = {}
        self._thread = threading.Thread(target=self._work, name="neighbours", daemon=True)
        self._thread.start()

    def asked(self, fd: int, pid: int = 0) -> None:
        """Somebody waits for this small file; `pid` is his thread, where that is known."""
        if self._kit.config.prefetch:
            with suppress(OSError):  # no descriptor left, perhaps: he gets his file all the same
                self._jobs.put((os.readlink(os.fsencode(fd_path(fd))), pid))

    def ended(self, ino: int, number: int) -> None:
        """The content of a file has come, or (errno) has not."""
        if ino in self._asked:
            self._jobs.put((ino, number))

    def pid_of(self, ino: int) -> int:
        """The thread for which this file is being brought ahead; 0: for none that is known."""
        asked = self._asked.get(ino)
        return asked.pid if asked is not None else 0

    def close(self) -> None:
        """End; what has been asked for comes, or not, without us."""
        self._jobs.put(None)
        self._thread.join()

    # --- in the thread ------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            try:
                about, number = job
                if isinstance(about, bytes):
                    self._missed(*os.path.split(about), number, time.monotonic())
                else:
                    self._came(about, number)
                self._pump()
            except (TierError, OSError) as error:
                log.debug("nothing is brought ahead: %s", error)
                self._forget()
            except Exception:
                log.exception("bringing files ahead")
                self._forget()
        self._forget()

    def _next_job(self) -> tuple[bytes, int] | tuple[int, int] | None:
        if self._runs:
            try:
                return self._jobs.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                self._forget()
        return self._jobs.get()

    def _forget(self) -> None:
        self._runs.clear()
        while self._waiting:
            os.close(self._waiting.popleft().fd)

    def _missed(self, directory: bytes, name: bytes, pid: int, now: float) -> None:
        run = self._runs.pop(directory, None)
        if run is None or now > run.until:
            run = Run(name, now + SECONDS)
        elif self._may_bring(now):
            self._go_on(run, directory, name, pid, now)
        self._runs[directory] = run
        if len(self._runs) > _RUNS:
            self._runs.popitem(last=False)
        for older in list(self._runs.values())[:-_LISTINGS]:
            older.listing = None

    def _may_bring(self, now: float) -> bool:
        kit, config = self._kit, self._kit.config
        limit = config.high * config.local_limit if config.local_limit else float("inf")
        if not kit.fetched.per_second() or not self.precision.is_good(now) or not kit.has_room(MOST_BYTES):
            return False  # the store does not answer, perhaps: who waits for it needs the threads
        return kit.index.totals().local_bytes < limit

    def _go_on(self, run: Run, directory: bytes, name: bytes, pid: int, now: float) -> None:
        top = os.fsencode(os.path.realpath(self._kit.tree.path))
        if directory != top and not directory.startswith(top + b"/"):
            return
        dirfd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if run.listing is None or now - run.listed > _LISTED_SECONDS:
                with os.scandir(dirfd) as entries:
                    names = [os.fsencode(e.name) for e in itertools.islice(entries, _MOST_LISTED + 1)]
                if len(names) > _MOST_LISTED:
                    return
                run.listing, run.listed, run.order = Listing(names), now, -1
            self._choose(run, run.next(name, now), dirfd, pid)
        finally:
            os.close(dirfd)

    def _choose(self, run: Run, places: range, dirfd: int, pid: int) -> None:
        """The next stubs in the order of the run, for this thread."""
        assert run.listing is not None
        limit = self._kit.config.local_limit
        room = min(MOST_BYTES, limit // _SHARE) if limit else MOST_BYTES
        count = 0
        for place in places:
            found = self._stub_at(dirfd, run.listing.orders[run.order][place], pid)
            if found is not None and found.size > room:
                os.close(found.fd)
                break
            run.ahead = place
            if found is not None:
                self._waiting.append(found)
                room -= found.size
                count += 1
                if count == run.window:
                    break
        run.until += count * SECONDS

    def _stub_at(self, dirfd: int, name: bytes, pid: int) -> _Ahead | None:
        """A small stub of which nothing is here, and that is not on its way."""
        try:
            st = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
            small = 0 < st.st_size <= self._kit.config.chunk_size
            if st.st_blocks or not small or not stat.S_ISREG(st.st_mode):
                return None
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dirfd)
        except OSError:
            return None  # gone since
        try:
            st = os.fstat(fd)
            asked = st.st_ino in self._asked or any(st.st_ino == each.ino for each in self._waiting)
            if not asked and st.st_dev == self._kit.tree.device and self._kit.tree.read_stub(fd) is not None:
                own, fd = fd, -1
                return _Ahead(st.st_ino, st.st_size, own, pid)
        finally:
            if fd >= 0:
                os.close(fd)
        return None

    def _pump(self) -> None:
        """Ask for as many as may be under way at once: who waits for another file finds a free thread."""
        now = time.monotonic()
        for ino in [ino for ino, asked in self._asked.items() if now - asked.since > _LOST_SECONDS]:
            del self._asked[ino]
            self.precision.failed(ino)
        most = min(max(1, self._kit.config.fetches * 3 // 4), wire.MAX_FDS)
        inos, fds = [], []
        try:
            while self._waiting and len(self._asked) < most:
                ahead = self._waiting.popleft()
                inos.append(ahead.ino)
                fds.append(ahead.fd)
                self._asked[ahead.ino] = _Asked(ahead.size, ahead.pid, now)
                self.precision.asked(ahead.ino, ahead.size, now)
            if inos:
                self._kit.server.send(wire.Bring(inos), fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _came(self, ino: int, number: int) -> None:
        asked = self._asked.pop(ino, None)
        if asked is None:
            return
        if not number:
            self.precision.came(asked.size)
            return
        self.precision.failed(ino)
        if number != errno.ECANCELED:  # by somebody who had asked for the same
            self._forget()  # the store does not answer, or the disk is full: nobody waits for these
