"""Our threads let others run at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tierfs import slices
from tierfs.fuse import compiled

_SHOW = """
import ctypes, json, os, struct, sys
from tierfs import slices
if sys.argv[1] == "batch":
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
os.nice(3)
def now():
    attributes = ctypes.create_string_buffer(48)
    number = {"x86_64": 315, "aarch64": 275}[os.uname().machine]
    assert ctypes.CDLL(None).syscall(number, 0, attributes, 48, 0) == 0
    return struct.unpack("=IIQiIQQQ", attributes.raw)[1:6]
before = now()
slices.stand_back(int(sys.argv[2]))
print(json.dumps([before, now()]))
"""


def _shown(how: str, **environment: str) -> tuple[list[int], list[int]]:
    """Policy, flags, nice, priority and slice, before and after."""
    out = subprocess.run(
        [sys.executable, "-c", _SHOW, how, str(slices.SERVER)],
        check=True, capture_output=True, text=True, timeout=30, env={**os.environ, **environment},
    ).stdout  # fmt: skip
    before, after = json.loads(out)
    return before, after


pytestmark = pytest.mark.skipif(
    os.uname().machine not in ("x86_64", "aarch64"), reason="the system call's number is not known here"
)
_VERSION = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
needs_slices = pytest.mark.skipif(_VERSION < (6, 12), reason="slices came with Linux 6.12")


@needs_slices
@pytest.mark.skipif(compiled.find()[0] is None, reason="the compiled part was not built")
def test_slice_is_longer_than_that_of_others_and_all_else_stays() -> None:
    before, after = _shown("usual")
    assert before[-1] < 5_000_000 < after[-1] == slices.SERVER
    assert before[:-1] == after[:-1]


@pytest.mark.parametrize("how, environment", [("batch", {}), ("usual", {compiled.PURE: "1"})])
def test_policy_that_somebody_chose_or_pure_form_changes_nothing(how: str, environment: dict[str, str]) -> None:
    before, after = _shown(how, **environment)
    assert before == after


@needs_slices
@pytest.mark.skipif(compiled.find()[0] is None, reason="the compiled part was not built")
def test_threads_that_are_there_and_such_as_are_begun_later_have_it_too() -> None:
    shown = _SHOW.replace("slices.stand_back(", "slices.stand_back_all(").replace(
        "print(json.dumps([before, now()]))",
        """
other, go, found = [], threading.Event(), []
def there():
    go.wait()
    found.append(now())
threads = [threading.Thread(target=there)]
threads[0].start()
slices.stand_back_all(slices.MOVER)
go.set()
threads.append(threading.Thread(target=there))
threads[1].start()
for thread in threads:
    thread.join()
slices.stand_back_all(slices.DEFAULT)
print(json.dumps([before[-1], found[0][-1], found[1][-1], now()[-1]]))
""",
    )
    out = subprocess.run(
        [sys.executable, "-c", f"import threading\n{shown}", "usual", str(slices.DEFAULT)],
        check=True, capture_output=True, text=True, timeout=30,
    ).stdout  # fmt: skip
    before, *others, after = json.loads(out)
    assert others == [slices.MOVER] * 2 and before == after < slices.SERVER < slices.MOVER
