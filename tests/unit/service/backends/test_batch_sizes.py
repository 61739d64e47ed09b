"""Batch sizes: the compiled ones, those that the self-test runs, and the sizes that rows are padded to."""

from __future__ import annotations

import pytest

from service.backends.batch_sizes import (
    BatchSizes,
    close_sizes,
    covering_width,
    doubling_sizes,
    largest_size,
    sizes_to_try,
    up_to_width,
)
from service.errors import ModelError


def test_sizes_double_up_to_the_width() -> None:
    assert [doubling_sizes(width) for width in (2, 8, 12)] == [(1, 2), (1, 2, 4, 8), (1, 2, 4, 8, 12)]


def test_a_width_between_exported_sizes_is_added() -> None:
    assert [up_to_width((1, 4, 8), width) for width in (3, 4, 9)] == [(1, 3), (1, 4), (1, 4, 8, 9)]


@pytest.mark.parametrize(
    ("max_rows", "expected"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 4)), (4, (1, 2, 4)), (8, (1, 2, 4, 8)), (9, (1, 2, 4, 8))],
)
def test_only_built_sizes_that_the_width_uses_are_needed(max_rows: int, expected: tuple[int, ...]) -> None:
    assert covering_width((8, 4, 2, 1), max_rows) == expected


def test_powers_of_two_and_1_5_times_those_are_tested() -> None:
    assert sizes_to_try(16) == (1, 2, 3, 4, 6, 8, 12)
    assert sizes_to_try(5) == (1, 2, 3, 4)


def test_the_largest_size_is_the_width_or_the_largest_compiled_one() -> None:
    assert (largest_size(None, 6, "network"), largest_size((1, 8), 6, "network")) == (6, 8)
    with pytest.raises(ModelError, match=r"network: max_rows must be at most 4, .*; got 6"):
        largest_size((1, 4), 6, "network")


def test_sizes_of_a_device_are_close_to_each_other() -> None:
    assert close_sizes(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert close_sizes(144)[10:] == (64, 72, 80, 88, 96, 104, 112, 120, 128, 144)
    assert [close_sizes(width) for width in (2, 12)] == [(1, 2), (1, 2, 4, 8, 12)]


def test_a_step_has_at_most_the_rows_of_every_call() -> None:
    assert BatchSizes(network=(1, 8), classifier=()).most_rows == 8
    assert BatchSizes(network=(1, 8), classifier=(1, 2)).most_rows == 2


def test_rows_are_padded_to_the_next_size() -> None:
    sizes = BatchSizes(network=(1, 2, 4), classifier=(2, 4))
    assert [sizes.padded_rows(rows) for rows in (1, 2, 3, 4)] == [1, 2, 4, 4]
    assert [sizes.padded_classified_rows(rows) for rows in (1, 2, 3, 4)] == [2, 2, 4, 4]
    assert BatchSizes(network=(1,), classifier=()).padded_classified_rows(1) == 0
