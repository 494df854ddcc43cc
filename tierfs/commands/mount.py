"""mount, umount and restart."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import subprocess
import sys
import time

import click

from tierfs import config, control, launch, locate, terminal, volume
from tierfs.commands.coming import ANEW_SECONDS, await_mount
from tierfs.commands.paths import PATH
from tierfs.errors import TierError, UsageError, VolumeError

_END_SECONDS = 120.0
_LOOK_SECONDS = 1.0
_NEXT_SECONDS = 0.02
_ABSENT = ("not mounted", "no mount point", "not found in")  # as umount(8) and fusermount3 say it


@click.command()
@click.option("--store", metavar="URL", help="s3://bucket/prefix or file:///path.")
@click.option(
    "--state", metavar="DIR", type=PATH, help="Where the volume keeps its local data."
)
@click.option("--local-limit", metavar="SIZE", help='Most bytes kept locally, like "20G".')
@click.option("--binding", type=click.Choice(["auto", "kernel", "fusepy"]), default="auto", show_default=True)
@click.option("--at", metavar="WHEN", help="A read-only view of the volume in --store as of then.")
@click.option("--only", metavar="PATH", default="", help="With --at: the part of it in this directory.")
@click.option("--force", is_flag=True, help="Take the store from another machine that has it.")
@click.option("--foreground", is_flag=True, help="Stay in the foreground, for service managers.")
@click.option("-o", "options", metavar="OPTS", multiple=True, help="Mount options, separated by commas.")
@click.argument("mountpoint", type=PATH)
def mount(
    store: str | None,
    state: str | None,
    local_limit: str | None,
    binding: str,
    at: str | None,
    only: str,
    force: bool,
    foreground: bool,
    options: tuple[str, ...],
    mountpoint: str,
) -> None:
    """Mount the volume of MOUNTPOINT there, creating it where there is none.

    WHEN is a date and time like 2026-11-20T14:30, or like "2 days ago"; PATH is as seen from MOUNTPOINT.
    """
    check_limit(local_limit)
    real = os.path.realpath(mountpoint)
    clear_dead_mount(real)
    if at is not None:
        from tierfs.commands.view import mount_view

        if store is None or state is not None or local_limit is not None or force:
            raise UsageError("--at needs --store, and goes without --state, --local-limit and --force")
        mount_view(store, at, only, binding, foreground, options, real)
        return
    if only:
        raise UsageError("--only goes with --at")
    if local_limit is not None:
        _refuse_new_limit(real)
    where = volume.find_state(real, state)
    arguments = daemon_arguments(real, where, store, local_limit, binding, options)
    if force:
        arguments.append("--force")
    if foreground:
        os.execv(sys.executable, launch.command([*arguments, "--foreground"]))
    launch.launch(arguments, real)
    if not volume.load(where).identity.conditional_put:
        terminal.complain(mountpoint, "its store cannot refuse a second machine: mount it on one only")


def _refuse_new_limit(mountpoint: str) -> None:
    """Raises VolumeError where a volume is mounted already: its limit stands elsewhere."""
    found = locate.mount_at(mountpoint, locate.read_mounts())
    if found is not None and found.volume:
        settings = os.path.join(_state_of(found), config.FILE_NAME)
        raise VolumeError(f"{mountpoint}: is mounted already: set local_limit in {settings}, that is enough")


def check_limit(local_limit: str | None) -> None:
    """Raises UsageError for what is no size."""
    if local_limit is not None and local_limit != "none":
        try:
            config.parse_size(local_limit)
        except ValueError as exc:
            raise UsageError(f"--local-limit: {exc}") from exc


def daemon_arguments(
    mountpoint: str,
    state: str,
    store: str | None = None,
    local_limit: str | None = None,
    binding: str = "auto",
    options: tuple[str, ...] = (),
) -> list[str]:
    """The daemon's command line. Raises UsageError for a store that is none."""
    arguments = ["--state", state, "--mountpoint", mountpoint, "--binding", binding]
    if store is not None:
        if store != config.EMBEDDED_STORE:
            from tierfs.store.urls import check_url

            check_url(store)
        arguments += ["--store", store]
    if local_limit is not None:
        arguments += ["--local-limit", local_limit]
    for option in options:
        arguments += ["-o", option]
    return arguments


def clear_dead_mount(mountpoint: str) -> None:
    """Detach a TierFS mount whose daemon is gone, which would answer nothing for ever. Raises VolumeError."""
    found = locate.mount_at(mountpoint, locate.read_mounts())
    if found is None or not found.volume:
        return
    try:
        control.connect(found).close()
    except VolumeError:
        try:
            os.statvfs(mountpoint)
        except OSError as exc:
            if exc.errno in (errno.ENOTCONN, errno.ECONNABORTED):
                detach(mountpoint)


@click.command()
@click.option("--wait", is_flag=True, help="First wait until everything is in the store.")
@click.argument("mountpoint", type=PATH)
def umount(wait: bool, mountpoint: str) -> None:
    """Unmount MOUNTPOINT and end its daemon."""
    await_mount(os.path.realpath(mountpoint))
    found = mounted_at(mountpoint)
    refuse_others(found, "unmount it")
    position, state = (drain(found), _state_of(found)) if wait else (0, "")
    holder = unmount(found)
    if holder:
        terminal.complain(
            mountpoint,
            f"is unmounted here; {holder} has it in another mount namespace: its daemon ends with that",
        )
        return
    # Bound to another place too, the volume goes on there, and nothing is over.
    if position and not any(other.volume == found.volume for other in locate.read_mounts()):
        from tierfs.commands.late import refuse_what_came_late

        refuse_what_came_late(mountpoint, state, position)


@click.command()
@click.argument("mountpoint", type=PATH)
def restart(mountpoint: str) -> None:
    """Go on at MOUNTPOINT with the version of TierFS that this command belongs to.

    Open files stay open; who asks for something meanwhile waits.
    """
    await_mount(os.path.realpath(mountpoint))
    found = mounted_at(mountpoint)
    refuse_others(found, "restart it")
    supervisor = _daemon_of(found)
    if supervisor is None:
        raise VolumeError(f"{mountpoint}: its daemon does not answer: unmount it, then mount it again")
    try:
        launch.restart(_state_of(found), supervisor, mountpoint)
    except PermissionError as exc:
        raise VolumeError(f"{mountpoint}: only root and the user who mounted it may restart it") from exc
    finally:
        os.close(supervisor)


def _state_of(mount: locate.Mount) -> str:
    """The state directory of a mounted volume. Raises VolumeError."""
    for answer in control.converse(mount, control.GetStatus()):
        if isinstance(answer, control.Status):
            return answer.where
    raise VolumeError(f"{mount.mountpoint}: its daemon does not say where its state directory is: see its log")


def mounted_at(mountpoint: str) -> locate.Mount:
    """The TierFS mount at a mountpoint. Raises VolumeError."""
    found = locate.mount_at(os.path.realpath(mountpoint), locate.read_mounts())
    if found is None or not found.volume:
        raise VolumeError(f"{mountpoint}: is no mounted TierFS volume: `tierfs status` lists those that are")
    if found.root != "/":
        raise VolumeError(f"{mountpoint}: is a part of a volume that is mounted elsewhere: use umount(8)")
    return found


def refuse_others(mount: locate.Mount, what: str) -> None:
    """Raises VolumeError where this is neither root nor who has mounted it."""
    if os.geteuid() not in (0, mount.uid):
        raise VolumeError(f"{mount.mountpoint}: only root and the user who mounted it may {what}")


def drain(mount: locate.Mount) -> int:
    """Wait, with a progress bar, until all is in the store. Returns up to which place in the mark log it was
    looked at; 0: nothing is for the store. Raises VolumeError where something cannot leave."""
    with terminal.bar("Copying to the store") as bar:
        for answer in control.converse(mount, control.Drain()):
            if isinstance(answer, control.Progress):
                bar.show(answer)
            elif isinstance(answer, control.Done):
                done = answer
    if done.stayed:
        for item in done.stayed:
            if not item.path:
                raise VolumeError(f"{mount.mountpoint}: {item.reason}: try again, or leave out --wait")
        lines = [(mount.shown(item.path), item.reason) for item in done.stayed]
        terminal.complain_all(lines)
        raise VolumeError(
            f"{mount.mountpoint}: {len(lines)} files are not in the store: see to that, or leave out --wait"
        )
    return done.position


def unmount(mount: locate.Mount) -> str:
    """Unmount, and wait until the daemon has ended. Returns who keeps it from that in another mount namespace.

    Raises VolumeError (busy, not permitted).
    """
    refuse_others(mount, "unmount it")
    supervisor = _daemon_of(mount)
    try:
        _take_away(mount, supervisor)
        elsewhere = any(other.volume == mount.volume for other in locate.read_mounts())
        if elsewhere or supervisor is None:
            return ""  # bound to another place too, or nobody is there to wait for
        deadline = time.monotonic() + _END_SECONDS
        while not select.select([supervisor], [], [], _LOOK_SECONDS)[0]:
            holder = locate.holder(mount.volume)
            if holder:
                return holder
            if time.monotonic() > deadline:
                raise VolumeError(f"{mount.mountpoint}: is unmounted, but its daemon still runs: see its log")
        return ""
    finally:
        if supervisor is not None:
            os.close(supervisor)


def _take_away(mount: locate.Mount, supervisor: int | None) -> None:
    """Also one that is just being mounted anew: who asked for its end shall not find it there again."""
    command = ["umount", "-i"] if os.geteuid() == 0 else ["fusermount3", "-u"]
    deadline = time.monotonic() + ANEW_SECONDS
    while True:
        try:
            return _run([*command, "--", mount.mountpoint], mount.mountpoint)
        except VolumeError as error:
            is_absent = any(said in str(error) for said in _ABSENT)
            if supervisor is None or not is_absent or time.monotonic() > deadline:
                raise
        while not _is_there(mount) and time.monotonic() < deadline:
            if select.select([supervisor], [], [], _NEXT_SECONDS)[0]:
                return None


def _is_there(mount: locate.Mount) -> bool:
    found = locate.mount_at(mount.mountpoint, locate.read_mounts())
    return found is not None and found.volume == mount.volume


def detach(mountpoint: str) -> None:
    """Take a dead mount out of the way. Raises VolumeError."""
    command = ["umount", "-i", "-l"] if os.geteuid() == 0 else ["fusermount3", "-uz"]
    _run([*command, "--", mountpoint], mountpoint)


def _daemon_of(mount: locate.Mount) -> int | None:
    """A descriptor that becomes readable when the supervisor has ended; None where none answers."""
    with contextlib.suppress(TierError, ProcessLookupError), control.connect(mount) as sock:
        pid, _, _ = control.peer_credentials(sock)
        return os.pidfd_open(pid)
    return None


def _run(command: list[str], mountpoint: str) -> None:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    except FileNotFoundError as exc:
        raise VolumeError(f"{mountpoint}: {command[0]} is not installed: install the package fuse3") from exc
    if result.returncode == 0:
        return
    said = result.stderr.strip().splitlines()[-1:] or [f"{command[0]} failed"]
    if "busy" in said[0]:
        inner = [m.mountpoint for m in locate.read_mounts() if locate.is_under(m.mountpoint, mountpoint)]
        if len(inner) > 1:
            raise VolumeError(f"{mountpoint}: is busy: {inner[-1]} is mounted in it: unmount that first")
        raise VolumeError(
            f"{mountpoint}: is busy: close what is open in it (`fuser -vm {mountpoint}` names the processes)"
        )
    if "not permitted" in said[0] or "must be superuser" in said[0]:
        raise VolumeError(f"{mountpoint}: only root and the user who mounted it may unmount it")
    raise VolumeError(f"{mountpoint}: cannot be unmounted: {said[0].split(': ')[-1]}")
