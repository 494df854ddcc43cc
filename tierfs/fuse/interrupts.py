"""Whether a signal is a reason to cut a waiting request short.

The kernel passes on that a caller has a signal pending, not which, and does so once. Programs do not expect
EINTR from a file for the death of a child or a resized window; for Ctrl-C it is what the user wants.
"""

from __future__ import annotations

import signal

_HARMLESS = sum(
    1 << number - 1
    for number in (
        signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH, signal.SIGCONT, signal.SIGIO, signal.SIGPROF,
        signal.SIGVTALRM, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGSTOP,
    )
)  # fmt: skip


def is_wanted(thread: int) -> bool:
    """Whether this thread (0: of another pid namespace) has a signal that should end its waiting."""
    try:
        with open(f"/proc/{thread}/status", "rb") as file:
            status = file.read()
    except OSError:
        return True  # it cannot be asked; an answer too early is better than a process that cannot be killed
    pending = 0
    for line in status.splitlines():
        if line.startswith((b"SigPnd:", b"ShdPnd:")):
            pending |= int(line.split()[1], 16)
    # None at all: what was pending was for another thread of the process.
    return bool(pending & ~_HARMLESS)
