"""The `torch` backend: a checkpoint's UNet in eager PyTorch, float32."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from diffusion.checkpoint import CheckpointError, checkpoint_sha256, load_unet
from service.errors import ModelError


class TorchBackend:
    """Implements `Denoiser` on the CPU."""

    def __init__(self, folder: Path) -> None:
        try:
            self.config, self._network = load_unet(folder)
            model_hash = checkpoint_sha256(folder)
        except CheckpointError as error:
            raise ModelError(str(error)) from error
        if self.config.model.low_res_size is not None:
            raise ModelError(f"{folder} holds a super-resolution model, which this service cannot serve yet")
        capability = torch.backends.cpu.get_cpu_capability()
        self.description = f"torch {torch.__version__} cpu {capability} float32"
        self.numerics_id = hashlib.sha256(f"{model_hash}\n{self.description}".encode()).hexdigest()[:16]

    @torch.inference_mode()
    def embed_timesteps(self, t_model: Tensor) -> Tensor:
        """Run the time MLP."""
        return self._network.embed_timesteps(t_model)

    @torch.inference_mode()
    def __call__(self, x_t: Tensor, emb_t: Tensor, y: Tensor | None) -> Tensor:
        """Run the UNet."""
        return self._network.forward_emb(x_t, emb_t, y)
