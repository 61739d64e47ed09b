"""Run a network as CUDA graphs, one per batch size; a replay launches all kernels of the network at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from diffusion.network_inputs import NetworkInputs

EmbNetwork = Callable[[NetworkInputs[Tensor]], Tensor]
"""n rows -> [n, out_channels, H, W]."""
Work = Callable[[], Tensor]
"""Operations on tensors at fixed addresses."""


class Capture(Protocol):
    """A way of capturing work."""

    def warm_up(self, work: Work) -> None:
        """Run work for the first time. Call this for all work before the first of it is captured.

        A first run may allocate more memory than later ones, and outside of the memory that graphs share.
        """
        ...

    def __call__(self, work: Work) -> Work:
        """Capture work; return a function that replays it into the same output each time."""
        ...


WARM_UP_CALLS = 3
"""Calls before a capture, in which libraries select kernels and allocate persistent memory."""


@dataclass(frozen=True)
class _Graph:
    buffers: NetworkInputs[Tensor]
    replay: Work


class GraphedNetwork:
    """A network that runs only at the batch sizes at which it was captured."""

    def __init__(
        self,
        network: EmbNetwork,
        sizes: Sequence[int],
        make_inputs: Callable[[int], NetworkInputs[Tensor]],
        capture: Capture,
    ) -> None:
        """Capture every size, the largest first, so that smaller ones reuse memory of the shared pool.

        Args:
            network: must not wait for the device, and must launch the same kernels for all values of its arguments.
            sizes: batch sizes.
            make_inputs: returns inputs of a batch size; the buffers are copies of them.
            capture: `CudaCapture` of the network's device, or `CallAgain`.
        """
        largest_first = sorted(sizes, reverse=True)
        with torch.inference_mode():  # in which all tensors are created that are copied into the buffers
            buffers = {size: _copied(make_inputs(size)) for size in largest_first}
            works = {size: partial(network, buffers[size]) for size in largest_first}
            for work in works.values():
                capture.warm_up(work)
            self._graphs = {size: _Graph(buffers[size], capture(work)) for size, work in works.items()}

    @torch.inference_mode()
    def __call__(self, inputs: NetworkInputs[Tensor]) -> Tensor:
        """Copy the inputs into the buffers of their batch size, replay, and return a copy of the output.

        Raises:
            ValueError: the batch size was not captured.
        """
        size = len(inputs.x_t)
        graph = self._graphs.get(size)
        if graph is None:
            raise ValueError(
                f"batch size must be one of {', '.join(map(str, sorted(self._graphs)))}, as captured; got {size}"
            )
        for buffer, given in zip(graph.buffers, inputs, strict=True):
            if buffer is not None and given is not None:
                buffer.copy_(given)
        return graph.replay().clone()


def _copied(inputs: NetworkInputs[Tensor]) -> NetworkInputs[Tensor]:
    return NetworkInputs._make(None if given is None else given.clone() for given in inputs)


class CallAgain:
    """A `Capture` where there are no CUDA graphs: the first call compiles the work, and a replay calls it again.

    torch.compile guards on more than shapes (strides, and whether a tensor was created in inference mode). With fixed
    buffers it always receives the same tensors, and compiles each size once.
    """

    def warm_up(self, work: Work) -> None:
        """Call the work."""
        work()

    def __call__(self, work: Work) -> Work:
        """Return the work."""
        return work


class CudaCapture:
    """A `Capture` into CUDA graphs, which share one memory pool and must never run concurrently."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # Captures need a side stream: see PyTorch's notes on CUDA graphs.
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def warm_up(self, work: Work) -> None:
        """Run the work a few times on the stream that captures."""
        with torch.cuda.device(self._device):
            self._side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._side):
                for _ in range(WARM_UP_CALLS):
                    work()
            torch.cuda.current_stream(self._device).wait_stream(self._side)

    def __call__(self, work: Work) -> Work:
        """Capture the work as a graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream(self._device)
            try:
                # thread_local: "global" would forbid the engine's thread to wait for steps while a model is loaded
                with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
                    out = work()
            except BaseException:
                torch.cuda.set_stream(current)  # `graph` leaves its own stream current if the capture cannot end
                raise

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay
