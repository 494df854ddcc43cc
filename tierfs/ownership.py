"""Whose store this is: the store's `volume.json`, written when a volume is created and renewed at each mount.

Each mount writes its epoch and a nonce by compare-and-swap, after it has noted both in the state directory
(`claim.json`: `next` before the swap, `last` after it). A store that holds neither of the two was written from
another copy of this state (a cloned or rolled-back machine): two writers would destroy each other's objects, so
the later one is refused. Where the store cannot swap conditionally this is advice, not a lock.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from tierfs.errors import ObjectMissingError, PreconditionError, StoreUnavailableError, VolumeError
from tierfs.store.base import ObjectStore
from tierfs.volume import Identity, Volume, write_json

STORE_KEY = "volume.json"
_NOTE = "claim.json"


def create(volume: Volume, store: ObjectStore) -> None:
    """Claim a store that nobody owns, or that carries our id already.

    Raises VolumeError where it belongs to another volume, StoreError.
    """
    try:
        store.put_if(STORE_KEY, _claim(volume.identity, 0, ""), None)
    except PreconditionError:
        check(volume, store)
    if not store.capabilities.conditional_put:
        check(volume, store)


def check(volume: Volume, store: ObjectStore) -> dict[str, Any]:
    """Make sure that the store is this volume's; returns what it says. Raises StoreError, and in particular

    VolumeError where it is another's; StoreUnavailableError where it has no `volume.json`: something else
    is mounted there, or the bucket is a wrong one.
    """
    try:
        raw = store.get(STORE_KEY)
    except ObjectMissingError as exc:
        raise StoreUnavailableError(
            f"{store.describe()}: holds no {STORE_KEY}: it is not this volume's store, or is not mounted"
        ) from exc
    try:
        claim = json.loads(raw)
        ident, created = str(claim["volume"]), float(claim["created"])
    except (ValueError, TypeError, KeyError) as exc:
        raise VolumeError(f"{store.describe()}: its {STORE_KEY} is not ours: use another prefix") from exc
    if ident != volume.identity.volume:
        raise VolumeError(
            f"{store.describe()}: the store belongs to volume {ident[:8]} of host {claim.get('host')!r}"
            f" since {_day(created)}: use another prefix"
        )
    return dict(claim)


def renew(volume: Volume, store: ObjectStore, epoch: int) -> None:
    """Take the store for this mount, before anything is written to it.

    Raises as `check`, and VolumeError where another copy of this volume has taken it since.
    """
    etag = _etag(store)
    found = check(volume, store)
    note = _read_note(volume)
    nonce = str(found.get("nonce", ""))
    if nonce and nonce not in (note.get("last"), note.get("next")):
        raise _taken(store, found)
    fresh = os.urandom(8).hex()
    path = volume.path(_NOTE)
    write_json(path, {"last": nonce, "next": fresh})
    try:
        store.put_if(STORE_KEY, _claim(volume.identity, epoch, fresh), etag)
    except PreconditionError as exc:
        raise VolumeError(
            f"{store.describe()}: another machine is taking this volume over: nothing is written to it"
        ) from exc
    write_json(path, {"last": fresh, "next": ""})


def verify(volume: Volume, store: ObjectStore) -> None:
    """Make sure that the store is still ours. Raises as `check`, and VolumeError where it was taken over."""
    found = check(volume, store)
    if found.get("nonce", "") != _read_note(volume).get("last"):
        raise _taken(store, found)


def _taken(store: ObjectStore, found: dict[str, Any]) -> VolumeError:
    return VolumeError(
        f"{store.describe()}: was taken over by host {found.get('host')!r} on"
        f" {_day(float(found.get('taken', 0)))}: only one machine may use a volume"
    )


def _etag(store: ObjectStore) -> str | None:
    try:
        return store.head(STORE_KEY).etag
    except ObjectMissingError:
        return None  # `check` says what that means


def _read_note(volume: Volume) -> dict[str, Any]:
    try:
        with open(volume.path(_NOTE), "rb") as file:
            return dict(json.load(file))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as exc:
        raise VolumeError(f"{volume.path(_NOTE)}: is damaged: put it back from a backup") from exc


def _claim(identity: Identity, epoch: int, nonce: str) -> bytes:
    claim = {
        "format": identity.format,
        "volume": identity.volume,
        "host": os.uname().nodename,
        "created": identity.created,
        "epoch": epoch,
        "nonce": nonce,
        "taken": time.time(),
    }
    return json.dumps(claim, indent=1).encode()


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))
