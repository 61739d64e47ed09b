"""Named training configurations, selected on the command line by name.

`cifar10-*` and `imagenet64-*` are those of IDDPM (arXiv:2102.09672: appendix A, tables 1 and 2, sections 5 and 6),
`guided-*` those of ADM (arXiv:2105.05233, appendix I), whose networks are the published ones. docs/training.md lists
the values without a confirmed source.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from diffusion.config import CheckpointConfig, ModelConfig, SamplingDefaults, size_text
from interchange.published import PUBLISHED
from trainer.config import TrainConfig
from trainer.data.options import DataConfig

CIFAR10 = ModelConfig(image_size=32, model_channels=128, channel_mult=(1, 2, 2, 2), num_res_blocks=3)
IMAGENET64 = ModelConfig(image_size=64, model_channels=128, channel_mult=(1, 2, 3, 4), num_res_blocks=3)
PHOTOGRAPHS = DataConfig(small_images="enlarge")
NO_LABELS: dict[str, Any] = {"class_conditional": False, "label_dropout": 0.0}


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
        sampling=SamplingDefaults(cfg_scale=1.3),  # 2 costs diversity (docs/experiments.md)
        checkpoint_every_images=20_000,
    )


def ablation(model: ModelConfig, steps: int, objective: str, schedule: str, num_timesteps: int) -> TrainConfig:
    """Return a line of IDDPM's table 1 or 2: `steps` batches of 128 without labels.

    L_simple has fixed variances, the others learn them, L_vlb by importance sampling. Which of the two fixed variances
    is used does not matter in training: choose `diffusion.variance` fixed_small or fixed_large.
    """
    dropout = {"linear": 0.1, "cosine": 0.3}[schedule] if model == CIFAR10 else 0.0
    return TrainConfig.model_validate(
        {
            **NO_LABELS,
            "model": {**model.model_dump(), "dropout": dropout, "learn_sigma": objective != "simple"},
            "diffusion": {
                "num_timesteps": num_timesteps,
                "noise_schedule": schedule,
                "variance": "fixed_large" if objective == "simple" else "learned_range",
                "rescale_timesteps": True,
            },
            "loss": objective,
            "timestep_sampler": "loss_second_moment" if objective == "vlb" else "uniform",
            "total_images": steps * 128,
            "data": DataConfig() if model == CIFAR10 else PHOTOGRAPHS,
        }
    )


def imagenet64(model_channels: int, *, steps: int = 1_500_000) -> TrainConfig:
    """Return a model of IDDPM's section 6: learning rate 1e-4 / sqrt(C / 128), L_hybrid, cosine, no labels."""
    config = ablation(IMAGENET64.replace(model_channels=model_channels), steps, "hybrid", "cosine", 4000)
    return config.replace(lr=1e-4 / math.sqrt(model_channels / 128))


def conditional(model_channels: int, steps: int, **optimisation: Any) -> TrainConfig:
    """Return a class-conditional model of IDDPM's section 5 (table 4)."""
    config = imagenet64(model_channels, steps=steps)
    return config.replace(class_conditional=True, lr=1e-4).replace(**optimisation)


def published(name: str, steps: int, batch_size: int, lr: float, **optimisation: Any) -> TrainConfig:
    """Return the training of a network that OpenAI published: `steps` batches, labels never dropped."""
    described = PUBLISHED[name].config
    is_unet = isinstance(described, CheckpointConfig)
    return TrainConfig.model_validate(
        {
            "model": described.model.model_dump(),
            "diffusion": described.diffusion.model_dump(),
            "loss": "hybrid" if is_unet else "cross_entropy",
            "rescale_vlb": False,
            "class_conditional": described.model.num_classes is not None,
            "label_dropout": 0.0,
            "total_images": steps * batch_size,
            "batch_size": batch_size,
            "lr": lr,
            "data": PHOTOGRAPHS,
            **optimisation,
        }
    )


def guided(name: str, steps: int, batch_size: int = 256, lr: float = 1e-4, **optimisation: Any) -> TrainConfig:
    """Return the training of one of ADM's UNets, with flips."""
    return published(name, steps, batch_size, lr, horizontal_flip=True, **optimisation)


def classifier(
    size: int, steps: int, batch_size: int = 256, lr: float = 3e-4, decay: float = 0.05, **process: Any
) -> TrainConfig:
    """Return the training of one of ADM's noisy classifiers: crops, flips, a rate that falls to zero, no average.

    Args:
        size: of the images.
        steps: batches.
        batch_size: images per batch.
        lr: learning rate at the start.
        decay: weight decay.
        process: fields of the process that the published file's flags leave at their defaults. A classifier is trained
            on the noise of the model that it guides.
    """
    config = guided(
        f"adm-classifier-{size}", steps, batch_size, lr,
        weight_decay=decay, lr_schedule="linear", ema_decay=0.0, preview_per_class=0,
        data=PHOTOGRAPHS.replace(random_crop=True),
    )  # fmt: skip
    return config.replace(diffusion=config.diffusion.replace(**process).model_dump())


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "fashion32": fashion32,
    # IDDPM
    "cifar10": partial(ablation, CIFAR10, 500_000, "hybrid", "cosine", 4000),
    "imagenet64": partial(imagenet64, 128),
    "imagenet64-vlb": partial(ablation, IMAGENET64, 1_500_000, "vlb", "cosine", 4000),
    **{f"imagenet64-{channels}": partial(imagenet64, channels) for channels in (64, 96, 128, 192)},
    **{
        f"{data}-{schedule}-{num_timesteps}-{objective}": partial(
            ablation, model, steps, objective, schedule, num_timesteps
        )
        for data, model, steps in (("cifar10", CIFAR10, 500_000), ("imagenet64", IMAGENET64, 200_000))
        for schedule, num_timesteps, objective in (
            ("linear", 1000, "simple"),
            ("linear", 4000, "simple"),
            ("linear", 4000, "hybrid"),
            ("cosine", 4000, "simple"),
            ("cosine", 4000, "hybrid"),
            ("cosine", 4000, "vlb"),
        )
    },
    "imagenet64-cond-128": partial(conditional, 128, 1_700_000),
    "imagenet64-cond-192": partial(published, "imagenet64-cond-270m", 250_000, 2048, 3e-4),
    "imagenet256-upsampler": partial(published, "imagenet-upsampler-64-256", 500_000, 256, 3e-4),
    "lsun256": partial(published, "lsun-bedroom-256-1200k", 1_200_000, 128, 1e-4),
    "lsun256-low-rate": partial(published, "lsun-bedroom-256-2400k", 2_400_000, 64, 2e-5),
    # ADM
    "guided-64": partial(guided, "adm-imagenet64", 540_000, 2048, 3e-4),
    "guided-128": partial(guided, "adm-imagenet128", 4_360_000),
    "guided-256": partial(guided, "adm-imagenet256", 1_980_000),
    "guided-256-uncond": partial(guided, "adm-imagenet256-uncond", 1_980_000),
    "guided-512": partial(guided, "adm-imagenet512", 1_940_000),
    "guided-upsampler-64-256": partial(guided, "adm-upsampler-64-256", 500_000),
    "guided-upsampler-128-512": partial(guided, "adm-upsampler-128-512", 1_050_000),
    "guided-lsun-bedroom": partial(guided, "adm-lsun-bedroom", 500_000),
    "guided-lsun-cat": partial(guided, "adm-lsun-cat", 200_000),
    "guided-lsun-horse": partial(guided, "adm-lsun-horse", 250_000),
    "guided-classifier-64": partial(classifier, 64, 300_000, 1024, 6e-4, 0.2, noise_schedule="cosine"),
    "guided-classifier-128": partial(classifier, 128, 300_000),
    "guided-classifier-256": partial(classifier, 256, 500_000),
    "guided-classifier-512": partial(classifier, 512, 500_000),
}
"""A function per preset, by name."""


def preset(name: str) -> TrainConfig:
    """Return a preset by name.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; allowed: {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()


def describe(name: str) -> str:
    """Return one line about a preset: data, network, process, loss, length."""
    config = preset(name)
    model, diffusion = config.model, config.diffusion
    size = size_text(model.image_size)
    if isinstance(model, ModelConfig) and model.low_res_size is not None:
        size = f"{size_text(model.low_res_size)} -> {size}"
    return (
        f"{size}, C={model.model_channels}, {'labels' if config.class_conditional else 'no labels'}; "
        f"{diffusion.noise_schedule}, T={diffusion.num_timesteps}, {diffusion.variance}; {config.loss}; "
        f"{config.total_images / 1e6:,.4g} M images, batch {config.batch_size}, lr {config.lr:.2g}"
    )
