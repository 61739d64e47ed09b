"""How an evaluation reads real images: as the training of the model did, unless other options are given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cli.main import app
from diffusion.config import CheckpointConfig
from tests.fakes import tiny_config
from tests.networks import write_random_model
from trainer.data import DataConfig
from trainer.evaluation.errors import EvaluationError
from trainer.evaluation.reading import reading_of, with_reading


def recorded(data: Any) -> CheckpointConfig:
    return tiny_config().replace(provenance={"images_seen": 3, "train_config": {"lr": 1e-4, "data": data}})


def test_images_are_read_as_in_training_but_for_what_is_set() -> None:
    config = recorded({"small_images": "enlarge", "background": "black"})
    assert reading_of(config) == DataConfig(small_images="enlarge", background="black")
    changed = with_reading(config, {"data.background": "white", "data.unreadable": "skip"})
    assert reading_of(changed) == DataConfig(small_images="enlarge", unreadable="skip")
    assert changed.provenance["images_seen"] == 3
    assert changed.provenance["train_config"]["lr"] == 1e-4
    assert with_reading(config, {}) == config


def test_images_of_a_model_without_a_record_are_read_in_its_units() -> None:
    assert reading_of(tiny_config()) == DataConfig()
    assert reading_of(tiny_config().replace(value_range=(0.0, 4095.0))) == DataConfig(value_range=(0.0, 4095.0))
    assert reading_of(with_reading(tiny_config(), {"data.small_images": "enlarge"})).small_images == "enlarge"


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        ({"background": "puce"}, {}, r"cannot read images as the training .*train_config\.data.*background"),
        ({"of_a_later_version": 1}, {}, "of_a_later_version"),
        ({}, {"model.dropout": 0}, r"options of the data here, .*got 'model\.dropout'; allowed: data\.class_from, "),
        ({}, {"data.unreadable": "maybe"}, "--set: .*unreadable"),
    ],
)
def test_records_and_options_that_are_not_understood_are_refused(
    data: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        reading_of(with_reading(recorded(data), changes))


def evaluate(model: Path, out: Path, command: str, images: Any, *options: str) -> tuple[int, str]:
    np.savez(out / "test.npz", images=images, labels=np.arange(6) % 3, classes=np.array(["x", "y", "z"]))
    arguments = ["evaluate", command, str(model), "--data", str(out / "test.npz"), "--out", str(out / "results")]
    result = CliRunner().invoke(app, [*arguments, *options])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize(
    ("command", "sizes"),
    [
        ("nll", ["--num", "2", "--steps", "2"]),
        ("noise-scale", ["--small", "1", "--big", "2", "--batches", "2", "--case", "simple:uniform"]),
    ],
)
def test_options_of_the_data_can_be_set_and_are_recorded(tmp_path: Path, command: str, sizes: list[str]) -> None:
    model = write_random_model(tmp_path / "model", seed=0)
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 3, 1), dtype=np.uint8)
    code, output = evaluate(model, tmp_path, command, images, *sizes, "--set", "data.small_images=enlarge")
    assert code == 0, output
    content = json.loads((tmp_path / "results" / "results.json").read_text())
    assert content["reading"]["small_images"] == "enlarge"
    code, output = evaluate(model, tmp_path, command, images, *sizes)  # continued with others
    assert code == 1
    assert "reading" in output


def test_the_option_that_an_error_names_works(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model", seed=0)
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1)) / 2.0
    sizes = ["--small", "1", "--big", "2", "--batches", "2", "--case", "simple:uniform"]
    code, output = evaluate(model, tmp_path, "noise-scale", images, *sizes)
    assert code == 1
    assert "--set data.value_range=" in output
    code, output = evaluate(model, tmp_path, "noise-scale", images, *sizes, "--set", "data.value_range=0,127.5")
    assert code == 0, output
