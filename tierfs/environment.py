"""Opening an LMDB environment, and what its errors mean: damage, a full disk, or a circumstance.

The map is as large as the filesystem on which the file lies, and at least LEAST_MAP: the file cannot outgrow
it, so that it need not grow while it is in use. That costs nothing: a shared, read-only mapping of a file is
not counted as committed memory (not even where overcommit is forbidden), a control group counts what is touched
of it, and the file is as long as what has been written. Only a limit of address space (`ulimit -v`) can forbid
it; then the largest part of it that fits is taken, and when that is full writing fails and reading goes on.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Collection, Sequence
from typing import Any

import lmdb

from tierfs.datafile import ADVICE, DATA, LOCK, check_file
from tierfs.errors import IndexDamagedError, IndexError_, IndexFullError

LEAST_MAP = 64 << 30
_SMALLEST = 1 << 20  # bytes beyond what is in use
_UNIT = 1 << 20
_READERS = 64
_LOCK_BYTES = 192 + (_READERS - 1) * 64  # of the lock file, as LMDB makes it
_DAMAGE = (
    lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.IncompatibleError,
    lmdb.CursorFullError, lmdb.PageFullError, lmdb.BadTxnError, lmdb.ProblemError, lmdb.BadValsizeError,
    lmdb.KeyExistsError,
)  # fmt: skip
# LMDB gives these the errno of the system call in words alone.
_FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))


def open_tables(
    path: str, names: Sequence[str], *, readonly: bool, durable: bool, later: Collection[str] = ()
) -> tuple[Any, dict[str, Any]]:
    """The environment in directory `path` and its tables, made unless `readonly`; once a process, after fork.

    Those of `later` a former version did not have: who only reads does without them. Raises IndexDamagedError
    where the file is no whole environment, IndexError_ where it does not open.
    """
    check_file(path)
    try:
        env = _mapped(path, len(names), readonly=readonly, durable=durable)
        tables = {name: env.open_db(name.encode(), create=not readonly) for name in names if name not in later}
        for name in later:
            with contextlib.suppress(lmdb.NotFoundError):
                tables[name] = env.open_db(name.encode(), create=not readonly)
        # A reader killed in the midst of a look would keep the pages it saw from ever being used again.
        env.reader_check()
    except lmdb.Error as exc:
        raise failure(path, "does not open", exc) from exc
    return env, tables


def failure(path: str, what: str, error: Exception) -> IndexError_:
    """The error to raise for one of LMDB's. `what` happened to the index in `path`."""
    if isinstance(error, IndexError_):
        return error
    said = f"{path}: the index {what}: {error}"
    if isinstance(error, _DAMAGE):
        return IndexDamagedError(f"{said}: {ADVICE}")
    if isinstance(error, lmdb.MapFullError | lmdb.MapResizedError):
        return IndexFullError(f"{said}: a limit of address space (`ulimit -v`) keeps it from growing: raise it")
    if (isinstance(error, lmdb.DiskError) and str(error).endswith(_FULL)) or _was_cut_short(path, error):
        return IndexFullError(f"{path}: the index {what}: no room is left: make room on its filesystem")
    return IndexError_(said)


def _was_cut_short(path: str, error: Exception) -> bool:
    """A write of which only a part found room: LMDB calls that an input or output error."""
    if not str(error).endswith(os.strerror(errno.EIO)):
        return False
    with contextlib.suppress(OSError):
        space = os.statvfs(path)
        return space.f_bavail * space.f_frsize < _UNIT
    return False


def is_dead(error: Exception) -> bool:
    """LMDB could not write where it must not fail (its meta page), and does nothing more in this process."""
    return isinstance(error, lmdb.PanicError)


def _mapped(path: str, tables: int, *, readonly: bool, durable: bool) -> Any:
    if not readonly:
        os.makedirs(path, 0o700, exist_ok=True)
    needed = _SMALLEST
    if os.path.exists(os.path.join(path, DATA)):
        needed += os.path.getsize(os.path.join(path, DATA))
    _back_lock(path)
    size = max(LEAST_MAP, _filesystem(path))
    while True:
        try:
            return lmdb.open(
                os.fsencode(path), map_size=size, max_dbs=tables, readonly=readonly, create=not readonly,
                max_readers=_READERS, metasync=durable, sync=durable, readahead=False,
            )  # fmt: skip
        except (lmdb.MemoryError, OverflowError):
            if size // 2 < needed:
                raise
            size //= 2


def _back_lock(path: str) -> None:
    """Have blocks beneath the lock file. LMDB makes a sparse one and writes it through a mapping, which kills a
    process that meets a full disk (SIGBUS). Raises IndexFullError; all else LMDB will find itself."""
    try:
        fd = os.open(os.path.join(path, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            status = os.fstat(fd)
            if not status.st_size or status.st_blocks * 512 < status.st_size:
                os.posix_fallocate(fd, 0, status.st_size or _LOCK_BYTES)
        finally:
            os.close(fd)
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            said = f"{path}: the index does not open: {exc.strerror}"
            raise IndexFullError(f"{said}: make room on its filesystem") from exc


def _filesystem(path: str) -> int:
    """Its size in bytes, in whole units of the map."""
    space = os.statvfs(path)
    return -(-space.f_blocks * space.f_frsize // _UNIT) * _UNIT
