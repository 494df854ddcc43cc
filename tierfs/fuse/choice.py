"""Which binding serves a mount, and why: the kernel's own protocol where it is spoken, libfuse 2 elsewhere."""

from __future__ import annotations

import os
import re
import sys
from ctypes.util import find_library
from typing import NamedTuple

from tierfs.errors import VolumeError

_OLDEST = (5, 13)  # the first Linux that speaks FUSE 7.33
_DEVICE = "/dev/fuse"


class Choice(NamedTuple):
    """A binding (`kernel` or `fusepy`) and a person's reason for it."""

    name: str
    reason: str


def choose(asked: str) -> Choice:
    """The binding for `--binding` ASKED (auto, kernel or fusepy). Raises VolumeError where it cannot be had."""
    if asked == "fusepy" and sys.platform == "linux" and not _has_libfuse():
        raise VolumeError(
            "--binding fusepy: there is no libfuse 2 here: install libfuse2 if it can be had, or leave that out"
        )
    if asked != "auto":
        return Choice(asked, "asked for with --binding")
    problem = _kernel_problem(sys.platform, os.uname().release, os.path.exists(_DEVICE))
    if not problem:
        return Choice("kernel", f"Linux {os.uname().release} speaks FUSE 7.33 or later")
    if not os.path.exists(_DEVICE) and sys.platform == "linux":
        return Choice("kernel", f"{problem}, without which libfuse serves nothing either")
    if not _has_libfuse():
        return Choice("kernel", f"{problem}, and there is no libfuse 2 either")
    return Choice("fusepy", problem)


def _has_libfuse() -> bool:
    """Whether fusepy finds it."""
    return bool(os.environ.get("FUSE_LIBRARY_PATH") or find_library("fuse"))


def _kernel_problem(platform: str, release: str, device: bool) -> str:
    """Why the kernel's protocol cannot be spoken here; "" where it can."""
    if platform != "linux":
        return f"{platform} has no FUSE protocol of Linux's"
    version = re.match(r"(\d+)\.(\d+)", release)
    if version and (int(version[1]), int(version[2])) < _OLDEST:
        return f"Linux {release} is older than {_OLDEST[0]}.{_OLDEST[1]}"
    return "" if device else f"there is no {_DEVICE}"
