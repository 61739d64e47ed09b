"""Plans share lines, keep them while there is room, and never overlap."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from service.engine.plan_table import PlanTable
from service.engine.request import PlanKey


def key(lines: int) -> PlanKey:
    return PlanKey(sampler="ancestral", spec=str(lines))


def test_a_plan_in_use_is_shared_and_an_unused_one_is_found_again() -> None:
    table = PlanTable(100)
    first = table.acquire(key(50), 50)
    second = table.acquire(key(50), 50)
    assert first is not None
    assert second is not None
    assert (first.offset, first.fresh) == (second.offset, second.fresh) == (0, True)
    table.confirm(key(50))
    third = table.acquire(key(50), 50)
    assert third is not None
    assert not third.fresh
    for _ in range(3):
        table.release(key(50))
    again = table.acquire(key(50), 50)
    assert again is not None
    assert not again.fresh


def test_an_unused_plan_gives_way_and_one_in_use_does_not() -> None:
    table = PlanTable(100)
    assert table.acquire(key(60), 60) is not None
    assert table.acquire(key(50), 50) is None
    table.release(key(60))
    taken = table.acquire(key(50), 50)
    assert taken is not None
    assert taken.fresh


def test_the_plan_unused_for_longest_goes_first() -> None:
    table = PlanTable(100)
    for lines in (30, 31, 32):
        table.acquire(key(lines), lines)
        table.confirm(key(lines))
    for lines in (31, 30):
        table.release(key(lines))
    table.acquire(key(29), 29)  # takes the room of 31, unused for longer than 30
    kept = table.acquire(key(30), 30)
    assert kept is not None
    assert not kept.fresh


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
def test_ranges_in_use_never_overlap(script: list[tuple[bool, int]]) -> None:
    table = PlanTable(64)
    held: dict[int, tuple[int, int]] = {}  # lines -> (offset, references)
    for take, lines in script:
        if take:
            found = table.acquire(key(lines), lines)
            if found is None:
                continue
            references = held.get(lines, (found.offset, 0))[1]
            held[lines] = (found.offset, references + 1)
        elif lines in held:
            table.release(key(lines))
            offset, references = held.pop(lines)
            if references > 1:
                held[lines] = (offset, references - 1)
        ranges = sorted((offset, offset + size) for size, (offset, _) in held.items())
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
        assert all(start >= 0 and end <= 64 for start, end in ranges)
