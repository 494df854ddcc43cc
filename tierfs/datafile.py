"""Is an LMDB data file long enough to be mapped? A page beyond its end would kill the process (SIGBUS).

The newest meta page names the last page in use, but a file may rightly be shorter: pages that one transaction
both took and gave back at the end are free, and LMDB never writes them (measured: 1,600 pages after files were
made and removed in one batch). So a writer extends the file after each commit, and where a crash came between,
all pages that are reachable are looked at.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from tierfs import pages
from tierfs.errors import IndexDamagedError

log = logging.getLogger("index")

DATA = "data.mdb"
LOCK = "lock.mdb"
ADVICE = "run `tierfs check --repair`"
_ATTEMPTS = 5
_PAUSE_SECONDS = 0.002


def check_file(path: str) -> None:
    """Raises IndexDamagedError where the environment in directory `path` has a damaged meta page, or uses pages
    beyond its file's end. A missing or empty file is none as yet."""
    file = os.path.join(path, DATA)
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not os.fstat(fd).st_size:
            return
        newest = _metas(fd, file)[-1]
        # The size is read last: a writer that commits meanwhile only makes the file longer.
        if os.fstat(fd).st_size >= (newest.last + 1) * newest.page_size:
            return
    finally:
        os.close(fd)
    try:
        pages.verify(file)
    except IndexDamagedError as error:
        raise IndexDamagedError(f"{error}: it is cut short: {ADVICE}") from error


def _metas(fd: int, file: str) -> list[pages.Meta]:
    for _ in range(_ATTEMPTS):
        try:
            return pages.read_metas(fd, file)
        except IndexDamagedError as error:
            found = error
        time.sleep(_PAUSE_SECONDS)  # it may be being written
    raise IndexDamagedError(f"{found}: {ADVICE}") from found


def keep_length(env: Any, path: str) -> None:
    """After a commit: no page is beyond the end of the file."""
    file = os.path.join(path, DATA)
    needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    try:
        if os.path.getsize(file) < needed:
            os.truncate(file, needed)
    except OSError as error:
        # What was committed is whole all the same; only the next opening takes longer.
        log.warning("%s cannot be extended: %s", file, error)
