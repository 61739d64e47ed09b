"""TensorBoard's files hold the log's values and the grids; without it, nothing is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainer.test_trainer import npz, tiny, train
from trainer.errors import TrainError
from trainer.progress import bar_entries

__all__ = ["npz"]


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def test_a_run_writes_its_log_and_grids_also_for_tensorboard(npz: Path, tmp_path: Path) -> None:
    train(tiny(total_images=20, tensorboard=True), npz, tmp_path / "run")
    train(tiny(tensorboard=True), npz, tmp_path / "run", resume=True)
    found = events(tmp_path / "run" / "tensorboard")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) >= 4
    assert [(event.step, pytest.approx(event.value)) for event in found.Scalars("mse")] == [
        (line["images"], line["mse"]) for line in lines
    ]
    assert any(tag.startswith("mse by quartile of t/") for tag in found.Tags()["scalars"])
    assert [event.step for event in found.Images("samples")] == [20, 40]


def test_nothing_is_written_unless_asked(npz: Path, tmp_path: Path) -> None:
    train(tiny(total_images=8), npz, tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_missing_package_is_named_before_training(npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainError, match="--tensorboard needs"):
        train(tiny(tensorboard=True), npz, tmp_path / "run")


def test_the_progress_bar_shows_terms_norm_and_rate_but_no_quartiles() -> None:
    line = {
        "images": 4.0,
        "lr": 1e-3,
        "loss": 0.51234,
        "mse_q0": 1.0,
        "grad_norm": 2.0,
        "images_per_second": 9.0,
    }
    assert bar_entries(line) == {"lr": "0.001", "loss": "0.512", "grad_norm": "2"}
