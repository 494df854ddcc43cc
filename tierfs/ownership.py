"""Whose store this is: the store's `volume.json`, written when a volume is created and renewed at each mount.

Each mount writes its epoch and a nonce by compare-and-swap, after it has noted both in the state directory
(`claim.json`: `next` before the swap, `last` after it, with `before`, what it has replaced). A store that
holds neither of the two was written from another copy of this state (a cloned or rolled-back machine): two
writers would destroy each other's objects, so the later one is refused; one that shows `before` answers late.
Where the store cannot swap conditionally this is advice, not a lock.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from dataclasses import dataclass
from typing import Any

from tierfs.errors import (
    ObjectMissingError,
    PreconditionError,
    StoreStaleError,
    StoreUnavailableError,
    VolumeError,
)
from tierfs.store.base import ObjectStore
from tierfs.syscalls import boot_id
from tierfs.volume import Identity, Volume, write_json

STORE_KEY = "volume.json"
ALIVE_KEY = "alive.json"  # renewed every ALIVE_SECONDS by who has the store mounted
ALIVE_SECONDS = 300.0
_NOTE = "claim.json"
_HEARD_SECONDS = 3600.0
_SET_BACK_SECONDS = 86400.0


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
    is mounted there, or the bucket is a wrong one; and where what it has once made sense.
    """
    try:
        raw = bytes(store.get(STORE_KEY))
    except ObjectMissingError as exc:
        raise StoreUnavailableError(
            f"{store.describe()}: holds no {STORE_KEY}: it is not this volume's store, or is not mounted"
        ) from exc
    try:
        claim = json.loads(raw)
        ident, created = str(claim["volume"]), float(claim["created"])
    except (ValueError, TypeError, KeyError) as exc:
        if volume.identity.complete:
            # It was ours: a login page or a cut body says nothing of an owner, and passes.
            raise StoreUnavailableError(f"{store.describe()}: its {STORE_KEY} makes no sense") from exc
        raise VolumeError(f"{store.describe()}: its {STORE_KEY} is not ours: use another prefix") from exc
    if ident != volume.identity.volume:
        raise VolumeError(
            f"{store.describe()}: the store belongs to volume {ident[:8]} of host {claim.get('host')!r}"
            f" since {_day(created)}: use another prefix, or `tierfs restore` to have that volume here"
        )
    return dict(claim)


def renew(volume: Volume, store: ObjectStore, epoch: int) -> None:
    """Take the store for this mount, before anything is written to it.

    Raises as `check`, and VolumeError where another copy of this volume has taken it since.
    """
    etag = _etag(store)
    found = look(volume, store)
    _take(volume, store, epoch, etag, found)


def look(volume: Volume, store: ObjectStore) -> dict[str, Any]:
    """What the store says, if this state directory may take it. Raises as `renew`; nothing is written."""
    found = check(volume, store)
    if not _is_ours(volume.state, found):
        if found.get("nonce") == _read_note(volume.state).get("before"):
            # Nobody writes a nonce twice: this is what we have written over ourselves.
            raise StoreStaleError(
                f"{store.describe()}: its {STORE_KEY} is as it was before this mount: if it was put back"
                " to an earlier state, mount with `tierfs mount --force` and run `tierfs check --repair`"
            )
        raise _taken(store, found)
    return found


def take_over(volume: Volume, store: ObjectStore, epoch: int) -> None:
    """Take the store from whoever had it. Raises as `renew`, where somebody else does so at this moment."""
    etag = _etag(store)
    _take(volume, store, epoch, etag, check(volume, store))


def _is_ours(state: str, found: dict[str, Any]) -> bool:
    note = _read_note(state)
    nonce = str(found.get("nonce", ""))
    return not nonce or nonce in (note.get("last"), note.get("next"))


def _take(volume: Volume, store: ObjectStore, epoch: int, etag: str | None, found: dict[str, Any]) -> None:
    nonce = str(found.get("nonce", ""))
    fresh = os.urandom(8).hex()
    path = volume.path(_NOTE)
    write_json(path, {"last": nonce, "next": fresh}, in_place=True)
    claim = _claim(volume.identity, epoch, fresh)
    try:
        store.put_if(STORE_KEY, claim, etag)
    except PreconditionError:
        _take_again(volume, store, claim, nonce)
    if not store.capabilities.conditional_put and check(volume, store).get("nonce") != fresh:
        raise _being_taken(store)
    write_json(path, {"last": fresh, "next": "", "before": nonce}, in_place=True)


def _take_again(volume: Volume, store: ObjectStore, claim: bytes, nonce: str) -> None:
    """After a refusal: has somebody taken the store, or are two requests in each other's way (409)?

    Raises VolumeError, or StoreUnavailableError where trying once more is in vain, too.
    """
    etag = _etag(store)
    if str(check(volume, store).get("nonce", "")) != nonce:
        raise _being_taken(store)
    try:
        store.put_if(STORE_KEY, claim, etag)
    except PreconditionError as exc:
        if str(check(volume, store).get("nonce", "")) != nonce:
            raise _being_taken(store) from exc
        raise StoreUnavailableError(
            f"{store.describe()}: refuses to have its {STORE_KEY} replaced, although nobody else has done so"
        ) from exc


def _being_taken(store: ObjectStore) -> VolumeError:
    return VolumeError(
        f"{store.describe()}: another machine is taking this volume over: nothing is written to it"
    )


def verify(volume: Volume, store: ObjectStore) -> None:
    """Make sure that the store is still ours; not while it is being taken (the store and our note of it are two
    reads). Raises as `check`, and VolumeError where it was taken over."""
    look(volume, store)


def note_heard(volume: Volume) -> None:
    """Remember that the store has said just now that it is ours, for `silence`. Raises OSError."""
    path = volume.path(_NOTE)
    with contextlib.suppress(FileNotFoundError):  # never claimed
        # Also where it lies ahead: a date from before the clock was set back would stand for as long.
        if abs(time.time() - os.stat(path).st_mtime) > _HEARD_SECONDS:
            os.utime(path)


def silence(volume: Volume) -> float:
    """For how many seconds the store has said nothing, about, by this machine's clock: also before a reboot.
    For ever, where the clock has been set back since by more than a day: nobody knows."""
    try:
        silent = time.time() - os.stat(volume.path(_NOTE)).st_mtime
    except FileNotFoundError:
        return 0.0  # never claimed: there is no copy yet
    return max(0.0, silent) if silent > -_SET_BACK_SECONDS else math.inf


@dataclass(frozen=True, slots=True)
class Owner:
    """Who has a store. `ago`: seconds since a sign of life, by the store's clock; `mounted`: as far as is
    known; `ours`: the state directory that was asked about took it last."""

    volume: str
    host: str
    created: float
    epoch: int
    mounted: bool
    ago: float
    ours: bool = False


def show_life(store: ObjectStore, epoch: int, mounted: bool, process: str = "") -> None:
    """Tell who else might want the store that it is in use, or no more. Raises StoreError.

    `process`: who works on it (`this_process`), for `refuse_second`.
    """
    said = {"host": os.uname().nodename, "epoch": epoch, "mounted": mounted, "at": time.time()}
    raw = json.dumps(said | {"process": process}).encode()
    store.put(ALIVE_KEY, raw, len(raw))


def this_process() -> str:
    """What tells this process from all others of all machines: boot, number, and when it was started."""
    return f"{boot_id()} {os.getpid()} {_started(os.getpid())}"


def refuse_second(volume: Volume, store: ObjectStore) -> None:
    """Raises VolumeError where a process of this very machine has the store mounted from elsewhere.

    A copy of a state directory that is in use has the same claim on the store as the original: the later mount
    would take it. Between machines a clone is told from one that was started anew by its claim alone.
    """
    try:
        life = json.loads(bytes(store.get(ALIVE_KEY)))
        boot, pid, started = str(life["process"]).split(" ")
        if not life["mounted"] or boot != boot_id() or started != _started(int(pid)):
            return
        with open(f"/proc/{int(pid)}/cmdline", "rb") as file:
            arguments = file.read().split(b"\0")
    except (ObjectMissingError, ValueError, TypeError, KeyError, OSError):
        return  # nothing there, of an older version, or that process has ended
    if os.fsencode(volume.state) not in arguments:
        raise VolumeError(
            f"{store.describe()}: is mounted on this machine by process {pid}, with another state directory:"
            " unmount it there, or go on with this copy by `tierfs mount --force`"
        )


def _started(pid: int) -> str:
    """When, in clock ticks since the machine was started (proc_pid_stat(5), field 22). Raises OSError."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b") ")[2].split()[19].decode()


def owner(store: ObjectStore, state: str) -> Owner:
    """Who has this store; `state` is a directory that may have been its. Raises StoreError, and VolumeError
    where there is no volume in it."""
    try:
        claim = json.loads(bytes(store.get(STORE_KEY)))
        ident, host, epoch = str(claim["volume"]), str(claim.get("host")), int(claim.get("epoch", 0))
        created = float(claim["created"])
        if len(bytes.fromhex(ident)) != 16 or not 0 <= epoch < 1 << 20:
            raise ValueError
    except ObjectMissingError as exc:
        raise VolumeError(f"{store.describe()}: holds no volume: correct the URL") from exc
    except (ValueError, TypeError, KeyError) as exc:
        raise VolumeError(f"{store.describe()}: its {STORE_KEY} is not ours: correct the URL") from exc
    seen, mounted = store.head(STORE_KEY).modified, True
    try:
        life = json.loads(bytes(store.get(ALIVE_KEY)))
        if int(life["epoch"]) == epoch:
            mounted, seen = bool(life["mounted"]), max(seen, store.head(ALIVE_KEY).modified)
    except (ObjectMissingError, ValueError, TypeError, KeyError):
        pass  # of a volume that was never mounted for long
    ours = bool(claim.get("nonce")) and _is_ours(state, claim)
    return Owner(ident, host, created, epoch, mounted, max(0.0, _now(store) - seen), ours)


def _now(store: ObjectStore) -> float:
    """The store's own clock."""
    key = f"probe/{os.urandom(8).hex()}"
    store.put(key, b"now", 3)
    try:
        return store.head(key).modified
    finally:
        store.delete([key])


def _taken(store: ObjectStore, found: dict[str, Any]) -> VolumeError:
    return VolumeError(
        f"{store.describe()}: is used by host {found.get('host')!r} since"
        f" {_minute(float(found.get('taken', 0)))}: only one machine may use a volume: unmount it there, or if"
        " that machine is gone, bring the volume back with `tierfs restore`, or go on with what is here by"
        " `tierfs mount --force`"
    )


def _etag(store: ObjectStore) -> str | None:
    try:
        return store.head(STORE_KEY).etag
    except ObjectMissingError:
        return None  # `check` says what that means


def _read_note(state: str) -> dict[str, Any]:
    path = os.path.join(state, _NOTE)
    try:
        with open(path, "rb") as file:
            return dict(json.load(file))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as exc:
        raise VolumeError(f"{path}: is damaged: put it back from a backup") from exc


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


def _minute(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))
