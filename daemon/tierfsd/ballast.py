"""Blocks kept back on the local disk, to be let go of when a fetch or the index finds no room at all."""

from __future__ import annotations

import contextlib
import logging
import os

from tierfs.tree import Tree

log = logging.getLogger("scheduler")

_SHARE = 0.02  # of the filesystem ...
_MOST = 1 << 30  # ... and no more bytes than this
_AMPLE = 2  # made only where this many times its size is free besides


class Ballast:
    """A file of real blocks beside the tree, on its filesystem."""

    def __init__(self, path: str, tree: Tree) -> None:
        self._path = path
        self._tree = tree
        self._there = os.path.exists(path)

    def release(self) -> bool:
        """Let go of it; it comes back when there is room. Whether it was there."""
        was, self._there = self._there, False
        if was:
            log.warning("the local disk is full: its reserve is let go of")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        return was

    def restore(self, min_free: float) -> None:
        """Make it where there is ample room beyond the share of the filesystem that is kept free anyway."""
        if self._there:
            return
        space = self._tree.space()
        size = min(int(space.total * _SHARE), _MOST)
        if size <= 0 or space.available < min_free * space.total + _AMPLE * size:
            return
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, size)
            finally:
                os.close(fd)
        except OSError as error:
            log.debug("no reserve is kept: %s", error)
            self.release()
            return
        self._there = True
