"""check: compare a volume's tree, index and store."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator

import click

from tierfs import control, launch, locate, terminal, volume
from tierfs.commands.mount import clear_dead_mount, daemon_arguments, unmount
from tierfs.errors import TierError, VolumeError

_RENEWING_SECONDS = 60.0
_PAUSE_SECONDS = 0.3


@click.command()
@click.option("--repair", is_flag=True, help="Put right what can be put right.")
@click.option("--read-data", is_flag=True, help="Also read every object and compare its digests.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.argument("target", metavar="VOLUME", type=click.Path(readable=False))
def check(repair: bool, read_data: bool, as_json: bool, target: str) -> int:
    """Compare the tree, index and store of VOLUME: a mountpoint or a state directory."""
    with _mounted(target) as mount:
        request = control.Check(repair, read_data)
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
            }
        )
        return 1 if left else 0
    for finding in listed:
        where = f"{terminal.shown(finding.path)}: " if finding.path else ""
        click.echo(f"{where}{finding.what}{' (repaired)' if finding.repaired else ''}")
    click.echo(f"{findings.files} files checked, {len(listed)} findings, {len(left)} left")
    return 1 if left else 0


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


def _ask(mount: locate.Mount, request: control.Check) -> control.Findings:
    with terminal.bar("Checking") as bar:
        for answer in control.converse(mount, request):
            if isinstance(answer, control.Progress):
                bar.show(answer)
            elif isinstance(answer, control.Findings):
                return answer
    raise VolumeError(f"{mount.mountpoint}: its daemon gave no findings: try again")
