"""versions, restore-version and gc: what is kept of the past, and for how long."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from typing import Any

import click

from tierfs import control, locate, moments, syscalls, terminal
from tierfs.commands.mount import mounted_at
from tierfs.commands.paths import PATH
from tierfs.errors import PathError, UsageError, VolumeError

_HERE = -100  # AT_FDCWD


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.argument("path", type=PATH)
def versions(as_json: bool, path: str) -> None:
    """List the former contents of PATH that are kept: of a file, there or deleted, or beneath a directory."""
    place = locate.locate(path)
    found = [
        _document(place.mount, answer)
        for answer in control.converse(place.mount, control.GetVersions(place.relative))
        if isinstance(answer, control.Version)
    ]
    if as_json:
        terminal.print_json(found)
        return
    if not found:
        terminal.tell(f"{terminal.shown(path)}: no copy of it has been made yet")
        return
    named = any(version["path"] != os.path.abspath(path) for version in found)
    head = f"{'GENERATION':>12}{'SIZE':>8}  {'MODIFIED':<20}{'STATE':<12}{'KEPT UNTIL':<18}"
    terminal.tell(f"{head}{'PATH' if named else ''}".rstrip())
    for version in found:
        kept = _day(version["kept_until"]) if version["kept_until"] else "-"
        row = f"{version['generation']:>12}{terminal.size(version['size']):>8}  {_day(version['mtime']):<20}"
        row += f"{version['state']:<12}{kept:<18}{terminal.shown(version['path']) if named else ''}"
        terminal.tell(row.rstrip())


def _document(mount: locate.Mount, answer: control.Version) -> dict[str, Any]:
    fields = control.to_json(answer)
    return {
        "path": mount.shown(os.fsencode(fields["path"])),
        "generation": answer.generation,
        "size": answer.size,
        "mtime": answer.mtime / 1e9,
        "key": answer.key,
        "state": answer.state,
        "since": answer.since / 1e9,
        "until": answer.until / 1e9 if answer.until is not None else None,
        "kept_until": answer.kept_until,
    }


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


@click.command("restore-version")
@click.argument("version", metavar="PATH@GENERATION|PATH@WHEN", type=PATH)
@click.argument("to", required=False, type=PATH)
def restore_version(version: str, to: str | None) -> None:
    """Bring a former content back, as a file of its own: at TO or, where nothing is there, at PATH.

    WHEN is a date and time like 2026-11-20T14:30, or like "2 days ago".
    """
    path, at, chosen = version.rpartition("@")
    if not at or not path or not chosen.strip():
        raise UsageError(f"{version}: write PATH@GENERATION, or PATH@WHEN with {moments.GRAMMAR}")
    place = locate.locate(path)
    if chosen.strip().isdecimal():
        request = control.ReadVersion(place.relative, generation=int(chosen))
    else:
        request = control.ReadVersion(place.relative, when=moments.parse(chosen, time.time()))
    target = to if to is not None else path
    if os.path.lexists(target):
        raise PathError(f"{target}: is there: give another place to restore to, or move it away first")
    directory = os.path.dirname(os.path.abspath(target))
    if not os.path.isdir(directory):
        raise PathError(f"{directory}: is no directory: make it, or give another place to restore to")
    _restore(place.mount, request, target, directory)


def _restore(mount: locate.Mount, request: control.ReadVersion, target: str, directory: str) -> None:
    """Write under another name first: what is at the target is whole. Raises TierError, OSError."""
    temporary = os.path.join(directory, f".tierfs-restore-{secrets.token_hex(6)}")
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            version = _receive(mount, request, fd)
            _dress(fd, version)
            os.fsync(fd)
        finally:
            os.close(fd)
        _name(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    above = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(above)
    finally:
        os.close(above)
    terminal.tell(f"{terminal.shown(target)}: {terminal.size(version.size)} of generation {version.generation}")


def _receive(mount: locate.Mount, request: control.ReadVersion, fd: int) -> control.Version:
    version: control.Version | None = None
    done = False
    with terminal.bar("Restoring") as bar:
        for answer in control.converse(mount, request):
            if isinstance(answer, control.Version):
                version = answer
                os.ftruncate(fd, version.size)
            elif isinstance(answer, control.Content) and version is not None:
                view, at = memoryview(answer.data), answer.offset
                while view:
                    written = os.pwrite(fd, view, at)
                    view, at = view[written:], at + written
                bar.show(control.Progress(0, 1, at, version.size, version.path))
            done = isinstance(answer, control.Done)
    if version is None or not done:
        raise VolumeError(f"{mount.mountpoint}: its daemon sent no version: try again")
    return version


def _dress(fd: int, version: control.Version) -> None:
    """Owner, mode and time as they were, as far as they are known and may be given."""
    if version.mode:
        mode = version.mode & 0o777
        if os.geteuid() == 0:
            os.fchown(fd, version.uid, version.gid)
            mode = version.mode
        os.fchmod(fd, stat.S_IMODE(mode))
    os.utime(fd, ns=(version.mtime, version.mtime))


def _name(temporary: str, target: str) -> None:
    """Give it its name, unless something has come there meanwhile. Raises PathError, OSError."""
    try:
        syscalls.renameat2(_HERE, os.fsencode(temporary), _HERE, os.fsencode(target), syscalls.RENAME_NOREPLACE)
    except FileExistsError as exc:
        raise PathError(f"{target}: has come into being meanwhile: give another place to restore to") from exc
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
        os.link(temporary, target)  # a filesystem without that flag
        os.unlink(temporary)


@click.command()
@click.option("--dry-run", is_flag=True, help="Only name what will be removed, and when.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.argument("mountpoint", type=PATH)
def gc(dry_run: bool, as_json: bool, mountpoint: str) -> None:
    """Remove from the store what nothing refers to any more, as far as its time is over."""
    listed: list[dict[str, Any]] = []
    removed = 0
    for answer in control.converse(mounted_at(mountpoint), control.Collect(dry_run)):
        if isinstance(answer, control.Garbage):
            listed.append(control.to_json(answer))
        elif isinstance(answer, control.Done) and not dry_run:
            removed = answer.files
    if as_json:
        terminal.print_json(listed if dry_run else {"removed": removed})
        return
    if not dry_run:
        terminal.tell(f"{terminal.count(removed, 'object')} removed")
        return
    for entry in listed:
        size = "?" if entry["size"] is None else terminal.size(entry["size"])
        terminal.tell(f"{_day(entry['may_go'])}  {size:>8}  {entry['key']}  {terminal.shown(entry['reason'])}")
    if not listed:
        terminal.tell("Nothing is to be removed.")
        return
    total = terminal.size(sum(entry["size"] or 0 for entry in listed))
    terminal.tell(f"{terminal.count(len(listed), 'object')}, {total}: each stays at least until then")
