"""The supervisor's care of the index: begins a session, and puts a damaged one aside for a new one to be made.

LMDB believes what it maps, so that a damaged file may kill whoever reads it before anything is noticed. A mark
stands beside the index while it is being opened, and after a process that uses it has met damage or was killed
by a signal that only a mistake in memory brings. Where there is a mark all pages are looked at before it is
opened.

    index.suspect    why; written before an opening and after such a death, removed once all is well
    index.damaged-…  what was put aside; a person may remove it
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import signal
import time

from tierfs import pages, syscalls, volume
from tierfs.errors import IndexDamagedError, IndexFullError
from tierfs.index import Index
from tierfs.marks import SPARE
from tierfs.tree import open_tree
from tierfsd.farewell import unread

log = logging.getLogger("supervisor")

INDEX_DAMAGED = 3  # exit code of a mover that has met damage
_FATAL = {-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGILL, -signal.SIGFPE}
_KEPT_ASIDE = 3


class IndexCare:
    """Of one volume; used in the supervisor's thread, while no other process has the index open for writing."""

    def __init__(self, home: volume.Volume) -> None:
        self._home = home
        self._path = home.path("index")
        self._mark = home.path("index.suspect")

    def begin_session(self) -> int:
        """A new epoch, in an index that is whole. Raises IndexError_, VolumeError, OSError."""
        self.put_aside_if_damaged()
        while True:
            try:
                return self._begin_and_keep()
            except (OSError, IndexFullError) as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._let_go_of_reserve():
                    raise
                log.warning("%s: the reserve was let go of", error)

    def suspect(self, status: int) -> bool:
        """How a child ended: whether the index may be to blame. Then it is looked at when it is next opened."""
        if status not in _FATAL and status != INDEX_DAMAGED:
            return False
        self.doubt(f"a process that uses it ended with {status}")
        return True

    def doubt(self, reason: str) -> None:
        """Have it looked at before it is next opened."""
        try:
            self._put_mark(reason)
        except OSError as error:  # of a disk that is full, or ends: no reason for the supervisor to end as well
            log.error("it is not written down that the index is to be looked at: %s", error)

    def _put_mark(self, reason: str) -> None:
        with open(self._mark, "w", encoding="utf-8") as file:
            file.write(f"{reason}\n")

    def _begin_and_keep(self) -> int:
        epoch = self._begin(volume.last_epoch(self._home.state))
        volume.keep_epoch(self._home.state, epoch)
        return epoch

    def _begin(self, floor: int) -> int:
        self._put_mark("a process that opened it did not come to an end")
        try:
            epoch = self._open_and_begin(floor)
        except IndexDamagedError as error:
            self._put_aside(str(error))
            epoch = self._open_and_begin(floor)
        self._remove_mark()
        return epoch

    def _open_and_begin(self, floor: int) -> int:
        boot, root = self._run(), self._root()
        with contextlib.closing(Index.open(self._path)) as index:
            if index.is_of(root):
                if index.power_was_lost(boot):
                    self._look_at_heat()
                return index.begin_session(boot, floor, root).epoch
        # Each inode has another number: no record is found, and all that has one would be taken for removed.
        self._lose_heat("the tree was copied here or moved")
        raise IndexDamagedError("the index is of another tree: this one was copied here or moved")

    def _root(self) -> bytes:
        with contextlib.closing(open_tree(self._home.path("tree"))) as tree:
            return tree.handle_of(tree.rootfd)

    def _run(self) -> str:
        """This run of the machine, and this mount of the disk: one that was torn out and put in again has lost
        what was not synced, as a machine has whose power failed."""
        mount = syscalls.mount_id(os.fsencode(self._home.state))
        return syscalls.boot_id() if mount is None else f"{syscalls.boot_id()} {mount}"

    def end_session(self) -> None:
        """In order: what was written has its marks in the index, or in a log that outlives a power cut by now.

        Raises IndexError_, OSError."""
        with contextlib.closing(Index.open(self._path)) as index:
            if unread(index, self._home.path("marks")):
                _sync_all(self._home.path("marks"))  # no mover has come to that: it hung, or had not begun
            index.end_session()

    def _let_go_of_reserve(self) -> bool:
        """The ballast, or where a full disk has taken that before, the next part of the mark log: better no
        change can be made for now than that nothing can be read."""
        for reserve in ("ballast", os.path.join("marks", SPARE)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._home.path(reserve))
                return True
        return False

    # --- damage -------------------------------------------------------------------------------------------

    def put_aside_if_damaged(self) -> bool:
        """Look at all pages where there is a mark. Whether there was damage: the index is aside then."""
        try:
            with open(self._mark, encoding="utf-8", errors="replace") as file:
                reason = file.read().strip()
        except FileNotFoundError:
            return False
        log.warning("the index is looked at: %s", reason)
        self._look_at_heat()
        damage = _damage(self._path) or self._refusal()
        if damage:
            self._put_aside(damage)
        self._remove_mark()
        return bool(damage)

    def _refusal(self) -> str:
        """The pages are whole: what is wrong with the values without which nothing goes, "" if nothing."""
        try:
            Index.open(self._path).close()
        except IndexDamagedError as error:
            return str(error)
        return ""

    def _put_aside(self, damage: str) -> None:
        aside = f"{self._path}.damaged-{time.time_ns()}"
        log.error("%s: put aside as %s; a new index is made from the tree", damage, aside)
        os.rename(self._path, aside)
        os.mkdir(self._path, 0o700)
        volume.sync_directory(self._home.state)
        prefix = os.path.basename(self._path) + ".damaged-"
        older = sorted(name for name in os.listdir(self._home.state) if name.startswith(prefix))
        for name in older[:-_KEPT_ASIDE]:
            shutil.rmtree(os.path.join(self._home.state, name), ignore_errors=True)

    def _look_at_heat(self) -> None:
        """Heat is never synced: what a power cut has left of it may be no tree of pages at all."""
        damage = _damage(self._home.path("heat"))
        if damage:
            self._lose_heat(damage)

    def _lose_heat(self, reason: str) -> None:
        log.warning("%s: heat is lost and begins anew", reason)
        path = self._home.path("heat")
        shutil.rmtree(path, ignore_errors=True)  # killed here before, none is there
        os.makedirs(path, 0o700, exist_ok=True)

    def _remove_mark(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._mark)


def _sync_all(directory: str) -> None:
    for name in os.listdir(directory):
        fd = os.open(os.path.join(directory, name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    volume.sync_directory(directory)


def _damage(path: str) -> str:
    """What is wrong with the environment in a directory, "" if nothing; none at all is not wrong."""
    file = os.path.join(path, "data.mdb")
    try:
        if os.path.getsize(file):
            pages.verify(file)
    except FileNotFoundError:
        return ""
    except IndexDamagedError as error:
        return str(error)
    return ""
