"""A volume's state directory: its layout, its identity, its lock, and facts of the running daemon.

A volume comes into being in this order, so that a crash between any two steps is finished by trying again:
`volume.json` with `complete` false (it holds the random id) → `volume.json` in the store, written only where
there is none or it carries our id → `complete` true. From then on a store without it is a store that is down.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import time
from dataclasses import asdict, dataclass, fields, replace
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from tierfs import config, locate
from tierfs.errors import PathError, VolumeError
from tierfs.spelling import quoted
from tierfs.store.base import Capabilities

FORMAT = 1
RESTORING = "restoring.json"  # in a state directory: a restore was begun and is not complete; see restoring.py
GIVEN = "given"  # the number of the backing tree that is about to be given back; see adoption.py
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:_.")
_NAME_LIMIT = 200
_END_SECONDS = 30.0  # for a daemon whose mount has gone; with files open under a lazy unmount it stays
_LOOK_SECONDS = 0.1
_SECTOR = 512  # bytes that a disk writes all or none of
_OTHERWISE = {
    "trusted": "was mounted with all of root's privileges, in the first user namespace: use it with them again",
    "user": "was mounted without root's privileges: use it without them again",
}


@dataclass(frozen=True, slots=True)
class Identity:
    """The content of the state directory's `volume.json`. `volume` is 32 hex digits, `created` seconds."""

    volume: str
    store: str
    created: float
    host: str
    format: int = FORMAT
    complete: bool = False
    conditional_put: bool = False
    partial_content: bool = False
    checks_sha256: bool = False
    client: str = ""
    bulk_delete: bool = True
    needs_sums: bool = False
    view: bool = False  # read-only, of another volume's store, and removed when it is unmounted
    attributes: str = ""  # the namespace that its stubs' attributes are in; "": not known as yet

    @property
    def capabilities(self) -> Capabilities:
        """What the store's server was seen to do when the volume was created."""
        return Capabilities(
            self.conditional_put,
            self.partial_content,
            self.checks_sha256,
            self.client,
            self.bulk_delete,
            self.needs_sums,
        )


@dataclass(frozen=True, slots=True)
class Volume:
    """An existing state directory and where things lie in it."""

    state: str
    identity: Identity

    def path(self, name: str) -> str:
        """The path of `tree`, `index`, `heat`, `marks`, `log` or `config.toml`."""
        return os.path.join(self.state, name)

    @property
    def store_url(self) -> str:
        """The store's URL; for the embedded store the directory in the state directory."""
        return resolve_store(self.state, self.identity.store)


def resolve_store(state: str, store: str) -> str:
    """The URL behind a `store` setting."""
    if store != config.EMBEDDED_STORE:
        return store
    return "file://" + quote(os.fsencode(os.path.join(state, "store")))


# --- names and places ------------------------------------------------------------------------------------


def escape_path(path: str) -> str:
    """An absolute path as one file name, as `systemd-escape --path` writes it."""
    raw = os.fsencode(path).strip(b"/")
    out = []
    for index, byte in enumerate(b"/".join(part for part in raw.split(b"/") if part)):
        char = chr(byte)
        if char == "/":
            out.append("-")
        elif char in _PLAIN and not (char == "." and index == 0):
            out.append(char)
        else:
            out.append(f"\\x{byte:02x}")
    name = "".join(out) or "-"
    if len(name) > _NAME_LIMIT:
        return f"{name[: _NAME_LIMIT - 17]}-{hashlib.sha256(raw).hexdigest()[:16]}"
    return name


def default_state(mountpoint: str) -> str:
    """Where `tierfs mount` keeps the state of an absolute mountpoint."""
    if os.geteuid() == 0:
        base = "/var/lib"
    else:
        base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(base, "tierfs", escape_path(mountpoint))


def adopted_state(directory: str) -> str:
    """Where `tierfs adopt` keeps it: beside the directory, so that one rename is enough."""
    return os.path.join(os.path.dirname(directory), f".tierfs-{escape_path(directory)}")


def find_state(mountpoint: str, given: str | None) -> str:
    """The state directory to use: the given one, that of an adopted directory, or the default."""
    if given:
        return os.path.realpath(given)
    adopted = adopted_state(mountpoint)
    return adopted if os.path.isdir(adopted) else os.path.realpath(default_state(mountpoint))


def check_unmounted(mountpoint: str) -> None:
    """Refuse an absolute real path at which a volume is mounted. Raises VolumeError."""
    mount = locate.mount_at(mountpoint, locate.read_mounts())
    if mount is not None and mount.fstype == locate.FSTYPE:
        raise VolumeError(f"{mountpoint}: is already mounted: see `tierfs status`, or unmount it first")


def check_mountpoint(mountpoint: str, state: str) -> None:
    """Refuse a mountpoint that cannot be used. Both are absolute real paths. Raises VolumeError."""
    check_unmounted(mountpoint)
    if locate.is_under(state, mountpoint):
        raise VolumeError(f"{state}: the state directory lies inside the mountpoint: choose another --state")
    if locate.is_under(mountpoint, state):
        raise VolumeError(f"{mountpoint}: lies inside the state directory: choose another mountpoint")
    try:
        names = os.listdir(mountpoint)
    except FileNotFoundError as exc:
        raise VolumeError(f"{mountpoint}: does not exist: create it with mkdir") from exc
    except NotADirectoryError as exc:
        raise VolumeError(f"{mountpoint}: is not a directory: choose a directory as the mountpoint") from exc
    except OSError as exc:
        raise VolumeError(f"{mountpoint}: cannot be read: {exc.strerror}") from exc
    if names:
        remedy = "choose an empty directory, or turn this one into a volume with `tierfs adopt`"
        if exists(state):
            remedy = f"its volume is in {state}: move away what is in the way, then mount it again"
        raise VolumeError(f"{mountpoint}: is not empty: {remedy}")


def check_state_place(state: str) -> None:
    """Refuse a place for a new state directory that is itself in a volume: that demotes what is kept here.
    Raises VolumeError."""
    with contextlib.suppress(PathError):
        outer = locate.locate(state).mount.mountpoint
        raise VolumeError(f"{state}: would lie in the TierFS volume at {outer}: choose another --state")


def check_store_place(store: str, mountpoint: str, state: str, *, new: bool) -> None:
    """Refuse a directory store inside of the volume that it is for. Raises VolumeError.

    That of an existing volume is not looked at: a network's disk that hangs must not keep it from mounting.
    """
    if not store.startswith("file:"):
        return
    path = unquote(urlsplit(store).path)
    path = os.path.realpath(path) if new else os.path.normpath(path)
    if locate.is_under(path, mountpoint) or locate.is_under(path, os.path.join(state, "tree")):
        raise VolumeError(f"{path}: the store lies inside of the volume that it is for: choose another place")


# --- state directory -------------------------------------------------------------------------------------


def lock(state: str) -> int:
    """Take the volume's lock; it lasts as long as the returned descriptor. Raises VolumeError.

    umount(8) returns before the daemon has ended: that is waited for.
    """
    try:
        directory = _own_directory(state)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open("lock", flags, 0o600, dir_fd=directory)
        finally:
            os.close(directory)
    except OSError as exc:
        raise VolumeError(f"{state}/lock: cannot be opened: {exc.strerror}") from exc
    deadline = time.monotonic() + _END_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            if _ending(state) and time.monotonic() < deadline:
                time.sleep(_LOOK_SECONDS)
                continue
            os.close(fd)
            raise VolumeError(f"{state}: the volume {_use(state)}") from exc
        return fd


def _ending(state: str) -> int:
    """The daemon that runs while its volume is mounted nowhere any more; 0: there is none."""
    supervisor = read_runtime(state).get("pids", {}).get("supervisor", 0)
    if not supervisor or not os.path.exists(f"/proc/{supervisor}"):
        return 0
    with contextlib.suppress(VolumeError):  # what is wrong with it, whoever has the lock next will say
        ident = load(state).identity.volume
        here = any(mount.volume == ident for mount in locate.read_mounts())
        return 0 if here or locate.holder(ident) else int(supervisor)
    return 0


def _use(state: str) -> str:
    """Who has the lock of a volume, and what is to be done."""
    where = read_runtime(state).get("mountpoint", "")
    if not where:
        return "is in use by another process: unmount that first"
    holder = ""
    with contextlib.suppress(VolumeError):  # what is wrong with it, the mount at `where` has said
        ident = load(state).identity.volume
        here = any(mount.volume == ident for mount in locate.read_mounts())
        holder = "" if here else locate.holder(ident)
    if holder:
        return f"is still mounted at {where} in another mount namespace, by {holder}: end that first"
    if ending := _ending(state):
        return f"is not yet let go by process {ending}, which ends with the last file that is open at {where}"
    return f"is in use by the mount at {where}: unmount that first"


def exists(state: str) -> bool:
    """Whether a state directory holds a volume, finished or not. Raises VolumeError where that is not told."""
    try:
        os.stat(os.path.join(state, "volume.json"))
    except PermissionError as exc:
        raise VolumeError(f"{state}: is closed to you: act as its owner or as root") from exc
    except OSError:
        return False
    return True


def make_state(state: str) -> None:
    """Create a state directory (mode 0700) with its parents. Raises VolumeError."""
    try:
        if not os.path.lexists(state):
            _make_durably(os.path.dirname(state), 0o777)
            _make_durably(state, 0o700)
        fd = _own_directory(state)
        try:
            if os.fstat(fd).st_mode & 0o077:
                os.fchmod(fd, 0o700)
        finally:
            os.close(fd)
    except PermissionError as exc:
        raise VolumeError(f"{state}: only root may make the state directory there: act as root") from exc
    except OSError as exc:
        raise VolumeError(f"{state}: the state directory cannot be made: {exc.strerror}") from exc


def _make_durably(path: str, mode: int) -> None:
    """A directory, with those above it: what is synced in it later is worth nothing without its name."""
    if os.path.isdir(path):
        return
    above = os.path.dirname(path)
    _make_durably(above, 0o777)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, mode)
    sync_directory(above)


def _own_directory(state: str) -> int:
    """A descriptor of a state directory of ours: whatever somebody else has put in its place is not written to.

    Raises VolumeError, OSError."""
    try:
        fd = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as exc:
        if os.path.islink(state):
            raise VolumeError(f"{state}: is a symbolic link: name what it leads to by --state") from exc
        if isinstance(exc, PermissionError):
            raise VolumeError(f"{state}: is closed to you: act as its owner or as root") from exc
        raise
    if os.fstat(fd).st_uid == os.geteuid():
        return fd
    os.close(fd)
    raise VolumeError(f"{state}: the state directory belongs to another user: choose another --state")


def check_above(state: str) -> None:
    """Refuse a place that nobody has named for a new state directory of root's, if another user could put
    something else there instead: what root writes would go where that user likes. Raises VolumeError."""
    above = os.path.dirname(state)
    while os.geteuid() == 0 and not exists(state):
        found = os.stat(above)
        shared = found.st_mode & (stat.S_IWOTH | (stat.S_IWGRP if found.st_gid else 0))
        if found.st_uid or (shared and not found.st_mode & stat.S_ISVTX):
            raise VolumeError(
                f"{above}: may be changed by others, who could put something else in the place of {state}:"
                " choose a --state where only root may make directories, or that one if you trust them"
            )
        if above == os.path.dirname(above):
            return
        above = os.path.dirname(above)


def create(state: str, ident: str = "", created: float = 0.0, **settings: str) -> Volume:
    """Lay out a new volume, not yet known to its store; the caller holds the lock. `settings` are raw values
    of configuration keys; `ident` and `created` those of a volume that is restored.

    Raises VolumeError, ConfigError."""
    strange = set(os.listdir(state)) - {"lock", "run.json", "config.toml", "config.toml.new", "volume.json.new",
                                        "adopting.json", RESTORING, "claim.json",
                                        "epoch", "index", "heat", "marks", "log",
                                        "store", "tree.new"}  # fmt: skip
    if strange:
        raise VolumeError(
            f"{state}: is neither a volume nor empty ({quoted(min(strange))} is in it): choose another --state"
        )
    try:
        for name in ("index", "heat", "marks", "log"):
            os.makedirs(os.path.join(state, name), 0o700, exist_ok=True)
        config.write_default(os.path.join(state, config.FILE_NAME), **settings)
        store = settings.get("store", config.EMBEDDED_STORE)
        if store == config.EMBEDDED_STORE:
            os.makedirs(os.path.join(state, "store"), 0o700, exist_ok=True)
        ident, created = ident or os.urandom(16).hex(), created or time.time()
        volume = Volume(state, Identity(ident, store, created, socket.gethostname()))
        write_json(volume.path("volume.json"), asdict(volume.identity))
    except OSError as exc:
        raise VolumeError(f"{state}: the volume cannot be made: {exc.strerror}") from exc
    return volume


def load(state: str) -> Volume:
    """Read an existing volume. Raises VolumeError."""
    path = os.path.join(state, "volume.json")
    try:
        with open(path, "rb") as file:
            raw = json.load(file)
        if isinstance(raw, dict) and "epoch" in raw and "store" not in raw:
            raise VolumeError(_is_a_store(state))
        known = {field.name for field in fields(Identity)}
        identity = Identity(**{key: value for key, value in raw.items() if key in known})
    except FileNotFoundError as exc:
        raise VolumeError(f"{state}: is no state directory of a volume") from exc
    except OSError as exc:
        raise VolumeError(f"{path}: cannot be read: {exc.strerror}") from exc
    except (ValueError, TypeError, AttributeError) as exc:
        raise VolumeError(f"{path}: is damaged: put it back from a backup") from exc
    if identity.format != FORMAT:
        raise VolumeError(f"{path}: has format {identity.format}: this version of tierfs reads {FORMAT}")
    return Volume(state, identity)


def _is_a_store(path: str) -> str:
    """Both have a `volume.json`; the store's says who has claimed it."""
    url = "file://" + quote(os.fsencode(os.path.abspath(path)))
    return (
        f"{path}: is the store of a volume, not its state directory: name that one, or have one made with"
        f" `tierfs restore --store {url} DIR`"
    )


def discard(state: str) -> None:
    """Undo a `create` that never became complete; a backing tree is left alone."""
    for name in ("volume.json", config.FILE_NAME):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(state, name))
    for name in ("index", "heat", "marks", "store"):
        with contextlib.suppress(FileNotFoundError, OSError):
            os.rmdir(os.path.join(state, name))


def remove(state: str) -> None:
    """Remove the state directory of a volume that has ended; cut short, it is done again. Raises OSError."""
    for entry in list(os.scandir(state)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name not in ("volume.json", GIVEN):
            os.unlink(entry.path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(state, GIVEN))
    os.unlink(os.path.join(state, "volume.json"))  # last: by it the directory is known to be ours
    os.rmdir(state)


def is_bare(state: str) -> bool:
    """All of a volume has been removed but for the sign of what it was."""
    return not set(os.listdir(state)) - {"volume.json", "lock"}


def make_tree(volume: Volume, like: os.stat_result) -> None:
    """Make the backing tree where there is none, its root with owner and mode of `like`. Raises OSError."""
    path = volume.path("tree")
    if os.path.isdir(path):
        return
    new = path + ".new"
    os.makedirs(new, exist_ok=True)
    if os.geteuid() == 0:
        os.chown(new, like.st_uid, like.st_gid)
    os.chmod(new, stat.S_IMODE(like.st_mode) | stat.S_IRWXU)
    os.rename(new, path)
    sync_directory(volume.state)


def keep_attributes(volume: Volume, namespace: str) -> Volume:
    """Note in which namespace of extended attributes this process keeps what makes a file a stub, or compare:
    in the other one it would see no stubs, and read their holes as content. Raises VolumeError, OSError."""
    known = volume.identity.attributes
    if known == namespace:
        return volume
    if known:
        raise VolumeError(
            f"{volume.state}: {_OTHERWISE[known]}: demoted files would be taken for files of zeros"
        )
    identity = replace(volume.identity, attributes=namespace)
    try:
        write_json(volume.path("volume.json"), asdict(identity))
    except OSError as exc:
        # Not over the former one, of which a power cut might leave half: the next mount will note it.
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return volume
    return Volume(volume.state, identity)


def complete(volume: Volume, abilities: Capabilities, *, view: bool = False) -> Volume:
    """Note that the store is ours and what its server can do: the volume exists now. Raises OSError."""
    identity = replace(
        volume.identity,
        complete=True,
        conditional_put=abilities.conditional_put,
        partial_content=abilities.partial_content,
        checks_sha256=abilities.checks_sha256,
        client=abilities.client,
        bulk_delete=abilities.bulk_delete,
        needs_sums=abilities.needs_sums,
        view=view,
    )
    write_json(volume.path("volume.json"), asdict(identity))
    return Volume(volume.state, identity)


# --- facts of the running daemon --------------------------------------------------------------------------


def write_runtime(state: str, facts: dict[str, Any]) -> None:
    """Publish facts of the running daemon for its own processes. Raises OSError."""
    write_json(os.path.join(state, "run.json"), facts, sync=False, in_place=True)


def read_runtime(state: str) -> dict[str, Any]:
    """What the daemon last published; empty where there is nothing readable."""
    try:
        with open(os.path.join(state, "run.json"), "rb") as file:
            facts = json.load(file)
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def last_epoch(state: str) -> int:
    """The highest epoch that this volume has used: kept apart from the index, which may get lost."""
    try:
        with open(os.path.join(state, "epoch"), "rb") as file:
            return int(json.load(file)["epoch"])
    except FileNotFoundError:
        return 0
    except (ValueError, TypeError, KeyError) as exc:
        raise VolumeError(f"{state}/epoch: is damaged: put it back from a backup") from exc


def keep_epoch(state: str, epoch: int) -> None:
    """Note, durably, that this epoch is in use. Raises OSError."""
    write_json(os.path.join(state, "epoch"), {"epoch": epoch})


def write_json(path: str, value: dict[str, Any], *, sync: bool = True, in_place: bool = False) -> None:
    """Replace a JSON file (mode 0600), durably with `sync`. Raises OSError.

    `in_place`: where there is no room for another file, into the blocks of the former one; whole sectors, of
    which a crash leaves the former content or this.
    """
    text = json.dumps(value, indent=1)
    if in_place:
        text = text.ljust(-(-len(text) // _SECTOR) * _SECTOR)
    try:
        _write(path + ".new", os.O_CREAT | os.O_TRUNC, text, sync)
    except OSError as exc:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + ".new")
        if not in_place or exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _write_over(path, text.encode(), sync)
        return
    os.replace(path + ".new", path)
    if sync:
        sync_directory(os.path.dirname(path))


def _write(path: str, flags: int, text: str, sync: bool) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags, 0o600)
    with open(fd, "w", encoding="ascii") as file:
        file.write(text)
        file.truncate()
        if sync:
            os.fsync(fd)


def _write_over(path: str, text: bytes, sync: bool) -> None:
    """Into the blocks of a file, which with `sync` a crash leaves as it was or with all of this text.

    Spaces, which mean nothing, fill up what is shorter: first the file, as those of former versions are, or the
    text until it is all there.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        if size < len(text):
            os.pwrite(fd, b" " * (len(text) - size), size)
            if sync:
                os.fsync(fd)
        os.pwrite(fd, text.ljust(size), 0)
        if sync:
            os.fsync(fd)
        os.ftruncate(fd, len(text))
    finally:
        os.close(fd)


def sync_directory(path: str) -> None:
    """Make the names in a directory durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
