"""The mount, and what must outlive a mount server that another is to follow.

That is the descriptor of the mount, the ledger, and the descriptors without which files that have no name would
end. The supervisor keeps them; a server gets them when it starts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterator

from tierfs import channel, ledger, locate, wire
from tierfs.fuse import mounting

log = logging.getLogger("supervisor")


class Attachment:
    """Of one volume at one mountpoint, mounted or not."""

    def __init__(self, mountpoint: str, volume: str) -> None:
        self.mountpoint = mountpoint
        self._volume = volume
        self.fuse_fd = -1
        self.ledger_fd = -1
        self.kept: dict[int, int] = {}  # inode number -> a descriptor without which the file would end
        self._devices: set[str] = set()  # of a mount that is in no table any more

    def begin(self) -> None:
        """A session begins, of which nothing is kept yet. Raises OSError."""
        self.ledger_fd = ledger.make()

    def mount(self, options: list[str]) -> None:
        """Mount it, for whoever is given the descriptor then. Raises VolumeError, UsageError."""
        self.fuse_fd = mounting.mount(self.mountpoint, self._volume, options)

    def is_mounted(self) -> bool:
        """Whether the volume is seen at its place."""
        found = locate.mount_at(self.mountpoint, locate.read_mounts())
        return found is not None and found.volume == self._volume

    # --- files without a name -----------------------------------------------------------------------------

    def keep(self, ino: int, fd: int) -> None:
        """Keep this descriptor, which is ours from now on."""
        self.let_go(ino)
        self.kept[ino] = fd

    def let_go(self, ino: int) -> None:
        """That of this inode is needed no more."""
        fd = self.kept.pop(ino, -1)
        if fd >= 0:
            os.close(fd)

    def hand_on(self, to: channel.Channel) -> None:
        """Give all of them to another server. Raises OSError."""
        inos = list(self.kept)
        for first in range(0, len(inos), wire.MAX_FDS):
            batch = inos[first : first + wire.MAX_FDS]
            to.send(channel.Kept(batch), [self.kept[ino] for ino in batch])

    # --- ending -------------------------------------------------------------------------------------------

    def hide(self) -> None:
        """Take the mount out of the tree; what is open stays, and is ended by `detach`."""
        self._devices = mounting.devices_of(self._volume)
        self._unmount_lazily()

    def detach(self) -> bool:
        """Let go of the mount, whatever its state. False where it was there no more: somebody unmounted it."""
        if self.fuse_fd >= 0:
            self._abort()
        was_there = self._unmount_lazily()
        if self.fuse_fd >= 0:
            os.close(self.fuse_fd)
            self.fuse_fd = -1
        for fd in [*self.kept.values(), *([self.ledger_fd] if self.ledger_fd >= 0 else [])]:
            os.close(fd)
        self.kept.clear()
        self.ledger_fd = -1
        return was_there

    def _abort(self) -> None:
        """End what waits for a server. Without the last descriptor the kernel would do so by itself, but a dead
        server's teller has one too, and may be waiting for one of those who wait."""
        if not mounting.is_connected(self.fuse_fd):
            return
        try:
            for device in self._devices or mounting.devices_of(self._volume):
                mounting.abort(device)
        except OSError as exc:
            log.error("the connection of the mount is not aborted: %s", exc)

    def _unmount_lazily(self) -> bool:
        """Of two who unmount at once one is told that there is nothing: asking the table first would not do."""
        try:
            mounting.unmount(self.mountpoint, lazy=True)
        except OSError:
            return self.is_mounted()
        return True


@contextlib.contextmanager
def writable(mountpoint: str) -> Iterator[None]:
    """fusermount3 wants a mountpoint that its user may write to; beneath the mount it is as it was before."""
    if os.geteuid() == 0:
        yield
        return
    fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        mode = stat.S_IMODE(status.st_mode)
        closed = status.st_uid == os.geteuid() and not mode & stat.S_IWUSR
        if closed:
            os.fchmod(fd, mode | stat.S_IWUSR)
        try:
            yield
        finally:
            if closed:
                os.fchmod(fd, mode)
    finally:
        os.close(fd)
