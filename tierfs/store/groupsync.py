"""One fsync of a directory for all who need it: what many threads ask for at once is done once."""

from __future__ import annotations

import errno
import os
import threading


class _Round:
    """One fsync to come, or under way, and its outcome."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: OSError | None = None


class GroupSync:
    """Syncs directories by name; a call returns when an fsync that began after it has succeeded."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[tuple[int, str], _Round] = {}
        self._next: dict[tuple[int, str], _Round] = {}

    def sync(self, root: int, directory: str) -> None:
        """fsync `directory` (relative to the descriptor `root`). Raises OSError as fsync does."""
        name = (root, directory)
        with self._lock:
            running = self._running.get(name)
            mine = self._next.get(name)
            leads = mine is None
            if mine is None:
                mine = self._next[name] = _Round()
        if leads:
            if running:
                running.done.wait()
            self._run(name, mine)
        mine.done.wait()
        if mine.error:
            raise OSError(mine.error.errno, mine.error.strerror, directory)

    def _run(self, name: tuple[int, str], this: _Round) -> None:
        with self._lock:
            del self._next[name]
            self._running[name] = this
        try:
            _fsync_directory(*name)
        except BaseException as exc:
            this.error = exc if isinstance(exc, OSError) else OSError(errno.EINTR, "interrupted")
            if not isinstance(exc, OSError):
                raise
        finally:
            with self._lock:
                del self._running[name]
            this.done.set()


def _fsync_directory(root: int, directory: str) -> None:
    fd = os.open(directory or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
