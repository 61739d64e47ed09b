"""The benchmark of train steps: its contenders run on 8-bit images, and its table compares rounds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import training
from benchmarks.rounds import Pace, Timing, take_turns
from benchmarks.training import BASELINE, contenders, table
from tests.unit.trainer.test_trainer import tiny
from trainer.config import TrainConfig
from trainer.data import Dataset, open_dataset
from trainer.loop import resolve
from trainer.objective import DiffusionObjective


@pytest.fixture
def problem(tmp_path: Path) -> tuple[TrainConfig, Dataset]:
    images = np.random.default_rng(0).integers(0, 256, (training.IMAGES, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "toy.npz", images=images, labels=np.arange(training.IMAGES) % 3)
    dataset = open_dataset(tmp_path / "toy.npz", 8, 1)
    return resolve(tiny(), dataset), dataset


def test_every_contender_takes_a_step(problem: tuple[TrainConfig, Dataset]) -> None:
    timings = take_turns(contenders(*problem), Pace(rounds=1, max_seconds=60, warm_up_calls=1))
    assert set(timings) >= {BASELINE, "ours, float32", "ours, bfloat16", "gradient alone, float32"}
    assert all(timing.best > 0 for timing in timings.values())


@pytest.mark.parametrize("make", [training.openai_step, partial(training.our_step, precision="float32")])
def test_both_loops_learn(
    problem: tuple[TrainConfig, Dataset],
    make: Callable[[TrainConfig, Dataset], Callable[[], object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[nn.Module] = []
    original = DiffusionObjective.build

    def build(objective: DiffusionObjective) -> nn.Module:
        built.append(original(objective))
        return built[-1]

    monkeypatch.setattr(DiffusionObjective, "build", build)
    step = make(*problem)
    weights = dict(built[0].named_parameters())["out.2.weight"]
    seen = [weights.detach().clone()]
    for _ in range(3):
        step()
        seen.append(weights.detach().clone())
    assert all(not torch.equal(before, after) for before, after in pairwise(seen))
    assert seen[-1].isfinite().all()


def test_the_table_gives_the_median_of_the_rounds_ratios() -> None:
    lines = table({BASELINE: Timing((1.0, 4.0, 9.0)), "ours": Timing((0.5, 2.0, 3.0))}).splitlines()
    assert [cell.strip() for cell in lines[-1].strip("|").split("|")] == ["ours", "2000", "500", "2.00", "2.00 to 2.50"]
