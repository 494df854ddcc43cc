"""A child process of the supervisor."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

_STEADY_SECONDS = 60.0  # a child that ran so long starts with a clean slate


class Child:
    """One of our two processes, in whichever incarnation. `deaths` counts those in quick succession."""

    def __init__(self, name: str, module: str, log_fd: int) -> None:
        self.name = name
        self.deaths = 0
        self.total_deaths = 0
        self._module = module
        self._log_fd = log_fd
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0

    @property
    def pid(self) -> int:
        """The process id, 0 where there is none."""
        return self._process.pid if self._process else 0

    def start(self, arguments: Mapping[str, object], fds: Sequence[int]) -> None:
        """Run the module with `--key value` arguments; it inherits these descriptors. Raises OSError."""
        # -P: what lies in the working directory must not be imported.
        command = [sys.executable, "-P", "-m", self._module]
        for key, value in arguments.items():
            command += [f"--{key}", str(value)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log_fd,
            stderr=self._log_fd,
            pass_fds=fds,
            cwd="/",
            # Ctrl-C at the terminal is for the supervisor, which ends the others in order. And each has a
            # scheduling group of its own (see `priority`).
            start_new_session=True,
        )
        self._started = time.monotonic()

    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def reap(self) -> int | None:
        """The exit status (negative: the signal) if it has ended since the last call, else None."""
        if self._process is None or self._process.poll() is None:
            return None
        status = self._process.returncode
        self._process = None
        return status

    def died(self, *, steady: bool = False) -> None:
        """Count a death that nobody asked for; `steady`: it had done its work before."""
        if steady or time.monotonic() - self._started > _STEADY_SECONDS:
            self.deaths = 0
        self.deaths += 1
        self.total_deaths += 1

    def signal(self, number: int) -> None:
        """Send a signal if it runs."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def kill(self) -> None:
        """End it now, and reap it."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None
