"""Looking through the tree, once for each custody epoch: an adopted tree, a lost index, an unclean stop.

Every regular file gets a record (from its stub attribute, where it has one), every directory its place, heat a
first guess from the times of last access. Files whose tuple is not their copy's are compared with it (custody
rule 16). A survey that is cut short begins anew: what it has recorded is only looked at again.

What is moved meanwhile, from where nobody has looked to where somebody has, would never be seen: a file that is
only renamed gets no record of it. So the marks tell where something has been moved to, and there it is looked
once more, until nothing has moved.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from tierfs import transitions
from tierfs.copying import Item
from tierfs.draining import forget
from tierfs.errors import ForeignStubError, TierError
from tierfs.index import Writer
from tierfs.inodes import InodeSet
from tierfs.kit import Kit, is_gone, is_passing, same_tuple
from tierfs.model import UNPROVEN, Copy, Record, Residency, new_fid
from tierfs.past import Ending
from tierfs.places import Directory, join
from tierfs.spelling import quoted
from tierfs.tier import Tier
from tierfs.tree import Tree

log = logging.getLogger("survey")

_COMMITS = 512  # under way at once; fewer where few descriptors may be open, of which a new record holds one
_VERIFY = 64  # files compared in one batch
_ROUNDS = 20  # of looks where something has moved: whoever renames all the time moves what has been seen
_FIRST_GENERATION = 1  # below all that a mount hands out; 0 means refused


class Survey:
    """One run over the tree. `left` says how many known files have yet to be looked at."""

    def __init__(
        self, tier: Tier, seed: Callable[[list[tuple[int, int, float]]], None], stopping: threading.Event
    ) -> None:
        """`seed` takes (ino, local bytes, seconds since last access)."""
        self._tier = tier
        self._kit = tier.kit
        self._seed = seed
        self._stopping = stopping
        self._futures: list[Future[None]] = []
        self._most = max(1, min(_COMMITS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self._guesses: list[tuple[int, int, float]] = []
        self._doubtful: list[Item] = []
        self._seen = InodeSet()
        self._found = InodeSet()  # directories
        self._astray: list[Directory] = []  # not where they were found, and yet to be looked for
        self._missed = InodeSet()  # all that ever were
        self._unread = 0  # directories that are there and could not be read
        self._known = 0
        self._first = False

    @property
    def left(self) -> int:
        """Known files not yet looked at; in a first look none has a copy that could be doubted for that."""
        unseen = 0 if self._first else self._known - len(self._seen)
        return max(0, unseen) + len(self._doubtful)

    def run(self) -> bool:
        """Look at everything; False if it was stopped. Where a directory cannot be read nothing is taken for
        gone. Raises IndexError_, OSError."""
        self._tier.drain()
        self._first = self._kit.index.never_surveyed
        self._known = self._kit.index.totals().files
        begun = time.monotonic()
        drainer = self._tier.drainer
        drainer.note_moves(True)
        try:
            self._walk([Directory.root(self._kit.tree)])
            for _ in range(_ROUNDS):
                moved = self._moved_meanwhile()
                if not moved:
                    break
                self._walk(moved)
        finally:
            drainer.note_moves(False)
        if self._stopping.is_set():
            return False
        self._flush()
        self._verify()
        if not self._unread:
            self._forget_unseen()
        if self._stopping.is_set():
            return False
        self._kit.index.commit(lambda w: w.set_surveyed(True)).result()
        log.info("looked through %d files in %.1f s", len(self._seen), time.monotonic() - begun)
        return True

    def _walk(self, pending: list[Directory]) -> None:
        """Take in these directories and all beneath them that nobody has found yet."""
        while pending and not self._stopping.is_set():
            pending.extend(self._directory(pending.pop()))

    def _moved_meanwhile(self) -> list[Directory]:
        """Where something has been moved to since this was last asked, and what was not where it was found."""
        if self._stopping.is_set():
            return []
        self._flush()
        # Whatever the server had done when it answers has its mark in the log.
        self._kit.server.await_marks()
        self._tier.drain()
        again, self._astray = self._astray, []
        for ino in self._tier.drainer.note_moves(True):
            fd = self._tier.places.look_at(ino)
            if fd < 0:
                continue  # gone, or moved once more
            try:
                place = self._tier.places.directory(ino)
                if place is not None:
                    again.append(Directory(ino, self._kit.tree.handle_of(fd), place.path))
            finally:
                os.close(fd)
        return again

    def _directory(self, here: Directory) -> list[Directory]:
        """Take in one directory; those in it. What vanishes meanwhile has marks of its own."""
        below: list[Directory] = []
        path = here.path
        try:
            fd = self._tier.places.opened(here)
        except OSError as error:
            self._leave_out(here, error)
            return below
        try:
            parent = os.fstat(fd).st_ino
            for text in self._names(fd, here):
                name = os.fsencode(text)
                try:
                    st = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    if st.st_dev != self._kit.tree.device:
                        # Its inode numbers mean others here.
                        log.warning("%s is on another filesystem: left out", quoted(join(path, name)))
                    elif stat.S_ISDIR(st.st_mode):
                        if self._kit.index.get_dir(st.st_ino) != (parent, name):
                            self._commit(partial(_put_dir, st.st_ino, parent, name))
                        if self._found.add(st.st_ino):
                            handle = self._kit.tree.handle_at(fd, name)
                            below.append(Directory(st.st_ino, handle, join(path, name)))
                    elif stat.S_ISREG(st.st_mode):
                        self._file(fd, parent, name, st, join(path, name))
                except FileNotFoundError:
                    continue
                except PermissionError:
                    raise  # it may be read, but not searched
                except OSError as error:
                    self._not_read(join(path, name), error, "file ")
        except PermissionError as error:
            self._leave_out(here, error)
        finally:
            os.close(fd)
        return below

    def _names(self, fd: int, here: Directory) -> list[str]:
        try:
            return os.listdir(fd)
        except OSError as error:
            self._leave_out(here, error)
            return []

    def _leave_out(self, here: Directory, error: OSError) -> None:
        """A directory that cannot be looked into. Raises the error where that is so just now only."""
        if not is_gone(error) and error.errno != errno.ELOOP:
            self._not_read(here.path, error, "directory ")
        elif self._missed.add(here.ino):
            log.debug("directory %s is not where it was: %s", quoted(here.path), error)
            self._astray.append(here)

    def _not_read(self, path: bytes, error: OSError, kind: str) -> None:
        """Raises the error where it is so just now only."""
        if is_passing(error):
            raise error
        log.debug("%s%s is left out: %s", kind, quoted(path), error)
        if not is_gone(error) and error.errno not in (errno.ELOOP, errno.EACCES):
            self._unread += 1
            what = f"{kind}{quoted(path)} cannot be read: nothing new in it is copied out"
            self._kit.troubles.note(f"{what}: {error.strerror}")

    def _file(self, dirfd: int, parent: int, name: bytes, st: os.stat_result, path: bytes) -> None:
        if not self._seen.add(st.st_ino):
            return  # another name of the same inode
        handle = self._kit.tree.handle_at(dirfd, name)
        record = self._kit.index.get(st.st_ino)
        if record is None or record.handle != handle:
            self._new(dirfd, parent, name, st, handle)
        else:
            if not record.parent or not record.name:
                self._commit(partial(_put_place, st.st_ino, parent, name))
            if self._first and record.residency is Residency.RESIDENT and record.copy is None:
                self._made_of_marks(dirfd, name, st, record)
            if self._is_doubtful(dirfd, name, record, st):
                self._doubtful.append(Item(st.st_ino, handle, path, parent, name, st.st_size))
                if len(self._doubtful) >= _VERIFY:
                    self._verify()
        if st.st_blocks:
            self._guesses.append((st.st_ino, st.st_blocks * 512, max(0.0, time.time() - st.st_atime)))
        if len(self._futures) >= self._most:
            self._flush()

    def _is_doubtful(self, dirfd: int, name: bytes, record: Record, st: os.stat_result) -> bool:
        """Something has touched it since its copy was proven. A stub that was emptied and written, and has no
        attribute any more, is a file like others, whatever became of the marks."""
        if record.copy is None or record.dirty:
            return False
        if same_tuple(record, record.copy, st) and not record.copy.unproven:
            return False
        return record.residency is Residency.RESIDENT or not self._is_stub(dirfd, name, st.st_ino)

    def _is_stub(self, dirfd: int, name: bytes, ino: int) -> bool:
        opath = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=dirfd)
        try:
            if os.fstat(opath).st_ino != ino:
                return True  # replaced just now, which has a mark
            return self._kit.tree.read_stub(opath) is not None
        except ForeignStubError:
            return True
        finally:
            os.close(opath)

    def _new(self, dirfd: int, parent: int, name: bytes, st: os.stat_result, handle: bytes) -> None:
        with ExitStack() as closing:
            opath = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=dirfd)
            closing.callback(os.close, opath)
            if os.fstat(opath).st_ino != st.st_ino:
                return  # replaced just now, which has a mark
            try:
                record = fresh_record(self._kit, opath, st, handle, parent, name)
            except ForeignStubError as error:
                self._kit.troubles.note(f"{self._kit.name_of(opath)}: {error}", st.st_ino)
                return
            made = self._commit(partial(put_new, record, opath, self._kit.holder(record.fid)))
            kept = closing.pop_all()  # the transaction looks at the file once more
        made.add_done_callback(lambda _: kept.close())

    def _made_of_marks(self, dirfd: int, name: bytes, st: os.stat_result, before: Record) -> None:
        """In a new index marks are read again that are older than the stub: nothing writes to one before its
        attribute is gone. Then the stub counts."""
        opath = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=dirfd)
        try:
            if os.fstat(opath).st_ino != st.st_ino or self._kit.tree.read_stub(opath) is None:
                return
            record = fresh_record(self._kit, opath, st, before.handle, before.parent, before.name)
        except ForeignStubError:
            return  # its data is all there is of it
        finally:
            os.close(opath)
        if self._kit.holder(record.fid) is None:
            self._commit(partial(put_instead, before, record))

    def _commit(self, run: Callable[[Writer], None]) -> Future[None]:
        future = self._kit.index.commit(run)
        self._futures.append(future)
        return future

    def _flush(self) -> None:
        """Wait for what was submitted, and hand on the guesses of heat."""
        futures, self._futures = self._futures, []
        for future in futures:
            future.result()
        guesses, self._guesses = self._guesses, []
        if guesses:
            self._seed(guesses)

    def _verify(self) -> None:
        """Compare doubtful files with their copies; those that differ are copied out anew. What cannot be
        compared now, since the store is away, is dirty from here on: nobody would look at it again."""
        items, self._doubtful = self._doubtful, []
        if not items or self._stopping.is_set():
            return
        left = items
        try:
            left = [item for item in self._tier.demote(items, self._stopping, punch=False) if item.reason]
        except (TierError, OSError) as error:
            log.warning("%d files were not compared with their copies: %s", len(items), error)
        for item in left:
            log.info("%s: not compared with its copy: %s", quoted(item.path), item.reason)
            self._commit(partial(_put_dirty, item.ino, item.handle))
        self._flush()

    def _forget_unseen(self) -> None:
        for record in gone(self._kit, self._seen):
            self._commit(partial(forget_gone, record))
            if self._stopping.is_set():
                break
        self._flush()


def gone(kit: Kit, seen: InodeSet) -> Iterator[Record]:
    """Records of files that are not there any more, among those that were not seen: their marks were lost.

    None where the tree cannot be asked for a file by its handle. Raises IndexError_, OSError.
    """
    start, more = 0, kit.tree.privileged
    while more:
        page = list(kit.index.records(start))
        yield from (record for record in page if record.ino not in seen and _is_gone(kit.tree, record))
        start, more = (page[-1].ino + 1, True) if page else (0, False)


def _is_gone(tree: Tree, record: Record) -> bool:
    try:
        os.close(tree.open_handle(record.handle, os.O_PATH))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise
        return True
    return False


def fresh_record(kit: Kit, opath: int, st: os.stat_result, handle: bytes, parent: int, name: bytes) -> Record:
    """What the file itself says of it, its stub attribute before all. Raises ForeignStubError, OSError."""
    stub = kit.tree.read_stub(opath)
    record = Record(
        st.st_ino, handle, new_fid(), _FIRST_GENERATION, size=st.st_size, blocks=st.st_blocks,
        local=st.st_blocks * 512, parent=parent, name=name,
    )  # fmt: skip
    if stub is not None:
        # Nothing is known of what happened since this copy was proven.
        copy = Copy(
            stub.generation, stub.tag, stub.digest, st.st_size, st.st_mtime_ns, st.st_ctime_ns,
            UNPROVEN, stub.chunk_shift,
        )  # fmt: skip
        full = max(st.st_blocks, -(-st.st_size // 4096) * 8)
        record = replace(record, fid=stub.fid, generation=stub.generation, copy=copy)
        record = replace(record, residency=Residency.STUB, blocks=full)
    return record


def _put_dir(ino: int, parent: int, name: bytes, w: Writer) -> None:
    w.put_dir(ino, parent, name)


def _put_place(ino: int, parent: int, name: bytes, w: Writer) -> None:
    record = w.get(ino)
    if record is not None and not (record.parent and record.name):
        w.put(replace(record, parent=parent, name=name))


def _put_dirty(ino: int, handle: bytes, w: Writer) -> None:
    """Unless it is so already. The generation is none that a copy has; those of this session are higher."""
    record = w.get(ino)
    if record is not None and record.handle == handle and not record.dirty:
        w.put(transitions.wrote(record, record.generation + 1))


def put_new(record: Record, opath: int, twin: Record | None, w: Writer) -> None:
    """Unless a mark was quicker, or the file has no name any more. A second inode with a stub of the same file
    stays without a record until it is fetched, and then gets an id of its own."""
    before = w.get(record.ino)
    if before is not None and before.handle == record.handle:
        return
    if twin is not None and twin.handle != record.handle and w.get(twin.ino) == twin:
        return
    if before is not None:
        forget(w, before, Ending(time.time_ns()))
    if _is_named(opath):
        w.put(record)


def _is_named(opath: int) -> bool:
    """Asked in the transaction that makes a record of the file: if it has a name, the mark of its end has yet
    to come. If it has none, that may be in the index already, and the record would be there for ever."""
    return os.fstat(opath).st_nlink > 0


def put_instead(before: Record, record: Record, w: Writer) -> None:
    """Unless a mark, or work on the file, was quicker."""
    if w.get(record.ino) == before:
        w.put(record)


def forget_gone(before: Record, w: Writer) -> None:
    """Unless the inode's number is another file's by now."""
    record = w.get(before.ino)
    if record is not None and record.handle == before.handle:
        forget(w, record, Ending(time.time_ns()))
