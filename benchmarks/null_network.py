"""A network that computes nothing, at once or in a given time, for benchmarks of the surrounding code."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion.config import CheckpointConfig, DiffusionConfig, ModelConfig
from diffusion.network_inputs import NetworkInputs
from formats.precision import Precision
from service.backends.base import DenoiserDefaults, FailureKind, GuidingClassifier, synchronous_failure_kind
from service.backends.pending import Later, Pending


class NullDenoiser(DenoiserDefaults[Any]):
    """Predicts no noise, at once or after sleeping for the time of a call."""

    def __init__(self, image_size: int, max_rows: int, call_s: Mapping[int, float] | None = None) -> None:
        """Describe an unconditional network of RGB images.

        Args:
            image_size: height and width.
            max_rows: the batch size for which it is compiled if `call_s` is None.
            call_s: seconds of a call by batch size; None: a call takes no time.
        """
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
        self.precision: Precision = "fp32"
        self.description = "nothing"
        self._call_s = {max_rows: 0.0} if call_s is None else dict(call_s)
        self.batch_sizes: tuple[int, ...] | None = tuple(sorted(self._call_s))
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
        return self.begin(inputs).wait()

    def begin(self, inputs: NetworkInputs[Any]) -> Pending[Any]:
        """Start the time of a call."""
        end = time.perf_counter() + self._call_s[len(inputs.x_t)]
        return Later(lambda: self._predict_at(end, inputs))

    def _predict_at(self, end: float, inputs: NetworkInputs[Any]) -> Any:
        if (left := end - time.perf_counter()) > 0:
            time.sleep(left)
        rows, _, *size = inputs.x_t.shape
        return np.zeros((rows, self.config.model.out_channels, *size), dtype=np.float32)
