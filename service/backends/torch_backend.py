"""The `torch` backend: a checkpoint's UNet in eager PyTorch, float32."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from diffusion.checkpoint import CheckpointError, checkpoint_sha256, load_unet
from service.errors import ModelError

NOT_CHOSEN_BY = frozenset({"cpu_name", "num_sockets", "num_physical_cores", "num_logical_cores"})


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
        self.description = f"torch {torch.__version__} cpu {torch.backends.cpu.get_cpu_capability()} float32"
        depends_on = [model_hash, self.description, json.dumps(_processor(), sort_keys=True)]
        self.numerics_id = hashlib.sha256("\n".join(depends_on).encode()).hexdigest()[:16]

    @torch.inference_mode()
    def embed_timesteps(self, t_model: Tensor) -> Tensor:
        """Run the time MLP."""
        return self._network.embed_timesteps(t_model)

    @torch.inference_mode()
    def __call__(self, x_t: Tensor, emb_t: Tensor, y: Tensor | None) -> Tensor:
        """Run the UNet."""
        return self._network.forward_emb(x_t, emb_t, y)


def _processor() -> dict[str, object]:
    """Return what kernels are chosen by: instruction sets and cache sizes, not names or numbers of cores."""
    return {name: value for name, value in torch.cpu.get_capabilities().items() if name not in NOT_CHOSEN_BY}
