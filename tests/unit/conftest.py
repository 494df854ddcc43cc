"""The compiled part, built once for all tests of a run."""

import fcntl
import os

import pytest
from hotside import build, load


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The compiled part. Workers share what the first of them has built."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    program = place / "_hot.so"
    with open(place / "_hot.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            build(program)
    return load(program)
