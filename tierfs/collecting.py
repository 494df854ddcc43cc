"""Removing objects that nothing refers to any more, after the grace time (custody rule 17).

An object is only ever removed by its own tombstone, never for being in a listing. Before that the backing
filesystem is synced, so that an unlink which a power cut could undo has become final, and the file that the
object belonged to is looked for by its handle once more.
"""

from __future__ import annotations

import logging
import os
import time

from tierfs.digests import SIDE_SUFFIX
from tierfs.errors import TierError
from tierfs.index import Writer
from tierfs.kit import Kit
from tierfs.model import Record, object_key

log = logging.getLogger("mover")

_BATCH = 500


class Collector:
    """Carries out what the tombstones say."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit

    def run(self) -> int:
        """Remove what may go now; how many objects went. Raises StoreError, IndexError_, OSError."""
        kit = self._kit
        if kit.withheld or not kit.index.surveyed:
            return 0
        due = kit.index.tombstones(time.time_ns() - int(kit.config.grace * 1e9), _BATCH)
        if not due:
            return 0
        kit.tree.sync()
        gone: list[tuple[int, str]] = []
        kept: list[tuple[int, str]] = []
        for when, key in due:
            verdict = self._judge(when, key)
            if verdict is not None:
                (gone if verdict else kept).append((when, key))
        if gone:
            kit.store.delete([key for _, key in gone] + [key + SIDE_SUFFIX for _, key in gone])
        if gone or kept:
            kit.index.commit(lambda w: self._drop(w, gone, kept)).result()
        return len(gone)

    def _judge(self, when: int, key: str) -> bool | None:
        """True: nothing refers to this object. False: something does. None: its file is still open."""
        fid, _, _ = _parts(key)
        record = self._kit.index.get_by_fid(fid)
        if record is not None and _key_of(record) == key:
            return False
        handle = self._kit.index.tombstone_handle(when, key)
        if not handle or not self._kit.tree.privileged:
            return True
        try:
            fd = self._kit.tree.open_handle(handle, os.O_PATH)
        except OSError:
            return True  # the inode is gone
        try:
            stub = self._kit.tree.read_stub(fd)
            if stub is None or stub.key != key:
                return True
            # Unlinked and open: its reader may still need the object. Linked: it is back after a power cut.
            return None if os.fstat(fd).st_nlink == 0 else False
        except TierError:
            return None
        finally:
            os.close(fd)

    def _drop(self, w: Writer, gone: list[tuple[int, str]], kept: list[tuple[int, str]]) -> None:
        for when, key in gone:
            fid, generation, _ = _parts(key)
            record = self._kit.index.get_by_fid(fid)
            if record is None or record.copy is None or record.copy.generation != generation:
                w.drop_leaves(fid, generation)
            w.drop_tombstone(when, key)
        for when, key in kept:
            w.drop_tombstone(when, key)


def _parts(key: str) -> tuple[bytes, int, str]:
    """File id, generation and tag of a key."""
    _, _, name, version = key.split("/")
    generation, _, tag = version.partition("-")
    return bytes.fromhex(name), int(generation, 16), tag


def _key_of(record: Record) -> str:
    return object_key(record.fid, record.copy.generation, record.copy.tag) if record.copy is not None else ""
