"""Sums of work by place, compared with a simple implementation."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.ordered_work import BLOCK, OrderedWork


@given(st.integers(0, 2**32), st.integers(1, 4 * BLOCK))
def test_sums_and_order_equal_those_of_a_sorted_list(seed: int, operations: int) -> None:
    draw = random.Random(seed)
    line, entries = OrderedWork(), dict[tuple[float, int], int]()
    for sequence in range(operations):
        if entries and draw.random() < 0.3:
            order = draw.choice(list(entries))
            del entries[order]
            line.remove(order)
        else:
            order = (float(draw.randrange(20)), sequence)
            entries[order] = draw.randrange(1, 500)
            line.add(order, entries[order])
    place = (float(draw.randrange(21)), draw.randrange(operations))
    before = [work for order, work in entries.items() if order < place]
    assert line.before(place) == (len(before), sum(before))
    assert (len(line), line.work) == (len(entries), sum(entries.values()))
    assert [*line] == sorted(entries)


def test_removing_a_missing_element_raises() -> None:
    line = OrderedWork()
    line.add((1.0, 1), 5)
    for order in ((0.0, 1), (1.0, 2), (2.0, 1)):
        with pytest.raises(KeyError):
            line.remove(order)
