"""Work on the store before a mount, in a process of its own.

An S3 client starts threads, which the process that will supervise shall not have: it is forked later on, and
the client of such a child would wait for threads that are not there.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
from collections.abc import Callable

from tierfs.errors import VolumeError

_DONE = b"done"


def apart(work: Callable[[], None]) -> None:
    """Run it there, and wait for its end. Raises what it raises; VolumeError where the process was killed."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        os.close(reading)
        _run(work, writing)
    os.close(writing)
    try:
        with open(reading, "rb") as answer:
            said = answer.read()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if not said:
        raise VolumeError("what was to prepare the store was killed: try again")
    if said != _DONE:
        raise pickle.loads(said)


def _run(work: Callable[[], None], fd: int) -> None:
    """In the child: work, say how it went, and end without ceremony."""
    said = b""
    try:
        work()
        said = _DONE
    except Exception as error:  # whatever it is, the other process has to hear of it
        said = _packed(error)
    finally:
        with contextlib.suppress(OSError), open(fd, "wb") as answer:
            answer.write(said)
        os._exit(0)


def _packed(error: Exception) -> bytes:
    """An error of a library may not be one that can be handed on: then it is told in words."""
    try:
        packed = pickle.dumps(error)
        pickle.loads(packed)
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return packed
