"""Pools of threads: how many run, and that another number holds at once."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from tierfs.transfer import Pool, Urgency, flow


class Jobs:
    """Jobs that run until they are let go; how many do."""

    def __init__(self, pool: Pool, count: int) -> None:
        self.running = 0
        self.let_go = threading.Semaphore(0)
        self._lock = threading.Lock()
        self.futures = [pool.submit(Urgency.UPLOAD, self._run) for _ in range(count)]

    def _run(self) -> None:
        with self._lock:
            self.running += 1
        self.let_go.acquire(timeout=20)
        with self._lock:
            self.running -= 1

    def become(self, running: int) -> None:
        deadline = time.monotonic() + 20
        while self.running != running:
            assert time.monotonic() < deadline, self.running
            time.sleep(0.005)
        time.sleep(0.05)
        assert self.running == running


def test_a_pool_takes_another_size_at_work() -> None:
    pool = Pool(2, "test")
    jobs = Jobs(pool, 12)
    jobs.become(2)
    pool.resize(4)
    jobs.become(4)
    pool.resize(1)
    jobs.let_go.release(3)
    jobs.become(1)
    assert pool.queued == 8
    jobs.let_go.release(20)
    for future in jobs.futures:
        assert future.result(20) is None
    again = Jobs(pool, 3)
    again.become(1)
    again.let_go.release(3)
    pool.resize(3)
    for future in again.futures:
        assert future.result(20) is None
    pool.close()


@pytest.mark.parametrize("who", ["items", "caller"])
def test_what_is_under_way_is_waited_for_where_the_items_or_their_caller_fail(who):
    """Otherwise it would tell of its progress after its order has been answered."""
    ended = []

    def work(item):
        time.sleep(0.05)
        ended.append(item)

    def items():
        yield from range(3)
        if who == "items":
            raise OSError("no more can be read")

    with ThreadPoolExecutor(2) as pool:
        flowing = flow(items(), lambda item: pool.submit(work, item), 2)
        next(flowing)
        if who == "caller":
            flowing.close()
        else:
            with pytest.raises(OSError, match="no more"):
                list(flowing)
        assert sorted(ended) == ([0, 1] if who == "caller" else [0, 1, 2])


def interrupted_at(moment: int, interrupted: threading.Event) -> None:
    """Run a flow in which this step, if there is one, is interrupted as by ^C."""
    left, code = moment, flow.__code__

    def trace(frame, event, _argument):
        nonlocal left
        if frame.f_code is not code and (frame.f_back is None or frame.f_back.f_code is not code):
            return None
        if frame.f_code.co_filename != code.co_filename:
            return None
        left -= 1
        if left == 0:
            sys.settrace(None)
            interrupted.set()
            raise KeyboardInterrupt
        return trace

    with ThreadPoolExecutor(2) as pool:
        sys.settrace(trace)
        try:
            with suppress(KeyboardInterrupt):
                for _ in flow(range(4), lambda item: pool.submit(time.sleep, 0.001), 2):
                    pass
        finally:
            sys.settrace(None)


def test_an_interrupt_at_any_moment_ends_it() -> None:
    """One that comes between an end that was taken and its being counted must not wait for it once more."""
    for moment in range(1, 1000):
        interrupted = threading.Event()
        thread = threading.Thread(target=interrupted_at, args=(moment, interrupted), daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive(), f"interrupted at step {moment} it waits for ever"
        if not interrupted.is_set():
            break
    assert 20 < moment < 999
