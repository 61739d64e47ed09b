"""The comparison of two checkouts: what it tabulates, and that it times bookkeeping by processor time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks import bookkeeping, two_checkouts
from benchmarks.checkout_costs import Steps, bookkeeping_costs
from benchmarks.null_network import NullDenoiser
from benchmarks.two_checkouts import EngineCosts, service_costs, table
from tests.waiting import PATIENCE_S


def test_costs_are_compared_turn_by_turn() -> None:
    before = [{"step": 100.0, "memory": 10.0}, {"step": 200.0, "memory": 10.0}, {"step": 300.0, "memory": 10.0}]
    after = [{"step": 110.0, "memory": 9.0}, {"step": 180.0, "memory": 9.0}, {"step": 330.0, "memory": 9.0}]
    assert table(before, after).splitlines()[2:] == [
        "| step | 200 (100 to 300) | 180 (110 to 330) | 1.100 (0.900 to 1.100) |",
        "| memory | 10.00 (10.00 to 10.00) | 9.00 (9.00 to 9.00) | 0.900 (0.900 to 0.900) |",
    ]


def test_bookkeeping_is_timed_by_another_clock_and_only_meanwhile() -> None:
    costs = bookkeeping_costs(waiting=40, width=4, steps=60)
    assert {"bookkeeping: fifo, step", "bookkeeping: srw, eta", "bookkeeping: deadline, submit"} <= {*costs}
    assert bookkeeping.time is time  # type: ignore[attr-defined]  # no name that it exports


def test_a_step_is_timed_once_per_line_of_the_plan() -> None:
    ticks = iter(range(1000))
    assert Steps(NullDenoiser(image_size=8, max_rows=4), 4).cost(3, 5, lambda: float(next(ticks))) == 1e6
    assert next(ticks) == 2 * 5


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Return a checkout whose programs end at once."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "iddpm"):
        (programs / name).write_text("#!/bin/sh\nexit 3\n")
        (programs / name).chmod(0o755)
    return tmp_path


def test_an_engine_that_ends_is_an_error_that_names_its_checkout(broken: Path) -> None:
    engine = EngineCosts(broken, broken, [])
    try:
        with pytest.raises(ValueError, match=f"{broken}: benchmarks/checkout_costs.py has ended"):
            engine.measure()
    finally:
        engine.close()


def test_a_service_that_ends_at_start_is_not_waited_for(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_checkouts, "START_SECONDS", PATIENCE_S)
    with pytest.raises(ValueError, match=r"the service has ended \(3\); start it by itself: .*iddpm"):
        service_costs(broken, broken)
