"""What hangs, by a clock that is told what to show."""

from __future__ import annotations

import pytest

from service.engine.watchdog import CHECK_INTERVAL_S, StepUnderWay, Watchdog


def seconds_until_it_hangs(expected_s: float, every_s: float = CHECK_INTERVAL_S) -> float:
    """Look at one step, again and again; say how old it is when it is said to hang."""
    watchdog, step, now = Watchdog(), StepUnderWay(expected_s), 100.0
    while not watchdog.hangs(step, now):
        now += every_s
    return now - 100.0


@pytest.mark.parametrize(("expected_s", "limit"), [(0.0, 10.0), (0.1, 10.0), (0.5, 10.0), (2.0, 40.0)])
def test_a_step_hangs_after_ten_seconds_or_twenty_times_what_was_expected(expected_s: float, limit: float) -> None:
    assert seconds_until_it_hangs(expected_s) == limit + CHECK_INTERVAL_S


def test_steps_that_follow_each_other_do_not_hang_nor_does_an_idle_engine() -> None:
    watchdog = Watchdog()
    for tick in range(1000):
        step = None if tick < 300 else StepUnderWay(0.1)
        assert not watchdog.hangs(step, tick * 5.0)
        assert not watchdog.hangs(step, tick * 5.0 + 4.0)


def test_time_in_which_nobody_looked_hardly_counts() -> None:
    watchdog, step = Watchdog(), StepUnderWay(0.1)
    assert not watchdog.hangs(step, 0.0)
    assert not watchdog.hangs(step, 3600.0)  # the process was stopped for an hour
    assert seconds_until_it_hangs(0.1, every_s=60.0) == 11 * 60.0  # ten looks at a second each, and one more
