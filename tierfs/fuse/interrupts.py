"""Whether a signal is a reason to cut a waiting request short.

The kernel passes on that a caller has a signal pending, not which, and does so once. Programs do not expect
EINTR from a file for the death of a child, a resized window or a timer of theirs: a disk never answers so, and
PostgreSQL takes it for a broken file. For Ctrl-C it is what the user wants, also where a program has a handler;
but there the signal may mean something else (PostgreSQL's asks for a checkpoint), so content that comes soon is
waited for.
"""

from __future__ import annotations

import math
import signal

HANDLED_SECONDS = 0.5  # with a tick until it is noticed, Ctrl-C has its effect within a second


def _mask(*numbers: signal.Signals) -> int:
    return sum(1 << number - 1 for number in numbers)


_ENDING = _mask(signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)

_DEADLY_TO_NOBODY = _mask(
    signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH, signal.SIGCONT,
    signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGSTOP,
)  # fmt: skip


def patience(thread: int) -> float:
    """For how many seconds after its interrupt this thread (0: of another pid namespace) should wait on."""
    try:
        with open(f"/proc/{thread}/status", "rb") as file:
            status = file.read()
    except OSError:
        return 0.0  # it cannot be asked; an answer too early is better than a process that cannot be killed
    masks = dict.fromkeys((b"SigPnd", b"ShdPnd", b"SigBlk", b"SigCgt"), 0)
    for line in status.splitlines():
        name, _, value = line.partition(b":")
        if name in masks:
            masks[name] = int(value, 16)
    # None at all: what was pending was for another thread of the process.
    pending = (masks[b"SigPnd"] | masks[b"ShdPnd"]) & ~masks[b"SigBlk"]
    caught = masks[b"SigCgt"]
    if pending & ~caught & ~_DEADLY_TO_NOBODY:
        return 0.0
    return HANDLED_SECONDS if pending & caught & _ENDING else math.inf
