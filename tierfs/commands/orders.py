"""pin, unpin, demote and fetch: commands about files that change where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click

from tierfs import control, locate, terminal
from tierfs.commands.paths import PATH
from tierfs.errors import TierError

_paths = click.argument("paths", nargs=-1, required=True, type=PATH)
_wait = click.option("--wait", is_flag=True, help="Return when it is done; name what stays as it is.")


@click.command()
@_wait
@_paths
def demote(wait: bool, paths: tuple[str, ...]) -> int:
    """Move files, and all in directories, to the store; reading them brings them back."""
    return _order(paths, "Demoting", wait, lambda relative: control.Demote(relative, wait))


@click.command()
@_wait
@_paths
def fetch(wait: bool, paths: tuple[str, ...]) -> int:
    """Bring files, and all in directories, back to the local disk."""
    return _order(paths, "Fetching", wait, lambda relative: control.Fetch(relative, wait))


@click.command()
@_paths
def pin(paths: tuple[str, ...]) -> int:
    """Keep files and directories, with all that is in them, on the local disk."""
    return _order(paths, "Pinning", True, lambda relative: control.SetPin(relative, True))


@click.command()
@_paths
def unpin(paths: tuple[str, ...]) -> int:
    """Take pins away."""
    return _order(paths, "Unpinning", True, lambda relative: control.SetPin(relative, False))


def _order(
    paths: Iterable[str], title: str, wait: bool, request: Callable[[list[bytes]], control.Request]
) -> int:
    """Send an order to the volume of each path; complain about what stayed. Returns the exit code."""
    failed = False
    volumes: dict[locate.Mount, dict[bytes, str]] = {}
    mounts = locate.read_mounts()
    for path in paths:
        try:
            place = locate.locate(path, mounts)
        except TierError as exc:
            terminal.complain(path, str(exc).removeprefix(f"{path}: "))
            failed = True
            continue
        volumes.setdefault(place.mount, {})[place.relative] = path
    for mount, named in volumes.items():
        done = converse_with_bar(mount, request(list(named)), title)
        # Many are cut short, what failed and what was named last of all.
        stayed = sorted(done.stayed, key=lambda item: (not item.failed, item.path not in named))
        lines = [(named.get(item.path) or mount.shown(item.path), item.reason) for item in stayed]
        terminal.complain_all(lines)
        failed = failed or any(item.failed or (wait and item.path in named) for item in done.stayed)
    return 1 if failed else 0


def converse_with_bar(mount: locate.Mount, request: control.Request, title: str) -> control.Done:
    """Carry out a request under a progress bar. Raises TierError; KeyboardInterrupt has cancelled it."""
    done, said = control.Done(), set[str]()
    with terminal.bar(title) as bar:
        for answer in control.converse(mount, request):
            if isinstance(answer, control.Progress):
                bar.show(answer)
                if answer.note and answer.note not in said:
                    said.add(answer.note)
                    terminal.complain(mount.mountpoint, answer.note)
            elif isinstance(answer, control.Done):
                done = answer
    return done
