"""Costs of steps are running means that never fall with rows; beyond the knee, more rows do not pay."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.step_costs import SMOOTHING, StepCosts, knee


def measured(table: dict[int, float]) -> StepCosts:
    costs = StepCosts()
    for rows, seconds in table.items():
        costs.observe(rows, seconds)
    return costs


def test_between_sizes_costs_are_interpolated_and_beyond_them_they_grow_by_row() -> None:
    costs = measured({2: 1.0, 4: 3.0})
    assert [costs.seconds(rows) for rows in (1, 2, 3, 4, 8)] == [1.0, 1.0, 2.0, 3.0, 6.0]
    assert StepCosts().seconds(3) == 0.0


def test_a_cost_follows_new_measurements() -> None:
    costs = measured({2: 1.0})
    costs.observe(2, 2.0)
    assert costs.seconds(2) == 1.0 + SMOOTHING
    for _ in range(200):
        costs.observe(2, 2.0)
    assert costs.seconds(2) == pytest.approx(2.0, abs=1e-3)


@given(st.dictionaries(st.integers(1, 64), st.floats(0.001, 10), min_size=1))
def test_more_rows_never_take_less_time_and_the_mean_is_kept(table: dict[int, float]) -> None:
    costs = measured(table)
    curve = [costs.seconds(rows) for rows in range(1, 80)]
    assert all(b >= a * (1 - 1e-12) for a, b in itertools.pairwise(curve))
    assert sum(costs.table().values()) == pytest.approx(sum(table.values()))


@pytest.mark.parametrize(("rows", "seconds"), [(0, 1.0), (1, -1.0)])
def test_an_impossible_measurement_is_refused(rows: int, seconds: float) -> None:
    with pytest.raises(ValueError, match="at least 1 row"):
        StepCosts().observe(rows, seconds)


@pytest.mark.parametrize(
    ("fixed", "per_row", "width"),
    [(0.95, 0.05, 32), (0.8, 0.2, 24), (0.05, 0.95, 2), (1.0, 0.0, 32)],
)
def test_the_knee_is_high_if_rows_are_cheap_and_low_if_they_are_not(fixed: float, per_row: float, width: int) -> None:
    costs = measured({n: fixed + per_row * n for n in (1, 2, 4, 8, 12, 16, 24, 32)})
    assert knee(costs, 32, 0.95) == width


def test_the_knee_is_the_maximum_until_the_maximum_has_been_measured() -> None:
    assert knee(StepCosts(), 8, 0.95) == 8
    assert knee(measured({1: 1.0, 2: 2.0}), 8, 0.95) == 8


def test_the_cost_of_a_padded_maximum_includes_its_padding() -> None:
    assert knee(measured({8: 1.0, 16: 2.0}), 9, 0.95) == 8


def test_a_change_of_speed_of_the_only_size_in_use_applies_to_all_sizes() -> None:
    costs = measured({4: 1.0, 8: 1.8})
    for slower in (2.0, 1.0, 4.0, 1.0, 0.5):
        for _ in range(300):
            costs.observe(8, 1.8 * slower)
        assert costs.table() == pytest.approx({4: slower, 8: 1.8 * slower}, rel=0.001)


@pytest.mark.parametrize("wrongly", [0.5, 2.0])
@pytest.mark.parametrize("colder", [1.0, 1.2])
def test_a_wrong_measurement_is_corrected_by_steps_of_that_size(wrongly: float, colder: float) -> None:
    costs = measured({4: 1.0, 8: 1.8 * wrongly})
    for _ in range(150):
        for rows, seconds in ((4, colder), (4, 1.0), (4, 1.0), (8, 1.8 * colder * colder), (8, 1.8)):
            costs.observe(rows, seconds)  # the first step of the larger size is the slower one
    assert costs.seconds(8) / costs.seconds(4) == pytest.approx(1.8, rel=0.01)


def test_a_draining_queue_does_not_change_relative_costs() -> None:
    true = {1: 1.0, 2: 1.95, 4: 3.6, 8: 6.66}
    costs = measured(true)
    for _ in range(200):
        for rows, seconds in sorted(true.items(), reverse=True):
            costs.observe(rows, 1.5 * seconds if rows == 8 else seconds)  # slower, after an idle period
            for _ in range(5):
                costs.observe(rows, seconds)
    table = costs.table()
    assert {rows: seconds / table[1] for rows, seconds in table.items()} == pytest.approx(true, rel=0.001)
    assert knee(costs, 8, 0.95) == 8


def test_one_delayed_step_has_little_influence() -> None:
    costs = measured({4: 1.0, 8: 1.8})
    for rows, seconds in ((4, 1.0), (4, 1.0), (8, 1.8), (8, 1800.0)):
        costs.observe(rows, seconds)
    assert costs.seconds(8) / costs.seconds(4) == pytest.approx(1.8, rel=0.1)
    assert costs.seconds(4) < 1.2


def test_sizes_that_take_turns_with_every_step_are_not_compared() -> None:
    costs = measured({4: 1.0, 8: 3.6})
    for _ in range(20):
        costs.observe(4, 1.0)
        costs.observe(8, 1.8)
    assert costs.seconds(8) / costs.seconds(4) == pytest.approx(3.6)


def test_speed_changes_within_steps_do_not_change_relative_costs() -> None:
    rng = np.random.default_rng(0)
    true = {1: 0.3, 2: 0.55, 4: 1.0, 8: 1.6}
    costs = measured(true)
    widths = []
    for rows in rng.choice([2, 4, 8, 8], size=2000).repeat(2).tolist():
        costs.observe(rows, true[rows] * rng.choice([1.0, 1.1, 1.5]))
        widths.append(knee(costs, 8, 0.9))
    assert np.mean(np.array(widths) == 8) > 0.9


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_costs_of_unused_sizes_do_not_drift_if_first_steps_of_others_are_slower(noise: float) -> None:
    rng = np.random.default_rng(0)
    true = {1: 0.0100, 2: 0.0105, 4: 0.0120, 8: 0.0150}
    costs = measured(true)
    for _ in range(1000):
        for rows in (8, 4):
            for nth in range(12):
                late = 1.07 if nth == 0 else 1.0
                costs.observe(rows, true[rows] * late * max(0.5, rng.normal(1.0, noise)))
        assert costs.table() == pytest.approx(true, rel=0.15)
    assert knee(costs, 8, 0.95) == 8


def test_the_classifier_s_cost_stays_bounded_if_steps_seem_faster_than_the_network() -> None:
    true = {4: 0.013, 8: 0.025}
    costs = measured(true)
    for rows, seconds in true.items():
        costs.observe(rows, 1.15 * seconds, classified=rows)
    for speed in (0.8, 1.0):
        for _ in range(400):
            for rows, seconds in true.items():
                costs.observe(rows, 1.15 * speed * seconds, classified=rows)
    for rows, seconds in true.items():
        assert costs.seconds(rows, rows) - costs.seconds(rows) == pytest.approx(0.15 * seconds, rel=0.01)


def test_a_machine_that_gets_slower_does_not_narrow_the_width() -> None:
    costs = StepCosts()
    for rows, seconds in ((1, 0.3), (2, 0.55), (4, 1.0), (8, 1.8)):
        costs.observe(rows, seconds)
    for slower in (1.0, 2.0, 1.5, 3.0, 0.5):
        for _ in range(100):
            costs.observe(8, 1.8 * slower)
        assert knee(costs, 8, 0.95) == 8
