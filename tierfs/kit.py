"""What all parts of the tier share: tree, index, store, the link to the server, pools and settings."""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from tierfs.config import VolumeConfig
from tierfs.errors import BusyError, IndexError_
from tierfs.index import Index, Writer
from tierfs.model import UNPROVEN, Copy, Record
from tierfs.restless import Restless
from tierfs.serverlink import ServerLink
from tierfs.spelling import quoted
from tierfs.store.base import ObjectStore
from tierfs.transfer import Pool, Rate, Troubles
from tierfs.tree import Tree, fd_path

log = logging.getLogger("tier")

# What fetches leave to the index: a share of the filesystem, at most so many bytes. ext4 counts up to 4096
# clusters as free that it gives to nobody, hence twice that.
_INDEX_SHARE = 0.03
_INDEX_MOST = 32 << 20
GONE = "is not there any more"  # why a file stays as it is
TICK = 20_000_000  # ns; twice the coarsest granularity of a ctime (a jiffy at 100 Hz)
READ_FLAGS = os.O_RDONLY | os.O_NOATIME | os.O_NONBLOCK | os.O_NOFOLLOW
WRITE_FLAGS = os.O_RDWR | os.O_NOATIME | os.O_NONBLOCK | os.O_NOFOLLOW


class Claims:
    """Which inode is in whose hands: demotion, fetch and recovery never work on one at the same time."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._held: set[int] = set()

    def take(self, ino: int, seconds: float = 0.0) -> bool:
        """Claim an inode, waiting at most so long."""
        with self._free:
            if not self._free.wait_for(lambda: ino not in self._held, seconds):
                return False
            self._held.add(ino)
            return True

    def give(self, ino: int) -> None:
        """The claim ends."""
        with self._free:
            self._held.discard(ino)
            self._free.notify_all()


class Outcomes:
    """Who waits for a file to become resident, and how that ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: dict[int, list[Future[tuple[int, str]]]] = {}

    def expect(self, ino: int) -> Future[tuple[int, str]]:
        """The (errno, reason) of the next end of this inode's fetch; ETIMEDOUT: the store has not answered."""
        future: Future[tuple[int, str]] = Future()
        with self._lock:
            self._futures.setdefault(ino, []).append(future)
        return future

    def tell(self, ino: int, number: int, reason: str) -> None:
        """It has ended; errno 0: it is resident."""
        with self._lock:
            futures = self._futures.pop(ino, [])
        for future in futures:
            future.set_result((number, reason))

    def forget(self, ino: int, future: Future[tuple[int, str]]) -> None:
        """Nobody waits for this one any more."""
        with self._lock:
            left = [each for each in self._futures.pop(ino, []) if each is not future]
            if left:
                self._futures[ino] = left


class InUse:
    """Objects that are being read for somebody, whatever the index says of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: Counter[str] = Counter()

    @contextmanager
    def holding(self, key: str) -> Iterator[None]:
        """For as long as the block runs."""
        with self._lock:
            self._keys[key] += 1
        try:
            yield
        finally:
            with self._lock:
                self._keys[key] -= 1
                self._keys += Counter()

    def __contains__(self, key: str) -> bool:
        with self._lock:
            return key in self._keys


class Movements:
    """What came to the local disk, what left it and what is gone, since this was last taken: heat's input.

    `told` is called, in whichever thread, when something has come.
    """

    def __init__(self) -> None:
        self.told: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._here: dict[int, tuple[int, int, bool]] = {}
        self._left: set[int] = set()
        self._gone: set[int] = set()

    def here(self, ino: int, size: int, grown: int, lent: bool = False) -> None:
        """The file is local with `size` bytes, `grown` of them new; `lent`: for a scan alone."""
        self.many({ino: (size, grown)}, (), lent)

    def many(self, here: Mapping[int, tuple[int, int]], gone: Iterable[int], lent: bool = False) -> None:
        """Files that are local (inode -> size, grown), and others that are no more."""
        with self._lock:
            for ino, (size, grown) in here.items():
                _, more, before = self._here.get(ino, (0, 0, True))
                self._here[ino] = size, grown + more, lent and before
                self._left.discard(ino)
                self._gone.discard(ino)
            for ino in gone:
                self._here.pop(ino, None)
                self._left.discard(ino)
                self._gone.add(ino)
        if here:
            self.told()

    def left(self, ino: int) -> None:
        """The file is a stub now."""
        with self._lock:
            self._here.pop(ino, None)
            self._left.add(ino)

    def gone(self, ino: int) -> None:
        """The file is no more."""
        self.many({}, (ino,))

    def take(self) -> tuple[list[tuple[int, int, int, bool]], set[int], set[int]]:
        """(ino, size, grown, lent) of what is here, what left, what is gone; and begin anew."""
        with self._lock:
            here = [(ino, *what) for ino, what in self._here.items()]
            taken = here, self._left, self._gone
            self._here, self._left, self._gone = {}, set(), set()
            return taken

    def give_back(self, here: list[tuple[int, int, int, bool]], left: set[int], gone: set[int]) -> None:
        """What was taken, and has come to nothing; what has happened since counts more."""
        with self._lock:
            for ino, size, grown, lent in here:
                if ino in self._here:
                    newer, more, still = self._here[ino]
                    self._here[ino] = newer, more + grown, lent and still
                elif ino not in self._left and ino not in self._gone:
                    self._here[ino] = size, grown, lent
            self._left |= {ino for ino in left if ino not in self._here and ino not in self._gone}
            self._gone |= {ino for ino in gone if ino not in self._here}


@dataclass
class Kit:
    """Held by each part. `custody` is the present custody epoch, and no proof from before `taken` says anything
    of the store (see index.Session); `config` is replaced as a whole on reload.

    `withheld` says why nothing may be written to the store or removed from it now, "" where it may;
    `claim_tried` is set once the store has been asked for the first time: an order given right after the mount
    waits for that. `still_ours` asks the store whose it is: it raises VolumeError where another machine has
    taken it, StoreError where that cannot be told. `fence` does so in a short time or goes by the last answer:
    before each batch of copies and punches. It raises VolumeError alone. `snapshot_wanted` is set while garbage
    waits for a snapshot of the namespace in which it is not.
    """

    tree: Tree
    index: Index
    store: ObjectStore
    server: ServerLink
    config: VolumeConfig
    custody: int
    taken: int
    fetches: Pool
    uploads: Pool
    withheld: str = ""
    claim_tried: threading.Event = field(default_factory=threading.Event)
    movements: Movements = field(default_factory=Movements)
    restless: Restless = field(default_factory=Restless)
    still_ours: Callable[[], None] = lambda: None
    fence: Callable[[], None] = lambda: None
    snapshot_wanted: threading.Event = field(default_factory=threading.Event)
    in_use: InUse = field(default_factory=InUse)
    claims: Claims = field(default_factory=Claims)
    outcomes: Outcomes = field(default_factory=Outcomes)
    troubles: Troubles = field(default_factory=Troubles)
    fetched: Rate = field(default_factory=Rate)
    uploaded: Rate = field(default_factory=Rate)

    @property
    def chunk_shift(self) -> int:
        """Log2 of the chunk size for new copies."""
        return self.config.chunk_size.bit_length() - 1

    def holder(self, fid: bytes) -> Record | None:
        """The record of a file id; a damaged one is none. Not for garbage: what has no record may go."""
        try:
            return self.index.get_by_fid(fid)
        except IndexError_ as error:
            log.error("%s", error)
            return None

    def has_room(self, count: int) -> bool:
        """So many bytes of content fit on the local disk, and the index can still grow: without that nothing
        could be evicted any more."""
        space = self.tree.space()
        return space.free >= count + min(int(space.total * _INDEX_SHARE), _INDEX_MOST)

    def open(self, ino: int, handle: bytes, flags: int, path: bytes | None = None) -> int:
        """Open an inode by its handle or, without that privilege, by path beneath the root, verified.

        Raises OSError: ESTALE when it is gone or elsewhere.
        """
        if self.tree.privileged:
            fd = self.tree.open_handle(handle, flags)
        elif path is not None:
            fd = os.open(path or b".", flags | os.O_CLOEXEC, dir_fd=self.tree.rootfd)
        else:
            raise OSError(errno.ESTALE, "its place in the tree is not known")
        if os.fstat(fd).st_ino != ino or (not self.tree.privileged and self.tree.handle_of(fd) != handle):
            os.close(fd)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return fd

    def name_of(self, fd: int) -> str:
        """How to name an open file of the tree to a person: its path as the kernel knows it, in quotes. Never
        raises: who has an error to tell must not meet another."""
        root = os.path.realpath(self.tree.path) + "/"
        try:
            return quoted(os.readlink(fd_path(fd)).removeprefix(root))
        except OSError as error:  # its path is longer than the kernel tells
            log.debug("a file has no name for people: %s", error)
            with suppress(OSError):
                return f"inode {os.fstat(fd).st_ino}"
            return "a file"

    @contextmanager
    def writable(self, fd: int) -> Iterator[None]:
        """Let an owner without privileges write content and attributes of a file of mode 0444 and the like.

        Moves ctime where it had to. Raises OSError.
        """
        with self.tree.lending(fd, stat.S_IWUSR):
            yield


def is_passing(error: OSError) -> bool:
    """It is of this process or machine just now, and says nothing of the file."""
    return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR)


def is_gone(error: Exception) -> bool:
    """It says that there is no such file any more."""
    return isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


def unopened(error: OSError) -> str:
    """Why a file that could not be opened stays."""
    if is_gone(error):
        return GONE
    if error.errno == errno.ETXTBSY:
        return "is being run"
    if error.errno == errno.EPERM:
        return "may not be changed: it is immutable or append-only (`lsattr` shows it)"
    return f"cannot be opened: {error.strerror}"


def intend_all(keys: list[str], w: Writer) -> None:
    """In a write transaction, before these objects are put: what no record comes to refer to is collected."""
    for key in keys:
        w.intend(key)


def abandon_intended(keys: list[str], w: Writer) -> None:
    """In a write transaction: of these, what has not become a copy is garbage now."""
    for key in keys:
        if w.intended(key):
            w.abandon(key)


def may_be_gone(kit: Kit, copy: Copy) -> bool:
    """Others have had the store since this copy was last proven: its object may be missing."""
    return copy.custody & ~UNPROVEN < kit.taken


def proven(record: Record | None, st: os.stat_result, custody: int) -> bool:
    """The file's bytes are known to equal its copy's: clean, unbroken custody, tuple unchanged."""
    if record is None or record.copy is None or record.dirty:
        return False
    return record.copy.custody == custody and same_tuple(record, record.copy, st)


def same_tuple(record: Record, copy: Copy, st: os.stat_result) -> bool:
    """Nothing has touched the inode since its copy was last proven."""
    times = (copy.ctime, record.left_ctime)
    return copy.size == st.st_size and copy.mtime == st.st_mtime_ns and st.st_ctime_ns in times


def read_exactly(fd: int, offset: int, length: int) -> bytes:
    """These bytes of a local file. Raises BusyError if it has become shorter, OSError."""
    data = os.pread(fd, length, offset)
    if len(data) == length:
        return data
    parts = [data]
    got = len(data)
    while data and got < length:
        data = os.pread(fd, length - got, offset + got)
        parts.append(data)
        got += len(data)
    if got < length:
        raise BusyError("it became shorter while it was read")
    return b"".join(parts)
