"""What the supervisor waits for: descriptors that can be read, signals, and the end of a child (SIGCHLD)."""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Callable, Iterable
from types import FrameType

from tierfs.channel import Channel

Source = int | Channel


class Events:
    """Used in the main thread alone."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self.signals: list[int] = []  # that have come, and nobody has acted on yet

    def watch(self, source: Source, call: Callable[[], object]) -> None:
        """Call this whenever the source can be read."""
        self._selector.register(source, selectors.EVENT_READ, call)

    def unwatch(self, source: Source) -> None:
        """No more."""
        self._selector.unregister(source)

    def catch(self, numbers: Iterable[int]) -> None:
        """Note these signals from now on."""
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        self.watch(reading, lambda: os.read(reading, 4096))

        def note(number: int, _frame: FrameType | None) -> None:
            self.signals.append(number)

        for number in numbers:
            signal.signal(number, note)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)

    def take(self, number: int) -> bool:
        """Whether this signal has come; it is done with then."""
        if number not in self.signals:
            return False
        self.signals.remove(number)
        return True

    def wait(self, until: Callable[[], bool], timeout: float | None) -> None:
        """Handle events until the condition holds or the time is up."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not until():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return
            for key, _ in self._selector.select(left):
                key.data()
