"""The supervisor: holds the lock and the control socket, and keeps a mount server and a mover running.

A mover that dies is replaced at once, later after a growing pause, and the server gets a new link; in a long
pause whoever asks something is told so from here. When the server dies another takes its session over: the
descriptor of the mount and the ledger are kept here, and so is what nameless files would end without. Where
that cannot be, or does not help, the mount is detached and made anew. A new server comes with a new mover. On
SIGUSR2 it becomes another version of itself (see `handover`). An unmount, by whomever, ends the server in
order, and then all.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass, field

from tierfs import __version__, channel, control, launch, locate, volume, wire
from tierfs.errors import TierError, VolumeError
from tierfs.fuse import mounting
from tierfs.fuse.choice import Choice
from tierfsd import handover
from tierfsd.attachment import Attachment, writable
from tierfsd.children import Child
from tierfsd.events import Events
from tierfsd.farewell import say_what_is_local_only
from tierfsd.indexcare import IndexCare
from tierfsd.logs import CANNOT_WORK, LogFile, LogPipe
from tierfsd.priority import hurry_on
from tierfsd.serverchannel import ServerChannel
from tierfsd.servicemanager import notify
from tierfsd.standin import StandIn

log = logging.getLogger("supervisor")

READY_SECONDS = 60.0
_MOVER_PAUSES = (0.0, 0.1, 0.5, 2.0, 10.0, 30.0)
_LONG_PAUSE = 5.0  # who asks the mover something shall not wait so long for the next one
_SERVER_DEATHS = 5  # in quick succession; then the volume is given up
_TAKEOVERS = 3  # in quick succession; then something in the session itself is wrong, and it is mounted anew
_STEADY_SECONDS = 0.5  # of serving, after which a death is no consequence of the one before
_BUSY_SECONDS = 10.0  # how long an orderly stop waits for the last open file
_EXIT_SECONDS = 20.0  # for a child that was asked to end
# While the machine has no process, memory or descriptor to spare: a mount that serves is worth some patience.
_PASSING = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE})
_PATIENCE = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between attempts to start a server
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


@dataclass
class Plan:
    """What to mount and how. `options` are those of `-o`."""

    volume: volume.Volume
    mountpoint: str
    binding: Choice
    options: list[str] = field(default_factory=list)
    foreground: bool = False


class Supervisor:
    """Runs one mounted volume in one thread. Use `start`, then `run`."""

    def __init__(self, plan: Plan, lock_fd: int, listener: socket.socket, logfile: LogFile) -> None:
        self._plan = plan
        self._lock_fd = lock_fd
        self._listener = listener
        self._logfile = logfile
        self._log = LogPipe(logfile)
        self._events = Events()
        module = "tierfsd.portable_server" if plan.binding.name == "fusepy" else "tierfsd.mount_server"
        self._server = Child("server", module, self._log.writing)
        self._mover = Child("mover", "tierfsd.mover", self._log.writing)
        self._attachment = Attachment(plan.mountpoint, plan.volume.identity.volume)
        self._channel = ServerChannel(self._events, self._attachment, self._doubt_index, self._end_stuck)
        self._stand_in = StandIn(self._events, listener, self._excuse)
        self._care = IndexCare(plan.volume)
        self._restarts = handover.Restarts()
        self._epoch = 0
        self._takeovers = 0
        self._mover_due = 0.0
        self._suspect = False  # the index is to be looked at
        self._unmounted = False  # while it was about to be mounted anew

    # --- starting ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Mount, and return when the mount answers. Raises TierError, OSError."""
        self._listen_to_all()
        try:
            self._mount()
            self._publish()
        except BaseException:
            self._end_children()
            self._detach()
            raise

    def resume(self, left: handover.Handover) -> None:
        """Go on with what another version of us had mounted. Raises VolumeError."""
        self._listen_to_all()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        held = self._attachment
        held.fuse_fd, held.ledger_fd, held.kept = left.fuse_fd, left.ledger_fd, dict(left.kept)
        self._epoch = left.epoch
        self._server.total_deaths, self._mover.total_deaths = left.server_deaths, left.mover_deaths
        self._restarts = handover.Restarts(left.restarts + 1, left.token)
        if not self._take_over() and not self._mount_anew():
            raise VolumeError(f"{self._plan.mountpoint}: cannot be served any more: {self._logfile.last_error}")

    def _listen_to_all(self) -> None:
        self._events.watch(self._log.reading, self._log.pump)
        self._events.catch(_SIGNALS)

    def _mount(self) -> None:
        """Begin a session, mount, start both processes, and wait for the server to answer the kernel."""
        self._epoch = self._care.begin_session()
        self._attachment.begin()
        with writable(self._plan.mountpoint):
            self._start_pair()
        if not self._channel.ready:
            self._log.drain()
            reason = self._logfile.last_error or f"see {self._logfile.path}"
            raise VolumeError(f"{self._plan.mountpoint}: the mount server did not start: {reason}")

    def _start_pair(self, *, takeover: bool = False) -> None:
        """Start both processes, and wait until the server answers the kernel or has ended."""
        with self._channel.open() as theirs:
            self._start_server(theirs.fileno(), takeover=takeover)
        self._start_mover()
        self._events.wait(lambda: self._channel.ready or not self._server.alive(), READY_SECONDS)

    def _start_server(self, channel_fd: int, *, takeover: bool) -> None:
        """Start the server, and mount when it has loaded all it needs; with libfuse it mounts by itself."""
        plan, identity = self._plan, self._plan.volume.identity
        arguments: dict[str, object] = {
            "state": plan.volume.state, "volume": identity.volume, "channel-fd": channel_fd,
            "epoch": self._epoch,
        }  # fmt: skip
        inherited = [channel_fd, self._lock_fd]
        if plan.binding.name == "fusepy":
            arguments |= {"mountpoint": plan.mountpoint, "options": ",".join(plan.options)}
            self._run_server(arguments, inherited)
            return
        held = self._attachment
        arguments |= {"ledger-fd": held.ledger_fd, "takeover": int(takeover)}
        self._run_server(arguments, [*inherited, held.ledger_fd])
        self._events.wait(lambda: self._channel.prepared or not self._server.alive(), READY_SECONDS)
        if not self._channel.prepared or not self._channel.is_open:
            return
        if takeover:
            self._channel.hand_on()
        else:
            held.mount(plan.options)
        self._channel.send(channel.Mounted(), [held.fuse_fd])

    def _end_session(self) -> None:
        try:
            self._care.end_session()
        except (TierError, OSError) as error:
            log.error("copies will be proven again: %s", error)

    def _run_server(self, arguments: dict[str, object], inherited: list[int]) -> None:
        """Raises OSError where that cannot be, though it was waited for."""
        for seconds in _PATIENCE:
            try:
                self._server.start(arguments, inherited)
                return
            except OSError as exc:
                if exc.errno not in _PASSING:
                    raise
                log.error("the mount server cannot be started yet: %s", exc)
            self._events.wait(lambda: bool(self._events.signals), seconds)
        self._server.start(arguments, inherited)

    def _start_mover(self) -> None:
        """Where it cannot be started it is tried again: what is resident needs none."""
        try:
            self._run_mover()
        except OSError as exc:
            self._mover_due = time.monotonic() + _LONG_PAUSE
            log.error("the mover cannot be started; tried again in %.0f s: %s", _LONG_PAUSE, exc)
            self._stand_in.begin(f"could not be started ({exc.strerror or exc})", self._mover_due)

    def _run_mover(self) -> None:
        if not self._channel.is_open:  # the server has just died, and is about to be replaced with its mover
            return
        server_end, mover_end = wire.make_pair()
        with server_end, mover_end:
            self._stand_in.end()
            control_fd = self._listener.fileno()
            link_fd = mover_end.fileno()
            arguments = {"state": self._plan.volume.state, "link-fd": link_fd, "control-fd": control_fd}
            self._mover.start(arguments, [link_fd, control_fd, self._lock_fd])
            with contextlib.suppress(OSError):  # the server's death is noticed by itself
                self._channel.send(channel.NewMover(), [server_end.fileno()])

    def _publish(self) -> None:
        """Write down for the mover (status) and for people who we are."""
        facts = {
            "mountpoint": self._plan.mountpoint,
            "binding": {**self._plan.binding._asdict(), "form": self._channel.form},
            "pids": {"supervisor": os.getpid(), "server": self._server.pid, "mover": self._mover.pid},
            "mover_deaths": self._mover.total_deaths,
            "server_deaths": self._server.total_deaths,
            "version": __version__,
            **self._restarts.published(),
        }
        try:
            volume.write_runtime(self._plan.volume.state, facts)
        except OSError as exc:  # of a disk that is full, or ends: no reason to end what still serves
            log.error("who runs is not written down, and `tierfs status` may name others: %s", exc)

    # --- running -----------------------------------------------------------------------------------------

    def run(self) -> int:
        """Keep it running until it is unmounted or told to stop. Returns the exit code."""
        try:
            return self._run()
        except BaseException:
            # Nobody would look after it any more, and whoever uses the mount would wait for ever.
            self._end_children()
            self._detach()
            raise

    def _run(self) -> int:
        while True:
            self._events.wait(self._eventful, self._pause())
            if self._events.take(signal.SIGHUP):
                self._begin_to_reload()
            if self._events.take(signal.SIGUSR2) and not self._restart():
                return self._given_up()
            if self._events.signals:
                return self._stop()
            status = self._server.reap()
            if status is not None:
                if status == 0 and not self._attachment.is_mounted():
                    return self._finish()
                if not self._revive(status):
                    return self._given_up()
            self._look_after_mover()
            if not self._look_after_index():
                return self._given_up()

    def _begin_to_reload(self) -> None:
        try:
            threading.Thread(target=self._reload, name="reload", daemon=True).start()
        except RuntimeError as exc:  # too many threads on this machine: no reason to end
            log.error("not reloaded: %s", exc)

    def _reload(self) -> None:
        """Have the mover read its configuration: by a request, since a signal could meet it half started."""
        identity = self._plan.volume.identity
        source = f"{locate.SOURCE_PREFIX}{identity.volume}"
        mount = locate.Mount(self._plan.mountpoint, locate.FSTYPE, source, os.geteuid())
        try:
            for _ in control.converse(mount, control.Reload()):
                pass
        except TierError as exc:
            log.error("not reloaded: %s", exc)
        except Exception:
            log.exception("not reloaded")

    def _eventful(self) -> bool:
        mover_due = not self._mover.pid and time.monotonic() >= self._mover_due
        mover_dead = bool(self._mover.pid) and not self._mover.alive()
        asked = bool(self._events.signals) or self._suspect
        return asked or not self._server.alive() or mover_due or mover_dead

    def _pause(self) -> float | None:
        """How long to wait for an event at most; None: for ever (a child's end is an event: SIGCHLD)."""
        return None if self._mover.pid else max(0.0, self._mover_due - time.monotonic())

    def _look_after_index(self) -> bool:
        """Look at a suspect index while nobody writes it; with a new one all begins anew. False: in vain."""
        if not self._suspect:
            return True
        self._suspect = False
        if self._mover.alive():
            self._end_mover()
            self._mover_due = time.monotonic()
        if not self._care.put_aside_if_damaged():
            return True
        log.error("there is a new index: mounting anew")
        self._server.kill()  # it has the former one open, and nothing that it holds may be handed on
        return self._mount_anew()

    def _look_after_mover(self) -> None:
        status = self._mover.reap()
        if status is not None:
            self._mover.died()
            how = _how(status) + self._said_by_mover(status)
            self._suspect |= self._care.suspect(status)
            pause = _MOVER_PAUSES[min(self._mover.deaths, len(_MOVER_PAUSES)) - 1]
            self._mover_due = time.monotonic() + pause
            log.error("the mover %s; starting another in %.1f s", _how(status), pause)
            if pause >= _LONG_PAUSE:
                self._stand_in.begin(how, self._mover_due)
        if not self._mover.pid and time.monotonic() >= self._mover_due:
            self._start_mover()
            self._publish()

    def _said_by_mover(self, status: int) -> str:
        """Why it could not work and what is to be done, as without room for its index; "" if it was killed."""
        self._log.drain()
        said = self._logfile.last_error
        return f" ({said.removeprefix(CANNOT_WORK)})" if status > 0 and said.startswith(CANNOT_WORK) else ""

    def _excuse(self, how: str, seconds: float) -> str:
        return (
            f"the mover {how}, for the {self._mover.deaths}th time: another is started in {seconds:.0f} s;"
            f" what is local can be used; {self._logfile.path} says more"
        )

    def _doubt_index(self) -> None:
        self._suspect = True
        self._care.doubt("the mount server has met damage")

    def _end_stuck(self, message: channel.Stuck) -> None:
        """Not waited for here: one that is caught in the kernel ends when the call returns."""
        if message.pid in (0, self._mover.pid):
            log.error("the mover %s while somebody waits: it is killed", message.reason)
            self._mover.signal(signal.SIGKILL)

    # --- a server that dies -------------------------------------------------------------------------------

    def _revive(self, status: int) -> bool:
        """The server has died: let another take its session over, or mount anew. False where nothing helps."""
        self._channel.hear_all()  # the descriptors that it has given away are still on their way
        lasting = self._channel.lasting or self._takeovers > 0
        steady = self._channel.served_for() > _STEADY_SECONDS
        self._server.died(steady=steady)
        self._takeovers = 1 if steady else self._takeovers + 1
        # At once: its guards have ended with the server, so that nothing must be punched any more.
        self._mover.kill()
        if self._care.suspect(status) and self._care.put_aside_if_damaged():
            lasting = False  # what it held was from another index
        if lasting and self._takeovers <= _TAKEOVERS:
            log.error("the mount server %s; another takes its session over", _how(status))
            if self._take_over():
                return True
        log.error("the mount server %s; mounting anew", _how(status))
        return self._mount_anew(self._plan.binding.name == "fusepy" and status >= 0)

    def _given_up(self) -> int:
        return self._finish() if self._unmounted else 1

    def _mount_anew(self, by_itself: bool = False) -> bool:
        """False where it cannot be mounted, or somebody has unmounted it meanwhile: he shall not find it there
        again. `by_itself`: the server may have done so when it ended, as libfuse does."""
        self._end_children()
        if not self._detach() and not by_itself:
            log.warning("it has been unmounted meanwhile, and is not mounted anew")
            self._unmounted = True
            return False
        if self._server.deaths > _SERVER_DEATHS:
            log.critical("the mount server keeps dying: giving up; see the lines above")
            return False
        try:
            self._mount()
        except (TierError, OSError) as exc:
            log.critical("the volume cannot be mounted anew: %s", exc)
            self._end_children()
            self._detach()
            return False
        self._publish()
        return True

    def _take_over(self) -> bool:
        """Start a server that goes on where the dead one stopped; whoever asks meanwhile waits."""
        self._channel.drop()
        try:
            self._start_pair(takeover=True)
        except OSError as exc:
            log.error("the session cannot be taken over: %s", exc)
            return False
        if self._channel.ready:
            self._publish()
            return True
        ended = self._server.reap()
        if ended is not None and ended < 0 and self._takeovers < _TAKEOVERS:
            # Killed while it took over: the session is as it was.
            self._takeovers += 1
            self._mover.kill()
            log.error("the mount server %s; another takes its session over", _how(ended))
            return self._take_over()
        return False

    # --- another version ----------------------------------------------------------------------------------

    def _restart(self) -> bool:
        """Become the version that somebody asks for. Returns only where that cannot be; False: all is lost."""
        asked = launch.Asked("", "")
        try:
            asked = launch.take_asked(self._plan.volume.state)
            if not self._channel.lasting:
                raise VolumeError(
                    "open files outlive it only for root, with the kernel binding, on Linux 6.9 or later: "
                    "unmount, then mount again"
                )
            handover.refuse_if_unable(asked.python, self._left(asked.token))
            log.info("restarting with %s", asked.python)
            self._end_mover()
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until the next version hears them
            if self._events.signals or not self._server.alive():
                raise VolumeError("it is being ended")
            self._server.kill()
            self._channel.hear_all()  # the descriptors that it has given away are still on their way
            self._log.drain()
            handover.become(asked.python, self._left(asked.token))
        except (TierError, OSError) as exc:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            log.error("not restarted: %s", handover.one_line(exc))
            self._restarts.failed(asked.token, exc)
        if not self._server.pid and not self._take_over() and not self._mount_anew():
            return False
        self._publish()
        return True

    def _left(self, token: str) -> handover.Handover:
        plan = self._plan
        return handover.Handover(
            state=os.fsencode(plan.volume.state),
            mountpoint=os.fsencode(plan.mountpoint),
            binding=(plan.binding.name, plan.binding.reason),
            options=plan.options,
            foreground=plan.foreground,
            epoch=self._epoch,
            lock_fd=self._lock_fd,
            listener_fd=self._listener.fileno(),
            fuse_fd=self._attachment.fuse_fd,
            ledger_fd=self._attachment.ledger_fd,
            kept=self._attachment.kept,
            server_deaths=self._server.total_deaths,
            mover_deaths=self._mover.total_deaths,
            restarts=self._restarts.count,
            token=token,
        )

    # --- ending ------------------------------------------------------------------------------------------

    def _stop(self) -> int:
        """Asked to end: unmount, waiting a little for what is open; then without regard to it."""
        log.info("stopping")
        notify("STOPPING=1")
        deadline = time.monotonic() + _BUSY_SECONDS
        while self._server.alive() and time.monotonic() < deadline:
            try:
                mounting.unmount(self._plan.mountpoint)
            except OSError as exc:
                log.debug("not yet unmounted: %s", exc)
            self._events.wait(lambda: not self._server.alive(), 0.5)
        if self._server.alive():
            log.warning("files are still open: detaching the mount")
            self._attachment.hide()
            self._events.wait(lambda: not self._server.alive(), _BUSY_SECONDS / 2)
        self._server.reap()
        return self._finish()

    def _finish(self) -> int:
        """The mount has ended. Where files were still open, every copy is proven anew after the next start."""
        self._channel.hear_all()
        self._end_children()
        self._detach()
        if self._channel.clean:
            self._end_session()
        say_what_is_local_only(self._plan.volume)
        log.info("unmounted" if self._channel.clean else "ended while files were open")
        return 0

    def _end_mover(self) -> None:
        self._mover.signal(signal.SIGTERM)
        hurry_on(self._mover.pid)
        self._events.wait(lambda: not self._mover.alive(), _EXIT_SECONDS)
        if self._mover.alive():
            log.error("the mover did not end within %.0f s: killed", _EXIT_SECONDS)
        self._mover.kill()

    def _end_children(self) -> None:
        self._end_mover()
        self._server.signal(signal.SIGTERM)
        self._events.wait(lambda: not self._server.alive(), _EXIT_SECONDS / 4)
        self._server.kill()
        self._log.drain()

    def _detach(self) -> bool:
        """Let go of the mount, whatever its state; False where it was there no more."""
        self._channel.drop()
        was_there = self._attachment.detach()
        self._channel.lasting, self._takeovers = False, 0
        return was_there


def _how(status: int) -> str:
    """How a child ended, in words."""
    if status >= 0:
        return f"ended with exit code {status}"
    return f"was killed by {signal.Signals(-status).name}"
