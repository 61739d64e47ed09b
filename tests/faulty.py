"""Networks that fail: on some rows, for lack of memory, or once; and runners of them."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import numpy as np
import torch

from diffusion.config import CheckpointConfig
from diffusion.network_inputs import NetworkInputs
from service.backends.base import FailureKind
from service.backends.pending import Later, Pending, Raised
from service.engine.config import EngineConfig
from service.engine.runners.array_runner import ArrayRunner
from tests.denoisers import ExactClassifier, ExactDenoiser
from tests.fakes import tiny_classifier_config, tiny_config
from tests.late_queue import LateQueue

WIDTH = 4
FAULTY_CONFIG = EngineConfig(max_rows=WIDTH, slots_per_row=1)
FINE, OVERFLOWS, RAISES = 1, 2, 3
"""Classes of images, by the effect on the network in the second half of the chain."""
Kind = Literal["any size", "compiled sizes", "asynchronous", "queued"]
MODELS = {"m": tiny_config(), "up": tiny_config(low_res_size=8)}
"""A model, and another that takes its images as conditioning images."""


class DeviceLost(Exception):
    """An error of the device."""


class FaultyDenoiser(ExactDenoiser):
    """A network that overflows on some rows, raises on others, runs out of memory, and has temporary errors."""

    def __init__(self, config: CheckpointConfig, batch_sizes: tuple[int, ...] | None, xp: Any = np) -> None:
        super().__init__(config, xp, batch_sizes, ExactClassifier(tiny_classifier_config(), xp, batch_sizes))
        self.armed = False
        self.most_rows = 1000
        self.next_error: Exception | None = None

    def failure_kind(self, error: Exception) -> FailureKind:
        return FailureKind.DEVICE if isinstance(error, DeviceLost) else super().failure_kind(error)

    def embed_timesteps(self, t_model: Any) -> Any:
        self._have_trouble()
        return super().embed_timesteps(t_model)

    def _have_trouble(self) -> None:
        if self.next_error is not None:
            error, self.next_error = self.next_error, None
            raise error.with_traceback(None)  # otherwise it keeps the frames of all scripts

    def __call__(self, inputs: NetworkInputs[Any]) -> Any:
        if not self.armed:
            return super().__call__(inputs)
        self._have_trouble()
        if len(inputs.x_t) > self.most_rows:
            raise MemoryError
        late = inputs.emb_t[:, 1] < 1.5  # t below 500
        if bool((late & (inputs.y == RAISES)).any()):
            raise ValueError("this row cannot be computed")
        out = super().__call__(inputs)
        out[late & (inputs.y == OVERFLOWS)] = np.inf
        return out


class AsynchronousFaulty(FaultyDenoiser):
    """Raises in turns when a call begins and when its result is fetched."""

    def begin(self, inputs: NetworkInputs[Any]) -> Pending[Any]:
        try:
            out = self(inputs)
        except Exception as error:
            if len(self.calls) % 2:
                raise
            return Raised(error)
        return Later(lambda: out)


class QueuedFaulty(FaultyDenoiser):
    """Raises when a step is launched; that a row has overflowed is known later.

    No step has a graph: replaying one calls no network that could raise.
    """

    def __init__(self, config: CheckpointConfig, batch_sizes: tuple[int, ...] | None) -> None:
        super().__init__(config, batch_sizes, torch)
        self.queue: LateQueue = LateQueue(lambda inputs: self(inputs), self.classifier)
        self.queue.lacks_memory_after = 0


@cache
def faulty(kind: Kind, model: str = "m") -> tuple[FaultyDenoiser, ArrayRunner[Any]]:
    """Return a network that fails, and a warmed-up runner of it."""
    kinds = {"asynchronous": AsynchronousFaulty, "queued": QueuedFaulty}
    sizes = (1, WIDTH, 2 * WIDTH) if kind in ("compiled sizes", "queued") else None
    denoiser = kinds.get(kind, FaultyDenoiser)(MODELS[model], sizes)
    runner: ArrayRunner[Any] = ArrayRunner(denoiser, FAULTY_CONFIG)
    runner.warm_up()
    return denoiser, runner
