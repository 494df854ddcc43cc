"""Asking several volumes at the same time, when nobody has named one of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import TypeVar

from tierfs import locate
from tierfs.errors import TierError, VolumeError

T = TypeVar("T")
_PATIENCE_SECONDS = 10.0  # for all of them; of one that is named a restart of its mover is waited for


def ask_all(
    mounts: Sequence[locate.Mount], ask: Callable[[locate.Mount], T]
) -> list[tuple[locate.Mount, T | TierError]]:
    """What each answers, or why it does not: one that is silent keeps nobody from the others' answers."""
    asked = [(mount, _begin(ask, mount)) for mount in mounts]
    wait([future for _, future in asked], _PATIENCE_SECONDS)
    return [(mount, _failure(mount, future) or future.result()) for mount, future in asked]


def _begin(ask: Callable[[locate.Mount], T], mount: locate.Mount) -> Future[T]:
    """In a thread that the command's end does not wait for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(ask(mount))
        except BaseException as error:  # whatever it is, who asks hears of it
            future.set_exception(error)

    threading.Thread(target=run, name="ask", daemon=True).start()
    return future


def _failure(mount: locate.Mount, future: Future[T]) -> TierError | None:
    if not future.done():
        return VolumeError(
            f"{mount.mountpoint}: has not answered within {_PATIENCE_SECONDS:.0f} s: name it, and it is"
            " waited for longer; log/tierfs.log in its state directory may say why"
        )
    error = future.exception()
    return error if isinstance(error, TierError) else None
