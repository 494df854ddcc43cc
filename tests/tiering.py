"""A tier over a real directory with a real gate at the other end of the link, in one process, without FUSE."""

from __future__ import annotations

import functools
import os
import select
import threading
import time
from pathlib import Path

from tierfs import config, wire
from tierfs.gate import Gate
from tierfs.index import Index
from tierfs.marks import MarkWriter
from tierfs.serverlink import ServerLink
from tierfs.store.memory import MemoryStore
from tierfs.tier import Item, Tier
from tierfs.tree import open_tree
from tierfs.waits import Blocked

MIB = 1 << 20


class Job:
    """A request to the control server, as far as its work knows of it: nobody cancels it."""

    def __init__(self):
        self.cancelled = threading.Event()
        self.awaited = True
        self.reports = []

    def report(self, progress):
        self.reports.append(progress)


class Server:
    """The mount server's half: a Gate whose loop runs in a thread, and files opened through it."""

    def __init__(self, tree, index, marks, epoch, sock):
        self.tree = tree
        self.lock = threading.RLock()
        self.gate = Gate(tree, index, marks, epoch, None, wire.Link(sock, server=True))
        self._stop, self._wake = os.pipe()
        self._sock = sock
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def _loop(self):
        poll = select.poll()  # select() takes no descriptor above 1023
        for fd in (self._sock.fileno(), self._stop):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(50)}
            if self._stop in ready:
                os.read(self._stop, 1)
                return
            with self.lock:
                if self._sock.fileno() in ready:
                    self.gate.mover.on_readable()
                self.gate.tick(time.monotonic())

    def connect(self, sock):
        """Speak to another mover."""
        self._end_loop()
        with self.lock:
            self.gate.mover.connect(None)
            self._sock = sock
            self.gate.mover.connect(wire.Link(sock, server=True))
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def _end_loop(self):
        os.write(self._wake, b"x")
        self._thread.join()
        self._sock.close()

    def close(self):
        self._end_loop()
        os.close(self._stop)
        os.close(self._wake)

    def run(self, call, seconds=20.0):
        """Run an operation as a binding does: again whenever what it waits for has come."""
        deadline = time.monotonic() + seconds
        while True:
            with self.lock:
                try:
                    return call()
                except Blocked as blocked:
                    wait = blocked.wait
                    fired = threading.Event()
                    wait.add(fired.set)
            assert fired.wait(deadline - time.monotonic()), "an operation of the server hangs"
            if wait.errno:
                raise OSError(wait.errno, wait.reason)

    def open(self, path, flags=os.O_RDONLY):
        def call():
            opath = os.open(path, os.O_PATH | os.O_NOFOLLOW)
            try:
                st = os.fstat(opath)
                parent = os.stat(os.path.dirname(path)).st_ino
                return self.gate.open(opath, st, flags, parent, os.fsencode(os.path.basename(path)))
            except BaseException:
                os.close(opath)
                raise

        return self.run(call)

    def release(self, handle):
        with self.lock:
            self.gate.release(handle)

    def read(self, path, offset=0, size=1 << 40):
        handle = self.open(path)
        try:
            size = min(size, os.stat(path).st_size - offset)
            parts = []
            while size > 0:
                part = self.run(functools.partial(self.gate.contents.read, handle, offset, min(size, MIB)))
                if not part:
                    break
                parts.append(part)
                offset, size = offset + len(part), size - len(part)
            return b"".join(parts)
        finally:
            self.release(handle)

    def write(self, path, data, offset=0, flags=os.O_WRONLY):
        handle = self.open(path, flags)
        try:
            self.run(lambda: self.gate.contents.write(handle, offset, data))
        finally:
            self.release(handle)

    def create(self, path, data):
        with self.lock:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            parent = os.stat(os.path.dirname(path)).st_ino
            handle = self.gate.created(fd, os.fstat(fd), os.O_RDWR, parent, os.fsencode(os.path.basename(path)))
        self.run(lambda: self.gate.contents.write(handle, 0, data))
        self.release(handle)

    def chmod(self, path, mode):
        """As vfs.py does it; what the inode has become."""

        def change():
            self.gate.before_change(os.stat(path).st_ino)
            os.chmod(path, mode)
            st = os.stat(path)
            self.gate.after_change(st.st_ino, st)
            return st

        return self.run(change)

    def unlink(self, path):
        """As names.py does it for the last name of a file."""
        with self.lock:
            st, parent = os.stat(path), os.stat(os.path.dirname(path)).st_ino
            fd = os.open(path, os.O_PATH | os.O_NOFOLLOW)
            try:
                handle = self.tree.handle_of(fd)
            finally:
                os.close(fd)
            os.unlink(path)
            self.gate.gone(st, handle, parent, os.fsencode(os.path.basename(path)))

    def mkdir(self, path):
        with self.lock:
            os.mkdir(path)
            st, parent = os.stat(path), os.stat(os.path.dirname(path)).st_ino
            self.gate.marking.made_dir(st.st_ino, parent, os.fsencode(os.path.basename(path)))

    def rename(self, old, new):
        with self.lock:
            os.rename(old, new)
            st, parent = os.stat(new), os.stat(os.path.dirname(new)).st_ino
            name = os.fsencode(os.path.basename(new))
            (self.gate.marking.made_dir if os.path.isdir(new) else self.gate.named)(st.st_ino, parent, name)

    def shown(self, path):
        with self.lock:
            opath = os.open(path, os.O_PATH)
            try:
                return self.gate.appearance.shown(os.fstat(opath), opath)
            finally:
                os.close(opath)


class Volume:
    """A tree, an index, a store, a server and a tier under one directory."""

    def __init__(self, base, store=None, **settings):
        self.base = Path(base)
        for name in ("tree", "index", "marks"):
            (self.base / name).mkdir(exist_ok=True)
        self.store = store if store is not None else MemoryStore()
        self.config = config.VolumeConfig(min_age=0.0, min_size=0, **settings)
        self.tree = open_tree(str(self.base / "tree"))
        self.root = os.path.realpath(self.base / "tree")
        self.start()

    def start(self, boot="boot", floor=0):
        self.index = Index.open(str(self.base / "index"))
        self.session = self.index.begin_session(boot, floor)
        self.marks_fd = os.open(self.base / "marks", os.O_RDONLY | os.O_DIRECTORY)
        self.marks = MarkWriter(self.marks_fd)
        ours, theirs = wire.make_pair()
        self.server = Server(self.tree, self.index, self.marks, self.session.epoch, ours)
        self._start_mover(theirs)

    def _start_mover(self, sock):
        self.link = ServerLink(wire.Link(sock, server=False))
        self.mover_sock = sock
        self.tier = Tier(self.tree, self.index, self.store, self.link, self.marks_fd, self.config)
        self.link.start(self)
        self.link.send(wire.Hello(os.getpid(), self.tier.drainer.position))
        self.link.send(wire.Limits(self.config.fetch_timeout, self.config.chunk_size))

    def next_mover(self):
        """Another in the place of one that has ended, under the same server."""
        ours, theirs = wire.make_pair()
        self.server.connect(ours)
        self.mover_sock.close()
        self._start_mover(theirs)

    def stop(self, clean=True):
        self.tier.close()
        self.server.close()
        self.mover_sock.close()
        self.marks.close()
        os.close(self.marks_fd)
        if clean:
            self.index.end_session()
        self.index.close()

    def close(self):
        """Stop for good. Who has hundreds of volumes, one after another, keeps no descriptor of them."""
        self.stop()
        for inode in self.server.gate.states.inodes.values():
            os.close(inode.opath)  # the server was stopped before it was told that the content has come
        self.tree.close()
        self.store.close()

    def restart(self, clean=True, boot="boot", floor=0):
        self.stop(clean)
        self.start(boot, floor)

    def take_back(self):
        """As `mount --force`, when another machine has had the store."""
        self.restart(floor=self.session.epoch + 2)

    # what the link reports
    def on_fetch(self, message, opath):
        self.tier.filler.on_fetch(message, opath)

    def on_cancel(self, message):
        self.tier.filler.on_cancel(message)

    def on_touches(self, message):
        pass

    def on_hurry(self):
        pass

    def on_poke(self, message):
        pass

    def on_lost(self):
        pass

    # helpers
    def path(self, name):
        return os.path.join(self.root, name)

    def item(self, name, ordered=True):
        path = self.path(name)
        st = os.stat(path)
        fd = os.open(path, os.O_PATH)
        try:
            handle = self.tree.handle_of(fd)
        finally:
            os.close(fd)
        parent = os.stat(os.path.dirname(path)).st_ino
        relative = os.fsencode(name)
        return Item(st.st_ino, handle, relative, parent, os.path.basename(relative), st.st_size, ordered)

    def demote(self, *names, **options):
        return self.tier.demote([self.item(name) for name in names], **options)

    def fetch(self, *names):
        return self.tier.fetch([self.item(name) for name in names])

    def record(self, name):
        self.tier.drain()
        return self.index.get(os.stat(self.path(name)).st_ino)

    def stub(self, name):
        fd = os.open(self.path(name), os.O_PATH)
        try:
            return self.tree.read_stub(fd)
        finally:
            os.close(fd)

    def settle(self, name, seconds=10.0):
        """Wait until a file has no stub attribute and nothing of it is under way."""
        deadline = time.monotonic() + seconds
        ino = os.stat(self.path(name)).st_ino
        while self.stub(name) is not None or self.tier.filler.arrival(ino) is not None:
            assert time.monotonic() < deadline, f"{name} does not settle"
            time.sleep(0.002)
