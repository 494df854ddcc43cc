"""The daemon's end of the control socket: one thread a connection, each request judged by the peer's uid.

Root and the daemon's own user may do everything; what others may reach is decided in `reach.py`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from tierfs import control
from tierfs.errors import BusyError, IndexError_, NotPermittedError, TierError, UsageError
from tierfs.spelling import quoted
from tierfsd.credentials import Peer, acting_as, peer_of
from tierfsd.reach import Reach, Targets, join, outcome_of
from tierfsd.turns import Client, Shares, Turns
from tierfsd.versions_server import VersionBackend, VersionRequests

log = logging.getLogger("control")

_STOPPING = "the daemon is stopping: try again"
_MAX_CONNECTIONS = 64
_MAX_WAITING = 96  # of users who have their share already
_MAX_ORDERS = 64  # that somebody waits for
_ORDERS_WAITING = 512  # for one of those to end
_WAITING_BYTES = 64 * 1024  # of paths in an order of another user's that waits: it is in memory
MOST_ORDERS = 64  # in the background
_IDLE_SECONDS = 30.0
_PROGRESS_SECONDS = 0.1
LIST_LIMIT = 100_000  # outcomes named in one answer
_OF_A_PATH = (control.ListNames, control.GetVersions, control.ReadVersion)
# What may take hours; all else is answered as soon as it can be, and does not wait for these.
_ORDERS = (control.Demote, control.Fetch, control.SetPin, control.Drain, control.Check, control.Collect)
_LONG = (*_ORDERS, control.ReadVersion)


class Job(Protocol):
    """What a long request lets its worker do: report, and ask whether to stop."""

    def report(self, progress: control.Progress) -> None:
        """Show how far it has come; cheap, may be called often."""

    @property
    def cancelled(self) -> threading.Event:
        """Set when the client has gone or the daemon stops."""

    @property
    def awaited(self) -> bool:
        """Somebody waits for its end."""


class Backend(VersionBackend, Protocol):
    """What the control server asks of the mover. Any method may raise TierError or OSError."""

    def status(self) -> control.Status:
        """Facts of the volume."""

    def facts(self, opath: int, status: os.stat_result, path: bytes) -> control.Facts:
        """Facts of one name; `opath` is an O_PATH descriptor of it."""

    def handle_of(self, opath: int) -> bytes:
        """The kernel file handle."""

    def demote(self, targets: Targets, job: Job) -> control.Done:
        """Carry out an order to demote."""

    def fetch(self, targets: Targets, job: Job) -> control.Done:
        """Carry out an order to fetch."""

    def set_pin(self, opath: int, status: os.stat_result, parent: int, name: bytes, on: bool) -> None:
        """Pin or unpin one file or directory."""

    def pins(self) -> Iterable[bytes]:
        """The paths of all pins."""

    def drain(self, job: Job) -> control.Done:
        """Wait until everything is in the store."""

    def check(self, request: control.Check, job: Job) -> control.Findings:
        """Compare tree, index and store."""

    def collect(self, dry_run: bool, job: Job) -> Iterable[control.Garbage | control.Done]:
        """Remove what may go from the store, or name what will; ends with Done."""

    def reload(self) -> None:
        """Read the configuration anew. Raises ConfigError."""


class ControlServer:
    """Serves a listening socket until `close`."""

    def __init__(
        self,
        listener: socket.socket,
        rootfd: int,
        backend: Backend,
        hurry: Callable[[bool], None] = lambda ordered: None,
    ) -> None:
        """`hurry` is called with each request, and whether it is an order: a person waits."""
        self._listener = listener
        self._hurry = hurry
        self._reach = Reach(rootfd, backend.handle_of)
        self._backend = backend
        self._versions = VersionRequests(self._reach, backend)
        self._stopping = threading.Event()
        self._places = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        # Of the places too. Our own users wait for one; others for a share, not to be in their way.
        shares = Shares(1 << 30, _MAX_CONNECTIONS * 3 // 4, _MAX_CONNECTIONS // 4)
        self._turns = Turns(shares, _MAX_WAITING, _MAX_WAITING // 2)
        shares = Shares(_MAX_ORDERS, _MAX_ORDERS * 3 // 4, _MAX_ORDERS // 4)
        self._order_turns = Turns(shares, _ORDERS_WAITING, _MAX_WAITING // 2)
        self._background = Shares(MOST_ORDERS, MOST_ORDERS // 2, MOST_ORDERS // 8)
        self._counting = threading.Lock()
        self._questions = self._orders = 0

    @property
    def asked(self) -> bool:
        """Whether somebody waits for an answer that is not an order's."""
        return self._questions > 0

    @property
    def ordered(self) -> bool:
        """Whether somebody waits for an order."""
        return self._orders > 0

    def start(self) -> None:
        """Serve in threads of its own."""
        threading.Thread(target=self._accept, name="control", daemon=True).start()

    def close(self) -> None:
        """Take no more requests and cancel those that run; the listener itself stays open."""
        self._stopping.set()

    def _accept(self) -> None:
        self._listener.settimeout(1.0)
        while not self._stopping.is_set():
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError as exc:
                if not self._stopping.wait(1.0):  # too many open files, perhaps: clients wait in the backlog
                    log.error("a client cannot be heard: %s", exc)
                continue
            self._admit(sock)
        self._dismiss()

    def _dismiss(self) -> None:
        for client in (*self._turns.dismiss(), *self._order_turns.dismiss()):
            _send_away(client.sock, BusyError(_STOPPING))

    def _admit(self, sock: socket.socket) -> None:
        """Serve a client, when there is a place, in a thread of its own."""
        try:
            client = Client(sock, peer_of(sock))
            if not self._turns.enter(client):
                return
        except OSError as exc:
            log.error("a client cannot be heard: %s", exc)
            sock.close()
            return
        except BusyError as exc:
            _send_away(sock, exc)
            return
        self._places.acquire()
        try:
            threading.Thread(target=self._serve, args=(client,), name="control-request", daemon=True).start()
        except RuntimeError as exc:  # too many threads, for now: who comes later is heard
            log.error("a client cannot be heard: %s", exc)
            self._places.release()
            unheard: Client | None = client
            while unheard is not None:
                unheard.sock.close()
                unheard = self._turns.leave(unheard.peer)

    def _serve(self, first: Client) -> None:
        """Serve this one, and whoever waits for its place."""
        client: Client | None = first
        try:
            while client is not None:
                self._listen_to(client)
                client = self._turns.leave(client.peer)
        finally:
            self._places.release()

    def _listen_to(self, client: Client) -> None:
        """Until it ends, or asks for what takes long and waits for another turn; whatever goes wrong, this one
        is over."""
        with contextlib.ExitStack() as ending:
            ending.enter_context(client.sock)
            with self._whatever_goes_wrong():
                request = self._answer_quick_ones(client)
                if request is not None:
                    ending.pop_all()
                    self._queue(client._replace(request=request))

    @contextlib.contextmanager
    def _whatever_goes_wrong(self) -> Iterator[None]:
        try:
            yield
        except UsageError as exc:
            log.warning("a client sent nonsense: %s", exc)
        except OSError as exc:
            log.debug("a client went away: %s", exc)
        except Exception:
            log.exception("a client was not heard to its end")

    def _answer_quick_ones(self, client: Client) -> control.Request | None:
        """Answer one request after another. Returns what is for another turn, None at the end."""
        client.sock.settimeout(_IDLE_SECONDS)
        while (request := control.receive_request(client.sock)) is not None:
            if isinstance(request, _LONG):
                return request
            self._answer(client.sock, client.peer, request)
        return None

    def _queue(self, client: Client) -> None:
        """Carry out what takes long when its turn comes, in a thread of its own: no question waits for that."""
        small = sum(map(len, getattr(client.request, "paths", ()))) <= _WAITING_BYTES
        try:
            if not self._order_turns.enter(client, may_wait=small or client.peer.trusted):
                if self._stopping.is_set():
                    self._dismiss()
                return
        except BusyError:
            _send_away(client.sock, BusyError("you have too many orders under way: end some"))
            return
        try:
            threading.Thread(target=self._serve_long, args=(client,), name="control-long", daemon=True).start()
        except RuntimeError as exc:  # too many threads, for now
            log.error("an order cannot be carried out: %s", exc)
            unheard: Client | None = client
            while unheard is not None:
                _send_away(unheard.sock, BusyError("too many threads run on this machine: try again"))
                unheard = self._order_turns.leave(unheard.peer)

    def _serve_long(self, first: Client) -> None:
        """This order, and those that wait for its end. The connection ends with the answer, not to keep a turn
        from who waits for it while nothing more is asked."""
        client: Client | None = first
        while client is not None:
            self._carry_out_one(client)
            client = self._order_turns.leave(client.peer)

    def _carry_out_one(self, client: Client) -> None:
        if self._stopping.is_set():
            _send_away(client.sock, BusyError(_STOPPING))
            return
        with client.sock, self._whatever_goes_wrong():
            assert client.request is not None
            self._answer(client.sock, client.peer, client.request)

    @contextlib.contextmanager
    def _counted(self, request: control.Request) -> Iterator[None]:
        order = isinstance(request, _ORDERS)
        self._count(order, 1)
        try:
            yield
        finally:
            self._count(order, -1)

    def _count(self, order: bool, change: int) -> None:
        with self._counting:
            if order:
                self._orders += change
            else:
                self._questions += change

    def _answer(self, sock: socket.socket, peer: Peer, request: control.Request) -> None:
        """Carry out one request and send its last frame. Raises OSError where the client is gone."""
        with self._counted(request):
            self._hurry(isinstance(request, _ORDERS))
            self._answer_counted(sock, peer, request)

    def _answer_counted(self, sock: socket.socket, peer: Peer, request: control.Request) -> None:
        about = request.path if isinstance(request, _OF_A_PATH) else b""
        try:
            answer = self._carry_out(sock, peer, request)
        except TierError as exc:
            # The index is closed beneath who goes on for a moment.
            told = BusyError(_STOPPING) if isinstance(exc, IndexError_) and self._stopping.is_set() else exc
            answer = control.Failed(told.errno, str(told), about)
        except (BrokenPipeError, ConnectionError, TimeoutError):
            raise
        except OSError as exc:
            answer = control.Failed(exc.errno or errno.EIO, f"{exc.strerror or exc}", about)
        except Exception as exc:
            if self._stopping.is_set():  # the pools take nothing more, and drop what waits
                log.info("a %s request was cut short: %r", type(request).__name__, exc)
                answer = control.Failed(BusyError.errno, _STOPPING)
            else:
                log.exception("a %s request failed", type(request).__name__)
                answer = control.Failed(errno.EIO, "an internal error: see the volume's log/tierfs.log")
        control.send(sock, answer)

    def _carry_out(self, sock: socket.socket, peer: Peer, request: control.Request) -> control.Answer:
        match request:
            case control.GetStatus():
                status = self._backend.status()
                return status if peer.trusted else _without_errors(status)
            case control.GetFacts(paths):
                return self._send_facts(sock, peer, paths)
            case control.ListNames(path):
                return self._send_names(sock, peer, path)
            case control.GetPins():
                return self._send_pins(sock, peer)
            case control.SetPin(paths, on):
                return self._set_pins(sock, peer, paths, on)
            case control.Demote(paths, wait):
                return self._order(sock, peer, paths, wait, os.O_WRONLY, self._backend.demote)
            case control.Fetch(paths, wait):
                return self._order(sock, peer, paths, wait, os.O_RDONLY, self._backend.fetch)
            case control.GetVersions(path):
                return self._versions.send_list(sock, peer, path)
            case control.ReadVersion():
                return self._versions.read(sock, peer, request)
        if not peer.trusted:
            raise NotPermittedError("only root and the volume's owner may ask for this: act as one of them")
        with self._job(sock) as job:
            match request:
                case control.Drain():
                    return self._backend.drain(job)
                case control.Check():
                    return self._backend.check(request, job)
                case control.Collect(dry_run):
                    for answer in self._backend.collect(dry_run, job):
                        if isinstance(answer, control.Done):
                            return answer
                        control.send(sock, answer)
        self._backend.reload()
        return control.Done()

    # --- requests ----------------------------------------------------------------------------------------

    def _send_facts(self, sock: socket.socket, peer: Peer, paths: list[bytes]) -> control.Done:
        stayed = []
        for path in paths:
            try:
                with self._reach.find(peer, path, os.O_RDONLY) as found:
                    facts = self._backend.facts(found.opath, found.status, path)
            except (TierError, OSError) as exc:
                stayed.append(outcome_of(path, exc))
                continue
            control.send(sock, facts)
        return control.Done(len(paths) - len(stayed), stayed)

    def _send_names(self, sock: socket.socket, peer: Peer, path: bytes) -> control.Done:
        try:
            with self._reach.find(peer, path, os.O_RDONLY) as found:
                if not stat.S_ISDIR(found.status.st_mode):
                    control.send(sock, self._backend.facts(found.opath, found.status, path))
                    return control.Done(1)
                directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=found.opath)
        except OSError as exc:
            return control.Done(0, [outcome_of(path, exc)])
        stayed: list[control.Outcome] = []
        try:
            names = sorted(os.fsencode(name) for name in os.listdir(directory))
            for name in names:
                whole = join(path, name)
                try:
                    facts = self._facts_in(peer, directory, name, whole)
                except FileNotFoundError:
                    continue
                except (TierError, OSError) as exc:
                    stayed.append(outcome_of(whole, exc))
                    continue
                control.send(sock, facts)
        finally:
            os.close(directory)
        return control.Done(len(names) - len(stayed), stayed)

    def _facts_in(self, peer: Peer, directory: int, name: bytes, path: bytes) -> control.Facts:
        with acting_as(peer):  # who may read a directory may not yet search it
            opath = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=directory)
        try:
            return self._backend.facts(opath, os.fstat(opath), path)
        finally:
            os.close(opath)

    def _send_pins(self, sock: socket.socket, peer: Peer) -> control.Done:
        count = 0
        for path in sorted(self._backend.pins()):
            with contextlib.suppress(TierError, OSError), self._reach.find(peer, path, os.O_RDONLY) as found:
                facts = self._backend.facts(found.opath, found.status, path)
                control.send(sock, facts)
                count += 1
        return control.Done(count)

    def _set_pins(self, sock: socket.socket, peer: Peer, paths: list[bytes], on: bool) -> control.Done:
        stayed: list[control.Outcome] = []
        done: list[bytes] = []
        for path in paths:
            try:
                with self._reach.find(peer, path, os.O_WRONLY) as found:
                    self._backend.set_pin(found.opath, found.status, found.parent, found.name, on)
                done.append(path)
            except (TierError, OSError) as exc:
                stayed.append(outcome_of(path, exc))
        if on and done:
            fetched = self._order(sock, peer, done, True, os.O_RDONLY, self._backend.fetch)
            stayed.extend(fetched.stayed)
        return control.Done(len(done), stayed)

    def _order(
        self,
        sock: socket.socket,
        peer: Peer,
        paths: list[bytes],
        wait: bool,
        access: int,
        carry_out: Callable[[Targets, Job], control.Done],
    ) -> control.Done:
        """Find the files that an order is about and carry it out, now or (not `wait`) in the background."""
        if not wait:
            return self._order_in_background(peer, paths, access, carry_out)
        with self._job(sock) as waiting:
            targets, stayed = self._reach.targets(peer, paths, access, waiting.cancelled)
            done = carry_out(targets, waiting)
        return control.Done(done.files, (stayed + done.stayed)[:LIST_LIMIT])

    def _order_in_background(
        self, peer: Peer, paths: list[bytes], access: int, carry_out: Callable[[Targets, Job], control.Done]
    ) -> control.Done:
        """Raises BusyError where too many are under way: each has a thread, and all of its files in memory."""
        if not self._background.take(peer):
            raise BusyError("too many orders are under way in the background: try again, or wait for their end")
        try:
            targets, stayed = self._reach.targets(peer, paths, access, self._stopping)
            threading.Thread(
                target=self._in_background, args=(peer, carry_out, targets), name="control-order", daemon=True
            ).start()
        except BaseException:
            self._background.give(peer)
            raise
        return control.Done(len(targets), stayed)

    def _in_background(
        self, peer: Peer, carry_out: Callable[[Targets, Job], control.Done], targets: Targets
    ) -> None:
        try:
            done = carry_out(targets, _Job(None, self._stopping))
        except (TierError, OSError) as exc:
            log.error("an order for %d files failed: %s", len(targets), exc)
            return
        except Exception:
            log.exception("an order for %d files failed", len(targets))
            return
        finally:
            self._background.give(peer)
        for outcome in done.stayed:
            level = logging.ERROR if outcome.failed else logging.INFO
            log.log(level, "%s stays as it is: %s", quoted(outcome.path), outcome.reason)

    @contextlib.contextmanager
    def _job(self, sock: socket.socket) -> Iterator[_Job]:
        """A job that is cancelled when the client hangs up or the daemon stops.

        Raises BusyError at its end where it was: what came of it says nothing then.
        """
        job = _Job(sock, self._stopping)
        watcher = threading.Thread(target=job.watch, name="control-watch", daemon=True)
        watcher.start()
        try:
            yield job
        finally:
            job.over.set()
            watcher.join()
        if job.cancelled.is_set():
            raise BusyError(_STOPPING)


class _Job:
    """A request under way. With `sock` None nobody listens to its progress."""

    def __init__(self, sock: socket.socket | None, stopping: threading.Event) -> None:
        self._sock = sock
        self._stopping = stopping
        self._next = 0.0
        self._lock = threading.Lock()
        self.awaited = sock is not None
        self.cancelled = stopping if sock is None else threading.Event()
        self.over = threading.Event()

    def report(self, progress: control.Progress) -> None:
        if self._sock is None:
            return
        with self._lock:
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + _PROGRESS_SECONDS
            try:
                control.send(self._sock, progress)
            except OSError:
                self.cancelled.set()

    def watch(self) -> None:
        """Notice that the client has hung up, until the job is over."""
        assert self._sock is not None
        fd = self._sock.fileno()
        while not self.over.wait(0.05):
            if self._stopping.is_set() or _hung_up(fd):
                self.cancelled.set()
                return


def _send_away(sock: socket.socket, why: TierError) -> None:
    """Say why, without waiting for who does not listen."""
    with sock, contextlib.suppress(OSError):
        sock.settimeout(0)
        control.send(sock, control.Failed(why.errno, str(why)))


def _hung_up(fd: int) -> bool:
    with socket.socket(fileno=os.dup(fd)) as sock:
        try:
            return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True


def _without_errors(status: control.Status) -> control.Status:
    """Errors, and what waits, name files, which other users may not be allowed to know of."""
    fields = {name: getattr(status, name) for name in status.__struct_fields__}
    return control.Status(**{**fields, "errors": [], "waiting": []})
