"""The daemon's entry: makes or opens the volume, mounts it, and stays as its supervisor.

Exit codes: 0 unmounted or stopped in order, 1 failed, 2 wrong usage. The reason goes to the log, to stderr in
the foreground, and to the pipe by which `tierfs mount` waits.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import resource
import shutil
import socket
import sys
from functools import partial

from tierfs import __version__, adoption, config, control, launch, ownership, volume
from tierfs.errors import TierError, UsageError, VolumeError
from tierfs.fuse import choice, mounting
from tierfs.spelling import shown
from tierfs.tree import open_tree
from tierfsd import handover, logs
from tierfsd.apart import apart
from tierfsd.claiming import refuse_if_taken
from tierfsd.servicemanager import notify
from tierfsd.supervisor import Plan, Supervisor

log = logging.getLogger("supervisor")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tierfsd", allow_abbrev=False)
    parser.add_argument("--state", required=True)
    parser.add_argument("--mountpoint", required=True)
    parser.add_argument("--store")
    parser.add_argument("--local-limit")
    parser.add_argument("--binding", default="auto", choices=("auto", "kernel", "fusepy"))
    parser.add_argument("-o", dest="options", action="append", default=[])
    parser.add_argument("--adopt", action="store_true")
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--foreground", action="store_true")
    parser.add_argument("--ready-fd", type=int, default=-1)
    parser.add_argument("--resume", type=int, default=-1)
    parser.add_argument("--check-only", action="store_true")
    return parser.parse_args()


def main() -> int:
    """Run until unmounted; returns the exit code."""
    arguments = _parse_arguments()
    answer = Answer(arguments.ready_fd)
    try:
        if arguments.resume >= 0:
            return _resume(arguments)
        return _run(arguments, answer)
    except UsageError as exc:
        answer.failed(str(exc))
        return 2
    except TierError as exc:
        answer.failed(str(exc))
    except OSError as exc:  # what has no name is a file of the state directory's: its disk is full, or ends
        answer.failed(f"{exc.filename or arguments.state}: {exc.strerror or exc}")
    except ImportError as exc:
        answer.failed(f"TierFS is not whole: install it anew: {exc}")
    except Exception as exc:
        log.exception("internal error")
        where = os.path.join(arguments.state, "log", "tierfs.log")
        answer.failed(f"{arguments.mountpoint}: internal error ({type(exc).__name__}): see {where}")
    return 1


class Answer:
    """What whoever started the daemon is told, once."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def ready(self) -> None:
        """The mount answers."""
        self._tell(launch.READY)
        notify("READY=1")

    def failed(self, message: str) -> None:
        """It does not, because of this."""
        line = shown(message)
        log.error("%s", line)
        if self._fd < 0:
            with contextlib.suppress(OSError):
                print(f"tierfs: {line}", file=sys.stderr, flush=True)
        self._tell(line.encode() + b"\n")

    def _tell(self, data: bytes) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.write(self._fd, data)
            os.close(self._fd)
            self._fd = -1


def _run(arguments: argparse.Namespace, answer: Answer) -> int:
    state, mountpoint = arguments.state, arguments.mountpoint
    logging.getLogger().addHandler(logging.NullHandler())  # until there is a log file we answer otherwise
    chosen = choice.choose(arguments.binding)
    options = [part for given in arguments.options for part in given.split(",") if part]
    if chosen.name == "kernel":
        mounting.parse_options(options)
    _precheck(arguments)
    fresh = not os.path.isdir(state)
    volume.make_state(state)
    with contextlib.ExitStack() as stack:
        lock = volume.lock(state)
        stack.callback(os.close, lock)
        os.set_inheritable(lock, False)
        try:
            opened = _open_volume(arguments)
        except BaseException:
            if fresh and not _is_complete(state):
                _undo(state)
            raise
        volume.check_mountpoint(mountpoint, state)
        view = opened.identity.view
        if view:
            stack.callback(shutil.rmtree, state, ignore_errors=True)
        else:
            refuse_if_taken(opened, arguments.force)
        logfile = logs.LogFile(opened.path("log/tierfs.log"), 2 if arguments.foreground else None)
        logs.setup(logfile)
        _raise_limits()
        listener = _listen(opened)
        stack.callback(_stop_listening, listener)
        options += ["ro"] if view else []
        log.info("binding %s: %s", *chosen)
        plan = Plan(opened, mountpoint, chosen, options, arguments.foreground)
        supervisor = Supervisor(plan, lock, listener, logfile)
        supervisor.start()
        log.info("volume %s is mounted at %s", opened.identity.volume[:8], mountpoint)
        answer.ready()
        return supervisor.run()


def _resume(arguments: argparse.Namespace) -> int:
    """Go on where another version has left off."""
    left = handover.read(arguments.resume)
    if arguments.check_only:
        handover.check(left)
        return 0
    os.close(arguments.resume)
    left.inheritable(False)
    with contextlib.ExitStack() as stack:
        opened = volume.load(os.fsdecode(left.state))
        if opened.identity.view:
            stack.callback(shutil.rmtree, opened.state, ignore_errors=True)
        logfile = logs.LogFile(opened.path("log/tierfs.log"), 2 if left.foreground else None)
        logs.setup(logfile)
        listener = socket.socket(fileno=left.listener_fd)
        stack.callback(_stop_listening, listener)
        plan = Plan(
            opened, os.fsdecode(left.mountpoint), choice.Choice(*left.binding), left.options, left.foreground
        )
        supervisor = Supervisor(plan, left.lock_fd, listener, logfile)
        supervisor.resume(left)
        log.info("version %s goes on at %s", __version__, plan.mountpoint)
        return supervisor.run()


def _precheck(arguments: argparse.Namespace) -> None:
    """Find what is wrong before anything is made. Raises VolumeError."""
    volume.check_unmounted(arguments.mountpoint)  # its state directory may be another user's
    if os.path.exists(os.path.join(arguments.state, volume.RESTORING)) and not _is_complete(arguments.state):
        raise VolumeError(f"{arguments.state}: its restore was interrupted: run `tierfs restore` again")
    new = not _is_complete(arguments.state)
    store = arguments.store if new else volume.load(arguments.state).store_url
    if new:
        volume.check_state_place(arguments.state)
    volume.check_store_place(store or "", arguments.mountpoint, arguments.state, new=new)
    if adoption.read_intent(arguments.state) is not None:
        return
    if arguments.adopt:
        adoption.check_directory(arguments.mountpoint, arguments.state)
    else:
        volume.check_mountpoint(arguments.mountpoint, arguments.state)
    mounting.check_device()


def _open_volume(arguments: argparse.Namespace) -> volume.Volume:
    """The volume, made where there is none, with its backing tree in place. Raises TierError, OSError."""
    state, mountpoint = arguments.state, arguments.mountpoint
    intent = adoption.read_intent(state)
    if arguments.adopt and intent is None:
        adoption.begin(mountpoint, state)
    adopting = arguments.adopt or intent is not None
    opened = _existing(arguments) if _is_complete(state) else _create(arguments, adopting)
    if adopting:
        if not os.path.isdir(opened.path("tree")):
            if not arguments.adopt:
                raise VolumeError(f"{mountpoint}: its adoption was interrupted: run `tierfs adopt` again")
            adoption.check_directory(mountpoint, state)
            adoption.move(mountpoint, state)
        adoption.finish(mountpoint, state)
    if not os.path.isdir(opened.path("tree")):
        tree = opened.path("tree")
        raise VolumeError(f"{tree}: the backing tree is missing: put it back, or use another --state")
    with contextlib.closing(open_tree(opened.path("tree"))) as backing:
        return volume.keep_attributes(opened, backing.namespace)


def _is_complete(state: str) -> bool:
    return volume.exists(state) and volume.load(state).identity.complete


def _existing(arguments: argparse.Namespace) -> volume.Volume:
    """Open a volume that is there; its store is not asked for anything."""
    opened = volume.load(arguments.state)
    if arguments.store is not None and arguments.store != opened.identity.store:
        raise VolumeError(
            f"{arguments.mountpoint}: the volume's store is {opened.identity.store}: leave out --store;"
            " to another one it moves by `tierfs leave`, then `tierfs adopt --store`"
        )
    path = opened.path(config.FILE_NAME)
    if arguments.local_limit is not None:
        config.set_key(path, "local_limit", arguments.local_limit)
    config.load(path)
    return opened


def _create(arguments: argparse.Namespace, adopting: bool) -> volume.Volume:
    """Make a volume and claim its store. Raises TierError, OSError."""
    settings = {"store": arguments.store, "local_limit": arguments.local_limit}
    given = {key: value for key, value in settings.items() if value is not None}
    made = volume.create(arguments.state, **given)
    if not adopting:
        volume.make_tree(made, os.stat(arguments.mountpoint))
    apart(partial(_claim, made))
    return volume.load(arguments.state)


def _claim(made: volume.Volume) -> None:
    """Find out what the store of a new volume can do, and make it this volume's. Raises TierError, OSError."""
    from tierfs.store.probe import probe
    from tierfs.store.urls import open_store

    with contextlib.closing(open_store(made.store_url, create=True)) as unknown:
        capabilities = probe(unknown)
    with contextlib.closing(open_store(made.store_url, capabilities=capabilities, create=True)) as store:
        ownership.create(made, store)
    volume.complete(made, capabilities)


def _undo(state: str) -> None:
    """Remove a state directory that we have just made and that never became a volume."""
    adoption.cancel(state)
    volume.discard(state)
    with contextlib.suppress(OSError):
        with contextlib.suppress(FileNotFoundError):  # in an adoption it would have come last
            os.rmdir(os.path.join(state, "tree"))
        shutil.rmtree(state)


def _listen(opened: volume.Volume) -> socket.socket:
    """The control socket. Raises VolumeError, OSError."""
    directory = control.make_runtime_directory(os.geteuid())
    path = os.path.join(directory, f"{opened.identity.volume}.sock")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    listener.bind(path)
    os.chmod(path, 0o666)
    listener.listen(64)
    return listener


def _stop_listening(listener: socket.socket) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(listener.getsockname())
    listener.close()


def _raise_limits() -> None:
    """Let the server hold as many descriptors as it may: each file that any program has open is one of its own.

    A limit that is meant for one program would be met by the programs together, as their EMFILE.
    """
    with contextlib.suppress(ValueError, OSError):  # past the hard limit only with CAP_SYS_RESOURCE
        with open("/proc/sys/fs/nr_open") as file:
            most = int(file.read())
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
