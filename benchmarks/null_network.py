"""A network that computes nothing, for benchmarks of the surrounding code."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffusion.config import CheckpointConfig, DiffusionConfig, ModelConfig
from diffusion.network_inputs import NetworkInputs
from service.backends.base import DenoiserDefaults, FailureKind, GuidingClassifier, synchronous_failure_kind


class NullDenoiser(DenoiserDefaults[Any]):
    """Predicts no noise, at once."""

    def __init__(self, image_size: int, max_rows: int) -> None:
        """Describe an unconditional network of RGB images, compiled for one batch size."""
        self.config = CheckpointConfig(
            model=ModelConfig(
                image_size=image_size,
                image_channels=3,
                model_channels=32,
                channel_mult=(1,),
                num_res_blocks=1,
                attention_resolutions=(),
                num_heads=1,
                num_classes=None,
                null_class=False,
            ),
            diffusion=DiffusionConfig(num_timesteps=1000),
        )
        self.network_id = "null"
        self.description = "nothing"
        self.batch_sizes: tuple[int, ...] | None = (max_rows,)
        self.threads = 1
        self.xp: Any = np
        self.device: Any = "cpu"
        self.classifier: GuidingClassifier[Any] | None = None

    def embed_timesteps(self, t_model: Any) -> Any:
        """Not used."""
        return np.zeros((len(t_model), self.config.model.emb_channels), dtype=np.float32)

    def failure_kind(self, error: Exception) -> FailureKind:
        """Classify an exception; this network raises none."""
        return synchronous_failure_kind(error)

    def __call__(self, inputs: NetworkInputs[Any]) -> Any:
        """Predict no noise."""
        rows, _, *size = inputs.x_t.shape
        return np.zeros((rows, self.config.model.out_channels, *size), dtype=np.float32)
