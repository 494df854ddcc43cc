"""Logging of the daemon's processes: each writes lines to stderr, the supervisor alone keeps the file.

One writer makes rotation safe, and what a dying process prints on stderr ends up in the log as well.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading

from tierfs.spelling import shown

MAX_BYTES = 4 << 20
KEEP = 4
CANNOT_WORK = "the mover cannot work: "  # begins the last line of one that ends for a reason that it knows
_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s"


class _OneLine(logging.Formatter):
    """Names of files may hold newlines, and bytes that are no text: outside of tracebacks they are escaped."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return shown(super().formatMessage(record))


def setup(stream: object = None, level: int = logging.INFO) -> None:
    """Log to `stream` (stderr unless given), a line an event: date, time, level, component, message."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)  # type: ignore[arg-type]
    handler.setFormatter(_OneLine(_FORMAT, "%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    threading.excepthook = _log_thread
    for noisy in ("boto3", "botocore", "urllib3", "watchdog", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _log_thread(ended: threading.ExceptHookArgs) -> None:
    """A thread has ended by what it did not expect: nobody else hears of it."""
    if ended.exc_value is not None and ended.exc_type is not SystemExit:
        name = ended.thread.name if ended.thread is not None else "a thread"
        logging.getLogger("threads").critical("%s has ended", name, exc_info=ended.exc_value)


class LogFile:
    """The log file with rotation; a text stream for `setup`. `echo`: also write to this descriptor.

    A disk that is full loses lines, never the daemon.
    """

    def __init__(self, path: str, echo: int | None = None) -> None:
        self.path = path
        self.last_error = ""
        self._echo = echo
        self._fd = -1
        self._open()

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(self.path, flags, 0o600)

    def write(self, text: str) -> int:
        """Append text."""
        self.append(text.encode(errors="backslashreplace"))
        return len(text)

    def append(self, data: bytes) -> None:
        """Append whole lines, and remember the last error among them."""
        for line in data.splitlines():
            if b" ERROR " in line or b" CRITICAL " in line:
                self.last_error = line.decode(errors="backslashreplace").split(": ", 1)[-1]
        if self._echo is not None:
            with contextlib.suppress(OSError):
                os.write(self._echo, data)
        with contextlib.suppress(OSError):
            if os.fstat(self._fd).st_size > MAX_BYTES:
                self._rotate()
            os.write(self._fd, data)

    def _rotate(self) -> None:
        for number in range(KEEP - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self.path}.{number}", f"{self.path}.{number + 1}")
        with contextlib.suppress(FileNotFoundError):  # somebody has removed it: what they removed is full
            os.replace(self.path, f"{self.path}.1")
        os.close(self._fd)
        self._open()

    def flush(self) -> None:
        """Nothing is buffered."""


class LogPipe:
    """What the children write ends up in the log file, by lines."""

    def __init__(self, logfile: LogFile) -> None:
        self._logfile = logfile
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.reading, False)
        self._rest = b""

    def pump(self) -> bool:
        """Move what is there to the log file; False where there is nothing."""
        try:
            data = os.read(self.reading, 65536)
        except BlockingIOError:
            return False
        lines, separator, self._rest = (self._rest + data).rpartition(b"\n")
        if separator:
            self._logfile.append(lines + separator)
        return True

    def drain(self) -> None:
        """Take over what dead children have left in the pipe."""
        while self.pump():
            pass
