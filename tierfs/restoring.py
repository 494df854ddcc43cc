"""A lost machine's volume, from its store into an empty state directory.

    restoring.json written  →  the store is taken (a new epoch: the former owner writes nothing more)
    →  `tree.new`: all directories, stubs and links  →  index  →  syncfs
    →  `restored.json`, what did not come back  →  `tree.new` becomes `tree`
    →  volume.json complete  →  restoring.json goes

Killed anywhere before it is complete, the next attempt removes what there is and starts again; until then no
mount accepts the state directory. `restoring.json` is written before anything else and removed last: by it a
restore may remove a tree that it has made itself, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from typing import Any

from tierfs import failpoints, ownership, volume
from tierfs.errors import VolumeError
from tierfs.index import Index
from tierfs.marks import Mark, MarkWriter
from tierfs.model import Record
from tierfs.namespace import Chronicle
from tierfs.namespace import Tree as Namespace
from tierfs.planting import Left, Outcome, Place, Planted, Planter, run_on
from tierfs.store.base import Capabilities, ObjectStore
from tierfs.tree import open_tree

REPORT = "restored.json"
_IN_USE_SECONDS = 3 * ownership.ALIVE_SECONDS
_BATCH = 20_000  # records in one commit
_MADE = ("tree", "tree.new", "tree.lent", "index", "heat", "marks")

Progress = Callable[[str, int, int], None]


def check_state(state: str) -> None:
    """Refuse a state directory that holds anything but a restore that was cut short. Raises VolumeError."""
    if os.path.isdir(state) and read_intent(state) is None and set(os.listdir(state)) - {"lock"}:
        what = "already holds a volume: mount that" if volume.exists(state) else "is not empty"
        raise VolumeError(f"{state}: {what}, or choose another --state")


def check_owner(store: ObjectStore, state: str, force: bool) -> ownership.Owner:
    """Who has the store. Raises VolumeError where it seems to be in use and not `force`, or has no journal;
    StoreError."""
    owner = ownership.owner(store, state)
    if Chronicle(store, owner.volume).empty:
        raise VolumeError(
            f"{store.describe()}: has no journal of names (`meta/`), so there is nothing to restore:"
            " its content is in `data/`"
        )
    if owner.mounted and not owner.ours and not force and owner.ago < _IN_USE_SECONDS:
        raise VolumeError(
            f"{store.describe()}: volume {owner.volume[:8]} is in use by host {owner.host!r}, last seen"
            f" {owner.ago:.0f} s ago: unmount it there, or if that machine is lost, say --force"
        )
    return owner


def begin(state: str, store: str, owner: ownership.Owner) -> volume.Volume:
    """An incomplete volume in an empty state directory, or in one where a restore was cut short.

    The caller holds its lock. Raises VolumeError, OSError.
    """
    intent = read_intent(state)
    if intent is not None:
        if intent.get("store") != store or intent.get("volume") != owner.volume:
            raise VolumeError(
                f"{state}: another restore was begun in it, from {intent.get('store')}: finish that one, or"
                " choose another --state"
            )
        _clear(state)
    check_state(state)
    volume.write_json(os.path.join(state, volume.RESTORING), {"store": store, "volume": owner.volume})
    volume.sync_directory(os.path.dirname(state))
    return volume.create(state, owner.volume, owner.created, store=store)


def read_intent(state: str) -> dict[str, Any] | None:
    """The restore that was begun in a state directory and has not been completed. Raises VolumeError."""
    path = os.path.join(state, volume.RESTORING)
    try:
        with open(path, "rb") as file:
            intent = json.load(file)
        return dict(intent)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as exc:
        raise VolumeError(f"{path}: cannot be read: remove {state} and restore again") from exc


def _clear(state: str) -> None:
    """Remove what an earlier attempt has made; the claim on the store stays."""
    if volume.exists(state) and volume.load(state).identity.complete:
        raise VolumeError(f"{state}: is restored already: mount it")
    for name in _MADE:
        path = os.path.join(state, name)
        if os.path.lexists(path):
            shutil.rmtree(path)
    for name in ("volume.json", "config.toml", REPORT):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(state, name))


def is_done(state: str) -> bool:
    """The restore is complete but for the removal of its intent, which this does. Raises VolumeError."""
    if read_intent(state) is None or not volume.exists(state) or not volume.load(state).identity.complete:
        return False
    os.unlink(os.path.join(state, volume.RESTORING))
    return True


def restore(
    home: volume.Volume,
    store: ObjectStore,
    owner: ownership.Owner,
    capabilities: Capabilities,
    *,
    special: bool = True,
    progress: Progress = lambda what, done, of: None,
) -> dict[str, Any]:
    """Carry it out. Returns the report, as it is kept in `restored.json`.

    Raises StoreError, VolumeError, OSError.
    """
    epoch = owner.epoch + 1
    failpoints.hit(failpoints.RESTORE_BEGUN)
    volume.keep_epoch(home.state, epoch)
    ownership.take_over(home, store, epoch)
    ownership.show_life(store, epoch, True)
    failpoints.hit(failpoints.RESTORE_TAKEN)
    progress("reading the journal", 0, 0)
    chronicle = Chronicle(store, owner.volume)
    names = chronicle.read()
    epoch = run_on(names, epoch)
    volume.keep_epoch(home.state, epoch)
    outcome = plant(home, names, epoch, special, progress)
    report = _report(chronicle, owner, outcome)
    volume.write_json(home.path(REPORT), report)
    failpoints.hit(failpoints.RESTORE_PLANTED)
    os.rename(home.path("tree.new"), home.path("tree"))
    volume.sync_directory(home.state)
    failpoints.hit(failpoints.RESTORE_NAMED)
    volume.complete(home, capabilities)
    failpoints.hit(failpoints.RESTORE_COMPLETE)
    is_done(home.state)
    return report


def plant(home: volume.Volume, names: Namespace, epoch: int, special: bool, progress: Progress) -> Outcome:
    """Make `tree.new` and the index. Raises VolumeError, IndexError_, OSError."""
    os.mkdir(home.path("tree.new"), 0o700)
    index = Index.open(home.path("index"))
    with contextlib.closing(index), contextlib.closing(open_tree(home.path("tree.new"))) as tree:
        planter = Planter(tree, names, epoch, special)
        keeper = _Keeper(index, home)
        places = planter.directories()
        keeper.places(places)
        total, done = len(names.inodes), 0
        for place in places:
            planter.fill(place, keeper.keep)
            done = planter.outcome.files + planter.outcome.others + planter.outcome.directories
            progress("making files", done, total)
        planter.link(places, keeper.keep)
        planter.finish(places)
        keeper.close()
        progress("syncing", total, total)
        tree.sync()
    return planter.outcome


class _Keeper:
    """Writes records in batches, and marks for pins."""

    def __init__(self, index: Index, home: volume.Volume) -> None:
        self._index = index
        self._home = home
        self._batch: list[Planted] = []
        self._pins: list[tuple[int, int, bytes, bytes]] = []

    def places(self, places: list[Place]) -> None:
        """Where directories are."""
        for start in range(0, len(places), _BATCH):
            with self._index.write() as w:
                for place in places[start : start + _BATCH]:
                    if place.parent:
                        w.put_dir(place.ino, place.parent, place.name)
        self._pins += [(p.ino, p.parent, p.name, b"") for p in places if p.line.pinned]

    def keep(self, planted: Planted) -> None:
        """One file."""
        self._batch.append(planted)
        if len(self._batch) >= _BATCH:
            self._write()

    def _write(self) -> None:
        """Of two files that say to be one and the same the first is known, the other is a copied stub."""
        batch, self._batch = self._batch, []
        with self._index.write() as w:
            for planted in batch:
                record: Record = planted.record
                if w.has_file(record.fid):
                    continue
                w.put(record)
                if planted.pinned:
                    self._pins.append((record.ino, record.parent, record.name, record.handle))
                if planted.extents is not None:
                    w.put_leaves(record.fid, record.generation, b"", planted.extents)

    def close(self) -> None:
        """Write the rest: the index is complete."""
        self._write()
        with self._index.write() as w:
            w.set_surveyed(True)
        if self._pins:
            fd = os.open(self._home.path("marks"), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                marks = MarkWriter(fd)
                for ino, parent, name, handle in self._pins:
                    marks.append(Mark.PIN, ino, parent=parent, a=1, handle=handle, name=name)
                marks.close()
            finally:
                os.close(fd)


def _report(chronicle: Chronicle, owner: ownership.Owner, outcome: Outcome) -> dict[str, Any]:
    """Times in seconds since the epoch, sizes in bytes; paths as in a shell that escapes nothing."""
    return {
        "volume": owner.volume,
        "host": owner.host,
        "as_of": chronicle.at / 1e9,
        "restored": time.time(),
        "files": outcome.files,
        "directories": outcome.directories,
        "others": outcome.others,
        "bytes": outcome.content,
        "lost": [_left(left) for left in outcome.lost],
        "older": [{**_left(left), "restored_mtime": left.copied / 1e9} for left in outcome.older],
        "rescued": [{**_left(left), "taken": left.copied / 1e9} for left in outcome.rescued],
        "refused": [{"path": os.fsdecode(path), "reason": reason} for path, reason in outcome.refused],
        "journal": {"missing_segments": chronicle.missing, "troubles": chronicle.troubles},
    }


def _left(left: Left) -> dict[str, Any]:
    return {"path": os.fsdecode(left.path), "size": left.size, "since": left.since / 1e9}
