"""Run a network as CUDA graphs, one per batch size; a replay launches all kernels of the network at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.network_inputs import NetworkInputs

EmbNetwork = Callable[[NetworkInputs[Tensor]], Tensor]
"""n rows -> [n, out_channels, H, W]."""
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Capture work on fixed buffers; returns a function that replays it into the same output each time."""

WARM_UP_CALLS = 3
"""Calls before a capture, in which libraries select kernels and allocate persistent memory."""


@dataclass(frozen=True)
class _Graph:
    buffers: NetworkInputs[Tensor]
    replay: Callable[[], Tensor]


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
            capture: `cuda_capture` of the network's device, or `call_again`.
        """
        self._graphs = {size: _captured(network, make_inputs(size), capture) for size in sorted(sizes, reverse=True)}

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


@torch.inference_mode()
def _captured(network: EmbNetwork, inputs: NetworkInputs[Tensor], capture: Capture) -> _Graph:
    # Created in inference mode, like all tensors copied into them.
    buffers: NetworkInputs[Tensor] = NetworkInputs._make(None if given is None else given.clone() for given in inputs)
    return _Graph(buffers, capture(lambda: network(buffers)))


def call_again(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Replace capturing where there are no CUDA graphs: call the work once to compile it; a replay calls it again.

    torch.compile guards on more than shapes (strides, and whether a tensor was created in inference mode). With fixed
    buffers it always receives the same tensors, and compiles each size once.
    """
    work()
    return work


def cuda_capture(device: torch.device) -> Capture:
    """Return a `Capture` for a device. Its graphs share one memory pool and must never run concurrently."""
    pool = torch.cuda.graph_pool_handle()
    # Captures need a side stream: see PyTorch's notes on CUDA graphs.
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with torch.cuda.device(device):
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_CALLS):
                    work()
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # thread_local: "global" would forbid the engine's thread to wait for steps while a model is loaded
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                out = work()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return capture
