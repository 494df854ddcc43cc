"""Which volume a path belongs to: read from the kernel's mount table, never from the mount itself."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from tierfs.errors import PathError

FSTYPE = "fuse.tierfs"
SOURCE_PREFIX = "tierfs#"
_OCTAL = re.compile(rb"\\([0-7]{3})")


class Mount(NamedTuple):
    """One line of the mount table. `uid`: who mounted a FUSE filesystem (0 for others). `root`: which directory
    of the filesystem is shown; not "/" where a part of it is bound to another place."""

    mountpoint: str
    fstype: str
    source: str
    uid: int
    root: str = "/"

    @property
    def volume(self) -> str:
        """The volume id, "" where this is no TierFS mount."""
        if self.fstype == FSTYPE and self.source.startswith(SOURCE_PREFIX):
            return self.source[len(SOURCE_PREFIX) :]
        return ""

    def shown(self, relative: bytes) -> str:
        """Where a path of the volume is seen in this mount."""
        inside = os.path.relpath(b"/" + relative, os.fsencode(self.root))
        return os.path.normpath(os.path.join(self.mountpoint, os.fsdecode(inside)))


class Place(NamedTuple):
    """A path inside a mounted volume. `relative` is relative to the volume's root, b"" for the root itself."""

    mount: Mount
    relative: bytes


def read_mounts(table: str = "/proc/self/mountinfo") -> list[Mount]:
    """All mounts in the order of the table (later ones lie on top). Raises OSError."""
    with open(table, "rb") as file:
        return [_parse(line) for line in file.read().splitlines() if line]


def _parse(line: bytes) -> Mount:
    fields = line.split(b" ")
    separator = fields.index(b"-", 6)
    fstype, source, options = fields[separator + 1 : separator + 4]
    owner = re.search(rb"(?:^|,)user_id=(\d+)", options)
    uid = int(owner[1]) if owner else 0
    return Mount(_unescape(fields[4]), os.fsdecode(fstype), _unescape(source), uid, _unescape(fields[3]))


def _unescape(field: bytes) -> str:
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field))


def is_under(path: str, directory: str) -> bool:
    """Whether an absolute path is the directory or lies in it (by name)."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def mount_at(path: str, mounts: Iterable[Mount]) -> Mount | None:
    """The topmost mount whose mountpoint is exactly this absolute path."""
    found = None
    for mount in mounts:
        if mount.mountpoint == path:
            found = mount
    return found


def resolve(path: str) -> str:
    """The absolute path with symlinks resolved in all but the last component (a link names itself)."""
    parent, name = os.path.split(path)
    if name in ("", ".", ".."):
        return os.path.realpath(path)
    return os.path.join(os.path.realpath(parent or "."), name)


def locate(path: str, mounts: list[Mount] | None = None) -> Place:
    """The volume of a path, which need not exist. Raises PathError where it is on no TierFS mount.

    A link outside of all volumes is not meant itself, but what it leads to.
    """
    mounts = read_mounts() if mounts is None else mounts
    for real in (resolve(path), os.path.realpath(path)):
        found = _mount_of(real, mounts)
        if found is not None and found.volume:
            inside = real[len(found.mountpoint.rstrip("/")) :]
            return Place(found, os.fsencode((found.root.rstrip("/") + inside).strip("/")))
    if not os.path.lexists(path):
        raise PathError(f"{path}: does not exist, and is not in a mounted TierFS volume")
    raise PathError(f"{path}: is not in a mounted TierFS volume: mount it with `tierfs mount`")


def _mount_of(real: str, mounts: Iterable[Mount]) -> Mount | None:
    """The mount that a real path lies in."""
    found = None
    for mount in mounts:
        if is_under(real, mount.mountpoint) and (
            found is None or len(mount.mountpoint) >= len(found.mountpoint)
        ):
            found = mount
    return found


def holder(volume: str) -> str:
    """A process that has this volume mounted in another mount namespace, in words; "" where none is seen."""
    seen = {os.readlink("/proc/self/ns/mnt")}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace not in seen:
                seen.add(namespace)
                if any(mount.volume == volume for mount in read_mounts(f"/proc/{pid}/mountinfo")):
                    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                        return f"process {pid} ({file.read().strip()})"
    return ""


def tier_mounts() -> list[Mount]:
    """All TierFS mounts of this machine, each volume once, without those that another mount covers."""
    mounts, found = read_mounts(), dict[str, Mount]()
    for mount in mounts:
        if mount.volume and mount.root == "/" and mount_at(mount.mountpoint, mounts) is mount:
            found.setdefault(mount.volume, mount)
    return list(found.values())
