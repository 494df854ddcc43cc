"""Work whose result nobody waits for: what becomes of it is at least written down."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from tierfs.errors import TierError


def log_failure(log: logging.Logger, what: str) -> Callable[[Future[Any]], None]:
    """For `Future.add_done_callback`: log how it failed, with the traceback of a defect."""

    def done(future: Future[Any]) -> None:
        error = None if future.cancelled() else future.exception()
        if isinstance(error, TierError | OSError):
            log.info("%s that nobody waits for has failed: %s", what, error)
        elif error is not None:
            log.error("%s that nobody waits for has failed", what, exc_info=error)

    return done
