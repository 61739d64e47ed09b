"""`diffusion.noise` on tensors: the same words on every device, and normals that agree to 1e-6."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffusion.noise import ELEMENTS_PER_BLOCK, MAX_SEED, MAX_WORD, check_range, philox


def normal(
    seeds: Tensor,
    image_indices: Tensor,
    steps: Tensor,
    stream: int,
    shape: tuple[int, int, int],
) -> Tensor:
    """Return standard normals for a batch of images; a row depends on its own numbers only.

    Nothing here waits for the device, so it may be captured into a CUDA graph. For the same reason ranges are
    checked on the CPU only; numbers that live on another device are checked by whoever puts them there.

    Args:
        seeds: int64 [B], 0..2^53-1.
        image_indices: int64 [B], 0..2^32-1: which image of its request.
        steps: int64 [B], 0..2^32-1: see the streams of `diffusion.noise`.
        stream: `STREAM_X_T` or `STREAM_STEP`.
        shape: (C, H, W).

    Returns:
        float32 [B, C, H, W] on the device of seeds.

    Raises:
        ValueError: a number out of its range, on the CPU; a tensor of another type than int64.
    """
    for name, values, limit in (
        ("seeds", seeds, MAX_SEED),
        ("image_indices", image_indices, MAX_WORD),
        ("steps", steps, MAX_WORD),
    ):
        if values.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, whose products wrap where they should; got {values.dtype}")
        if values.device.type == "cpu" and len(values):
            check_range(name, int(values.min()), int(values.max()), limit)

    elements = math.prod(shape)
    blocks = torch.arange(-(-elements // ELEMENTS_PER_BLOCK), dtype=torch.int64, device=seeds.device)[None]
    seeds = seeds[:, None]
    streams = torch.full((1, 1), stream, dtype=torch.int64, device=seeds.device)
    counter = (blocks, steps[:, None], image_indices[:, None], streams)
    words = philox(counter, (seeds & MAX_WORD, seeds >> 32))

    normals: list[Tensor] = []
    for first in (0, 2):
        radius = torch.sqrt(-2.0 * torch.log((words[first].double() + 0.5) * 2.0**-32))
        angle = (words[first + 1].double() + 0.5) * (2.0**-32 * 2.0 * math.pi)
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    flat = torch.stack(normals, dim=2).float().flatten(1)  # [B, 4 blocks]
    return flat[:, :elements].reshape(-1, *shape)
