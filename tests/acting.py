"""Acting as somebody else for the length of one call, in a thread of its own: credentials are a thread's."""

from __future__ import annotations

import ctypes
import errno
import platform
import threading
from collections.abc import Callable
from typing import Any

import pytest

ALICE, BOB, STAFF = 12345, 12346, 54321
_CALLS = {"x86_64": (116, 119, 117), "aarch64": (159, 149, 147)}  # setgroups, setresgid, setresuid
_libc = ctypes.CDLL(None, use_errno=True)


def act_as(
    uid: int, call: Callable[..., Any], *args: Any, gid: int | None = None, groups: tuple = (), **kw: Any
) -> Any:
    """What `call(*args)` returns, or raises, for this user."""
    numbers = _CALLS.get(platform.machine())
    if numbers is None:
        pytest.skip(f"system call numbers of {platform.machine()} are not known")
    outcome: list[Any] = []

    def run() -> None:
        try:
            _become(numbers, uid, uid if gid is None else gid, groups)
            outcome.append(call(*args, **kw))
        except BaseException as error:
            outcome.extend([None, error])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if len(outcome) == 2:
        raise outcome[1]
    return outcome[0]


def _become(numbers: tuple[int, int, int], uid: int, gid: int, groups: tuple) -> None:
    setgroups, setresgid, setresuid = numbers
    listed = (ctypes.c_uint32 * len(groups))(*groups)
    for words in ((setgroups, len(groups), listed), (setresgid, gid, gid, gid), (setresuid, uid, uid, uid)):
        if _libc.syscall(*words):
            raise OSError(ctypes.get_errno(), "cannot become another user")


def fails(number: int, call: Callable[..., Any], *args: Any, **kw: Any) -> None:
    """The call must fail with this errno."""
    with pytest.raises(OSError) as caught:
        call(*args, **kw)
    found = errno.errorcode.get(caught.value.errno or 0)
    assert found == errno.errorcode[number], caught.value


def denied(uid: int, number: int, call: Callable[..., Any], *args: Any, **kw: Any) -> None:
    """The call must fail with this errno for this user."""
    with pytest.raises(OSError) as caught:
        act_as(uid, call, *args, **kw)
    assert caught.value.errno == number, caught.value
