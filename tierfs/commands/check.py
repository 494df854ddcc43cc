"""check: compare a volume's tree, index and store."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator

import click

from tierfs import config, control, launch, locate, terminal, volume
from tierfs.commands.mount import clear_dead_mount, daemon_arguments, unmount
from tierfs.commands.paths import PATH
from tierfs.errors import TierError, UsageError, VolumeError

_RENEWING_SECONDS = 60.0
_PAUSE_SECONDS = 0.3


@click.command()
@click.option("--repair", is_flag=True, help="Put right what can be put right.")
@click.option("--read-data", is_flag=True, help="Also read every object and compare its digests.")
@click.option("--rate", metavar="SIZE", help="Read at most so much a second, like 20M.")
@click.option("--from-start", is_flag=True, help="Read from the beginning, not from where it was stopped.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.argument("target", metavar="VOLUME", type=PATH)
def check(
    repair: bool, read_data: bool, rate: str | None, from_start: bool, as_json: bool, target: str
) -> int:
    """Compare the tree, index and store of VOLUME: a mountpoint or a state directory."""
    if (rate is not None or from_start) and not read_data:
        raise UsageError("--rate and --from-start say how copies are read: give --read-data too")
    request = control.Check(repair, read_data, _bytes_of(rate), from_start)
    with _mounted(target) as mount:
        findings, renewed = _ask(mount, request), []
        if findings.renewing:
            renewed = findings.findings
            findings = _ask_again(mount, request)
    listed = [*renewed, *findings.findings]
    left = [finding for finding in listed if not finding.repaired]
    if as_json:
        terminal.print_json(
            {
                "files": findings.files,
                "findings": [control.to_json(finding) for finding in listed],
                "left": len(left),
                "read_files": findings.read_files,
                "read_bytes": findings.read_bytes,
                "resumed_files": findings.resumed_files,
                "resumed_bytes": findings.resumed_bytes,
            }
        )
        return 1 if left else 0
    for finding in listed:
        where = f"{terminal.shown(finding.path)}: " if finding.path else ""
        terminal.tell(f"{where}{finding.what}{' (repaired)' if finding.repaired else ''}")
    if read_data and not findings.renewing:
        size = terminal.size(findings.read_bytes)
        terminal.tell(f"{terminal.count(findings.read_files, 'copy')} read, {size}{_earlier(findings)}")
    checked, found = terminal.count(findings.files, "file"), terminal.count(len(listed), "finding")
    terminal.tell(f"{checked} checked, {found}, {len(left)} left")
    return 1 if left else 0


def _bytes_of(rate: str | None) -> int:
    """Bytes a second; 0 without a limit. Raises UsageError."""
    if rate is None:
        return 0
    try:
        count = config.parse_size(rate)
    except ValueError as exc:
        raise UsageError(f"--rate: {exc}") from exc
    if not count:
        raise UsageError("--rate: nothing would be read at 0 bytes a second: leave it out for no limit")
    return count


def _earlier(findings: control.Findings) -> str:
    if not findings.resumed_bytes:
        return ""
    return f", {findings.resumed_files} of them ({terminal.size(findings.resumed_bytes)}) by an earlier check"


@contextlib.contextmanager
def _mounted(target: str) -> Iterator[locate.Mount]:
    """The mount of a volume; one that is not mounted is, for the check, in a directory that nobody else enters.

    Raises VolumeError.
    """
    real = os.path.realpath(target)
    clear_dead_mount(real)
    at = locate.mount_at(real, locate.read_mounts())
    if at is not None and at.volume:
        yield at
        return
    if not volume.exists(real):
        raise VolumeError(f"{target}: is neither a mounted volume nor a state directory")
    identity = volume.load(real).identity
    for mount in locate.tier_mounts():
        if mount.volume == identity.volume:
            yield mount
            return
    with tempfile.TemporaryDirectory(prefix="tierfs-check-") as private:
        private = os.path.realpath(private)
        launch.launch(daemon_arguments(private, real), private)
        try:
            yield locate.Mount(private, locate.FSTYPE, f"{locate.SOURCE_PREFIX}{identity.volume}", os.geteuid())
        finally:
            unmount(locate.locate(private).mount)


def _ask_again(mount: locate.Mount, request: control.Check) -> control.Findings:
    """With a new index, as soon as there is one. Raises TierError where it takes too long."""
    deadline = time.monotonic() + _RENEWING_SECONDS
    while True:
        time.sleep(_PAUSE_SECONDS)
        try:
            findings = _ask(mount, request)
        except TierError:
            if time.monotonic() > deadline:
                raise
            continue
        if not findings.renewing or time.monotonic() > deadline:
            return findings


def _tell_where(first: control.Progress) -> None:
    if first.bytes_resumed:
        terminal.say(f"reading goes on where it was stopped, after {terminal.size(first.bytes_resumed)}")


def _ask(mount: locate.Mount, request: control.Check) -> control.Findings:
    reading: control.Progress | None = None
    try:
        with terminal.bar("Checking") as checking, terminal.bar("Reading") as bar:
            for answer in control.converse(mount, request):
                if isinstance(answer, control.Findings):
                    return answer
                if not isinstance(answer, control.Progress):
                    continue
                if not answer.bytes_total:
                    checking.show(answer)
                    continue
                if reading is None:
                    checking.close()
                    _tell_where(answer)
                reading = answer
                bar.show(answer)
    except (KeyboardInterrupt, TierError) as exc:
        if request.read_data and (reading is not None or isinstance(exc, KeyboardInterrupt)):
            read = f"{reading.files_done} of {reading.files_total} copies are read: " if reading else ""
            terminal.say(f"{read}the same command goes on where it was, `--from-start` begins anew")
        raise
    raise VolumeError(f"{mount.mountpoint}: its daemon gave no findings: try again")
