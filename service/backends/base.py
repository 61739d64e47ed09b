"""What a runner asks of a backend: one network call on a batch of rows, and what the numbers depend on."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from diffusion.config import CheckpointConfig


class Denoiser(Protocol):
    """A network, ready to run. Implementations hold weights and nothing about requests."""

    config: CheckpointConfig
    numerics_id: str
    """Names everything the pixels depend on besides the request: model, backend, precision, versions, machine."""
    description: str
    """Backend, device and precision, for people."""

    def embed_timesteps(self, t_model: Tensor) -> Tensor:
        """Return emb_t, float32 [n, emb_channels], for what the network is told of n timesteps, float32 [n]."""
        ...

    def __call__(self, x_t: Tensor, emb_t: Tensor, y: Tensor | None) -> Tensor:
        """Run the network on a batch: [n, C, H, W], [n, emb_channels], int64 [n] -> [n, out_channels, H, W]."""
        ...
