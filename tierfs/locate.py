"""Which volume a path belongs to: read from the kernel's mount table, never from the mount itself."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from tierfs.errors import PathError

FSTYPE = "fuse.tierfs"
SOURCE_PREFIX = "tierfs#"
_OCTAL = re.compile(rb"\\([0-7]{3})")


class Mount(NamedTuple):
    """One line of the mount table. `uid`: who mounted a FUSE filesystem (0 for others)."""

    mountpoint: str
    fstype: str
    source: str
    uid: int

    @property
    def volume(self) -> str:
        """The volume id, "" where this is no TierFS mount."""
        if self.fstype == FSTYPE and self.source.startswith(SOURCE_PREFIX):
            return self.source[len(SOURCE_PREFIX) :]
        return ""


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
    return Mount(_unescape(fields[4]), os.fsdecode(fstype), _unescape(source), int(owner[1]) if owner else 0)


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
    """The volume of a path, which need not exist. Raises PathError where it is on no TierFS mount."""
    real = resolve(path)
    found = None
    for mount in read_mounts() if mounts is None else mounts:
        if is_under(real, mount.mountpoint) and (
            found is None or len(mount.mountpoint) >= len(found.mountpoint)
        ):
            found = mount
    if found is None or not found.volume:
        raise PathError(f"{path}: is not in a mounted TierFS volume: mount it with `tierfs mount`")
    return Place(found, os.fsencode(real[len(found.mountpoint.rstrip("/")) :].strip("/")))


def tier_mounts() -> list[Mount]:
    """All TierFS mounts of this machine, without those that another mount covers."""
    mounts = read_mounts()
    return [mount for mount in mounts if mount.volume and mount_at(mount.mountpoint, mounts) is mount]
