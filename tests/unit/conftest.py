"""What several files of unit tests use: a volume in this process, and the compiled part."""

import fcntl
import os

import pytest
from hotside import FORMS, Side, build, load
from tiering import Volume


@pytest.fixture
def volume(tmp_path):
    """With everything in force that the defaults say, and a store in memory."""
    made = Volume(tmp_path)
    yield made
    made.stop()


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


@pytest.fixture(params=FORMS)
def side(request, tmp_path, monkeypatch):
    """A session that sees edits behind the mount."""
    (tmp_path / "tree").mkdir()
    built = request.getfixturevalue("built") if request.param == "compiled" else None
    one = Side(tmp_path / "side", request.param, monkeypatch, built, watched=True)
    yield one
    one.close()
