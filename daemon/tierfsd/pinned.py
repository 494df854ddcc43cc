"""What is pinned comes back: files beneath a pin that are not all here are fetched, in the background."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator

from tierfs.errors import TierError
from tierfs.spelling import quoted
from tierfs.tier import Item, Tier

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
    root = os.fsencode(tier.kit.tree.path)
    top = os.path.join(root, path)
    if not os.path.isdir(top):
        yield from _stub_at(tier, top, path)
        return
    for directory, below, names in os.walk(top, followlinks=False):
        if os.stat(directory).st_dev != tier.kit.tree.device:
            below.clear()  # a subvolume: what is in it is not the volume's
            continue
        for name in names:
            full = os.path.join(directory, name)
            yield from _stub_at(tier, full, os.path.relpath(full, root))


def _stub_at(tier: Tier, full: bytes, path: bytes) -> Iterator[Item]:
    try:
        opath = os.open(full, os.O_PATH | os.O_NOFOLLOW)
    except OSError:
        return  # gone since
    try:
        if tier.kit.tree.read_stub(opath) is None:
            return
        st = os.fstat(opath)
        parent = os.stat(os.path.dirname(full)).st_ino
        handle, name = tier.kit.tree.handle_of(opath), os.path.basename(full)
        yield Item(st.st_ino, handle, path, parent, name, st.st_size, ordered=True)
    finally:
        os.close(opath)
