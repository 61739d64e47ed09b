"""The same network in diffusers: UNet2DModel and DDPMScheduler in PyTorch and bfloat16, its fastest precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel

from benchmarks.peers.meter import Meter
from benchmarks.peers.request_sampler import Uint8Array


class DiffusersSampler:
    """The loop of docs/diffusers.md without guidance. A torch generator draws the noise, so pixels differ."""

    def __init__(self, folder: Path, meter: Path, *, threads: int) -> None:
        torch.set_num_threads(threads)
        unet: Any = UNet2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16, low_cpu_mem_usage=False)
        self._unet = unet.eval().requires_grad_(False)
        self._scheduler: Any = DDPMScheduler.from_pretrained(folder)
        self._meter = Meter(meter)

    @torch.inference_mode()
    def __call__(
        self, steps: int, seeds: Sequence[int], image_indices: Sequence[int], labels: Sequence[int]
    ) -> Uint8Array:
        """Sample images of one request."""
        generator = torch.Generator().manual_seed(seeds[0])
        y = torch.tensor(list(labels))
        size = self._unet.config.sample_size
        x = torch.randn((len(y), self._unet.config.in_channels, size, size), generator=generator)
        self._scheduler.set_timesteps(steps)
        for t in self._scheduler.timesteps:
            with self._meter.call(len(y), len(y)):
                out = self._unet(x.to(self._unet.dtype), t, class_labels=y).sample.float()
            x = self._scheduler.step(out, t, x, generator=generator).prev_sample
        pixels: Uint8Array = ((x.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        return pixels
