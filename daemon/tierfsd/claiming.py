"""Whether the store is still ours: asked when a volume is mounted, and before each batch of work on the store.

Both ask in a bounded time, and take silence for no change: a volume mounts and works while its store is away.
But not for ever: who takes a store over by force removes what has been of no use to it for `keep_versions`.
What is decided by compare-and-swap stands in ownership.py.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

from tierfs import ownership, volume
from tierfs.config import VolumeConfig
from tierfs.errors import StoreError, StoreStaleError, VolumeError
from tierfs.spelling import shown

log = logging.getLogger("mover")

_FRESH_SECONDS = 5.0  # an answer is good for so long
_WAIT_SECONDS = 2.0  # for one, before work goes on with the last
_MOUNT_SECONDS = 4.0  # for one at mounting: a laptop that is offline shall not wait long
_FORCE_SECONDS = 30.0


def _since_boot() -> float:
    """Seconds, those of suspends included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def patience(config: VolumeConfig) -> float:
    """For how many seconds a silent store is taken to have what it had. Whoever has taken it meanwhile removes
    by settings of its own: after a restore by the defaults."""
    return min(config.kept_seconds, VolumeConfig().kept_seconds)


class Fence:
    """`check` before a batch: raises VolumeError once `verify` has, while the store is one of an earlier time,
    which may lack any copy, and when it has been silent for too long; never anything else."""

    def __init__(
        self,
        verify: Callable[[], None],
        patience: Callable[[], float],
        silent: float = 0.0,
        clock: Callable[[], float] = _since_boot,
    ) -> None:
        """`verify` raises VolumeError where another machine has taken the store, StoreError at its silence,
        which is put up with for `patience` seconds, and has lasted for `silent`."""
        self._verify = verify
        self._patience = patience
        self._clock = clock
        self._heard = clock() - silent
        self._lock = threading.Lock()
        self._asking: Future[None] | None = None
        self._fresh_until = float("-inf")
        self._lost: VolumeError | None = None
        self._stale: StoreStaleError | None = None

    def check(self) -> None:
        """Raises VolumeError where the store is another machine's, RuntimeError where that cannot be asked."""
        if self._lost is None and self._clock() >= self._fresh_until:
            with self._lock:
                if self._asking is None or self._asking.done():
                    begun: Future[None] = Future()
                    # Not of a pool: the process would wait for it at its end. Where there are too many threads
                    # this fails, and it is asked the next time.
                    threading.Thread(target=self._ask, args=(begun,), name="fence", daemon=True).start()
                    self._asking = begun
                asking = self._asking
            with contextlib.suppress(FutureTimeout):
                asking.result(_WAIT_SECONDS)
        if self._lost is not None:
            raise VolumeError(str(self._lost))
        if self._stale is not None:
            raise VolumeError(str(self._stale))
        silent, patience = self._clock() - self._heard, self._patience()
        if silent > patience:
            since = f"for {silent / 3600:.0f} hours" if silent < math.inf else "since the clock was set back"
            raise VolumeError(
                f"the store has not answered {since}: what is here stays here, since another machine may have"
                " taken it over and removed copies"
            )

    def _ask(self, asking: Future[None]) -> None:
        try:
            self._verify()
        except VolumeError as error:
            self._lost = error
        except StoreStaleError as error:
            self._stale = error
        except (StoreError, OSError) as error:
            log.debug("whose the store is cannot be told now: %s", error)
        except Exception:
            log.exception("whose the store is cannot be told")
        else:
            self._stale = None
            self._heard = self._clock()
        finally:
            self._fresh_until = self._clock() + _FRESH_SECONDS
            asking.set_result(None)


def refuse_if_taken(home: volume.Volume, force: bool) -> None:
    """Before a mount: another machine that has taken the store is named; `force` takes it back.

    In a process of its own, so that no S3 client stays in this one, and one that hangs can be left behind.
    Raises VolumeError: the store is another's, or (`force`) it did not answer.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        os.close(reading)
        _answer(home, force, writing)
    os.close(writing)
    try:
        said = _hear(reading, _FORCE_SECONDS if force else _MOUNT_SECONDS)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if said.startswith(b"taken "):
        raise VolumeError(said[6:].decode(errors="backslashreplace"))
    if force and said != b"ours":
        reason = said.decode(errors="backslashreplace") or "it does not answer"
        raise VolumeError(f"{home.store_url}: the store cannot be taken over now: {reason}")


def _hear(fd: int, seconds: float) -> bytes:
    said = b""
    deadline = time.monotonic() + seconds
    while select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(fd, 65536)
        if not part:
            return said
        said += part
    return b""


def _answer(home: volume.Volume, force: bool, fd: int) -> None:
    """In the child: say whose the store is, and end without ceremony."""
    said = "it does not answer"
    try:
        said = _look(home, force)
    except VolumeError as exc:
        said = f"taken {exc}"
    except Exception as exc:
        said = str(exc)
    finally:
        with contextlib.suppress(OSError):
            os.write(fd, shown(said).encode())
        sys.stdout.flush()
        os._exit(0)


def _look(home: volume.Volume, force: bool) -> str:
    from tierfs.store.retry import RetryPolicy
    from tierfs.store.urls import open_store

    policy = RetryPolicy(deadline=(_FORCE_SECONDS if force else _MOUNT_SECONDS) / 2)
    store = open_store(home.store_url, capabilities=home.identity.capabilities, foreground=policy)
    if force:
        epoch = max(volume.last_epoch(home.state), int(ownership.check(home, store).get("epoch", 0))) + 1
        volume.keep_epoch(home.state, epoch)
        ownership.take_over(home, store, epoch)
    else:
        ownership.look(home, store)
        ownership.refuse_second(home, store)
    return "ours"
