"""The mount server's process: answers the kernel, and waits for nothing but kernel, mover and supervisor.

Started by the supervisor with inherited descriptors. Ends when the mount does, or on SIGTERM; its last message
says whether custody was unbroken. Without its supervisor it goes on serving: programs have files open.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from tierfs import channel, failpoints, slices, wire
from tierfs.errors import IndexError_, TierError, VolumeError
from tierfs.fuse import telling, watching
from tierfs.fuse.backing import KernelBacking
from tierfs.fuse.kernel import End, Session
from tierfs.fuse.spinning import Spinner
from tierfs.gate import Gate
from tierfs.heat_index import HeatIndex
from tierfs.index import Index
from tierfs.ledger import Incompatible, Ledger
from tierfs.marks import Entry, MarkReader, MarkWriter
from tierfs.tree import Tree, open_tree
from tierfs.vfs import Vfs
from tierfsd import logs
from tierfsd.confirming import Confirming

log = logging.getLogger("server")

BATCH = 128  # requests between two looks at the mover and the supervisor
UNHEARD = 512  # requests between two looks at edits behind the mount, at most
TICK_SECONDS = 0.25  # from the first request after an idle time to the gate's turn
_STATFS_SECONDS = 2.0  # how long the sum of evictable bytes is believed


_NEVER = float("inf")


class Evictable:
    """How much could be freed at once: what is local and has a copy. Read from the index now and then."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._bytes = 0
        self._until = 0.0

    def __call__(self) -> int:
        now = time.monotonic()
        if now >= self._until:
            totals = self._index.totals()
            self._bytes = max(0, totals.local_bytes - totals.dirty_bytes)
            self._until = now + _STATFS_SECONDS
        return self._bytes


class HeatReader:
    """What `user.tierfs.heat` says. The mover makes the environment, perhaps after this process began."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._heat: HeatIndex | None = None

    def __call__(self, ino: int) -> bytes | None:
        if self._heat is None:
            try:
                self._heat = HeatIndex(self._path, 0, readonly=True)
            except IndexError_ as error:
                log.debug("no heat yet: %s", error)
                return None
        return b"%.3f" % self._heat.heat(ino)


class Server:
    """The event loop of one mount: the kernel first, then the mover, then the supervisor."""

    def __init__(
        self,
        session: Session,
        vfs: Vfs,
        gate: Gate,
        supervisor: channel.Channel,
        signal_fd: int,
        watch: watching.Watch | None = None,
    ) -> None:
        """From `signal_fd` the numbers of signals can be read: SIGTERM ends it, SIGUSR1 logs what it holds."""
        self._vfs = vfs
        self._signal_fd = signal_fd
        self._session = session
        self._gate = gate
        self._supervisor = supervisor
        self._link_fd = -1
        self._stopping = False
        self._said_ready = self._said_suspect = False
        self._next_tick = 0.0
        self._spinner = session.spinner
        # All but the kernel, as one descriptor.
        self._others = select.epoll()
        self._poll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        supervisor.sock.setblocking(False)
        for fd in (session.fileno(), self._others.fileno()):
            self._poll.register(fd, select.EPOLLIN)
        self._watch(supervisor.fileno(), self._hear_supervisor)
        self._watch(signal_fd, self._signalled)
        self._edits = watch
        self._next_look = _NEVER if watch is None else 0.0
        self._unheard = 0  # requests since edits were heard
        self._confirming = Confirming(
            gate.lasting.believed,
            lambda most: self._tell_later(session.confirm(most)),
            lambda most: self._tell_later(session.disbelieve(most)),
        )
        if watch is not None:
            self._handlers[watch.fileno()] = self._hear_edits
            self._listening = False
        self._kept: set[int] = set()
        gate.mover.on_stuck = self._stuck
        vfs.nodes.keep, vfs.nodes.let_go = self._keep, self._let_go

    def _watch(self, fd: int, handler: Callable[[], None]) -> None:
        self._handlers[fd] = handler
        self._others.register(fd, select.EPOLLIN)

    def run(self) -> bool:
        """Serve until the mount ends or somebody says so. Returns whether custody is unbroken."""
        session = self._session
        while session.end is None and not self._stopping:
            until = min(self._next_due(), time.monotonic() + TICK_SECONDS)
            served = session.serve(BATCH, until, self._others.fileno())
            session.run_ready()
            if session.ready and not self._said_ready:
                self._said_ready = True
                lasting = self._vfs.tree.privileged and session.lasting
                self._tell(channel.Ready(self._gate.states.backing is not None, lasting, session.form))
            self._turn(served)
            self._hear_in_time(served)
            self._confirming.turn(time.monotonic(), served)
            self._events(0.0 if served == BATCH else self._pause())
            session.run_ready()
        self._gate.tick(time.monotonic())
        # Releases that the unmount has overtaken count as open: that loses custody, never data.
        return session.end is End.UNMOUNTED and not session.writers_open

    def _turn(self, served: int) -> None:
        """Give the gate its turn when it is due; after an idle time that is soon after the first request."""
        now = time.monotonic()
        if served:
            self._next_tick = min(self._next_tick, now + TICK_SECONDS)
        if now >= self._next_tick:
            self._next_tick = now + self._gate.tick(now)
            self._session.run_ready()
            self._session.look_after_interrupted()
        if self._session.interrupted:
            self._next_tick = min(self._next_tick, now + TICK_SECONDS)
        if now >= self._next_look or (self._edits is not None and self._edits.hurried):
            self._look_for_edits(now)

    def _next_due(self) -> float:
        return min(self._next_tick, self._next_look, self._confirming.due)

    def _pause(self) -> float:
        return max(0.0, self._next_due() - time.monotonic())

    def _hear_in_time(self, served: int) -> None:
        """Our own changes are events as well, and each new one the kernel compares with those that wait."""
        self._unheard += served
        if self._edits is not None and self._unheard >= UNHEARD:
            self._hear_edits()

    def _hear_edits(self) -> None:
        """There are some, perhaps our own: many are taken at once."""
        self._unheard = 0
        watch = self._edits
        assert watch is not None
        pause = watch.hear()
        watch.tell()
        # What could not be told is tried again soon, however many requests there are.
        self._next_look = time.monotonic() + (min(pause, watching.SOON) if watch.busy else pause)
        self._listen(watch, False)

    def _listen(self, watch: watching.Watch, on: bool) -> None:
        """Whether events end a sleep. Where not, each costs an eighth less: it looks for nobody to wake."""
        if on and not self._listening:
            self._others.register(watch.fileno(), select.EPOLLIN)
        elif self._listening and not on:
            self._others.unregister(watch.fileno())
        self._listening = on

    def _tell_later(self, nodeids: list[int]) -> None:
        """The kernel did not know these nodes yet. Without a watch nothing is believed."""
        if nodeids and self._edits is not None:
            self._edits.outdated(nodeids)
            self._next_look = 0.0

    def _look_for_edits(self, now: float) -> None:
        watch = self._edits
        assert watch is not None
        watch.tell()
        self._next_look = now if watch.hurried else now + watching.SOON if watch.busy else _NEVER
        self._listen(watch, True)

    def _events(self, timeout: float) -> None:
        """Sleep until something happens, and let all be heard but the kernel, whose turn is next."""
        before = time.perf_counter()
        events = self._poll.poll(timeout)
        ready = {fd for fd, _ in events}
        # What the mover says ends a sleep too, but no spinning would have caught it.
        if timeout and self._session.fileno() in ready:
            self._spinner.slept(time.perf_counter() - before)
        if self._others.fileno() in ready:
            self._hear_others()
        if events:
            self._next_tick = min(self._next_tick, time.monotonic() + TICK_SECONDS)

    def _hear_others(self) -> None:
        for fd, _ in self._others.poll(0.0):
            handler = self._handlers.get(fd)
            if handler is not None:
                handler()

    # --- supervisor and mover -----------------------------------------------------------------------------

    def _tell(self, message: wire.Message, fds: Sequence[int] = ()) -> None:
        try:
            self._supervisor.send(message, fds)
        except OSError as error:
            log.warning("the supervisor does not listen: %s", error)

    def index_lost(self, reason: str, damaged: bool) -> None:
        """Reading the index has shown damage. Called in any thread."""
        if damaged and not self._said_suspect:
            self._said_suspect = True
            log.error("%s", reason)
            self._tell(channel.Suspect())

    def _stuck(self, pid: int, reason: str) -> None:
        self._tell(channel.Stuck(pid, reason))

    def _keep(self, ino: int, fd: int) -> None:
        """Before its last name goes: from now on a file ends with the supervisor, not with us."""
        if not self._gate.states.registered(ino):
            self._kept.add(ino)
            self._tell(channel.Keep(ino), [fd])

    def _let_go(self, ino: int) -> None:
        if ino in self._kept:
            self._kept.discard(ino)
            self._tell(channel.LetGo(ino))

    def _signalled(self) -> None:
        numbers = os.read(self._signal_fd, 64)
        if signal.SIGUSR1 in numbers:
            held = {**self._vfs.holds(), **self._gate.states.holds()}
            log.info("holds %s", ", ".join(f"{count} {name}" for name, count in held.items()))
        if signal.SIGTERM in numbers:
            self._stop()

    def _stop(self) -> None:
        self._stopping = True

    def _hear_supervisor(self) -> None:
        try:
            received = self._supervisor.receive()
        except BlockingIOError:
            return
        except OSError as error:
            log.error("lost the supervisor: %s", error)
            received = None
        if received is None:
            log.error("the supervisor is gone: serving on until the unmount; a dead mover is not replaced")
            del self._handlers[self._supervisor.fileno()]
            self._others.unregister(self._supervisor.fileno())
            return
        message, fds = received
        if isinstance(message, channel.NewMover) and len(fds) == 1:
            self._connect(fds[0])
        elif isinstance(message, channel.Stop):
            self._stop()

    def _connect(self, fd: int) -> None:
        """Talk to a new mover. The gate owns the link, and closes it when it is lost."""
        self._handlers.pop(self._link_fd, None)
        self._link_fd = fd
        self._gate.mover.connect(wire.Link(socket.socket(fileno=fd), server=True))
        self._watch(fd, self._gate.mover.on_readable)

    def finish(self, clean: bool) -> None:
        """Say goodbye."""
        self._tell(channel.Stopped(clean))
        self._poll.close()
        self._others.close()


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tierfsd.mount_server")
    for name in ("--state", "--volume"):
        parser.add_argument(name, required=True)
    for name in ("--channel-fd", "--epoch", "--ledger-fd", "--takeover"):
        parser.add_argument(name, type=int, required=True)
    return parser.parse_args(argv)


def _signals() -> int:
    """A descriptor to read SIGTERM and SIGUSR1 from. Ctrl-C at a terminal is the supervisor's business."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda _number, _frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return reading


def _await_mount(supervisor: channel.Channel, kept: dict[int, int]) -> int | None:
    """The descriptor to serve; None where nothing was mounted after all. Adds to `kept` what is handed on."""
    while (received := supervisor.receive()) is not None:
        message, fds = received
        if isinstance(message, channel.Kept):
            kept.update(zip(message.inos, fds, strict=True))
        elif isinstance(message, channel.Mounted) and len(fds) == 1:
            return fds[0]
        elif not isinstance(message, wire.Unknown):
            raise VolumeError(f"the supervisor said {message} where it should have mounted")
    return None


def _take_over(fuse_fd: int, vfs: Vfs, session: Session, reader: MarkReader, kept: dict[int, int]) -> None:
    """Go on where a server that was killed has stopped. Raises OSError, TierError."""
    began = time.monotonic()
    failpoints.hit(failpoints.TAKEOVER_BEGUN)
    if vfs.ledger.passthrough:
        vfs.gate.states.backing = KernelBacking(fuse_fd)
    vfs.take_over(_undrained(reader), kept)
    for fd in kept.values():
        os.close(fd)
    failpoints.hit(failpoints.TAKEOVER_RESTORED)
    session.take_over()
    failpoints.hit(failpoints.TAKEOVER_RESENT)
    held = ", ".join(f"{count} {name}" for name, count in vfs.holds().items())
    log.info("took over %s in %.2f s", held, time.monotonic() - began)


def _undrained(reader: MarkReader) -> Iterator[Entry]:
    """All marks that no mover has drained."""
    before = -1
    while before != reader.position:
        before = reader.position
        yield from reader.read()


def _serve(
    arguments: argparse.Namespace, tree: Tree, index: Index, teller: socket.socket, stack: contextlib.ExitStack
) -> None:
    marks_fd = os.open(os.path.join(arguments.state, "marks"), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, marks_fd)
    marks = MarkWriter(marks_fd, index.log_position() or 0)
    stack.callback(marks.close)
    ledger = Ledger(arguments.ledger_fd)
    gate = Gate(tree, index, marks, arguments.epoch, ledger=ledger)
    vfs = Vfs(tree, gate, Evictable(index), HeatReader(os.path.join(arguments.state, "heat")))
    stack.callback(vfs.close)
    supervisor = channel.Channel(socket.socket(fileno=arguments.channel_fd), server=True)
    supervisor.send(channel.Prepared())
    kept: dict[int, int] = {}
    fuse_fd = _await_mount(supervisor, kept)
    if fuse_fd is None:
        return
    stack.callback(os.close, fuse_fd)
    watch = watching.begin(teller, fuse_fd, vfs, takeover=bool(arguments.takeover))
    if watch is not None:
        stack.callback(watch.close)
    session = Session(fuse_fd, vfs, passthrough=tree.privileged, spinner=Spinner())
    server = Server(session, vfs, gate, supervisor, _signals(), watch)
    index.on_lost = server.index_lost
    if arguments.takeover:
        _take_over(fuse_fd, vfs, session, MarkReader(marks_fd, index.log_position()), kept)
        if watch is not None:
            gate.lasting.unproven.update(node.ino for node in vfs.nodes.all())
            watch.doubt()
    # A longer time slice, not SCHED_BATCH: behind programs that compute, such a process waits for theirs, and a
    # stat takes 0.3 ms on average instead of 0.03 to 0.15.
    slices.stand_back(slices.SERVER)
    # What exists now stays: it need not be looked at in each collection.
    gc.collect()
    gc.freeze()
    clean = server.run()
    session.close()
    gate.heat.flush()
    gate.mover.connect(None)
    log.info("the mount has ended%s", "" if clean else ", not in order: copies will be proven again")
    server.finish(clean)


def main(argv: list[str]) -> int:
    """Serve one mount; 0 when it has ended."""
    arguments = _arguments(argv)
    logs.setup()
    try:
        with contextlib.ExitStack() as stack:
            teller = stack.enter_context(telling.start(arguments.volume))
            tree = open_tree(os.path.join(arguments.state, "tree"))
            stack.callback(tree.close)
            index = Index.open(os.path.join(arguments.state, "index"), readonly=True)
            stack.callback(index.close)
            _serve(arguments, tree, index, teller, stack)
    except (TierError, OSError, Incompatible) as error:
        log.critical("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
