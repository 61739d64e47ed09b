"""A CUDA device's stream as a `DeviceQueue`. Never run so far: no GPU was at hand (docs/decisions/0013)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from service.backends.cuda_graphs import cuda_capture
from service.backends.device_queue import Forward

DEPTH = 2
"""Enough for the host to be as late as a step takes; whatever fails is learnt of so many steps later."""
MOST_SHAPES = 64
"""torch.compile takes more shapes of one function for a mistake."""


class CudaQueue:
    """Implements `DeviceQueue` on the device's current stream."""

    def __init__(
        self, device: torch.device, network: Forward[Tensor], classifier: Forward[Tensor] | None, *, fused: bool
    ) -> None:
        """Describe a stream.

        Args:
            device: a CUDA device.
            network: runs on it.
            classifier: runs on it; None: there is none.
            fused: whether `fuse` compiles.
        """
        self.depth = DEPTH
        self.network: Forward[Tensor] = torch.inference_mode()(network)
        self.classifier: Forward[Tensor] | None = classifier
        self._device = device
        self._fused = fused
        self._capture = cuda_capture(device)

    def capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Capture a CUDA graph; all of a queue share one pool of memory, as they never run side by side."""
        with torch.inference_mode():
            return self._capture(work)

    def fuse(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Compile with torch.compile, one kernel per shape."""
        return compiled(work) if self._fused else work

    def send(self, values: npt.NDArray[Any]) -> Tensor:
        """Copy by way of pinned memory, which torch keeps until the copy is done."""
        return torch.from_numpy(values.copy()).pin_memory().to(self._device, non_blocking=True)

    def fetch(self, array: Tensor) -> CudaCopy:
        """Copy into pinned memory."""
        return self.receive(array.shape, array.dtype)(array)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[Tensor], CudaCopy]:
        """Take pinned memory, and an event to wait for."""
        host = torch.empty(shape, dtype=dtype, pin_memory=True)
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # missing in its stubs
        return lambda array: CudaCopy(array, host, done)


class CudaCopy:
    """A copy to host memory under way."""

    def __init__(self, array: Tensor, host: Tensor, done: torch.cuda.Event) -> None:
        self._host = host
        self._done = done
        host.copy_(array, non_blocking=True)
        done.record(torch.cuda.current_stream(array.device))

    def wait(self) -> npt.NDArray[Any]:
        """Wait until it is there."""
        self._done.synchronize()
        return self._host.numpy()


def compiled(work: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of tensors, whole or not at all; each shape anew, as sizes are few and known."""
    return torch.compile(  # type: ignore[call-overload]  # recompile_limit: missing in its stubs
        work,
        fullgraph=True,
        dynamic=False,
        recompile_limit=MOST_SHAPES,
        # It takes the noise's 64-bit products for 32-bit indices (PyTorch's issues 175966, 183901, 186057)
        options={"constant_and_index_propagation": False},
    )
