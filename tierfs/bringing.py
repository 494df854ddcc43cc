"""Orders to fetch: whole files, several at once, each asked for through the mount server as by a reader.

A store that does not answer is waited for as long as a reader waits for it (`fetch_timeout`), once for all the
files of an order, and whoever waits hears of it early. An order that nobody waits for is patient with
each file.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial

from tierfs import wire
from tierfs.copying import Item
from tierfs.errors import FetchTimeoutError, TierError
from tierfs.filling import Filler
from tierfs.kit import GONE, Kit, is_gone
from tierfs.transfer import flow

Report = Callable[[Item], None]
Tell = Callable[[str], None]

_AT_ONCE = 16  # files being fetched on order
_IN_HAND = 4 * _AT_ONCE  # and with those that wait for a thread
_ASK_AGAIN_SECONDS = 2.0
_LOOK_SECONDS = 0.2
_SILENT_SECONDS = 5.0  # before who waits is told


class _Order:
    """What one order knows of the store. `away` says why nothing more is asked of it, "" while it is asked."""

    def __init__(self, cancelled: threading.Event, report: Report | None, tell: Tell | None) -> None:
        self.cancelled = cancelled
        self.report = report
        self.tell = tell
        self.came = time.monotonic()  # when something last came; at first when it was asked
        self.away = ""

    def timed_out(self, since: float, reason: str) -> None:
        """A file that was asked for then has not come."""
        if self.tell is not None and self.came <= since:
            self.away = self.away or reason


class Bringer:
    """Carries out orders. `hint` says where a file may be, for who cannot open it by its handle."""

    def __init__(self, kit: Kit, filler: Filler, hint: Callable[[Item], bytes | None]) -> None:
        self._kit = kit
        self._filler = filler
        self._hint = hint
        self._threads = ThreadPoolExecutor(_AT_ONCE, "order")

    def close(self) -> None:
        """Begin with no more files."""
        self._threads.shutdown(cancel_futures=True)

    def fetch(
        self, items: Iterable[Item], cancelled: threading.Event, report: Report | None, tell: Tell | None
    ) -> Iterator[Item]:
        """Bring files back as a whole; each item, with what became of it, when it is done with.

        `tell` is given where somebody waits: it hears, again and again, that nothing comes, and the order ends
        when the store has kept one file waiting for too long, and has sent nothing else meanwhile.
        """
        order = _Order(cancelled, report, tell)

        def submit(item: Item) -> Future[None]:
            return self._threads.submit(self._one, item, order)

        for item, future in flow(items, submit, _IN_HAND, partial(self._idle, order), _LOOK_SECONDS):
            future.result()
            yield item

    def _idle(self, order: _Order) -> None:
        """Nothing has been done for a moment."""
        if order.tell is not None and time.monotonic() - order.came > _SILENT_SECONDS:
            order.tell(
                f"nothing has come from the store for {_SILENT_SECONDS:g} s:"
                f" it is waited for, {self._kit.config.fetch_timeout:g} s in all"
            )

    def _one(self, item: Item, order: _Order) -> None:
        opath = -1
        try:
            path = item.path or self._hint(item)
            opath = self._kit.open(item.ino, item.handle, os.O_PATH | os.O_NOFOLLOW, path)
            if self._kit.tree.read_stub(opath) is None:
                item.already = True
            else:
                self._bring(item, opath, order)
        except FetchTimeoutError as error:
            item.away = bool(order.away)
            item.stay(order.away or str(error), failed=True)
        except (OSError, TierError) as error:
            item.stay(GONE if is_gone(error) else str(error), failed=not is_gone(error))
        finally:
            if opath >= 0:
                os.close(opath)
            if order.report is not None:
                order.report(item)

    def _bring(self, item: Item, opath: int, order: _Order) -> None:
        """Have the server ask for it, until it is resident.

        Raises FetchTimeoutError, BusyError, OSError, ForeignStubError.
        """
        begun, asked, here = time.monotonic(), 0.0, -1
        future = self._kit.outcomes.expect(item.ino)
        try:
            while not order.cancelled.is_set():
                if order.away:
                    raise FetchTimeoutError(order.away)
                if time.monotonic() - asked > _ASK_AGAIN_SECONDS and self._filler.arrival(item.ino) is None:
                    if asked and self._kit.tree.read_stub(opath) is None:
                        return
                    self._kit.server.send(wire.Bring([item.ino]), [opath])
                    asked = time.monotonic()
                try:
                    number, reason = future.result(_LOOK_SECONDS)
                except FutureTimeout:
                    here = self._look(item, here, order)
                    continue
                if number == errno.ETIMEDOUT and time.monotonic() - begun < self._kit.config.fetch_timeout / 2:
                    # Somebody before us had asked for it: what the store does now has yet to be seen.
                    future = self._kit.outcomes.expect(item.ino)
                    continue
                if number == errno.ETIMEDOUT:
                    order.timed_out(begun, reason)
                    raise FetchTimeoutError(reason)
                if number:
                    item.stay(reason or os.strerror(number), failed=True)
                else:
                    order.came = time.monotonic()
                return
            item.stay("was cancelled")
        finally:
            self._kit.outcomes.forget(item.ino, future)

    def _look(self, item: Item, before: int, order: _Order) -> int:
        """How many bytes are here, where `before` was the answer at the last look; -1: nobody knows yet."""
        arrival = self._filler.arrival(item.ino)
        if arrival is None:
            return before
        item.moved = arrival.bytes_here
        if item.moved > before >= 0:
            order.came = time.monotonic()
        return item.moved
