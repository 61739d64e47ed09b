"""Sample images one at a time in this process: the reference that the service's engine must equal pixel by pixel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffusion.guidance import classifier_free
from diffusion.noise import STREAM_STEP, STREAM_X_T
from diffusion.noise_torch import normal
from diffusion.plans import SamplingPlan
from diffusion.unet import UNet
from diffusion.update import Network, Step, sample_loop, to_uint8


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """What determines one image, besides the network and the plan."""

    seed: int
    """0..2^53-1."""
    image_index: int = 0
    """Which image of the seed."""
    class_index: int | None = None
    """Label; None for an unconditional model (or, where there is a null class, for no label)."""
    cfg_scale: float = 1.0
    """Classifier-free guidance; 1 = off."""


def sample_images(
    network: UNet, plan: SamplingPlan, specs: list[ImageSpec], on_step: Callable[[int, Step], None] | None = None
) -> npt.NDArray[np.uint8]:
    """Sample images that share a plan in one batch; a single spec gives the reference pixels for that image.

    Equal to the service's pixels wherever the network gives a row of a batch the same bits at every size of two or
    more, which the service checks at start-up and this does not.

    Args:
        network: in eval mode.
        plan: the chain.
        specs: at least one.
        on_step: told the index of each step and what it gave.

    Returns:
        uint8 [N, H, W, C].
    """
    count = len(specs)
    if count == 1:
        specs = specs * 2  # a CPU's convolutions may round a lone row differently; its pixels are those in company
    config = network.config
    shape = (config.image_channels, config.image_size, config.image_size)
    seeds = torch.tensor([spec.seed for spec in specs])
    indices = torch.tensor([spec.image_index for spec in specs])

    def noise(step: int, stream: int) -> Tensor:
        return normal(seeds, indices, torch.full_like(seeds, step), stream, shape)

    x = sample_loop(
        guided_network(network, specs),
        plan,
        noise(0, STREAM_X_T),
        lambda step: noise(step, STREAM_STEP),
        on_step=on_step,
    )
    return to_uint8(x)[:count]


def guided_network(network: UNet, specs: list[ImageSpec]) -> Network:
    """Close a network over the classes and guidance scales of a batch, for `sample_loop`."""
    config = network.config
    if config.num_classes is None:
        return lambda x_t, t: network(x_t, t)
    y = torch.tensor([config.num_classes if spec.class_index is None else spec.class_index for spec in specs])
    scales = torch.tensor([spec.cfg_scale for spec in specs])
    if bool((scales == 1).all()):
        return lambda x_t, t: network(x_t, t, y)
    null = torch.full_like(y, config.num_classes)

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = network(x_t, t, y), network(x_t, t, null)
        return classifier_free(unconditional, conditional, scales, config.image_channels)

    return guided
