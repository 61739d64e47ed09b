"""Sample entire batches from the first step to the last, for servers that batch requests or run one at a time.

Plan, update, noise, network and batch sizes are the service's own, so pixels are equal too: only the serving
differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.peers.file_lock import FileLock
from benchmarks.peers.meter import metered_network
from diffusion.network_inputs import NetworkInputs
from diffusion.noise import STREAM_STEP, STREAM_X_T, normal
from diffusion.plans import SamplingPlan, build_plan
from diffusion.update import sample_loop, to_uint8
from service.backends.artifact_model import FloatArray
from service.backends.base import BackendOptions
from service.backends.batch_sizes import padded as padded_size

Turns = Literal["batch", "call"]
"""Unit of turns of concurrent batches: a `batch` keeps the device from its first step to its last; with `call`
they alternate."""
Uint8Array = npt.NDArray[np.uint8]


class Sampler(Protocol):
    """Samples image `image_indices[k]` of seed `seeds[k]` and class `labels[k]`, all in one batch."""

    def __call__(
        self, steps: int, seeds: Sequence[int], image_indices: Sequence[int], labels: Sequence[int]
    ) -> Uint8Array:
        """Return uint8 [N, H, W, C]."""
        ...


class HostArray(np.ndarray[Any, Any]):
    """An array with a `device` attribute, as in numpy 2: Triton's python backend works with numpy 1 only."""

    device = "cpu"


def integers(values: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return numbers as the int64 arrays of the sampling core."""
    return np.asarray(values, dtype=np.int64).view(HostArray)


class RequestSampler:
    """Samples a batch (ancestral, without guidance), padded to the next compiled size. For one thread."""

    def __init__(
        self,
        folder: Path,
        meter: Path,
        *,
        width: int,
        threads: int,
        turns: Turns,
        device_ms: tuple[float, float] | None = None,
    ) -> None:
        options = BackendOptions(max_rows=width, threads=threads, device="cpu")
        self._network = metered_network(folder, options, meter, device_ms)
        self.config = self._network.config
        self._sizes = options.sizes_to_compile
        self._turns = FileLock(meter.with_suffix(".batch")) if turns == "batch" else None
        self._embedded = cache(self._embed)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        model = self.config.model
        return model.image_shape

    def __call__(
        self, steps: int, seeds: Sequence[int], image_indices: Sequence[int], labels: Sequence[int]
    ) -> Uint8Array:
        """Sample at most `width` images."""
        plan, embedded = self._embedded(steps)
        self._network.used_rows = count = len(seeds)
        size = padded_size(count, self._sizes)
        padded = [*range(count), *[0] * (size - count)]
        y, seed, image_index = integers(labels)[padded], integers(seeds), integers(image_indices)
        lines = iter(embedded)

        def noise(step: int, stream: int) -> FloatArray:
            return normal(seed, image_index, np.full_like(seed, step), stream, self.shape).view(HostArray)

        def network(x_t: FloatArray, _: FloatArray) -> FloatArray:
            emb_t = np.broadcast_to(next(lines), (size, embedded.shape[1]))
            return self._network(NetworkInputs(x_t[padded], emb_t, y))[:count]

        with self._turns.held() if self._turns else nullcontext():
            x = sample_loop(network, plan, noise(0, STREAM_X_T), lambda step: noise(step, STREAM_STEP))
        return to_uint8(x)

    def _embed(self, steps: int) -> tuple[SamplingPlan, FloatArray]:
        plan = build_plan(self.config.diffusion, "ancestral", str(steps))
        return plan, self._network.embed_timesteps(plan.column("t_model"))
