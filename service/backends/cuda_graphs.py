"""A network as CUDA graphs, one per batch size: a replay launches all its kernels at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.network_inputs import NetworkInputs

EmbNetwork = Callable[[NetworkInputs[Tensor]], Tensor]
"""n rows -> [n, out_channels, H, W]."""
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Turn work on fixed buffers into something that repeats it, always into the same output."""

WARM_UP_CALLS = 3
"""Calls before a capture, in which libraries choose kernels and allocate what they keep."""


@dataclass(frozen=True)
class _Graph:
    buffers: NetworkInputs[Tensor]
    replay: Callable[[], Tensor]


class GraphedNetwork:
    """A network that runs at the batch sizes it was captured at, and at no other."""

    def __init__(
        self,
        network: EmbNetwork,
        sizes: Sequence[int],
        make_inputs: Callable[[int], NetworkInputs[Tensor]],
        capture: Capture,
    ) -> None:
        """Capture every size, the largest first, so that the smaller ones find memory in the pool they share.

        Args:
            network: must neither wait for the device nor depend on the values of its arguments in what it launches.
            sizes: batch sizes.
            make_inputs: returns inputs of a batch size, of which its buffers are copies.
            capture: `cuda_capture` of the network's device, or `call_again`.
        """
        self._graphs = {size: _captured(network, make_inputs(size), capture) for size in sorted(sizes, reverse=True)}

    @torch.inference_mode()
    def __call__(self, inputs: NetworkInputs[Tensor]) -> Tensor:
        """Copy the inputs into the buffers of their size, replay, and return a copy of the output.

        Raises:
            ValueError: a batch size that was not captured.
        """
        size = len(inputs.x_t)
        graph = self._graphs.get(size)
        if graph is None:
            raise ValueError(f"captured were batches of {', '.join(map(str, sorted(self._graphs)))}; got {size}")
        for buffer, given in zip(graph.buffers, inputs, strict=True):
            if buffer is not None and given is not None:
                buffer.copy_(given)
        return graph.replay().clone()


@torch.inference_mode()
def _captured(network: EmbNetwork, inputs: NetworkInputs[Tensor], capture: Capture) -> _Graph:
    # Made in inference mode, like all that is written into them.
    buffers: NetworkInputs[Tensor] = NetworkInputs._make(None if given is None else given.clone() for given in inputs)
    return _Graph(buffers, capture(lambda: network(buffers)))


def call_again(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Capture nothing, where there are no CUDA graphs: a replay calls again what has been called, and compiled, once.

    torch.compile guards on more than shapes (strides, and whether a tensor was made in inference mode); behind buffers
    it sees the same tensors always, and compiles each size once.
    """
    work()
    return work


def cuda_capture(device: torch.device) -> Capture:
    """Return a `Capture` on a device, whose graphs share one pool of memory: they must never run side by side."""
    pool = torch.cuda.graph_pool_handle()
    # On a stream of its own, as captures must be; PyTorch's notes on CUDA graphs ask for it.
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with torch.cuda.device(device):
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_CALLS):
                    work()
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # thread_local: a model is loaded while the engine's thread waits for steps, which "global" would forbid it
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                out = work()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return capture
