"""Detection of steps that hang, with a clock that the test controls."""

from __future__ import annotations

import pytest

from service.engine.watchdog import CHECK_INTERVAL_S, StepUnderWay, Watchdog


def seconds_until_it_hangs(expected_s: float, every_s: float = CHECK_INTERVAL_S) -> float:
    """Check one step repeatedly; return its age when it is reported as hanging."""
    watchdog, step, now = Watchdog(), StepUnderWay(expected_s), 100.0
    while not watchdog.hangs(step, now):
        now += every_s
    return now - 100.0


@pytest.mark.parametrize(("expected_s", "limit"), [(0.0, 10.0), (0.1, 10.0), (0.5, 10.0), (2.0, 40.0)])
def test_a_step_hangs_after_ten_seconds_or_twenty_times_its_expected_time(expected_s: float, limit: float) -> None:
    assert seconds_until_it_hangs(expected_s) == limit + CHECK_INTERVAL_S


def test_neither_consecutive_steps_nor_an_idle_engine_hang() -> None:
    watchdog = Watchdog()
    for tick in range(1000):
        step = None if tick < 300 else StepUnderWay(0.1)
        assert not watchdog.hangs(step, tick * 5.0)
        assert not watchdog.hangs(step, tick * 5.0 + 4.0)


def test_time_between_rare_checks_hardly_counts() -> None:
    watchdog, step = Watchdog(), StepUnderWay(0.1)
    assert not watchdog.hangs(step, 0.0)
    assert not watchdog.hangs(step, 3600.0)  # the process was stopped for an hour
    assert seconds_until_it_hangs(0.1, every_s=60.0) == 11 * 60.0  # ten checks that count a second each, and one more
