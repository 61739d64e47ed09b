"""The benchmark of training steps: its peers train, and its table compares within rounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import training
from benchmarks.rounds import Timing
from benchmarks.training import OpenAILoop, ours, section, take_turns
from tests.unit.trainer.test_trainer import tiny
from trainer.data import open_dataset
from trainer.loop import resolve


def test_turns_train_and_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "WARM_UP", 1)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "toy.npz", images=rng.integers(0, 256, (12, 8, 8, 1), dtype=np.uint8), labels=np.arange(12) % 3)
    dataset = open_dataset(tmp_path / "toy.npz", 8, 1)
    config = resolve(tiny(preview_per_class=0), dataset)
    peer = OpenAILoop(config, dataset)
    before = [parameter.detach().clone() for parameter in peer._parameters]  # noqa: SLF001
    timings = take_turns({"peer": peer, "ours": ours(config, dataset, "float32")}, rounds=2, batches=2)
    assert {len(timing.seconds) for timing in timings.values()} == {2}
    assert min(timings["ours"].seconds) > 0
    assert any((old != new).any() for old, new in zip(before, peer._parameters, strict=True))  # noqa: SLF001


def test_ratios_are_taken_within_a_round() -> None:
    timings = {"peer": Timing((1.0, 2.0, 4.0)), "ours": Timing((0.5, 1.0, 1.0))}
    text = section({}, timings, "peer", batch_size=64)
    assert "| ours | 1000 | 64 | 2.00 (2.00-4.00) | 3 |" in text
