"""Actions that recur after a number of images."""

from __future__ import annotations

import itertools
from functools import partial

import pytest

from trainer.every import Every, or_warn


@pytest.mark.parametrize(
    ("images", "start", "expected"),
    [(8, 0, [8, 16, 24, 30]), (8, 4, [12, 20, 28, 30]), (1, 0, [4, 8, 12, 16, 20, 24, 28, 30]), (100, 0, [30])],
)
def test_an_action_runs_once_per_interval_and_at_the_end(images: int, start: int, expected: list[int]) -> None:
    ran: list[int] = []
    seen = [*range(start, 30, 4), 30]
    for before, after in itertools.pairwise(seen):
        Every(images, partial(ran.append, after), start=start).run_if_due(before, after, done=after == 30)
    assert ran == expected


def test_a_failed_action_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise MemoryError

    or_warn("picture", fail)
    assert capsys.readouterr().err == "warning: no picture: MemoryError\n"
