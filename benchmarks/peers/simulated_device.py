"""A device that takes a given time for a network call and computes nothing, to measure only the server."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.network_inputs import NetworkInputs
from formats.precision import Precision
from service.backends.artifact_model import FloatArray, open_artifact
from service.backends.base import (
    BackendOptions,
    DenoiserDefaults,
    FailureKind,
    GuidingClassifier,
    synchronous_failure_kind,
)


class SimulatedDevice(DenoiserDefaults[Any]):
    """Implements `Denoiser` for the model of an artifact; predicts a fixed fraction of x_t as noise."""

    xp: Any = np
    device: Any = "cpu"

    def __init__(self, folder: Path, options: BackendOptions, fixed_ms: float, row_ms: float) -> None:
        """Describe a device on which a call of n rows takes `fixed_ms + row_ms * n`."""
        self.config = open_artifact(folder, "openvino").config
        self.network_id = "simulated"
        self.precision: Precision = "fp32"
        self.description = f"simulated, {fixed_ms:g} + {row_ms:g} n ms"
        self.batch_sizes: tuple[int, ...] | None = options.sizes_to_compile
        self.threads = 1
        self.classifier: GuidingClassifier[Any] | None = None
        self.costs = {rows: (fixed_ms + row_ms * rows) / 1000 for rows in options.sizes_to_compile}
        """Seconds of a call by rows."""

    def embed_timesteps(self, t_model: FloatArray) -> FloatArray:
        """Not used."""
        return np.zeros((len(t_model), self.config.model.emb_channels), dtype=np.float32)

    def failure_kind(self, error: Exception) -> FailureKind:
        """Classify an exception; this network raises none."""
        return synchronous_failure_kind(error)

    def __call__(self, inputs: NetworkInputs[Any]) -> FloatArray:
        """Sleep for the time of a call."""
        return self.begin(inputs).wait()

    def begin(self, inputs: NetworkInputs[Any]) -> SimulatedCall:
        """Start the time of a call."""
        rows, _, *size = inputs.x_t.shape
        return SimulatedCall(self.costs[rows], (rows, self.config.model.out_channels, *size))


class SimulatedCall:
    """A call that ends at a given time."""

    def __init__(self, seconds: float, shape: tuple[int, ...]) -> None:
        self.seconds = seconds
        self._end = time.perf_counter() + seconds
        self._shape = shape

    def wait(self) -> FloatArray:
        """Sleep until the call ends."""
        time.sleep(max(0.0, self._end - time.perf_counter()))
        return np.full(self._shape, 0.25, dtype=np.float32)
