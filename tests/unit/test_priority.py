"""How the mover gives way, and does not where somebody waits for it."""

import os
import subprocess
import sys
import threading
import time

import pytest
from tierfsd.priority import Priority

from tierfs import slices


def eventually(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_gives_way_but_for_who_waits(tmp_path, monkeypatch):
    group, given = tmp_path / "autogroup", []
    group.write_text("0")
    monkeypatch.setattr(slices, "stand_back_all", given.append)
    waiting = threading.Event()
    waiting.set()
    priority = Priority(str(group), 0.05)
    priority.start(waiting.is_set)
    try:
        time.sleep(0.2)  # several looks
        assert group.read_text() == "0"  # a process that begins is waited for
        waiting.clear()
        eventually(lambda: group.read_text() == "19")
        waiting.set()
        priority.hurry()
        assert group.read_text() == "0"
        time.sleep(0.2)  # several looks
        assert group.read_text() == "0"
        waiting.clear()
        eventually(lambda: group.read_text() == "19")
        priority.hurry()
        assert group.read_text() == "0"
        eventually(lambda: group.read_text() == "19")
    finally:
        priority.stop()
    assert group.read_text() == "0"  # whoever unmounts waits for what is left
    assert len(given) >= 6 and given == [slices.MOVER, slices.DEFAULT] * (len(given) // 2)


def use_a_processor(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_an_order_that_has_used_its_first_share_gets_a_small_one_for_as_long_as_it_runs(tmp_path):
    group = tmp_path / "autogroup"
    group.write_text("0")
    ordered = threading.Event()
    priority = Priority(str(group), 0.05)
    priority.start(lambda: False, ordered.is_set)
    try:
        eventually(lambda: group.read_text() == "19")
        ordered.set()
        priority.hurry()
        use_a_processor(0.1)
        eventually(lambda: group.read_text() == "10")
        time.sleep(0.2)  # several looks
        assert group.read_text() == "10"
        priority.hurry()
        assert group.read_text() == "0"
        ordered.clear()
        eventually(lambda: group.read_text() == "19")
    finally:
        priority.stop()


def test_what_is_ordered_on_a_busy_machine_is_not_slowed_before_it_has_used_a_processor(tmp_path, monkeypatch):
    group = tmp_path / "autogroup"
    group.write_text("0")
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    priority = Priority(str(group), 0.05)
    priority.start(lambda: False, lambda: True)
    try:
        time.sleep(0.3)  # several looks
        assert group.read_text() == "0"
    finally:
        priority.stop()


def test_an_order_has_the_usual_share_no_longer_than_a_small_one_needs(tmp_path, monkeypatch):
    group, used = tmp_path / "autogroup", [0.0]
    group.write_text("0")
    monkeypatch.setattr(time, "process_time", lambda: used[0])
    monkeypatch.setattr("tierfsd.priority._LOOKS", 20_000)
    priority = Priority(str(group), 1000.0)  # a question would have it for as long
    priority.start(lambda: False, lambda: True)
    try:
        priority._until = 0.0  # it has begun long ago
        used[0] = 1000.0
        eventually(lambda: group.read_text() == "10")
        priority.hurry(ordered=True)
        time.sleep(0.3)  # several looks
        assert group.read_text() == "0"
        used[0] += 101.0
        eventually(lambda: group.read_text() == "10")
    finally:
        priority.stop()


def test_where_there_are_no_groups_it_does_without(tmp_path):
    priority = Priority(str(tmp_path / "absent" / "autogroup"))
    priority.start(lambda: False)
    priority.hurry()
    priority.stop()


@pytest.mark.skipif(not os.path.exists("/proc/self/autogroup"), reason="this kernel has no autogroups")
def test_the_kernel_takes_it():
    code = """if True:
        import os, time
        from tierfsd.priority import Priority
        os.setsid()
        priority = Priority(calm_seconds=0.2)
        said = lambda: open("/proc/self/autogroup").read().split()[-1]
        print(said())
        priority.start(lambda: False)
        end = time.monotonic() + 20
        while said() != "19" and time.monotonic() < end: time.sleep(0.05)
        print(said())
        time.sleep(0.2)  # without privilege the kernel takes a change ten times a second
        priority.hurry()
        print(said())
        end = time.monotonic() + 20
        while said() != "19" and time.monotonic() < end: time.sleep(0.05)
        print(said())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["0", "19", "0", "19"]
