"""Turning a directory into a volume by one rename, and back.

`adopting.json` in the state directory is the intent, written before anything moves and removed at the end:
    {directory, ino, mode}. Written by `begin`, resolved by `finish`, which `adopt` and `mount` both call.
What a crash leaves: nothing moved yet (the directory is where it was: adopt again), or the directory is the
backing tree and its old place is empty (the mountpoint is made then).
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import stat
from typing import Any

from tierfs import locate, syscalls, volume
from tierfs.errors import VolumeError
from tierfs.spelling import quoted

_INTENT = "adopting.json"
_MOUNTPOINT_MODE = 0o555  # no program may write beneath the mount when it is not mounted


def check_directory(directory: str, state: str) -> None:
    """Refuse a directory that cannot be adopted. Both are absolute real paths. Raises VolumeError."""
    try:
        status = os.lstat(directory)
    except FileNotFoundError as exc:
        raise VolumeError(f"{directory}: does not exist") from exc
    if not stat.S_ISDIR(status.st_mode):
        raise VolumeError(f"{directory}: is not a directory")
    if directory == "/":
        raise VolumeError("/: the root directory cannot be adopted")
    if os.geteuid() not in (0, status.st_uid):
        raise VolumeError(f"{directory}: belongs to another user: act as its owner or as root")
    for mount in locate.read_mounts():
        if locate.is_under(mount.mountpoint, directory):
            what = "is" if mount.mountpoint == directory else "contains"
            raise VolumeError(f"{directory}: {what} a mountpoint ({mount.mountpoint}): unmount that first")
    other = _subvolume_in(directory, status.st_dev)
    if other:
        raise VolumeError(f"{directory}: contains a subvolume of its own ({other}): move that elsewhere first")
    if locate.is_under(state, directory):
        raise VolumeError(f"{state}: the state directory lies inside the directory: choose another --state")
    former = os.path.realpath(volume.default_state(directory))
    if former != state and volume.exists(former):
        raise VolumeError(
            f"{directory}: is the mountpoint of the volume in {former}, which is not mounted: move away what is"
            " in the way, then mount it"
        )
    inner = _state_in(directory)
    if inner:
        raise VolumeError(
            f"{directory}: the volume in {inner} keeps its local data there: leave it (`tierfs leave`), or move"
            " it elsewhere"
        )
    if os.stat(_existing_parent(state)).st_dev != status.st_dev:
        raise VolumeError(f"{state}: is on another filesystem than {directory}: choose another --state")


def check_links(directory: str) -> None:
    """Refuse a directory with files that have names outside of it, too: there they would be read as zeros when
    they are demoted here. Through a mount no such name can be made. Raises VolumeError, OSError."""
    left: dict[int, tuple[int, str]] = {}  # inode -> how many of its names have not been seen, and one that was
    pending, device = [directory], os.stat(directory).st_dev
    while pending:
        with contextlib.suppress(PermissionError, FileNotFoundError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # it alone has gone meanwhile
                    continue
                if status.st_dev != device:
                    continue
                if stat.S_ISDIR(status.st_mode):
                    pending.append(entry.path)
                elif status.st_nlink > 1 and stat.S_ISREG(status.st_mode):
                    names = left.pop(status.st_ino, (status.st_nlink, ""))[0] - 1
                    if names:
                        left[status.st_ino] = names, entry.path
    if left:
        _, path = next(iter(left.values()))
        raise VolumeError(
            f"{directory}: {len(left)} files in it have other names (hard links) outside of it, as"
            f" {quoted(os.fsencode(path))}, which would read as zeros there when they are demoted here: adopt a"
            " directory that has all their names, or replace them by copies"
        )


def _subvolume_in(directory: str, device: int) -> str:
    """A directory in it with inode numbers of its own, which is no mountpoint; "" where there is none.

    There are such where a filesystem has a device number that no disk has (btrfs).
    """
    if os.major(device):
        return ""
    for path, names, _ in os.walk(directory):
        for name in names:
            inner = os.path.join(path, name)
            with contextlib.suppress(OSError):  # gone meanwhile
                if os.lstat(inner).st_dev != device:
                    return inner
    return ""


def _state_in(directory: str) -> str:
    """Another volume's state directory in it, in a usual place; "" where there is none. Its stubs would be
    taken for stubs of ours, which nobody can fetch."""
    usual = (".local/state/tierfs/*", ".tierfs-*", "*/.tierfs-*")
    for place in usual:
        for found in glob.iglob(f"{glob.escape(directory)}/{place}/volume.json", include_hidden=True):
            return os.path.dirname(found)
    return ""


def _existing_parent(path: str) -> str:
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def begin(directory: str, state: str) -> None:
    """Write the intent, durably. Raises VolumeError, OSError."""
    volume.make_state(state)
    if os.path.isdir(os.path.join(state, "tree")):
        raise VolumeError(f"{state}: already holds a volume: mount it with `tierfs mount --state`")
    status = os.stat(directory)
    intent = {"directory": directory, "ino": status.st_ino}
    path = os.path.join(state, _INTENT)
    with open(path + ".new", "w", encoding="ascii") as file:
        json.dump(intent, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".new", path)
    volume.sync_directory(state)
    volume.sync_directory(os.path.dirname(state))


def move(directory: str, state: str) -> None:
    """The one rename: the directory becomes the backing tree. Raises OSError."""
    os.rename(directory, os.path.join(state, "tree"))


def finish(directory: str, state: str) -> None:
    """Bring an adoption that was begun to its end: the mountpoint in the old place, and no intent.

    Does nothing where there is no intent, or nothing has been moved yet. Raises VolumeError, OSError.
    """
    intent = read_intent(state)
    tree = os.path.join(state, "tree")
    if intent is None or intent["directory"] != directory or not os.path.isdir(tree):
        return
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o755)
    fd = _open_empty(directory, tree)
    try:
        if os.geteuid() == 0:
            status = os.stat(tree)
            os.fchown(fd, status.st_uid, status.st_gid)
        os.fchmod(fd, _MOUNTPOINT_MODE)
    finally:
        os.close(fd)
    volume.sync_directory(os.path.dirname(directory))
    volume.sync_directory(state)
    os.unlink(os.path.join(state, _INTENT))


def _open_empty(directory: str, tree: str) -> int:
    """The mountpoint itself: who owns the directory above might have put a link there. Raises VolumeError."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        if not os.listdir(fd):
            return fd
        os.close(fd)
    except OSError as exc:
        if exc.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
    raise VolumeError(f"{directory}: was filled while its content is in {tree}: empty it, then try again")


def read_intent(state: str) -> dict[str, Any] | None:
    """The adoption under way in a state directory, if there is one. Raises VolumeError."""
    path = os.path.join(state, _INTENT)
    try:
        with open(path, "rb") as file:
            intent = json.load(file)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise VolumeError(f"{path}: cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise VolumeError(f"{path}: is damaged: put it back from a backup") from exc
    return intent if isinstance(intent, dict) and "directory" in intent else None


def cancel(state: str) -> None:
    """Forget an intent of which nothing has happened yet. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(state, _INTENT))


def find_stubs(tree: str, limit: int = 10) -> list[str]:
    """Paths of files (at most `limit`) whose content is not all in the backing tree. Raises OSError."""
    stubs: list[str] = []
    for path, names in _files(tree):
        for name in names:
            whole = os.path.join(path, name)
            if _attributes(whole) & {"trusted.tierfs", "user.tierfs"}:
                stubs.append(os.path.relpath(whole, tree))
                if len(stubs) == limit:
                    return stubs
    return stubs


def strip(tree: str) -> None:
    """Remove TierFS's own attributes (pins) from a tree without stubs. Raises OSError."""
    for path, names in _files(tree):
        for whole in [path, *(os.path.join(path, name) for name in names)]:
            for attribute in _attributes(whole) & {"trusted.tierfs_pin", "user.tierfs_pin"}:
                os.removexattr(whole, attribute, follow_symlinks=False)


def give_back(directory: str, state: str) -> None:
    """Put the backing tree in the place of the (empty, unmounted) mountpoint. Raises OSError."""
    with open(os.path.join(state, volume.GIVEN), "w", encoding="ascii") as file:
        file.write(f"{os.stat(os.path.join(state, 'tree')).st_ino}\n")
        file.flush()
        os.fsync(file.fileno())
    os.rename(os.path.join(state, "tree"), directory)
    volume.sync_directory(os.path.dirname(directory))
    volume.sync_directory(state)


def is_given_back(directory: str, state: str) -> bool:
    """What is there now is the backing tree, which the state directory has not; or nothing is left to lose."""
    try:
        with open(os.path.join(state, volume.GIVEN), encoding="ascii") as file:
            return file.read() == f"{os.stat(directory).st_ino}\n"
    except FileNotFoundError:
        return volume.is_bare(state)


def make_durable(directory: str) -> None:
    """Have all of it on the disk: what of it was in the store alone as yet is about to go. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscalls.syncfs(fd)
    finally:
        os.close(fd)


def _files(tree: str) -> list[tuple[str, list[str]]]:
    def refuse(error: OSError) -> None:
        raise error

    return [(path, names) for path, _, names in os.walk(tree, onerror=refuse)]


def _attributes(path: str) -> set[str]:
    try:
        return set(os.listxattr(path, follow_symlinks=False))
    except OSError as exc:
        # A file that its owner may not read: only root's attributes could be hidden there.
        raise VolumeError(f"{path}: its attributes cannot be read: {exc.strerror}") from exc
