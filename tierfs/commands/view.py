"""mount --at: a read-only view of a volume as of a moment."""

from __future__ import annotations

import contextlib
import os
import sys
import time

from tierfs import launch, moments, terminal, viewing, volume
from tierfs.commands.mount import daemon_arguments
from tierfs.errors import ObjectMissingError, VolumeError
from tierfs.ownership import STORE_KEY


def mount_view(
    url: str, at: str, only: str, binding: str, foreground: bool, options: tuple[str, ...], mountpoint: str
) -> None:
    """Make the view and mount it; nothing is left of it where that fails. Raises TierError, OSError."""
    until = moments.parse(at, time.time())
    below = os.fsencode(os.path.normpath("/" + only).strip("/"))
    state = viewing.new_state(volume.default_state(mountpoint))
    try:
        volume.check_mountpoint(mountpoint, state)
        made = _make(state, url, until, below)
        arguments = daemon_arguments(mountpoint, state, binding=binding, options=options)
        _tell(made, until, mountpoint)
        if foreground:
            os.execv(sys.executable, launch.command([*arguments, "--foreground"]))
        launch.launch(arguments, mountpoint)
    except BaseException:
        viewing.remove(state)
        raise


def _make(state: str, url: str, until: int, only: bytes) -> viewing.View:
    from tierfs.store.probe import look
    from tierfs.store.urls import check_url, open_store

    check_url(url)
    with contextlib.closing(open_store(url)) as unknown:
        try:
            capabilities = look(unknown, STORE_KEY)
        except ObjectMissingError as exc:
            raise VolumeError(f"{unknown.describe()}: holds no volume: correct the URL") from exc
    lock = volume.lock(state)
    try:
        with contextlib.closing(open_store(url, capabilities=capabilities)) as store, terminal.steps() as show:
            return viewing.make(state, url, store, capabilities, until, only, show)
    finally:
        os.close(lock)


def _tell(made: viewing.View, until: int, mountpoint: str) -> None:
    outcome = made.outcome
    files = terminal.count(outcome.files, "file")
    terminal.tell(
        f"{terminal.shown(mountpoint)}: {files} ({terminal.size(outcome.content)}) as of"
        f" {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(made.at / 1e9))}, read-only"
    )
    if made.at > until:
        terminal.complain(mountpoint, "the journal does not reach back so far: this is the first it tells of")
    terminal.complain_all(
        [(os.fsdecode(left.path), "had not been copied then: left out") for left in outcome.lost]
        + [(os.fsdecode(left.path), "was being changed then: its content before") for left in outcome.older]
        + [(os.fsdecode(left.path), "was open then: a rescue copy, perhaps torn") for left in outcome.rescued]
        + [(os.fsdecode(path), why) for path, why in outcome.refused]
        + [("journal", trouble) for trouble in made.troubles]
    )
