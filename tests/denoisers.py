"""Denoisers for tests: exact arithmetic on either kind of array, and backends that misbehave.

No torch is imported here: tests/unit/test_without_torch.py uses them in a process without it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diffusion.arrays import namespace
from diffusion.config import CheckpointConfig, ClassifierCheckpointConfig
from diffusion.network_inputs import NetworkInputs
from formats.precision import Precision
from service.backends.base import Denoiser, DenoiserDefaults, FailureKind, GuidingClassifier, synchronous_failure_kind
from service.backends.pending import Later, Pending


class ExactDenoiser(DenoiserDefaults[Any]):
    """A network of sums, products and bounds that are exact in every library and at every batch size.

    It mixes neighbouring pixels and depends on timestep and label, so that a wrong row changes the result.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        xp: Any = np,
        batch_sizes: tuple[int, ...] | None = None,
        classifier: GuidingClassifier[Any] | None = None,
    ) -> None:
        self.config = config
        self.network_id = "exact"
        self.description = "exact arithmetic"
        self.precision: Precision = "fp32"
        self.classifier = classifier
        self.batch_sizes = batch_sizes
        self.threads = 1
        self.xp = xp
        self.device = "cpu"
        self.calls: list[int] = []

    def embed_timesteps(self, t_model: Any) -> Any:
        channels = namespace(t_model).arange(self.config.model.emb_channels, dtype=t_model.dtype)
        return t_model[:, None] / 1024 + channels[None]

    def failure_kind(self, error: Exception) -> FailureKind:
        return synchronous_failure_kind(error)

    def __call__(self, inputs: NetworkInputs[Any]) -> Any:
        x_t, emb_t, y = inputs.x_t, inputs.emb_t, inputs.y
        self.calls.append(len(x_t))
        xp = namespace(x_t)
        shift = xp.reshape(emb_t[:, 1], (-1, 1, 1, 1))
        if y is not None:
            shift = shift + xp.reshape(xp.astype(y, xp.float32), (-1, 1, 1, 1)) / 8
        mixed = x_t * 0.75 + xp.roll(x_t, 1, axis=3) * 0.5 - xp.roll(x_t, 1, axis=2) * shift
        if inputs.cond is not None:
            mixed = mixed + inputs.cond[:, :1] * 0.5
        out = xp.minimum(xp.maximum(mixed, xp.full_like(mixed, -4)), xp.full_like(mixed, 4))
        return xp.concat([out, 0.25 * out * shift], axis=1)[:, : self.config.model.out_channels]


class AsynchronousDenoiser(ExactDenoiser):
    """A network that computes when it is waited for, and reads its inputs until then."""

    def begin(self, inputs: NetworkInputs[Any]) -> Pending[Any]:
        given = [None if array is None else array.copy() for array in inputs]

        def end() -> Any:
            for before, array in zip(given, inputs, strict=True):
                np.testing.assert_array_equal(before, array)
            return self(inputs)

        return Later(end)


class ExactClassifier:
    """A classifier whose gradient is exact arithmetic too, and depends on image, timestep and label."""

    def __init__(
        self, config: ClassifierCheckpointConfig, xp: Any = np, batch_sizes: tuple[int, ...] | None = None
    ) -> None:
        self.config = config
        self.description = "exact classifier"
        self.batch_sizes = batch_sizes
        self.xp = xp
        self.device = "cpu"
        self.calls: list[int] = []

    def embed_timesteps(self, t_model: Any) -> Any:
        channels = namespace(t_model).arange(self.config.model.emb_channels, dtype=t_model.dtype)
        return t_model[:, None] / 512 + channels[None]

    def __call__(self, inputs: NetworkInputs[Any]) -> Any:
        x_t, emb_t, y = inputs.x_t, inputs.emb_t, inputs.y
        self.calls.append(len(x_t))
        xp = namespace(x_t)
        shift = xp.reshape(emb_t[:, 2] + xp.astype(y, xp.float32) / 4, (-1, 1, 1, 1))
        pulled = xp.roll(x_t, 1, axis=2) * 0.5 - x_t * shift
        return xp.minimum(xp.maximum(pulled, xp.full_like(pulled, -2)), xp.full_like(pulled, 2))


class BatchDependent(DenoiserDefaults[Any]):
    """A denoiser whose rows change a little at some batch sizes, as with badly chosen kernels."""

    def __init__(
        self, honest: Denoiser[Any], dependent_sizes: set[int], batch_sizes: tuple[int, ...] | None = None
    ) -> None:
        self.config = honest.config
        self.network_id = honest.network_id
        self.precision: Precision = honest.precision
        self.description = "batch dependent"
        self.classifier = honest.classifier
        self.batch_sizes = batch_sizes
        self.threads = honest.threads
        self.xp = honest.xp
        self.device = honest.device
        self._honest = honest
        self._dependent_sizes = dependent_sizes

    def embed_timesteps(self, t_model: Any) -> Any:
        return self._honest.embed_timesteps(t_model)

    def failure_kind(self, error: Exception) -> FailureKind:
        return self._honest.failure_kind(error)

    def __call__(self, inputs: NetworkInputs[Any]) -> Any:
        out = self._honest(inputs)
        return out * (1 + 1e-6) if len(out) in self._dependent_sizes else out


class PlaceDependent(BatchDependent):
    """A denoiser whose last row changes a little at some batch sizes."""

    def __call__(self, inputs: NetworkInputs[Any]) -> Any:
        out = self._honest(inputs)
        if len(out) in self._dependent_sizes:
            out[len(out) - 1] *= 1 + 1e-6
        return out


class AsNetwork:
    """A denoiser with the members of a UNet, for the one-image sampler."""

    def __init__(self, denoiser: Denoiser[Any]) -> None:
        self.config = denoiser.config.model
        self.embed_timesteps = denoiser.embed_timesteps
        self._denoiser = denoiser

    def run(self, inputs: NetworkInputs[Any], /) -> Any:
        return self._denoiser(inputs)
