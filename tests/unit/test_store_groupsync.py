"""Grouped directory syncs: shared when asked for at once, and never with one that had already begun."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from tierfs.store.groupsync import GroupSync


class Slow:
    """An fsync that waits to be let go, and counts."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.count = 0
        self.error: OSError | None = None

    def __call__(self, fd: int) -> None:
        self.count += 1
        self.begun.release()
        assert self.go.acquire(timeout=10)
        if self.error:
            raise self.error


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    slow = Slow()
    monkeypatch.setattr(os, "fsync", slow)
    return slow


def start(work, count: int) -> list[threading.Thread]:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_those_who_come_during_a_sync_share_the_next(tmp_path: Path, slow: Slow) -> None:
    root = os.open(tmp_path, os.O_RDONLY)
    syncs, done = GroupSync(), []

    def work() -> None:
        syncs.sync(root, "")
        done.append(slow.count)

    threads = start(work, 1)
    assert slow.begun.acquire(timeout=10)
    threads += start(work, 5)
    time.sleep(0.05)
    assert slow.count == 1 and not done
    slow.go.release()
    assert slow.begun.acquire(timeout=10)
    slow.go.release()
    for thread in threads:
        thread.join(10)
    assert slow.count == 2
    assert len(done) == 6
    os.close(root)


def test_all_who_shared_a_failed_sync_are_told(tmp_path: Path, slow: Slow) -> None:
    root = os.open(tmp_path, os.O_RDONLY)
    syncs, failed = GroupSync(), []
    slow.error = OSError(5, "disk")

    def work() -> None:
        try:
            syncs.sync(root, "")
        except OSError as exc:
            failed.append(exc.errno)

    threads = start(work, 4)
    for _ in range(4):
        slow.go.release()
    for thread in threads:
        thread.join(10)
    assert failed == [5] * 4
    os.close(root)
