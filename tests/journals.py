"""A volume whose namespace is journalled, driven through the vfs; a tree as it is told and as it is."""

from __future__ import annotations

import base64
import os
import stat
import threading

from tiering import Volume

from tierfs import manifest
from tierfs.journal import Journal
from tierfs.namespace import Chronicle
from tierfs.snapshots import Snapshots
from tierfs.vfs import Caller, Vfs

VOLUME = "ab" * 16
ROOT = Caller(0, 0)


class Journalled:
    """A `tiering.Volume` with a vfs above it and a journal below."""

    def __init__(self, base, store=None, **settings):
        self.volume = Volume(base, store, **settings)
        self.stopping = threading.Event()
        self.attach()

    def attach(self):
        volume = self.volume
        self.vfs = Vfs(volume.tree, volume.server.gate)
        self.journal = Journal(
            volume.tier.kit, volume.tier.places, volume.tier.drain, VOLUME, volume.session.epoch
        )
        self.snapshots = Snapshots(volume.tier.kit, self.journal, volume.tier.places, self.stopping)
        volume.index.commit(lambda w: w.set_surveyed(True)).result()

    def close(self):
        self.vfs.close()
        self.volume.stop()

    def restart(self, clean=True, boot="boot"):
        self.vfs.close()
        self.volume.restart(clean, boot)
        self.attach()

    def run(self, name, *args, **more):
        """An operation of the vfs."""
        return self.volume.server.run(lambda: getattr(self.vfs, name)(*args, **more))

    def node(self, path):
        """The node of a path, looked up from the root."""
        number = 1
        for name in os.fsencode(path).split(b"/") if path else []:
            number, _ = self.run("lookup", number, name)
        return number

    def above(self, path):
        """(node of the directory, name)"""
        directory, name = os.path.split(path)
        return self.node(directory), os.fsencode(name)

    def write(self, path, data=b"", mode=0o644):
        parent, name = self.above(path)
        _, _, fh, handle = self.run("create", parent, name, os.O_RDWR, stat.S_IFREG | mode, ROOT)
        self.volume.server.run(lambda: self.volume.server.gate.contents.write(handle, 0, data))
        self.run("release", fh)

    def mkdir(self, path, mode=0o755):
        self.run("mkdir", *self.above(path), mode, ROOT)

    def read_journal(self, until=None):
        return Chronicle(self.volume.store).read(until)

    def told(self):
        """What the journal says there is."""
        return as_told(self.read_journal())

    def there(self):
        """What there is."""
        return as_it_is(self.volume.root)

    def bytes_written(self):
        return sum(info.size for info in self.volume.store.list(manifest.PREFIX))


def as_told(tree):
    """path -> what is compared; hard links by the first path of their inode."""
    found, first = {}, {}
    for path, inode in sorted(tree.walk(), key=lambda item: item[0]):
        kind = type(inode).__name__.lower() + getattr(inode, "kind", "")
        xattrs = tuple(sorted((inode.xattrs or {}).items()))
        more = (inode.size, first.setdefault(inode.id, path)) if isinstance(inode, manifest.File) else ()
        if isinstance(inode, manifest.Symlink):
            more = (manifest.raw(inode.target),)
        found[path] = (kind, inode.mode, inode.uid, inode.gid, inode.mtime, xattrs, *more)
    return found


def as_it_is(root):
    """The same of a directory on the disk."""
    kinds = {
        stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink", stat.S_IFIFO: "specialfifo",
        stat.S_IFSOCK: "specialsocket", stat.S_IFCHR: "specialchar", stat.S_IFBLK: "specialblock",
    }  # fmt: skip
    root = os.fsencode(root)
    paths = [b""]
    for directory, below, names in os.walk(root):
        paths += [os.path.relpath(os.path.join(directory, name), root) for name in below + names]
    found, first = {}, {}
    for path in sorted(paths):
        full = os.path.join(root, path)
        st = os.lstat(full)
        kind = kinds[stat.S_IFMT(st.st_mode)]
        xattrs = tuple(
            sorted(
                (name, base64.b64encode(os.getxattr(full, name, follow_symlinks=False)).decode())
                for name in os.listxattr(full, follow_symlinks=False)
                if not name.startswith("trusted.tierfs")
            )
        )
        more = (st.st_size, first.setdefault(st.st_ino, path)) if kind == "file" else ()
        if kind == "symlink":
            more = (os.readlink(full),)
        found[path] = (kind, stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid, st.st_mtime_ns, xattrs, *more)
    return found
