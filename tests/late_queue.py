"""A queue for tests: the CPU computes at once, and the host gets results late, as from a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffusion.config import CheckpointConfig
from service.backends.pending import Later
from tests.denoisers import ExactDenoiser


class LateQueue:
    """Implements `DeviceQueue` on a CPU. A captured function uses the arrays, and addresses, of its capture."""

    depth = 2

    def __init__(self, network: Callable[..., Any], classifier: Callable[..., Any] | None) -> None:
        self.network = network
        self.classifier = classifier
        self.captures = 0
        self.lacks_memory_after = 1000
        """The number of captures that fit into memory."""
        self.error: Exception | None = None
        """The error of the device at the next wait for a copy."""
        self.waits = 0

    def warm_up(self, work: Callable[[], Tensor]) -> None:
        assert not self.captures, "work was warmed up after a capture"
        work()

    def capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if self.captures >= self.lacks_memory_after:
            raise MemoryError
        self.captures += 1
        out = work().clone()
        return lambda: out.copy_(work())  # into the same output, which the next replay writes over

    def fuse(self, work: Callable[..., Any]) -> Callable[..., Any]:
        return work

    def send(self, values: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(values.copy())

    def fetch(self, array: Tensor) -> Later[npt.NDArray[Any]]:
        copy = np.array(array.numpy())

        def wait() -> npt.NDArray[Any]:
            self.waits += 1
            if self.error is not None:
                raise self.error
            return copy

        return Later(wait)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[Tensor], Later[npt.NDArray[Any]]]:
        return self.fetch


class QueuedDenoiser(ExactDenoiser):
    """Exact arithmetic on tensors, behind a queue."""

    def __init__(self, config: CheckpointConfig, **named: Any) -> None:
        super().__init__(config, torch, **named)
        classifier = self.classifier
        self.queue: LateQueue = LateQueue(lambda inputs: self(inputs), classifier)
