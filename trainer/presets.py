"""Named training configurations: one function each, selected on the command line by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from diffusion.config import ModelConfig, SamplingDefaults
from trainer.config import TrainConfig
from trainer.data.options import DataConfig


def fashion32() -> TrainConfig:
    """Fashion-MNIST padded to 32x32 (or any small grey set): 1.9 M parameters, an hour or two on two CPU cores."""
    return TrainConfig(
        model=ModelConfig(
            image_size=32,
            image_channels=1,
            model_channels=32,
            channel_mult=(1, 2, 3),
            num_res_blocks=1,
            attention_resolutions=(8,),
            norm_groups=8,  # 32 over 32 channels would hide an image's grey level (docs/experiments.md)
        ),
        timestep_sampler="stratified",
        total_images=200_000,
        batch_size=64,
        lr=1e-3,
        lr_warmup_images=20_000,
        lr_schedule="cosine",
        grad_clip=1.0,
        data=DataConfig(small_images="frame"),
        sampling=SamplingDefaults(cfg_scale=2.0),
        checkpoint_every_images=20_000,
    )


def cifar10() -> TrainConfig:
    """CIFAR-10 as in the paper's appendix A and F: L_hybrid, cosine, dropout 0.3, 500K iterations, no labels."""
    return TrainConfig(
        model=ModelConfig(image_size=32, model_channels=128, channel_mult=(1, 2, 2, 2), num_res_blocks=3, dropout=0.3),
        class_conditional=False,
        label_dropout=0.0,
        total_images=500_000 * 128,
    )


def imagenet64(model_channels: int = 128) -> TrainConfig:
    """ImageNet 64x64 as in the paper's appendix A, no labels; learning rate scaled by 1 / sqrt(C / 128) (section 5)."""
    return TrainConfig(
        model=ModelConfig(image_size=64, model_channels=model_channels, channel_mult=(1, 2, 3, 4), num_res_blocks=3),
        class_conditional=False,
        label_dropout=0.0,
        total_images=1_500_000 * 128,
        lr=1e-4 / math.sqrt(model_channels / 128),
        data=DataConfig(small_images="enlarge"),
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "fashion32": fashion32,
    "cifar10": cifar10,
    "imagenet64": imagenet64,
    "imagenet64-64": partial(imagenet64, 64),
    "imagenet64-96": partial(imagenet64, 96),
    "imagenet64-128": partial(imagenet64, 128),
    "imagenet64-192": partial(imagenet64, 192),
}


def preset(name: str) -> TrainConfig:
    """Return a preset by name.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; allowed: {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()
