"""Presets: the networks of the two papers, by parameter count, weight names and hyper-parameters."""

from __future__ import annotations

import gzip
import json
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from cli.main import app
from diffusion.config import ModelConfig
from interchange.published import PUBLISHED
from tests.golden import GOLDEN_DIR
from trainer.config import TrainConfig
from trainer.objective import objective_of
from trainer.presets import PRESETS, describe, preset

FILES = {
    "imagenet64": "imagenet64-uncond-100m",
    "imagenet64-vlb": "imagenet64-uncond-vlb-100m",
    "cifar10": "cifar10-uncond-50m",
    "cifar10-cosine-4000-vlb": "cifar10-uncond-vlb-50m",
    "imagenet64-cond-192": "imagenet64-cond-270m",
    "imagenet256-upsampler": "imagenet-upsampler-64-256",
    "lsun256": "lsun-bedroom-256-1200k",
    "guided-64": "adm-imagenet64",
    "guided-128": "adm-imagenet128",
    "guided-256": "adm-imagenet256",
    "guided-256-uncond": "adm-imagenet256-uncond",
    "guided-512": "adm-imagenet512",
    "guided-upsampler-64-256": "adm-upsampler-64-256",
    "guided-upsampler-128-512": "adm-upsampler-128-512",
    **{f"guided-classifier-{size}": f"adm-classifier-{size}" for size in (64, 128, 256, 512)},
}
"""The published file that a preset trains, by the name of its preset for import."""


@cache
def manifests() -> dict[str, Any]:
    with gzip.open(GOLDEN_DIR / "ckpt_manifests.json.gz", "rt", encoding="utf-8") as file:
        return {entry["url"]: entry for entry in json.load(file).values()}


def build(config: TrainConfig) -> nn.Module:
    with torch.device("meta"):
        return objective_of(config, "meta").build()


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", FILES)
def test_a_preset_trains_the_network_of_the_published_file(name: str) -> None:
    published, config = PUBLISHED[FILES[name]], preset(name)
    manifest = manifests()[published.url]
    network = build(config)
    shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    assert shapes == manifest["state_dict"]
    assert parameters(network) == sum(torch.Size(shape).numel() for shape in manifest["state_dict"].values())
    assert config.diffusion == published.config.diffusion
    assert config.model.dropout == published.config.model.dropout


@pytest.mark.parametrize(
    ("name", "millions"),
    [("imagenet64-64", 30), ("imagenet64-96", 68), ("imagenet64-128", 120), ("imagenet64-192", 270),
     ("cifar10-linear-1000-simple", 52.5), ("imagenet64-linear-4000-hybrid", 120), ("imagenet64-cond-128", 120)],
)  # fmt: skip
def test_a_preset_has_the_papers_size(name: str, millions: float) -> None:
    assert abs(parameters(build(preset(name))) / (millions * 1e6) - 1) < 0.02


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_built_and_is_described(name: str) -> None:
    config = preset(name)
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config
    assert f"{config.model.image_size}x{config.model.image_size}" in describe(name)
    if isinstance(config.model, ModelConfig):
        assert config.model.learn_sigma == config.diffusion.learns_variance


def test_tables_1_and_2_are_complete() -> None:
    for data, iterations in (("cifar10", 500_000), ("imagenet64", 200_000)):
        for schedule, steps, loss in (
            ("linear", 1000, "simple"), ("linear", 4000, "simple"), ("linear", 4000, "hybrid"),
            ("cosine", 4000, "simple"), ("cosine", 4000, "hybrid"), ("cosine", 4000, "vlb"),
        ):  # fmt: skip
            config = preset(f"{data}-{schedule}-{steps}-{loss}")
            assert (config.diffusion.noise_schedule, config.diffusion.num_timesteps) == (schedule, steps)
            assert (config.loss, config.total_images) == (loss, iterations * 128)
            assert (config.timestep_sampler == "loss_second_moment") == (loss == "vlb")
            dropout = {"linear": 0.1, "cosine": 0.3}[schedule] if data == "cifar10" else 0.0
            assert (config.model.dropout, config.lr, config.ema_decay) == (dropout, 1e-4, 0.9999)
    assert preset("cifar10") == preset("cifar10-cosine-4000-hybrid")
    assert preset("imagenet64") == preset("imagenet64-128")


def test_the_scaling_presets_scale_the_rate_as_section_6_says() -> None:
    assert preset("imagenet64-64").lr == pytest.approx(1e-4 * 2**0.5)
    assert preset("imagenet64-128").lr == 1e-4


def test_classifiers_are_trained_as_adms() -> None:
    config = preset("guided-classifier-64")
    assert (config.loss, config.lr, config.weight_decay, config.batch_size) == ("cross_entropy", 6e-4, 0.2, 1024)
    assert (config.lr_schedule, config.horizontal_flip, config.class_conditional) == ("linear", True, True)


def test_the_command_line_lists_the_presets() -> None:
    result = CliRunner().invoke(app, ["train", "--list"])
    assert result.exit_code == 0
    for name in PRESETS:
        assert f"{name} " in result.output
