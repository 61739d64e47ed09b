"""The benchmark of a train step's parts: real steps, each part counted once per step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.step_parts import Clock, measure, parse_arguments, run

PARTS = ["images: read, decode, scale", "timesteps and noise", "gradient", "clip, AdamW", "average", "log"]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "toy.npz", images=rng.integers(0, 256, (12, 8, 8, 1), dtype=np.uint8), labels=np.arange(12) % 3)
    fields = {"image_size": 8, "model_channels": 16, "channel_mult": "1", "attention_resolutions": "[]"}
    sets = [part for name, value in fields.items() for part in ("--set", f"model.{name}={value}")]
    return [str(tmp_path / "toy.npz"), "--batch", "2", "--steps", "3", *sets]


def test_every_part_is_timed_once_per_step_without_the_first_ones(arguments: list[str]) -> None:
    seconds = measure(parse_arguments(arguments)).seconds
    assert list(seconds) == PARTS
    assert {len(values) for values in seconds.values()} == {3}


def test_the_table_has_the_shares_of_the_step(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    clock.seconds = {**dict.fromkeys(PARTS, [0.002] * 3), "gradient": [0.090] * 3}
    monkeypatch.setattr("benchmarks.step_parts.measure", lambda _: clock)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    run(parse_arguments(arguments))
    output = capsys.readouterr().out
    assert "| gradient | 90.00 | 90.00 to 90.00 | 90.00 % |" in output
    assert "| all but the gradient | 10.00 | 10.00 to 10.00 | 10.00 % |" in output
