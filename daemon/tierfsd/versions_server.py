"""Requests about former contents, judged by the peer's rights.

A peer sees a version that it could have read: along a path that it may search, and by the owner and mode that
the file had when the version ended. Where the directory is gone its mode is not known any more, nor is that of
content which the file outlived: it may have been opened to others only when that was overwritten. Then only the
file's own owner (and root, and the volume's) gets it.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Protocol

from tierfs import control
from tierfs.errors import NotPermittedError, PathError
from tierfs.store.base import Body
from tierfs.versions import Kept, choose
from tierfsd.credentials import Peer
from tierfsd.reach import Reach

_PATIENCE = 600.0  # seconds for a client that writes what it gets to a full disk


class VersionBackend(Protocol):
    """What is asked of the mover. Any method may raise TierError or OSError."""

    def versions(self, path: bytes, opath: int | None) -> list[Kept]:
        """All that is kept of a path; `opath` is an O_PATH descriptor of the file that is there now."""

    def versions_beneath(self, path: bytes) -> Iterable[Kept]:
        """All that ended beneath a directory, there or not."""

    def kept_until(self, kept: Kept) -> float | None:
        """Seconds since the epoch; None: as long as its file has it."""

    def content(self, kept: Kept) -> Iterator[tuple[int, Body]]:
        """(offset, bytes) of its data, checked."""


class VersionRequests:
    """Answers `GetVersions` and `ReadVersion`."""

    def __init__(self, reach: Reach, backend: VersionBackend) -> None:
        self._reach = reach
        self._backend = backend

    def send_list(self, sock: socket.socket, peer: Peer, path: bytes) -> control.Done:
        """Versions of a file, and beneath a directory. Raises PathError, NotPermittedError, OSError."""
        found, exists, directory = self._find(peer, path)
        beneath = self._beneath(peer, path) if directory or not exists else ()
        count = 0
        for kept in chain(found, beneath):
            control.send(sock, self._answer(kept))
            count += 1
        if not count and not exists:
            raise PathError(
                "neither exists nor is a version of it kept: `tierfs versions` of its directory lists what is"
            )
        return control.Done(count)

    def read(self, sock: socket.socket, peer: Peer, request: control.ReadVersion) -> control.Done:
        """Send one version with its content. Raises PathError, NotPermittedError, StoreError, OSError."""
        found, exists, directory = self._find(peer, request.path)
        if not found and (directory or (not exists and any(self._beneath(peer, request.path)))):
            raise PathError(
                "is a directory: name a file in it, or see all of it with `tierfs mount --at`"
            )
        kept = choose(found, request.generation, request.when)
        sock.settimeout(_PATIENCE)
        control.send(sock, self._answer(kept))
        for offset, data in self._backend.content(kept):
            control.send(sock, control.Content(offset, bytes(data)))
        return control.Done(1)

    def _find(self, peer: Peer, path: bytes) -> tuple[Iterable[Kept], bool, bool]:
        """What the peer may see of a path, whether there is something now, and whether that is a directory."""
        if self._reach.exists(peer, path):
            with self._reach.find(peer, path, os.O_RDONLY) as there:
                now, mode = there.status, there.status.st_mode
                listed = self._backend.versions(path, there.opath if stat.S_ISREG(mode) else None)
            # Of the present content the file itself says whose it is.
            found = [
                replace(kept, mode=mode, uid=now.st_uid, gid=now.st_gid) if kept.version is None else kept
                for kept in listed
            ]
            exists, whole, directory = True, True, stat.S_ISDIR(mode)
        else:
            found = self._backend.versions(path, None)
            exists, whole, directory = False, self._reach.exists(peer, os.path.dirname(path)), False
        allowed = [kept for kept in found if _permits(peer, kept, whole)]
        if found and not allowed:
            raise NotPermittedError("you may not read what was there")
        return allowed, exists, directory

    def _beneath(self, peer: Peer, path: bytes) -> Iterator[Kept]:
        """What the peer may see of what ended beneath a directory."""
        return (kept for kept in self._backend.versions_beneath(path) if _permits(peer, kept, False))

    def _answer(self, kept: Kept) -> control.Version:
        return control.Version(
            kept.path, kept.generation, kept.size, kept.mtime, kept.key, kept.state, kept.since, kept.until,
            self._backend.kept_until(kept), stat.S_IMODE(kept.mode), kept.uid, kept.gid,
        )  # fmt: skip


def _permits(peer: Peer, kept: Kept, whole: bool) -> bool:
    """`whole`: the peer may search all directories above, and they are still there."""
    if peer.trusted or (kept.version is None and whole and not kept.stale):
        return True  # of a file that is there it has been judged already
    if not kept.mode:
        return False
    if kept.uid == peer.uid:
        return bool(kept.mode & stat.S_IRUSR)
    if not whole or kept.stale:
        return False
    in_group = kept.gid == peer.gid or kept.gid in peer.groups
    return bool(kept.mode & (stat.S_IRGRP if in_group else stat.S_IROTH))
