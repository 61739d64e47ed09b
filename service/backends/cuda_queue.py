"""Implement `DeviceQueue` on a CUDA stream. Never run so far: no GPU was available (docs/decisions/0013)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from service.backends.compiling import compile_per_shape
from service.backends.cuda_graphs import CudaCapture, Work
from service.backends.device_queue import Forward

DEPTH = 2
"""Tolerates a host delay of one step. An error is detected up to this many steps after the step that caused it."""
MOST_SHAPES = 64
"""Limit of recompilations of a function."""


class CudaQueue:
    """Implements `DeviceQueue` on the device's current stream."""

    def __init__(
        self, device: torch.device, network: Forward[Tensor], classifier: Forward[Tensor] | None, *, fused: bool
    ) -> None:
        """Create a queue on the device's current stream.

        Args:
            device: a CUDA device.
            network: runs on the device.
            classifier: runs on the device; None: there is none.
            fused: whether `fuse` compiles functions.
        """
        self.depth = DEPTH
        self.network: Forward[Tensor] = torch.inference_mode()(network)
        self.classifier: Forward[Tensor] | None = classifier
        self._device = device
        self._fused = fused
        self._capture = CudaCapture(device)

    def warm_up(self, work: Work) -> None:
        """Run the work on the stream that captures."""
        with torch.inference_mode():
            self._capture.warm_up(work)

    def capture(self, work: Work) -> Work:
        """Capture a CUDA graph. All graphs of a queue share one memory pool, as they never run concurrently."""
        with torch.inference_mode():
            return self._capture(work)

    def fuse(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Compile with torch.compile, one kernel per shape, if fusing is on."""
        return compiled(work) if self._fused else work

    def send(self, values: npt.NDArray[Any]) -> Tensor:
        """Copy through pinned memory, which torch keeps until the copy is done."""
        return torch.from_numpy(values.copy()).pin_memory().to(self._device, non_blocking=True)

    def fetch(self, array: Tensor) -> CudaCopy:
        """Start a copy into pinned memory."""
        return self.receive(array.shape, array.dtype)(array)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[Tensor], CudaCopy]:
        """Allocate pinned memory and an event that marks the end of the copy."""
        host = torch.empty(shape, dtype=dtype, pin_memory=True)
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # missing in its stubs
        return lambda array: CudaCopy(array, host, done)


class CudaCopy:
    """A copy to host memory in progress."""

    def __init__(self, array: Tensor, host: Tensor, done: torch.cuda.Event) -> None:
        self._host = host
        self._done = done
        host.copy_(array, non_blocking=True)
        done.record(torch.cuda.current_stream(array.device))

    def wait(self) -> npt.NDArray[Any]:
        """Wait until the copy is done; return the array."""
        self._done.synchronize()
        return self._host.numpy()


def compiled(work: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of tensors as one graph, or raise; once per shape, as there are few shapes."""
    # This pass mistakes 64-bit products of the noise for 32-bit indices (PyTorch issues 175966, 183901, 186057)
    return compile_per_shape(work, MOST_SHAPES, {"constant_and_index_propagation": False})
