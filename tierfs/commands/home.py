"""adopt and leave: a directory becomes a volume by one rename, and a directory again by another."""

from __future__ import annotations

import contextlib
import os
import shlex

import click

from tierfs import adoption, config, control, launch, locate, terminal, volume
from tierfs.commands.coming import await_mount
from tierfs.commands.mount import clear_dead_mount, daemon_arguments, mounted_at, refuse_others, unmount
from tierfs.commands.orders import converse_with_bar
from tierfs.commands.paths import PATH
from tierfs.errors import TierError, VolumeError
from tierfs.tree import open_tree


@click.command()
@click.option("--store", metavar="URL", help="s3://bucket/prefix or file:///path.")
@click.option(
    "--state", metavar="DIR", type=PATH, help="Where the volume keeps its local data."
)
@click.argument("directory", type=PATH)
def adopt(store: str | None, state: str | None, directory: str) -> None:
    """Turn DIRECTORY into a volume, by one rename, and mount it in the same place."""
    real = os.path.realpath(directory)
    where = os.path.realpath(state) if state else volume.adopted_state(real)
    if not state:
        volume.check_above(where)
    clear_dead_mount(real)
    tree = os.path.join(where, "tree")
    held = os.path.isdir(tree)
    if not held and os.path.isdir(real) and not _is_mounted(real):
        adoption.check_links(real)  # here: it may take longer than anybody waits for a daemon to begin
    try:
        launch.launch([*daemon_arguments(real, where, store), "--adopt"], real)
    except BaseException as exc:
        if held or not os.path.isdir(tree) or _is_mounted(real):
            raise
        if isinstance(exc, VolumeError):
            raise VolumeError(f"{exc}; {_where_it_is(real, where)}") from exc
        terminal.say(f"{directory}: {_where_it_is(real, where)}")
        raise


def _where_it_is(real: str, where: str) -> str:
    """For whoever finds an empty directory: it has been moved, and its mount failed."""
    mount = shlex.join(["tierfs", "mount", "--state", where, real])
    leave = shlex.join(["tierfs", "leave", "--state", where, real])
    return f"its content is in {os.path.join(where, 'tree')}: `{mount}` goes on, `{leave}` brings it back"


@click.command()
@click.option(
    "--state",
    metavar="DIR",
    type=PATH,
    help="Where it keeps its local data, if it is unmounted and was given another place.",
)
@click.argument("directory", type=PATH)
def leave(directory: str, state: str | None = None) -> None:
    """Fetch everything, unmount, and make DIRECTORY a plain directory again."""
    real = os.path.realpath(directory)
    await_mount(real)
    clear_dead_mount(real)
    where = volume.find_state(real, state)
    mounted = None
    if _is_mounted(real):
        refuse_others(mounted_at(real), "make it a plain directory")
        mounted = _status(mounted_at(real))
        if state and where != mounted.where:
            raise VolumeError(f"{directory}: keeps its local data in {mounted.where}: leave out --state")
        where = mounted.where
    elif not volume.exists(where):
        remedy = "correct --state" if state else "mount it first"
        raise VolumeError(f"{directory}: is no mounted TierFS volume: {remedy}")
    try:
        if mounted is not None:
            _bring_home(mounted_at(real), mounted)
        _give_back(real, where)
    except KeyboardInterrupt:
        if not _is_mounted(real):
            again = _command(real, where, state)
            terminal.say(f"{directory}: is unmounted already: {again} goes on where it was")
        raise


def _is_mounted(real: str) -> bool:
    return locate.mount_at(real, locate.read_mounts()) is not None


def _command(real: str, where: str, given: str | None) -> str:
    """By which a directory is left whose volume is not mounted any more."""
    if volume.find_state(real, given) == where:
        return "the same command"
    return f"`tierfs leave --state {shlex.quote(where)} {shlex.quote(real)}`"


def _bring_home(mount: locate.Mount, status: control.Status) -> None:
    """Fetch everything and unmount; nothing has changed where this fails. Raises VolumeError."""
    _check_room(mount, status)
    # A pin on the root keeps the mover from demoting again what has just come back.
    pinned_before = any(item == b"" for item in _pins(mount))
    try:
        _must(mount, control.SetPin([b""], True), "Pinning")
        _must(mount, control.Fetch([b""], True), "Fetching")
        holder = unmount(mount)
        if holder:
            raise VolumeError(
                f"{mount.mountpoint}: is unmounted here, but {holder} has it in another mount namespace:"
                f" end that, then {_command(mount.mountpoint, status.where, None)} goes on"
            )
    except BaseException:
        if not pinned_before:
            with contextlib.suppress(TierError):
                _must(mount, control.SetPin([b""], False), "Unpinning")
        raise


def _status(mount: locate.Mount) -> control.Status:
    for answer in control.converse(mount, control.GetStatus()):
        if isinstance(answer, control.Status):
            return answer
    raise VolumeError(f"{mount.mountpoint}: its daemon gave no status: try again")


def _pins(mount: locate.Mount) -> list[bytes]:
    return [
        answer.path
        for answer in control.converse(mount, control.GetPins())
        if isinstance(answer, control.Facts)
    ]


def _must(mount: locate.Mount, request: control.Request, title: str) -> None:
    """Carry out a request of which nothing may fail. Raises VolumeError."""
    done = converse_with_bar(mount, request, title)
    failed = [(mount.shown(item.path), item.reason) for item in done.stayed if item.failed]
    if failed:
        terminal.complain_all(failed)
        raise VolumeError(
            f"{mount.mountpoint}: files are still only in the store: nothing was changed;"
            " try again when the store answers"
        )


def _check_room(mount: locate.Mount, status: control.Status) -> None:
    try:
        same = os.stat(status.where).st_dev == os.stat(os.path.dirname(mount.mountpoint)).st_dev
        free = os.statvfs(status.where)
    except OSError as exc:
        raise VolumeError(f"{status.where}: cannot be read: act as the volume's owner or as root") from exc
    if not same:
        raise VolumeError(
            f"{mount.mountpoint}: its content is on another filesystem ({status.where}): copy it with `cp -a`"
        )
    missing = status.total_bytes - status.local_bytes
    if missing > free.f_bavail * free.f_frsize:
        raise VolumeError(
            f"{mount.mountpoint}: {terminal.size(missing)} must be fetched, but only"
            f" {terminal.size(free.f_bavail * free.f_frsize)} are free: make room first"
        )


def _give_back(directory: str, state: str) -> None:
    """With nothing mounted: verify, rename back, remove the state directory. Raises VolumeError, OSError."""
    home = volume.load(state)
    lock = volume.lock(state)
    try:
        tree = home.path("tree")
        adoption.finish(directory, state)
        if os.path.isdir(tree):
            with contextlib.closing(open_tree(tree)) as backing:
                volume.keep_attributes(home, backing.namespace)
            stubs = adoption.find_stubs(tree)
            if stubs:
                raise VolumeError(
                    f"{directory}: {terminal.shown(stubs[0])} is only in the store: mount it, then try again"
                )
            adoption.strip(tree)
            adoption.give_back(directory, state)
        elif not adoption.is_given_back(directory, state):
            raise VolumeError(f"{tree}: the backing tree is missing: put it back, then try again")
        adoption.make_durable(directory)
        volume.remove(state)
    finally:
        os.close(lock)
    if home.identity.store != config.EMBEDDED_STORE:
        terminal.tell(f"The copies are left in {home.store_url}: delete them when you no longer want them.")
