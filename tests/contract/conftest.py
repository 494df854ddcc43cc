"""Stores for the contract tests: one of each kind for a file of them; each test keeps to a prefix of its own.

Not for the whole run: a Ceph cluster that nobody asks for takes some of a processor from all that comes later.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import s3servers

from tierfs.store.base import ObjectStore
from tierfs.store.memory import MemoryStore
from tierfs.store.probe import probe
from tierfs.store.retry import RetryingStore
from tierfs.store.throttle import ThrottledStore
from tierfs.store.urls import open_store

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], s3servers.Server]]:
    """`s3_server(name)` starts a server once; skips with the reason where it cannot be had."""
    running: dict[str, s3servers.Server | str] = {}
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for name, value in s3servers.credentials().items():
            patch.setenv(name, value)

        def server(name: str) -> s3servers.Server:
            if name not in running:
                try:
                    context = s3servers.SERVERS[name](tmp_path_factory.mktemp(name))
                    running[name] = stack.enter_context(context)
                except s3servers.Unavailable as exc:
                    running[name] = str(exc)
            found = running[name]
            if isinstance(found, str):
                pytest.skip(found)
            return found

        yield server


@pytest.fixture(scope="module")
def stores(s3_server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], ObjectStore]]:
    """`stores(kind)`: the store of that kind, opened as the mover opens it."""
    opened: dict[str, ObjectStore] = {}

    def make(kind: str) -> ObjectStore:
        if kind == "memory":
            return MemoryStore()
        if kind == "wrapped":
            return RetryingStore(ThrottledStore(MemoryStore(verifies=True), most=4))
        if kind == "directory":
            return open_store(f"file://{tmp_path_factory.mktemp('store')}/root", create=True)
        url = s3_server(kind).url
        return open_store(url, capabilities=probe(open_store(url)))

    def store(kind: str) -> ObjectStore:
        if kind not in opened:
            opened[kind] = make(kind)
        return opened[kind]

    yield store
    for each in opened.values():
        each.close()


@pytest.fixture
def base() -> str:
    """A prefix that no other test uses."""
    return f"t{next(_numbers)}/"
