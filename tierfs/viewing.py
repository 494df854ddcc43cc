"""A read-only view of a volume as of a moment: a tree of stubs in a state directory that ends with its mount.

The store is only read. The view takes no claim and has a volume id of its own, so that it can be mounted beside
the volume itself. Content comes when it is read, as long as the store keeps it (`keep_versions`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import time
from dataclasses import dataclass

from tierfs import ownership, volume
from tierfs.errors import ObjectMissingError, VolumeError
from tierfs.model import EPOCH_SHIFT
from tierfs.namespace import Chronicle
from tierfs.planting import Outcome
from tierfs.restoring import Progress, plant
from tierfs.store.base import Capabilities, ObjectStore

_PREFIX = "view~"  # no escaped path has this character
_BETWEEN_SECONDS = 600.0
_ANY_EPOCH = (1 << 48 - EPOCH_SHIFT) - 1


@dataclass(frozen=True, slots=True)
class View:
    """What was made: its state directory, as of when (ns) it is, and what could not be shown as it was."""

    state: str
    at: int
    outcome: Outcome
    troubles: list[str]


def new_state(beside: str) -> str:
    """A state directory for one view, in the directory in which others lie; those that a crash left go.

    Raises VolumeError, OSError.
    """
    above = os.path.dirname(beside)
    state = os.path.join(above, f"{_PREFIX}{secrets.token_hex(8)}")
    volume.make_state(state)
    for name in os.listdir(above):
        path = os.path.join(above, name)
        if name.startswith(_PREFIX) and path != state and _is_left(path):
            remove(path)
    return state


def _is_left(state: str) -> bool:
    """Nobody holds its lock, and not because it is just between being made and being mounted."""
    try:
        fd = os.open(os.path.join(state, "lock"), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if time.time() - os.fstat(fd).st_mtime < _BETWEEN_SECONDS:
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def remove(state: str) -> None:
    """It has ended."""
    with contextlib.suppress(OSError):
        shutil.rmtree(state)


def make(
    state: str,
    url: str,
    store: ObjectStore,
    capabilities: Capabilities,
    until: int,
    only: bytes = b"",
    progress: Progress = lambda what, done, of: None,
) -> View:
    """Read the journal and make the tree of that moment (ns), or what is in the directory `only` of it.

    Raises StoreError, VolumeError, PathError, OSError.
    """
    progress("reading the journal", 0, 0)
    chronicle = Chronicle(store, _volume_in(store))
    names = chronicle.read(until)
    if only:
        names = names.beneath(only)
    home = volume.create(state, store=url, local_limit="none")
    outcome = plant(home, names, _ANY_EPOCH, True, progress)
    os.rename(home.path("tree.new"), home.path("tree"))
    volume.complete(home, capabilities, view=True)
    return View(state, chronicle.at, outcome, chronicle.troubles)


def _volume_in(store: ObjectStore) -> str:
    key = ownership.STORE_KEY
    try:
        return str(json.loads(bytes(store.get(key)))["volume"])
    except ObjectMissingError as exc:
        raise VolumeError(f"{store.describe()}: holds no volume: correct the URL") from exc
    except (ValueError, TypeError, KeyError) as exc:
        raise VolumeError(f"{store.describe()}: its {key} is not ours: correct the URL") from exc
