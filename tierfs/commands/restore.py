"""restore."""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any

import click

from tierfs import launch, restoring, terminal, volume
from tierfs.commands.mount import check_limit, daemon_arguments
from tierfs.commands.paths import PATH
from tierfs.errors import VolumeError

_SHOWN = 20  # lines of each kind; all are in the state directory
_COUNTED = (("files", "file"), ("directories", "directory"))


@click.command()
@click.option("--store", metavar="URL", required=True, help="s3://bucket/prefix or file:///path.")
@click.option(
    "--state", metavar="DIR", type=PATH, help="Where the volume keeps its local data."
)
@click.option("--local-limit", metavar="SIZE", help='Most bytes kept locally, like "20G".')
@click.option("--force", is_flag=True, help="Take the store from a machine that still seems to use it.")
@click.option("--no-special", is_flag=True, help="Without devices, set-id bits and file capabilities.")
@click.option("-o", "options", metavar="OPTS", multiple=True, help="Mount options, separated by commas.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.argument("directory", metavar="DIR", type=PATH)
def restore(
    store: str,
    state: str | None,
    local_limit: str | None,
    force: bool,
    no_special: bool,
    options: tuple[str, ...],
    as_json: bool,
    directory: str,
) -> None:
    """Bring a lost machine's volume back from its store, and mount it at DIR.

    Names, attributes and sizes come now, content when it is read; what had never reached the store is listed.
    """
    from tierfs.store.urls import check_url

    check_url(store)
    check_limit(local_limit)
    real = os.path.realpath(directory)
    where = os.path.realpath(state) if state else os.path.realpath(volume.default_state(real))
    if os.path.lexists(real):
        volume.check_mountpoint(real, where)
    report = _read_report(where) if restoring.is_done(where) else _carry_out(store, where, force, no_special)
    with contextlib.suppress(FileExistsError):
        os.mkdir(real)
    launch.launch(daemon_arguments(real, where, local_limit=local_limit, options=options), real)
    if as_json:
        terminal.print_json({"mountpoint": real, "state": where, **report})
    else:
        _print(report, real, os.path.join(where, restoring.REPORT))


def _carry_out(url: str, state: str, force: bool, no_special: bool) -> dict[str, Any]:
    from tierfs.store.probe import probe
    from tierfs.store.urls import open_store

    restoring.check_state(state)
    with contextlib.closing(open_store(url)) as unknown:
        capabilities = probe(unknown)
    with contextlib.closing(open_store(url, capabilities=capabilities)) as known:
        owner = restoring.check_owner(known, state, force)
    volume.make_state(state)
    lock = volume.lock(state)
    try:
        home = restoring.begin(state, url, owner)
        with (
            contextlib.closing(open_store(url, capabilities=capabilities)) as store,
            terminal.steps() as show,
        ):
            return restoring.restore(home, store, owner, capabilities, special=not no_special, progress=show)
    finally:
        os.close(lock)


def _read_report(state: str) -> dict[str, Any]:
    path = os.path.join(state, restoring.REPORT)
    try:
        with open(path, "rb") as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError) as exc:
        raise VolumeError(f"{path}: cannot be read: the volume is restored: mount it") from exc


def _print(report: dict[str, Any], mountpoint: str, where: str) -> None:
    size, shown = terminal.size, terminal.shown
    rescued = report.get("rescued", [])  # of a version that knew none
    files, directories = (terminal.count(report[key], noun) for key, noun in _COUNTED)
    terminal.tell(
        f"{shown(mountpoint)}: {files} ({size(report['bytes'])}) in {directories}, as of"
        f" {_date(report['as_of'])}"
    )
    _list("lost (their content had not reached the store)", report["lost"], _lost)
    _list("older than they last were", report["older"], _older)
    _list("that were open (a rescue copy, taken while they were written, and perhaps torn)", rescued, _rescued)
    _list("not as they were", report["refused"], lambda item: f"{shown(item['path'])}: {item['reason']}")
    for trouble in report["journal"]["troubles"][:_SHOWN]:
        terminal.tell(f"journal: {shown(trouble)}")
    if report["lost"] or report["older"] or rescued or report["refused"]:
        terminal.tell(f"All of this is in {shown(where)}")


def _list(title: str, items: list[dict[str, Any]], show: Any) -> None:
    if not items:
        return
    terminal.tell(f"{len(items)} {title}:")
    for item in items[:_SHOWN]:
        terminal.tell(f"  {show(item)}")
    if len(items) > _SHOWN:
        terminal.tell(f"  ... and {len(items) - _SHOWN} more")


def _lost(item: dict[str, Any]) -> str:
    since = f", changed {_date(item['since'])}" if item["since"] else ""
    return f"{terminal.shown(item['path'])} ({terminal.size(item['size'])}{since})"


def _older(item: dict[str, Any]) -> str:
    return f"{terminal.shown(item['path'])}: is that of {_date(item['restored_mtime'])}"


def _rescued(item: dict[str, Any]) -> str:
    return f"{terminal.shown(item['path'])}: is that of {_date(item['taken'])}"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
