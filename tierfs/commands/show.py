"""status, ls and pins: commands that only show."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from tierfs import control, locate, terminal
from tierfs.commands.asking import ask_all
from tierfs.commands.paths import PATH
from tierfs.errors import PathError, TierError


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.argument("paths", nargs=-1, type=PATH)
def status(as_json: bool, paths: tuple[str, ...]) -> int:
    """Show sizes, tiers, queue and errors of volumes, or tier, heat and pin of a PATH in one."""
    documents: list[dict[str, Any]] = []
    failed = False
    for path, answer in _answers(paths) if paths else _answers_of_all():
        if isinstance(answer, TierError):
            if len(paths) == 1:
                raise answer
            terminal.complain(path, str(answer).removeprefix(f"{path}: "))
            failed = True
            continue
        documents.append(answer)
        if not as_json:
            (_print_volume if "mountpoint" in answer else _print_path)(answer)
    if as_json:
        terminal.print_json(documents[0] if documents and len(paths) == 1 else documents)
    elif not documents and not failed:
        terminal.tell("No TierFS volume is mounted.")
    return 1 if failed else 0


def _answers(paths: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any] | TierError]]:
    mounts = locate.read_mounts()
    for path in paths:
        try:
            place = locate.locate(path, mounts)
            yield path, _path_document(path, place) if place.relative else _volume_document(place.mount)
        except TierError as exc:
            yield path, exc


def _answers_of_all() -> Iterator[tuple[str, dict[str, Any] | TierError]]:
    for mount, answer in ask_all(locate.tier_mounts(), _volume_document):
        yield mount.mountpoint, answer


def _volume_document(mount: locate.Mount) -> dict[str, Any]:
    for answer in control.converse(mount, control.GetStatus()):
        if isinstance(answer, control.Status):
            document = {"mountpoint": mount.mountpoint, **control.to_json(answer), "state": answer.where}
            del document["state_bytes"]
            document["waiting"] = [control.to_json(file) for file in answer.waiting]
            document["local_limit"] = document["local_limit"] or None  # none is not a limit of nothing
            return document
    raise PathError(f"{mount.mountpoint}: its daemon gave no status: try again")


def _path_document(path: str, place: locate.Place) -> dict[str, Any]:
    facts, _ = _facts(place, control.GetFacts([place.relative]), path)
    return {**facts[0], "path": os.path.abspath(path)}


def _facts(
    place: locate.Place, request: control.Request, path: str
) -> tuple[list[dict[str, Any]], list[control.Outcome]]:
    """The facts that a request is answered with, and what could not be looked at beneath the path.

    Raises PathError where the path itself was refused.
    """
    found, unseen = [], []
    for answer in control.converse(place.mount, request):
        if isinstance(answer, control.Facts):
            found.append(control.to_json(answer))
        elif isinstance(answer, control.Done):
            unseen = answer.stayed
    if unseen and not found and unseen[0].path == place.relative:
        raise PathError(f"{path}: {unseen[0].reason}")
    return found, unseen


def _print_path(document: dict[str, Any]) -> None:
    state = ", ".join(
        word
        for word, on in (
            (document["tier"], True),
            ("pinned", document["pinned"]),
            ("not yet in the store", document["dirty"]),
        )
        if on
    )
    terminal.tell(f"{terminal.shown(document['path'])}: {state}")
    if document["tier"] in ("directory", "other"):
        return
    local, size = terminal.size(document["local_bytes"]), terminal.size(document["size"])
    terminal.tell(f"  size   {size}, {local} of it local")
    terminal.tell(f"  heat   {document['heat']:.2f}")
    terminal.tell(f"  copy   {document['copy'] or 'none'}")
    if document["stays"]:
        terminal.tell(f"  stays  {document['stays']}")
    if document["reason"]:
        terminal.tell(f"  error  {document['reason']}")


def _print_volume(document: dict[str, Any]) -> None:
    size, dirty = terminal.size, terminal.count(document["dirty_files"], "file")
    limit = document["local_limit"]
    of_limit = f" of {size(limit)}" if limit else ""
    lent = f", {size(document['lent_bytes'])} for scans alone" if document["lent_bytes"] else ""
    whole = f"all content {size(document['total_bytes'])}"
    resident = document["files"] - document["stubs"]
    lines = [
        ("store", document["store"]),
        ("state", document["state"]),
        ("local", f"{size(document['local_bytes'])}{of_limit}{lent}; {whole}"),
        ("files", f"{document['files']}: {resident} local, {document['stubs']} stubs"),
        ("to copy", f"{dirty}, {size(document['dirty_bytes'])}" + _since(document)),
        ("queued", f"{document['queued']}"),
        ("rates", f"up {size(int(document['upload_rate']))}/s, down {size(int(document['fetch_rate']))}/s"),
        ("pids", ", ".join(f"{name} {pid}" for name, pid in document["pids"].items())),
    ]
    lines += _deaths(document)
    if document["binding"]:
        lines.append(("binding", "{name}: {reason}".format(**document["binding"])))
    if document["journal_behind_seconds"]:
        lines.append(("journal", f"{terminal.age(document['journal_behind_seconds'])} behind"))
    if document["verifying"]:
        lines.append(("verifying", f"{document['verifying']} files after an unclean stop"))
    lines += [("open", _unsaved(file)) for file in document["waiting"] if file["open"]]
    if document["ahead"] and document["ahead"]["files"]:
        lines.append(("ahead", _ahead(document["ahead"])))
    if document["scrub"]:
        lines.append(("scrub", _scrub(document["scrub"])))
    lines += [("note", note) for note in document["notes"]]
    for problem in document["errors"]:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(problem["at"]))
        lines.append(("error", f"{at} {terminal.shown(problem['what'])}"))
    terminal.tell(terminal.shown(document["mountpoint"]))
    for name, text in lines:
        terminal.tell(f"  {name:<9} {text}")


def _since(document: dict[str, Any]) -> str:
    oldest = document["oldest_dirty"]
    return f", the oldest for {terminal.age(oldest)}" if oldest else ""


def _deaths(document: dict[str, Any]) -> list[tuple[str, str]]:
    """What has ended unasked since it was mounted, and was replaced; and how often it was restarted."""
    counts = [(document[f"{name}_deaths"], f"the {name} ended by itself") for name in ("server", "mover")]
    counts.append((document["restarts"], "restarted"))
    said = ", ".join(f"{what} {count} {'time' if count == 1 else 'times'}" for count, what in counts if count)
    return [("replaced", said)] if said else []


def _unsaved(file: dict[str, Any]) -> str:
    size, age = terminal.size(file["size"]), terminal.age(file["since"])
    rescued = f" (a rescue copy of {terminal.age(file['rescued'])} ago is)" if file["rescued"] else ""
    return f"{terminal.shown(file['path'])}: {size}, open, not in the store for {age}{rescued}"


def _ahead(ahead: dict[str, int]) -> str:
    came = f"{ahead['files']} files, {terminal.size(ahead['bytes'])}, came before they were asked for"
    return f"{came}; {ahead['used_files']} of them were used"


def _scrub(scrub: dict[str, Any]) -> str:
    if not scrub["every"] and not scrub["began"]:
        return "never (scrub_every)"
    text = f"every {terminal.age(scrub['every'])}" if scrub["every"] else "never (scrub_every)"
    if scrub["running"] or not scrub["ended"]:
        read = f"{scrub['files']} copies read, {terminal.size(scrub['bytes'])}"
        text += f"; {read}, since {_day(scrub['began'])}" if scrub["began"] else "; none yet"
    elif scrub["files"]:
        text += f"; {scrub['files']} copies read by {_day(scrub['ended'])}"
    return text + (f"; {scrub['damaged']} CANNOT BE HAD BACK" if scrub["damaged"] else "")


def _day(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))


@click.command("ls")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.argument("path", default=".", type=PATH)
def ls(as_json: bool, path: str) -> int:
    """List the names in PATH with tier, local and total size, heat and pin."""
    place = locate.locate(path)
    documents, unseen = _facts(place, control.ListNames(place.relative), path)
    base = os.fsdecode(place.relative)
    for document in documents:
        document["name"] = os.path.basename(document["path"]) if document["path"] != base else path
        document["path"] = place.mount.shown(os.fsencode(document["path"]))
    if as_json:
        terminal.print_json(documents)
    else:
        _print_table(documents, lambda document: str(document["name"]))
    terminal.complain_all([(place.mount.shown(item.path), item.reason) for item in unseen])
    return 1 if unseen else 0


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.argument("paths", nargs=-1, type=PATH)
def pins(as_json: bool, paths: tuple[str, ...]) -> int:
    """List what is pinned in the volumes of these PATHS; without one in all that are mounted and answer."""
    documents: list[dict[str, Any]] = []
    mounts, failed = _volumes_of(paths)
    if paths:
        for mount in mounts:
            documents += _pins(mount)
    else:
        for mount, found in ask_all(locate.tier_mounts(), _pins):
            # Nobody named it: another user's, or one that is just being unmounted, must not hide the others.
            if isinstance(found, TierError):
                terminal.complain(mount.mountpoint, str(found).removeprefix(f"{mount.mountpoint}: "))
            else:
                documents += found
    if as_json:
        terminal.print_json(documents)
    else:
        _print_table(documents, lambda document: str(document["path"]))
    return 1 if failed else 0


def _volumes_of(paths: tuple[str, ...]) -> tuple[list[locate.Mount], bool]:
    """Each volume that one of these paths is in, and whether one is in none, or is not there: that is said."""
    table, found, failed = locate.read_mounts(), dict[str, locate.Mount](), False
    for path in paths:
        try:
            place = locate.locate(path, table)
            if place.relative:
                _facts(place, control.GetFacts([place.relative]), path)
            found.setdefault(place.mount.volume, place.mount)
        except TierError as exc:
            terminal.complain(path, str(exc).removeprefix(f"{path}: "))
            failed = True
    return list(found.values()), failed


def _pins(mount: locate.Mount) -> list[dict[str, Any]]:
    found, _ = _facts(locate.Place(mount, b""), control.GetPins(), mount.mountpoint)
    return [{**document, "path": mount.shown(os.fsencode(document["path"]))} for document in found]


def _print_table(documents: list[dict[str, Any]], name: Callable[[dict[str, Any]], str]) -> None:
    if documents:
        terminal.tell(f"{'TIER':<10}{'LOCAL':>8}{'SIZE':>8}{'HEAT':>8}  PIN  NAME")
    for document in documents:
        pinned = "pin" if document["pinned"] else "-"
        local, total = terminal.size(document["local_bytes"]), terminal.size(document["size"])
        row = f"{document['tier']:<10}{local:>8}{total:>8}{document['heat']:>8.2f}  {pinned:<4}"
        terminal.tell(f"{row} {terminal.shown(name(document))}")
