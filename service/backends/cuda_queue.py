"""Implement `DeviceQueue` on a CUDA stream. Never run so far: no GPU was available (docs/decisions/0013)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from diffusion.noise import STREAM_STEP, unchecked_normal
from service.backends.compiling import compile_per_shape
from service.backends.cuda_graphs import CudaCapture, Work
from service.backends.device_queue import Forward, Normal

log = logging.getLogger(__name__)

DEPTH = 2
"""Tolerates a host delay of one step. An error is detected up to this many steps after the step that caused it."""
NOISE_TOLERANCE = 1e-6
"""Between the noise of two devices, as `diffusion.noise` promises."""
MOST_SHAPES = 64
"""Limit of recompilations of a function."""


class CudaQueue:
    """Implements `DeviceQueue` on the device's current stream."""

    def __init__(
        self,
        device: torch.device,
        network: Forward[Tensor],
        classifier: Forward[Tensor] | None,
        *,
        fuses: bool,
        normal: Normal[Tensor] = unchecked_normal,
    ) -> None:
        """Create a queue on the device's current stream.

        Args:
            device: a CUDA device.
            network: runs on the device.
            classifier: runs on the device; None: there is none.
            fuses: whether `fuse` compiles noise and update.
            normal: generates noise.
        """
        self.depth = DEPTH
        self.network: Forward[Tensor] = torch.inference_mode()(network)
        self.classifier: Forward[Tensor] | None = classifier
        self.normal: Normal[Tensor] = normal
        self._device = device
        self._fuses = fuses
        self._capture = CudaCapture(device)

    def warm_up(self, work: Work) -> None:
        """Run the work on the stream that captures."""
        with torch.inference_mode():
            self._capture.warm_up(work)

    def capture(self, work: Work) -> Work:
        """Capture a CUDA graph. All graphs of a queue share one memory pool, as they never run concurrently."""
        with torch.inference_mode():
            return self._capture(work)

    def fuse(self, work: Callable[..., Any]) -> Callable[..., Any] | None:
        """Compile noise and update with torch.compile, when they are called first; None if fusing is off."""
        return compiled(work) if self._fuses else None

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


def fastest_normal(device: torch.device) -> Normal[Tensor]:
    """Return the Triton kernel of the noise if it gives the noise of all devices, else PyTorch's operations.

    Logs a warning about the latter.
    """
    rows, shape = torch.arange(4, device=device), (1, 8, 8)
    expected = unchecked_normal(rows, rows, rows, STREAM_STEP, shape)
    try:
        from service.backends.triton_noise import triton_normal

        torch.testing.assert_close(
            triton_normal(rows, rows, rows, STREAM_STEP, shape), expected, rtol=0, atol=NOISE_TOLERANCE
        )
    except Exception as error:  # Triton is missing, or it has no C compiler, no folder for its cache, ...
        log.warning("noise is generated without Triton, more slowly: %s", error)
        return unchecked_normal
    return triton_normal


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
