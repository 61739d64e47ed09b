"""Runs that begin with a trained model's weights (`iddpm train --init`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from cli.main import app
from formats.checkpoint_config import checkpoint_sha256, read_config
from tests.unit.trainer.test_trainer import tiny
from trainer import loop
from trainer.config import TrainConfig
from trainer.data import open_dataset
from trainer.errors import TrainError
from trainer.initial_model import read_initial_model
from trainer.loop import resolve
from trainer.run_folder import checkpoints


def write_npz(path: Path, classes: int = 3) -> Path:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 6, 6, 1), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(24) % classes, classes=np.array(["x", "y", "z"][:classes]))
    return path


def train(config: TrainConfig, data: Path, run: Path, initial: Path | None = None, resume: bool = False) -> Path:
    dataset = open_dataset(data, 8, 1)
    config = resolve(config, dataset)
    model = None if initial is None else read_initial_model(initial, config)
    return loop.train(config, dataset, run, initial=model, resume=resume)


def test_a_run_begins_with_the_models_weights_and_records_them_even_after_a_resume(tmp_path: Path) -> None:
    npz = write_npz(tmp_path / "toy.npz")
    first = train(tiny(total_images=8), npz, tmp_path / "first")
    second = train(tiny(total_images=4, lr=1e-12, seed=1), npz, tmp_path / "second", initial=first)
    before, after = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-9, msg=name)
    recorded = {"checkpoint_sha256": checkpoint_sha256(first), "images_seen": 8}
    assert read_config(second).provenance["initial_model"] == recorded
    train(tiny(total_images=8, lr=1e-12, seed=1), npz, tmp_path / "second", resume=True)
    assert read_config(checkpoints(tmp_path / "second")[-1]).provenance["initial_model"] == recorded
    third = train(tiny(total_images=4, seed=2), npz, tmp_path / "third", initial=second)
    assert read_config(third).provenance["initial_model"]["initial_model"] == recorded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diffusion.num_timesteps": 500}, "diffusion.num_timesteps is 4000 there and 500 here"),
        ({"model.channel_mult": [1, 2]}, r"model.channel_mult is \[1.0\] there and \[1.0, 2.0\] here"),
    ],
)
def test_a_model_of_another_configuration_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    npz = write_npz(tmp_path / "toy.npz")
    model = train(tiny(total_images=4), npz, tmp_path / "first")
    with pytest.raises(TrainError, match=message):
        train(tiny(total_images=4).with_overrides(changes), npz, tmp_path / "second", initial=model)
    assert not (tmp_path / "second").exists()
    train(tiny(total_images=4).with_overrides({"model.dropout": 0.0}), npz, tmp_path / "second", initial=model)


def test_data_with_other_classes_are_refused(tmp_path: Path) -> None:
    model = train(tiny(total_images=4), write_npz(tmp_path / "toy.npz"), tmp_path / "first")
    with pytest.raises(TrainError, match=r"model.num_classes is 3 there and 2 here.*the data determine"):
        train(tiny(total_images=4), write_npz(tmp_path / "two.npz", classes=2), tmp_path / "second", initial=model)


def test_the_command_refuses_a_resumed_run_and_a_folder_without_a_model(tmp_path: Path) -> None:
    data, command = write_npz(tmp_path / "toy.npz"), ["train", "fashion32", "--data", str(tmp_path / "toy.npz")]
    for options, message in (
        (["--init", str(data.parent), "--resume"], "--init starts a new run"),
        (["--init", str(data.parent)], "config.json"),
    ):
        result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "run"), *options])
        assert result.exit_code == 1
        assert message in result.output
    assert not (tmp_path / "run").exists()
