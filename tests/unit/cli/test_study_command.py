"""`iddpm study scaling` trains, generates, scores and draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cli.main import app
from tests.unit.trainer.evaluation.test_extractors import onnx_means


def test_a_study_trains_generates_scores_and_draws(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("train", "test"):
        images = rng.integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.arange(12) % 2, classes=np.array(["a", "b"]))
    sets = [
        "model.image_size=8", "model.channel_mult=1", "model.attention_resolutions=[]", "batch_size=4",
        "diffusion.num_timesteps=20", "preview_per_class=0", "preview_steps=2", "precision=float32",
        "lr_warmup_images=0",
    ]  # fmt: skip
    options = [
        "--data", tmp_path / "train.npz", "--reference", tmp_path / "test.npz", "--out", tmp_path / "study",
        "--features", onnx_means(tmp_path / "means.onnx", ("n", 1, "h", "w")), "--cache", tmp_path / "cache",
        "--widths", "32,64", "--images", 8, "--points", 2, "--num", 4, "--steps", 2,
        "--nll-images", 3, "--nll-steps", 5, "--nll-extra-steps",
        *(part for field in sets for part in ("--set", field)),
    ]  # fmt: skip
    result = CliRunner().invoke(app, ["study", "scaling", "fashion32", *map(str, options)])
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "study" / "results.json").read_text())
    assert [network["channels"] for network in content["networks"]] == [32, 64]
    for network in content["networks"]:
        assert [point["images"] for point in network["points"]] == [4, 8]
        assert all(point["frechet_distance"] > 0 for point in network["points"])
        assert all(0 < point["bits_per_dim"] < 100 for point in network["points"])
    assert json.loads((tmp_path / "study" / "plan.json").read_text())["nll_extra_steps"] is True
    assert "| channels | parameters | images | FLOPs |" in (tmp_path / "study" / "results.md").read_text()
    assert content["measures"].keys() == {"frechet_distance", "bits_per_dim"}
    assert (tmp_path / "study" / "quality_over_compute.png").read_bytes().startswith(b"\x89PNG")

    again = CliRunner().invoke(app, ["study", "scaling", "fashion32", *map(str, options), "--num", "6"])
    assert again.exit_code == 1
    assert "other num" in " ".join(again.output.split())

    for field, value in (("cond_channels", 1), ("low_res_size", 4)):
        arguments = [*map(str, options), "--set", f"model.{field}={value}"]
        refused = CliRunner().invoke(app, ["study", "scaling", "fashion32", *arguments])
        assert refused.exit_code == 1
        assert f"model.{field} must be" in " ".join(refused.output.split())


def options_of_a_small_study(folder: Path) -> list[str]:
    rng = np.random.default_rng(0)
    for name in ("train", "test"):
        np.savez(folder / f"{name}.npz", images=rng.integers(0, 256, (12, 8, 8, 1), dtype=np.uint8))
    sets = [
        "model.image_size=8", "model.channel_mult=1", "model.attention_resolutions=[]", "batch_size=4",
        "diffusion.num_timesteps=20", "preview_per_class=0", "preview_steps=2", "precision=float32",
        "lr_warmup_images=0", "class_conditional=false", "label_dropout=0",
    ]  # fmt: skip
    options = [
        "--data", folder / "train.npz", "--reference", folder / "test.npz", "--out", folder / "study",
        "--features", onnx_means(folder / "means.onnx", ("n", 1, "h", "w")), "--cache", folder / "cache",
        "--widths", "32", "--images", 4, "--points", 1, "--num", 4, "--steps", 2,
        *(part for field in sets for part in ("--set", field)),
    ]  # fmt: skip
    return [*map(str, options)]


def test_another_variance_than_the_presets_can_be_studied(tmp_path: Path) -> None:
    fixed = ["--set", "loss=simple", "--set", "diffusion.variance=fixed_large", "--set", "model.learn_sigma=false"]
    result = CliRunner().invoke(app, ["study", "scaling", "fashion32", *options_of_a_small_study(tmp_path), *fixed])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "study" / "results.json").exists()


def test_derived_fields_of_a_study_are_refused_with_their_source(tmp_path: Path) -> None:
    wrong = ["--set", "model.learn_sigma=false"]
    result = CliRunner().invoke(app, ["study", "scaling", "fashion32", *options_of_a_small_study(tmp_path), *wrong])
    assert result.exit_code == 1
    assert "model.learn_sigma is true here and cannot be set to false" in " ".join(result.output.split())
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("option", [["--nll-extra-steps"], ["--nll-steps", "5"]])
def test_options_of_bits_per_dim_without_images_for_it_are_refused(tmp_path: Path, option: list[str]) -> None:
    arguments = [f"--{name}={tmp_path / name}" for name in ("data", "reference", "features", "out")]
    result = CliRunner().invoke(app, ["study", "scaling", "fashion32", *arguments, "--images", "8", *option])
    assert result.exit_code == 1
    assert f"{option[0]} needs --nll-images of at least 1" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
