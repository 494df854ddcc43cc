"""The `tierfs` command: finds the subcommand, and turns every error into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 128 + n ended by signal n.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import os
import signal
import sys
import time
from types import FrameType

import click

from tierfs import __version__, terminal
from tierfs.errors import TierError, UsageError
from tierfs.spelling import shown

# subcommand -> (module of tierfs.commands, function, its line in --help)
_COMMANDS = {
    "mount": ("mount", "mount", "Mount a volume, creating it where there is none."),
    "umount": ("mount", "umount", "Unmount a volume and end its daemon."),
    "restart": ("mount", "restart", "Put this version in charge of a mounted volume."),
    "status": ("show", "status", "Show what a volume, or a path, is and does."),
    "ls": ("show", "ls", "List names with tier, size, heat and pin."),
    "pin": ("orders", "pin", "Keep files and directories on the local disk."),
    "unpin": ("orders", "unpin", "Let pinned files and directories drift again."),
    "pins": ("show", "pins", "List what is pinned."),
    "demote": ("orders", "demote", "Move files to the store now."),
    "fetch": ("orders", "fetch", "Bring files back to the local disk now."),
    "adopt": ("home", "adopt", "Turn an existing directory into a mounted volume."),
    "leave": ("home", "leave", "Turn a volume back into a plain directory."),
    "versions": ("past", "versions", "List former contents of files, also of deleted ones."),
    "restore-version": ("past", "restore_version", "Bring a former content back."),
    "gc": ("past", "gc", "Remove from the store what nothing refers to any more."),
    "restore": ("restore", "restore", "Bring a lost machine's volume back from its store."),
    "check": ("check", "check", "Compare a volume's tree, index and store."),
}


class _Ended(KeyboardInterrupt):
    """By another signal than that of Ctrl-C, as when its terminal is closed: what Ctrl-C cancels and undoes is
    cancelled and undone then, too."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number


class _Lazy(click.Group):
    """Subcommands whose modules are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, function, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(f"tierfs.commands.{module}"), function)
        if not gc.isenabled():
            gc.freeze()
            gc.enable()
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in _COMMANDS.items()])


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tierfs")
def tierfs() -> None:
    """A home directory that keeps what you use on the local disk and lets the rest drift to S3."""


def main() -> None:
    """Entry point of the command. Always ends by SystemExit."""
    _open_missing()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # and not ignored, as nohup has it
            signal.signal(number, _end)
    code = _run()
    try:
        sys.stdout.flush()
    except OSError:
        # As has been said, where there was somebody to say it to. Python would try once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _open_missing() -> None:
    """Have standard streams where the command was begun without: what is opened next would get their numbers,
    and Python prints on the one what is for the other. A result that nobody can read is an error then."""
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # gets the lowest number that is free
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # the second one does not wait
    raise _Ended(number)


def _run() -> int:
    try:
        result = tierfs.main(standalone_mode=False, prog_name="tierfs")
        with terminal.writing():
            sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt) as exc:
        by = exc.__cause__ if isinstance(exc, click.exceptions.Abort) else exc
        return by.code if isinstance(by, _Ended) else 130
    except click.exceptions.NoArgsIsHelpError as exc:
        click.echo(exc.format_message())
        return 2
    except click.ClickException as exc:
        where = exc.ctx.command_path if isinstance(exc, click.UsageError) and exc.ctx else "tierfs"
        return _fail(f"{exc.format_message().rstrip('.')}: see `{where} --help`", exc.exit_code)
    except UsageError as exc:
        return _fail(str(exc), 2)
    except TierError as exc:
        return _fail(str(exc), 1)
    except BrokenPipeError:
        return 1  # whoever read our output has gone
    except OSError as exc:
        named = f"{exc.filename}: " if exc.filename else ""
        if not named and exc.errno == errno.ENOENT and _is_nowhere():
            return _fail("the working directory is not there any more: cd to another", 1)
        return _fail(f"{named}{exc.strerror or exc}", 1)
    except Exception as exc:
        return _fail(f"internal error ({type(exc).__name__}): {_keep_traceback()}", 1)


def _is_nowhere() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(f"tierfs: {shown(message.rstrip('.'))}", file=sys.stderr, flush=True)
    return code


def _keep_traceback() -> str:
    """Write the traceback of the present exception to a file, and say where it is."""
    import traceback

    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    directory = "/var/lib/tierfs" if os.geteuid() == 0 else os.path.join(state, "tierfs")
    path = os.path.join(directory, "cli.log")
    try:
        os.makedirs(directory, mode=0o755 if os.geteuid() == 0 else 0o700, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(fd, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sys.argv!r}\n{traceback.format_exc()}\n")
    except OSError as exc:
        return f"its log cannot be written to {path}: {exc.strerror}"
    return f"see {path}"
