"""What is pinned comes back: files beneath a pin that are not all here are fetched, in the background."""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Iterator

from tierfs.errors import TierError
from tierfs.places import Directory
from tierfs.spelling import quoted
from tierfs.tier import Item, Tier
from tierfs.walking import Name, walk

log = logging.getLogger("scheduler")


class Pinned:
    """Used by the scheduler's thread. `stopping` ends what is being fetched."""

    def __init__(self, tier: Tier, stopping: threading.Event) -> None:
        self._tier = tier
        self._stopping = stopping

    def turn(self) -> None:
        """Begin, if something was pinned through the mount. RuntimeError: too many threads."""
        pinned = self._tier.drainer.pinned
        if pinned.is_set():
            pinned.clear()
            try:
                threading.Thread(target=self.fetch, name="pinned", daemon=True).start()
            except RuntimeError:
                pinned.set()  # for the next round
                raise

    def fetch(self) -> None:
        """Bring back what is beneath all pins."""
        try:
            for path in self._tier.pins():
                self._fetch_beneath(path)
        except TierError as error:
            self._tier.kit.troubles.note(f"what is pinned cannot be fetched: {error}")
        except Exception as error:
            log.exception("what is pinned cannot be fetched")
            problem = f"internal error ({type(error).__name__})"
            self._tier.kit.troubles.note(f"what is pinned cannot be fetched: {problem}")

    def _fetch_beneath(self, path: bytes) -> None:
        troubles = self._tier.kit.troubles
        try:
            for item in self._tier.fetched(_stubs_beneath(self._tier, path), self._stopping):
                if item.failed:
                    troubles.note(f"{quoted(item.path)} is pinned and cannot be fetched: {item.reason}")
        except (TierError, OSError) as error:
            troubles.note(f"{quoted(path)} is pinned and cannot be fetched: {error}")


def _stubs_beneath(tier: Tier, path: bytes) -> Iterator[Item]:
    """Every stub at or below a path of the tree."""
    tree = tier.kit.tree
    try:
        fd = os.open(path or b".", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=tree.rootfd)
    except FileNotFoundError:
        return
    try:
        st, handle = os.fstat(fd), tree.handle_of(fd)
        if not stat.S_ISDIR(st.st_mode):
            parent = os.stat(os.path.dirname(path) or b".", dir_fd=tree.rootfd).st_ino
            yield from _stub(tier, Name(path, parent, os.path.basename(path), fd, st))
            return
    finally:
        os.close(fd)

    def refused(path: bytes, error: OSError) -> None:
        log.warning("%s is pinned and cannot be looked at: %s", quoted(path), error.strerror)

    for found in walk(tree, tier.places, Directory(st.st_ino, handle, path), refused):
        yield from _stub(tier, found)


def _stub(tier: Tier, found: Name) -> Iterator[Item]:
    if stat.S_ISREG(found.st.st_mode) and tier.kit.tree.read_stub(found.opath) is not None:
        handle = tier.kit.tree.handle_of(found.opath)
        yield Item(
            found.st.st_ino, handle, found.path, found.parent, found.name, found.st.st_size, ordered=True
        )
