"""Heat: frequency on a turnover clock, probation, the order of victims, and that it can always be made anew."""

from __future__ import annotations

import os

import lmdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierfs.heat_index import HeatIndex, order_key
from tierfs.policy.heat import DISPLAY_HALF_LIFE, Heat, add_use, admitted, score, seeded, shown_at, touched

MIB = 1 << 20


@pytest.fixture
def heat(tmp_path):
    opened = HeatIndex(str(tmp_path / "heat"), capacity=100 * MIB)
    yield opened
    opened.close()


def order(heat, local=0):
    return list(heat.victims(local))


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False)))
def test_order_keys_sort_as_numbers(numbers):
    assert sorted(numbers) == sorted(numbers, key=order_key)


@given(st.lists(st.floats(0, 50), min_size=1))
def test_a_use_never_cools_a_file(clocks):
    level = -1e300
    for clock in sorted(clocks):
        hotter = add_use(level, clock)
        assert hotter >= level and hotter >= clock / 0.5
        level = hotter


def test_a_burst_counts_once_for_the_policy_and_fully_for_people():
    burst = touched(touched(Heat(), 1.0, 0.0, 1, 10), 1.05, 1.0, 1000, 10)
    assert burst.level == touched(Heat(), 1.0, 0.0, 1, 10).level
    assert shown_at(burst, 1.0) == pytest.approx(1001, rel=0.01)
    assert touched(burst, 1.05, 3602.0, 1, 10).level > burst.level


def test_displayed_heat_halves_in_seven_days_and_ignores_a_clock_set_back():
    used = touched(Heat(), 0.0, 1000.0, 8, 10)
    assert shown_at(used, 1000.0 + DISPLAY_HALF_LIFE) == pytest.approx(4)
    assert shown_at(used, 0.0) == pytest.approx(8)


def test_frequent_beats_recent_and_small_beats_large():
    often = Heat()
    for clock in (1.0, 1.2, 1.4, 1.6):
        often = touched(often, clock, 0.0, 1, MIB)
    recent = touched(Heat(), 1.7, 0.0, 1, MIB)
    assert score(often) > score(recent)
    assert score(touched(Heat(), 1.0, 0, 1, 1000)) > score(touched(Heat(), 1.0, 0, 1, 100 * MIB))
    assert score(touched(Heat(), 1.0, 0, 1, 1000), True) == score(touched(Heat(), 1.0, 0, 1, 100 * MIB), True)


def test_an_old_file_is_colder_than_a_newer_one():
    assert seeded(400 * 86400, 0.0, 0.0, 10).level < seeded(86400, 0.0, 0.0, 10).level


def test_a_file_that_comes_back_soon_skips_probation():
    first = admitted(None, 1.0, 0.0, 10)
    assert first.probation and not admitted(first, 1.5, 0.0, 10).probation
    assert admitted(first, 3.0, 0.0, 10).probation


@pytest.mark.parametrize("touch_first", [True, False])
@pytest.mark.parametrize(("turnovers", "waits"), [(0.5, False), (3.0, True)])
def test_a_return_is_judged_alike_whether_its_use_is_told_before_or_after_it(touch_first, turnovers, waits):
    here = admitted(None, 1.0, 0.0, 10)
    clock = 1.0 + turnovers
    if touch_first:
        back = admitted(touched(here, clock, 0.0, 1, 10, local=False), clock, 0.0, 10)
    else:
        back = touched(admitted(here, clock, 0.0, 10), clock, 0.0, 1, 10)
    assert back.probation is waits
    assert back.level == add_use(here.level, clock)


def test_files_used_once_leave_before_files_used_again(heat):
    for ino in (1, 2, 3):
        heat.admit(ino, 10 * MIB, 10 * MIB)
    heat.admit(4, 20 * MIB, 20 * MIB)
    heat.touch_many([(1, 1, 10 * MIB)])
    assert order(heat)[-1] == 1 or order(heat)[0] != 1
    assert order(heat, local=50 * MIB)[:2] == [2, 3]


def test_a_scan_does_not_push_out_what_is_used_each_day(heat):
    """A `grep -r` over what is away, in a home where little comes or goes: the turnover clock stood still."""
    work, known, scanned, day = range(1, 11), range(100, 130), range(100, 150), 86400.0
    heat.admit_many([(ino, MIB, MIB) for ino in (*work, *known)], now=0.0)
    heat.left(known)
    for number in range(1, 8):
        heat.touch_many([(ino, 5, MIB) for ino in work], now=number * day)
    for ino in scanned:
        heat.admit(ino, MIB, MIB, now=8 * day)
        heat.touch_many([(ino, 1, MIB)], now=8 * day)
    assert set(order(heat, 60 * MIB)[:40]) < set(scanned)  # ten of them keep the share of what is on probation


def test_the_coldest_of_the_rest_leaves_first(heat):
    heat.seed_many([(7, MIB, 86400.0), (8, MIB, 400 * 86400.0), (9, MIB, 30 * 86400.0)])
    assert order(heat) == [8, 9, 7]
    heat.admit(1, 90 * MIB, 90 * MIB)
    heat.touch_many([(8, 1, MIB)])
    assert order(heat, local=1 << 40)[:2] == [9, 7]


def test_what_left_the_disk_keeps_its_heat_and_is_no_victim(heat):
    heat.seed_many([(7, MIB, 0.0)])
    heat.left([7])
    assert order(heat) == [] and heat.heat(7) > 0
    heat.touch_many([(7, 1, MIB)])
    assert order(heat) == []
    heat.admit(7, MIB, MIB)
    assert order(heat) == [7]


def test_probation_bytes_follow_changes_of_size_and_removal(heat):
    heat.admit(1, 10, 10)
    heat.admit(1, 30, 20)
    assert heat.probation_bytes() == 30
    heat.forget([1])
    assert heat.probation_bytes() == 0 and order(heat) == []


def test_more_victims_than_a_page(heat):
    heat.seed_many([(ino, 1, float(ino)) for ino in range(1, 1000)])
    assert order(heat) == list(range(999, 0, -1))


def test_a_damaged_environment_is_made_anew(tmp_path):
    path = tmp_path / "heat"
    opened = HeatIndex(str(path), 100)
    opened.admit(1, 10, 10)
    opened.close()
    os.truncate(path / "data.mdb", 5000)
    again = HeatIndex(str(path), 100)
    assert order(again) == []
    again.admit(2, 10, 10)
    again.close()


def test_heat_of_ten_thousand_files_takes_at_most_90_bytes_each(tmp_path):
    """Pages in use; with the index (at most 310) that is no more than the 400 bytes promised for a stub."""
    opened = HeatIndex(str(tmp_path), 10 << 30)
    for start in range(1, 10_001, 100):
        opened.admit_many([(ino, 4096, 4096) for ino in range(start, start + 100)])
    opened.touch_many([(ino, 1, 4096) for ino in range(1, 10_001, 7)])
    opened.left(range(1, 10_001))
    opened.close()
    with lmdb.open(str(tmp_path), max_dbs=8, readonly=True) as env, env.begin() as txn:
        used = 0
        for name in (b"heat", b"score", b"queue"):
            stat = txn.stat(env.open_db(name, txn=txn, create=False))
            used += (stat["leaf_pages"] + stat["branch_pages"]) * stat["psize"]
    assert used / 10_000 <= 90
