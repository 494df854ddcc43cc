"""A session with the Linux kernel over /dev/fuse: receive, run, reply; passthrough where it is permitted.

One thread serves requests one after another. A request whose operation is Blocked is parked and run again as a
whole when its wait fires; a Slow one is finished by a small pool of threads, which reply themselves. A request
gets exactly one reply, from whoever takes it out of `_parked`, or ran it, or finished it.
"""

from __future__ import annotations

import collections
import enum
import errno
import io
import logging
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tierfs.dirs import STEADY
from tierfs.errors import TierError
from tierfs.fuse import hot
from tierfs.fuse import protocol as p
from tierfs.fuse.backing import KernelBacking
from tierfs.fuse.interrupts import patience
from tierfs.fuse.mounting import filesystem_of
from tierfs.fuse.operations import Answer, Message, Operation, Operations
from tierfs.fuse.spinning import Spinner
from tierfs.fuse.splicing import Splicer
from tierfs.vfs import Vfs
from tierfs.waits import Blocked, Slow, Stretch, Wait

log = logging.getLogger("fuse")

SLOW_THREADS = 4
# Bytes; the kernel takes the lesser of this and the mount's read_ahead_kb. A page less than 1 MiB: with its
# header such a reply fits a pipe (splicing).
READAHEAD = (1 << 20) - 4096
_STACKED = frozenset({"overlay", "ecryptfs"})
_GATHER = 4096  # a reply larger than this is not worth copying behind its header
_RESENT = 1 << 63
_MOST_ERRNO = 511


class End(enum.Enum):
    """Why a session is over."""

    UNMOUNTED = "unmounted"
    ABORTED = "aborted"


@dataclass(eq=False, slots=True)
class _Parked:
    """A request that waits, with a copy of its bytes."""

    operation: Operation
    message: bytes
    unique: int
    nodeid: int
    wait: Wait
    runnable: collections.deque[_Parked]

    def wake(self) -> None:
        """Not run from within the gate, which is in the middle of something when a wait fires."""
        self.runnable.append(self)


class Session:
    """Serves one mount. Not thread-safe; `gate.states.backing` is set once passthrough is known to work."""

    def __init__(
        self,
        fd: int,
        vfs: Vfs,
        *,
        passthrough: bool,
        spinner: Spinner | None = None,
        receiver: hot.Receivers = hot.receiver,
    ) -> None:
        """`fd`: /dev/fuse of a mount, made non-blocking; stays the caller's. `receiver`: how requests come."""
        os.set_blocking(fd, False)
        self._device = io.FileIO(fd, "r+", closefd=False)
        self._fd = fd
        self._vfs = vfs
        self._ledger = vfs.ledger
        self._passthrough = passthrough
        self.spinner = spinner or Spinner(enabled=False)
        self._buffer = bytearray(p.BUFFER)
        self._view = memoryview(self._buffer)
        self._receiver: hot.Receiver = receiver(fd, self._buffer, vfs, self._refused, self._failed)
        self._splicer = Splicer(fd)
        self._parked: dict[int, _Parked] = {}
        self._interrupted: dict[int, float] = {}  # since when
        self._runnable: collections.deque[_Parked] = collections.deque()
        self._pool = ThreadPoolExecutor(SLOW_THREADS, "slow")
        steady = filesystem_of(vfs.tree.device) in STEADY
        operations = Operations(vfs, self._receiver.entry, self._outdated, opendir=not steady)
        self._table: list[Operation] = [operation or _unsupported for operation in operations.table]
        self._table[p.Op.INIT] = self._init
        self._table[p.Op.INTERRUPT] = self._interrupt
        self._table[p.Op.DESTROY] = self._destroy
        self._overtaking = [self._table[op] for op in (p.Op.FORGET, p.Op.BATCH_FORGET, p.Op.INTERRUPT)]
        self.ready = False  # the kernel has got its answer to INIT
        self.lasting = False  # the kernel asks a successor again what this one leaves unanswered: Linux 6.9
        self._resent = False  # what the server before left unanswered has not all come yet
        self._again: set[int] = set()  # those requests
        self.end: End | None = None

    def fileno(self) -> int:
        """For poll."""
        return self._fd

    @property
    def form(self) -> str:
        """How it serves: `compiled` or `pure`."""
        return hot.form(self._receiver)

    def take_over(self) -> None:
        """Go on with a session that another process has begun: have all sent again that it has not answered.

        Call it when the vfs has taken over. Raises OSError.
        """
        self.ready = self.lasting = self._resent = True
        self._device.write(p.OUT.pack(p.OUT_SIZE, p.NOTIFY_RESEND, 0))

    @property
    def interrupted(self) -> bool:
        """Somebody has had a signal that was no reason yet to stop waiting."""
        return bool(self._interrupted)

    @property
    def writers_open(self) -> bool:
        """A file is open for writing, as far as the kernel has told."""
        return self._vfs.files.writers > 0

    def confirm(self, most: int) -> list[int]:
        """Prove so many of the files that were believed, and tell the kernel which are not as it was told.

        Returns those nodes that it does not know: it may have yet to take in the answer that told it of them,
        and what is not true any more. Somebody has to go on telling it for a while.
        """
        return [nodeid for nodeid in self._vfs.confirm(most) if not self._knows_outdated(nodeid)]

    def disbelieve(self, most: int) -> list[int]:
        """Have the kernel ask again for so many of the files that were believed, and have not been proven.
        Returns as `confirm`."""
        unknown = self._receiver.disbelieve(most)
        if unknown is None:
            unknown = [nodeid for nodeid in self._vfs.disbelieve(most) if not self._knows_outdated(nodeid)]
        return unknown

    def close(self) -> None:
        """Finish what the threads still do. Parked requests get no answer: the connection's end is theirs."""
        self._pool.shutdown(wait=True)
        self._receiver.close()
        self._splicer.close()
        self._parked.clear()

    # --- requests -----------------------------------------------------------------------------------------

    def serve(self, most: int, until: float = 0.0, others: int = -1) -> int:
        """Answer what is there, at most so many requests, after a burst with a little patience. How many.

        Once there was one it also sleeps for the next, until then (CLOCK_MONOTONIC) or `others` can be read.
        """
        # What a server before has left is counted as it comes, one by one.
        receiver = hot.Pure(self._fd, self._buffer) if self._resent else self._receiver
        receive, table, head = receiver.receive, self._table, p.HEAD.unpack_from
        view, buffer, write_request = self._view, self._buffer, p.Op.WRITE
        receiver.others = others
        served, asleep = 0, 0.0
        while served < most:
            try:
                size = receive(most - served, asleep)
                if size is None:
                    size = self._linger(receiver)
            except OSError as error:
                if self._at_end(error):
                    return served
                continue
            if size is None:
                return served
            served += receiver.answered
            # Those who are to be run again come first; and what spins has to know how long it slept.
            asleep = 0.0 if self._runnable or self.spinner.enabled else until
            if not size:
                continue
            served += 1
            _, opcode, unique, nodeid = head(buffer)
            message = view[:size] if opcode == write_request else view[:size].tobytes()
            self._run(table[opcode] if opcode < p.OPS else _unsupported, message, unique, nodeid)
            if self.end is not None:
                return served
        return served

    def _linger(self, receiver: hot.Receiver) -> int | None:
        """Nothing is there: try again for as long as another request is likely. Raises OSError."""
        patience = self.spinner.patience
        if not patience:
            return None
        receive, clock = receiver.receive, time.perf_counter
        until = clock() + patience
        while clock() < until:
            size = receive(1, 0.0)
            if size is not None:
                self.spinner.hit()
                return size
        self.spinner.miss()
        return None

    def _at_end(self, error: OSError) -> bool:
        """Whether the session is over; otherwise it was a request that its caller gave up while we read it."""
        if error.errno in (errno.ENODEV, errno.ECONNABORTED):
            self.end = End.UNMOUNTED if error.errno == errno.ENODEV else End.ABORTED
            return True
        if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
            return False
        raise error

    def run_ready(self) -> None:
        """Run again what has got what it waited for. Call it after the gate has been given a turn."""
        while self._runnable:
            parked = self._runnable.popleft()
            if self._parked.get(parked.unique) is not parked:
                continue  # interrupted meanwhile
            del self._parked[parked.unique]
            wait = parked.wait
            if wait.errno:
                log.warning("%s failed: %s", _described(parked.message), wait.reason or os.strerror(wait.errno))
                self._fail(parked.unique, wait.errno)
            else:
                self._run(parked.operation, parked.message, parked.unique, parked.nodeid)
                self._receiver.anybody_told()  # what a Slow one is told is no node's attributes

    def _run(self, operation: Operation, message: Message, unique: int, nodeid: int) -> None:
        ledger = self._ledger
        ledger.request = unique
        if self._resent or unique >= _RESENT:
            self._before_again(operation, unique)
        try:
            answer = operation(message, nodeid)
        except Blocked as blocked:
            parked = _Parked(operation, bytes(message), unique, nodeid, blocked.wait, self._runnable)
            self._parked[unique] = parked
            if unique >= _RESENT:
                self._interrupted[unique] = time.monotonic()  # if it was, only the server before has been told
            blocked.wait.add(parked.wake)
        except Exception as error:
            self._fail(unique, _errno_of(error, message))
        else:
            self._answer(unique, answer, message)
        if ledger.replayed is not None:
            ledger.replayed = None
            if unique not in self._parked:
                ledger.settle(ledger.request)
                self._vfs.done_again(last=False)

    def _before_again(self, operation: Operation, unique: int) -> None:
        """After a takeover: have a request that is sent again meet what its first run has done.

        The kernel puts these before all others but what needs no answer. So with the first other one it is
        known which have been answered by the server before: those that have not come.
        """
        request = self._ledger.request = unique & ~_RESENT
        if unique >= _RESENT:
            self._again.add(request)
            self._vfs.again(request)
        elif operation not in self._overtaking:
            self._resent = False
            self._ledger.settle_all_but(self._again)
            self._vfs.done_again(last=True)

    def _answer(self, unique: int, answer: Answer, message: Message) -> None:
        if isinstance(answer, bytes):
            self._reply(unique, answer)
        elif isinstance(answer, Stretch):
            self._reply_with(unique, answer, message)
        elif answer is not None:
            self._pool.submit(self._finish, unique, answer, bytes(message[: p.IN]))

    def _finish(self, unique: int, slow: Slow, head: bytes) -> None:
        """In a thread of the pool: the rest of an operation."""
        try:
            self._reply(unique, slow.run())
        except Exception as error:
            self._fail(unique, _errno_of(error, head))

    # --- replies ------------------------------------------------------------------------------------------

    def _reply(self, unique: int, body: bytes) -> None:
        size = p.OUT_SIZE + len(body)
        head = p.OUT.pack(size, 0, unique)
        try:
            if size > _GATHER:
                os.writev(self._fd, (head, body))
            else:
                self._device.write(head + body)
        except OSError as error:
            self._not_replied(unique, error)

    def _reply_with(self, unique: int, stretch: Stretch, message: Message) -> None:
        try:
            if self._splicer.reply(unique, stretch):
                return
        except OSError as error:
            self._not_replied(unique, error)
            return
        try:
            body = os.pread(stretch.fd, stretch.length, stretch.offset)
        except OSError as error:  # the disk's: whoever reads has to hear of it
            self._fail(unique, _errno_of(error, message))
        else:
            self._reply(unique, body)

    def _fail(self, unique: int, number: int) -> None:
        try:
            self._device.write(p.OUT.pack(p.OUT_SIZE, -number, unique))
        except OSError as error:
            self._not_replied(unique, error)

    def _outdated(self, nodeid: int) -> None:
        """Have the kernel ask for attributes anew, of what it knows."""
        self._knows_outdated(nodeid)

    def _knows_outdated(self, nodeid: int) -> bool:
        """The same, of what it may not know: whether it does. It waits for nothing: no pages are concerned."""
        try:
            self._device.write(p.inval_attributes(nodeid))
        except OSError as error:
            self._not_replied(0, error)
            return error.errno != errno.ENOENT
        return True

    def _refused(self, unique: int, number: int) -> None:
        self._not_replied(unique, OSError(number, os.strerror(number)))

    def _failed(self, unique: int, error: Exception) -> None:
        self._fail(unique, _errno_of(error, self._view[: p.IN]))

    def _not_replied(self, unique: int, error: OSError) -> None:
        # The kernel no longer knows the request (aborted), or the connection is gone: reading says which.
        if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED):
            log.error("the kernel refused a reply (request %d): %s", unique & ~_RESENT, error)

    # --- requests about the session itself ------------------------------------------------------------------

    def _init(self, message: bytes, _nodeid: int) -> None:
        (unique,) = p.U64.unpack_from(message, 8)
        major, minor, _readahead, low = p.INIT_IN_OLD.unpack_from(message, p.IN)
        if major != p.MAJOR or minor < p.OLDEST_MINOR:
            log.error("the kernel speaks FUSE %d.%d; 7.%d (Linux 5.13) is needed: use --binding fusepy",
                      major, minor, p.OLDEST_MINOR)  # fmt: skip
            self._fail(unique, errno.EPROTO)
            self.end = End.ABORTED
            return
        offered = low
        if low & p.Feature.INIT_EXT.bit:
            offered |= p.INIT_IN.unpack_from(message, p.IN)[4] << 32
        depth = 2 if filesystem_of(os.fstat(self._vfs.tree.rootfd).st_dev) in _STACKED else 1
        reply, agreed = p.init_reply(minor, READAHEAD, offered, self._passthrough, depth)
        self._reply(unique, reply)
        if agreed & p.Feature.PASSTHROUGH.bit:
            self._try_passthrough()
        self.ready, self.lasting = True, bool(agreed & p.Feature.HAS_RESEND.bit)
        passthrough = self._vfs.gate.states.backing is not None
        self._ledger.serve(passthrough=passthrough)
        log.info("FUSE 7.%d, passthrough %s", min(minor, p.MINOR), "on" if passthrough else "off")

    def _try_passthrough(self) -> None:
        """Let the gate use passthrough if the kernel takes a file of the backing filesystem for it."""
        backing = KernelBacking(self._fd)
        try:
            with tempfile.TemporaryFile(dir=self._vfs.tree.path) as probe:
                backing.close(backing.open(probe.fileno()))
        except OSError as error:
            log.warning("passthrough is not to be had here: %s", error)
            return
        self._vfs.gate.states.backing = backing

    def _interrupt(self, message: bytes, _nodeid: int) -> None:
        (unique,) = p.U64.unpack_from(message, p.IN)
        # Otherwise it has been answered, or is in a system call that cannot be cut short.
        if unique in self._parked:
            self._interrupted[unique] = time.monotonic()
            self.look_after_interrupted()

    def look_after_interrupted(self) -> None:
        """Answer those who should wait no longer. Call it now and then: an interrupt is told only once."""
        now = time.monotonic()
        for unique, since in list(self._interrupted.items()):
            parked = self._parked.get(unique)
            if parked is None:
                del self._interrupted[unique]
            elif now - since >= patience(p.CALLER.unpack_from(parked.message, p.CALLER_AT)[2]):
                del self._interrupted[unique], self._parked[unique]
                parked.wait.discard(parked.wake)
                self._fail(unique, errno.EINTR)

    def _destroy(self, _message: bytes, _nodeid: int) -> bytes:
        self.end = End.UNMOUNTED
        return b""


def _unsupported(_message: Message, _nodeid: int) -> bytes:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def _described(message: Message) -> str:
    _, opcode, _, nodeid = p.HEAD.unpack_from(message)
    name = p.Op(opcode).name if opcode in p.Op._value2member_map_ else f"request {opcode}"
    return f"{name} of node {nodeid}"


def _errno_of(error: Exception, message: Message) -> int:
    """What the kernel is told. What a person should hear of is logged, here and nowhere else."""
    if isinstance(error, TierError):
        log.error("%s: %s", _described(message), error)
        return error.errno
    if isinstance(error, OSError) and error.errno is not None and 0 < error.errno <= _MOST_ERRNO:
        if error.errno == errno.EIO:
            log.error("%s: %s", _described(message), error)
        return error.errno
    log.error("%s failed unexpectedly: %r, %s", _described(message), error, _where(error))
    return errno.ENOMEM if isinstance(error, MemoryError) else errno.EIO


def _where(error: BaseException) -> str:
    """The calls that led to an error. No traceback: it reads source files, which may lie in our mount."""
    calls = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        calls.append(f"{os.path.basename(code.co_filename)}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return "in " + " > ".join(calls)
