"""Networks with random weights, of kinds that no golden file has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffusion.classifier import Classifier
from diffusion.config import CheckpointConfig, ClassifierConfig, DiffusionConfig, ModelConfig
from diffusion.unet import UNet
from formats.checkpoint import write_checkpoint

RANDOM_MODEL_STEPS = 40


def random_classifier(config: ClassifierConfig) -> Classifier:
    """Build a noisy classifier in which no weight is zero."""
    classifier = Classifier(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in classifier.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return classifier


def write_random_model(folder: Path, seed: int, **fields: Any) -> Path:
    """Write a checkpoint of a tiny UNet in which no weight is zero: 4x4 grey images, classes z, y and x, 40 timesteps.

    Args:
        folder: the checkpoint folder.
        seed: of the weights.
        fields: other fields of the configuration, num_classes of the model, and other fields of it as `model`.
    """
    model = ModelConfig(
        image_size=4, image_channels=1, model_channels=32, channel_mult=(1,), num_res_blocks=1,
        attention_resolutions=(), num_heads=1, num_classes=fields.pop("num_classes", 3), norm_groups=8,
    )  # fmt: skip
    config = CheckpointConfig(
        model=model.replace(**fields.pop("model", {})),
        **{"class_names": ("z", "y", "x"), "diffusion": DiffusionConfig(num_timesteps=RANDOM_MODEL_STEPS), **fields},
    )
    torch.manual_seed(seed)
    network = UNet(config.model)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    write_checkpoint(folder, config, network.state_dict())
    return folder
