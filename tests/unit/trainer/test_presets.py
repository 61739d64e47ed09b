"""Presets: the networks of the two papers, by parameter count, weight names and hyper-parameters."""

from __future__ import annotations

import gzip
import json
import re
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from cli.main import app
from cli.train_command import parse_assignments
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
    **{f"guided-lsun-{name}": f"adm-lsun-{name}" for name in ("bedroom", "cat", "horse")},
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
    schedule = config.diffusion.noise_schedule
    if name == "guided-classifier-64":  # its flags leave the schedule, which no network reads, at the default
        schedule = "linear"
    assert config.diffusion.replace(noise_schedule=schedule) == published.config.diffusion
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


class Training(NamedTuple):
    """How a preset trains."""

    batch_size: int
    steps: int
    lr: float
    dropout: float = 0.0
    weight_decay: float = 0.0
    label_dropout: float = 0.0
    flips: bool = False
    crops: bool = False
    lr_schedule: str = "constant"
    timestep_sampler: str = "uniform"
    ema_decay: float = 0.9999


def classifier(batch_size: int, steps: int, lr: float, decay: float) -> Training:
    return Training(
        batch_size, steps, lr, weight_decay=decay, flips=True, crops=True, lr_schedule="linear", ema_decay=0.0
    )


A = "IDDPM, appendix A: batch 128, lr 1e-4, EMA 0.9999, dropout of CIFAR-10 0.1 (linear), 0.3 (cosine); "
FLAGS = "README of openai/improved-diffusion, flags of the published file"
ADM = "README and scripts of openai/guided-diffusion (flips, no decay), a summary of ADM's tables 11 to 13"
UNCONFIRMED = "docs/training.md: not confirmed"
SOURCES: dict[str, tuple[Training, str]] = {
    **{
        f"cifar10-{line}": (Training(128, 500_000, 1e-4, 0.1 if "linear" in line else 0.3, timestep_sampler=sampler),
                            f"{A}table 2")
        for line, sampler in (
            ("linear-1000-simple", "uniform"), ("linear-4000-simple", "uniform"), ("linear-4000-hybrid", "uniform"),
            ("cosine-4000-simple", "uniform"), ("cosine-4000-hybrid", "uniform"),
            ("cosine-4000-vlb", "loss_second_moment"),
        )
    },
    **{
        f"imagenet64-{line}": (Training(128, 200_000, 1e-4, timestep_sampler=sampler), f"{A}table 1")
        for line, sampler in (
            ("linear-1000-simple", "uniform"), ("linear-4000-simple", "uniform"), ("linear-4000-hybrid", "uniform"),
            ("cosine-4000-simple", "uniform"), ("cosine-4000-hybrid", "uniform"),
            ("cosine-4000-vlb", "loss_second_moment"),
        )
    },
    "cifar10": (Training(128, 500_000, 1e-4, 0.3), FLAGS),
    "imagenet64": (Training(128, 1_500_000, 1e-4), f"{FLAGS}; table 1"),
    "imagenet64-vlb": (Training(128, 1_500_000, 1e-4, timestep_sampler="loss_second_moment"), f"{FLAGS}; table 1"),
    **{
        f"imagenet64-{channels}": (
            Training(128, 1_500_000, 1e-4 / (channels / 128) ** 0.5),
            f"IDDPM, section 6: lr 1e-4 / sqrt(C / 128); batches: {UNCONFIRMED}",
        )
        for channels in (64, 96, 128, 192)
    },
    "imagenet64-cond-128": (Training(128, 1_700_000, 1e-4), f"IDDPM, section 5: 1.7M batches; size, lr: {UNCONFIRMED}"),
    "imagenet64-cond-192": (Training(2048, 250_000, 3e-4), FLAGS),
    "imagenet256-upsampler": (Training(256, 500_000, 3e-4), FLAGS),
    "lsun256": (Training(128, 1_200_000, 1e-4), f"IDDPM, appendix B: 153.6M images; {FLAGS}"),
    "lsun256-low-rate": (Training(64, 2_400_000, 2e-5), "IDDPM, appendix B, and the file's name; the README has 128"),
    "guided-64": (Training(2048, 540_000, 3e-4, 0.1, flips=True), ADM),
    "guided-128": (Training(256, 4_360_000, 1e-4, flips=True), ADM),
    "guided-256": (Training(256, 1_980_000, 1e-4, flips=True), ADM),
    "guided-256-uncond": (Training(256, 1_980_000, 1e-4, flips=True), f"as guided-256: {UNCONFIRMED}"),
    "guided-512": (Training(256, 1_940_000, 1e-4, flips=True), ADM),
    "guided-upsampler-64-256": (Training(256, 500_000, 1e-4, flips=True), f"{ADM}; batch, lr: {UNCONFIRMED}"),
    "guided-upsampler-128-512": (Training(256, 1_050_000, 1e-4, flips=True), f"{ADM}; batch, lr: {UNCONFIRMED}"),
    **{
        f"guided-lsun-{name}": (Training(256, steps, 1e-4, 0.1, flips=True), f"{ADM}: 200K-500K; which: {UNCONFIRMED}")
        for name, steps in (("bedroom", 500_000), ("cat", 200_000), ("horse", 250_000))
    },
    "guided-classifier-64": (classifier(1024, 300_000, 6e-4, 0.2), UNCONFIRMED),
    "guided-classifier-128": (classifier(256, 300_000, 3e-4, 0.05), "README of openai/guided-diffusion, TRAIN_FLAGS"),
    "guided-classifier-256": (classifier(256, 500_000, 3e-4, 0.05), f"{ADM}: 500K; the rest: {UNCONFIRMED}"),
    "guided-classifier-512": (classifier(256, 500_000, 3e-4, 0.05), f"{ADM}: 500K; the rest: {UNCONFIRMED}"),
}  # fmt: skip
"""How each preset of the two papers trains, and where the values are from."""


def test_every_preset_of_the_papers_has_a_source() -> None:
    assert SOURCES.keys() == PRESETS.keys() - {"fashion32"}


@pytest.mark.parametrize("name", SOURCES)
def test_a_preset_trains_with_the_values_of_its_source(name: str) -> None:
    config, (training, source) = preset(name), SOURCES[name]
    assert config.total_images % config.batch_size == 0
    found = Training(
        config.batch_size, config.total_images // config.batch_size, config.lr, config.model.dropout,
        config.weight_decay, config.label_dropout, config.horizontal_flip, config.data.random_crop, config.lr_schedule,
        config.timestep_sampler, *config.ema_decay,
    )  # fmt: skip
    assert found == training, source
    assert (config.lr_warmup_images, config.grad_clip, config.min_snr_gamma) == (0, None, None)


def test_the_lines_of_tables_1_and_2_have_their_schedule_chain_and_loss() -> None:
    for name in SOURCES:
        if name.count("-") == 3 and not name.startswith("guided"):
            _, schedule, steps, loss = name.split("-")
            config = preset(name)
            assert (config.diffusion.noise_schedule, config.diffusion.num_timesteps) == (schedule, int(steps))
            assert (config.loss, config.diffusion.learns_variance) == (loss, loss != "simple")
    assert preset("cifar10") == preset("cifar10-cosine-4000-hybrid")
    assert preset("imagenet64") == preset("imagenet64-128")


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_a_classifier_is_trained_on_the_noise_of_the_model_that_it_guides(size: int) -> None:
    """ADM, section 4.3: on the noising distribution of the diffusion model; that of 64x64 is the cosine schedule."""
    trained, guided = preset(f"guided-classifier-{size}"), preset(f"guided-{size}")
    for field in ("noise_schedule", "num_timesteps", "rescale_timesteps"):
        assert getattr(trained.diffusion, field) == getattr(guided.diffusion, field)
    assert (trained.loss, trained.class_conditional) == ("cross_entropy", True)


def test_the_command_line_lists_the_presets() -> None:
    result = CliRunner().invoke(app, ["train", "--list"])
    assert result.exit_code == 0
    for name in PRESETS:
        assert f"{name} " in result.output


@pytest.mark.parametrize(
    ("name", "changes", "cure"),
    [
        ("fashion32", {"model.image_size": 64}, "16"),
        ("fashion32", {"model.image_size": [64, 32]}, "16"),
        ("fashion32", {"model.channel_mult": [1, 2]}, "16"),
        ("guided-64", {"model.image_size": 128}, "64,32,16"),
    ],
)
def test_a_size_without_the_levels_that_have_attention_is_refused_with_a_cure(
    name: str, changes: dict[str, Any], cure: str
) -> None:
    base = preset(name)
    with pytest.raises(ValueError, match=rf"add --set model\.attention_resolutions={cure} for") as caught:
        base.with_overrides(changes)
    (setting,) = re.findall(r"--set (\S+)", str(caught.value))
    changed = base.with_overrides({**changes, **parse_assignments([setting])})
    depths = [
        [config.model.level_sizes.index(size) for size in config.model.attention_resolutions]
        for config in (base, changed)
    ]
    assert depths[0] == depths[1] or "model.channel_mult" in changes


def test_a_size_with_all_levels_that_have_attention_needs_no_setting() -> None:
    changed = preset("cifar10").with_overrides({"model.image_size": 64})
    assert changed.model.attention_resolutions == (16, 8)
