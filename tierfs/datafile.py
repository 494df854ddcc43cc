"""Is an LMDB data file whole? Asked before it is mapped: a page beyond its end would kill the process (SIGBUS).

The newest meta page names the last page in use, but a file may rightly be shorter: pages that one transaction
both took and gave back at the end are free, and LMDB never writes them (measured: 1,600 pages after files were
made and removed in one batch). So a writer extends the file after each commit, and where a crash came between,
another process reads all that is reachable, and lives or dies.
"""

from __future__ import annotations

import logging
import os
import signal
import struct
import subprocess
import sys
from typing import Any

from tierfs.errors import IndexError_

log = logging.getLogger("index")

_ADVICE = "run `tierfs check --repair`"
_MAGIC = 0xBEEFC0DE
# LMDB's meta pages: 16 bytes of page header, then magic, version, address, map size, two databases of 48 bytes
# (the first four bytes of the first are the page size), last page, transaction (lmdb's mdb.c).
_META = struct.Struct("<16xI4x8x8xI44x48xQQ")
_READ_ALL = """
import sys, lmdb
with lmdb.open(sys.argv[1], readonly=True, max_dbs=32) as env, open("/dev/null", "wb") as out:
    env.copyfd(out.fileno(), compact=True)
"""
_READ_SECONDS = 600.0


def check_size(path: str) -> None:
    """Raises IndexError_ where the environment in directory `path` uses pages beyond its file's end."""
    file = os.path.join(path, "data.mdb")
    try:
        needed = _needed(file)
    except FileNotFoundError:
        return
    # The size is read last: a writer that commits meanwhile only makes the file longer.
    if os.path.getsize(file) < needed and not _readable(path):
        raise IndexError_(f"{file} is cut short: {_ADVICE}")


def keep_length(env: Any, path: str) -> None:
    """After a commit: no page is beyond the end of the file."""
    file = os.path.join(path, "data.mdb")
    needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    try:
        if os.path.getsize(file) < needed:
            os.truncate(file, needed)
    except OSError as error:
        # What was committed is whole all the same; only the next opening takes longer.
        log.warning("%s cannot be extended: %s", file, error)


def _needed(file: str) -> int:
    """The size at which every page is within the file; 0 of an empty one."""
    with open(file, "rb") as opened:
        first = opened.read(_META.size)
        if not first:
            return 0
        page = _META.unpack(first)[1] if len(first) == _META.size else 0
        opened.seek(page)
        second = opened.read(_META.size)
    if page < 512 or len(second) != _META.size:
        raise IndexError_(f"{file} is cut short or no index: {_ADVICE}")
    newest, last_page = -1, 0
    for magic, _, last, transaction in (_META.unpack(first), _META.unpack(second)):
        if magic == _MAGIC and transaction > newest:
            newest, last_page = transaction, last
    if newest < 0:
        raise IndexError_(f"{file} is no index: {_ADVICE}")
    return int((last_page + 1) * page)


def _readable(path: str) -> bool:
    """Another process reads the whole environment and survives it."""
    reader = [sys.executable, "-c", _READ_ALL, path]
    try:
        done = subprocess.run(reader, capture_output=True, timeout=_READ_SECONDS, check=False)
    except subprocess.TimeoutExpired as exc:
        raise IndexError_(f"{path}: the index cannot be read within {_READ_SECONDS:.0f} s: {_ADVICE}") from exc
    if done.returncode not in (0, 1, -signal.SIGBUS):
        raise IndexError_(f"{path}: reading the index ended with {done.returncode}: {_ADVICE}")
    return done.returncode == 0
