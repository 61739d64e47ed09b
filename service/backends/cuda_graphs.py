"""A network as CUDA graphs, one per batch size: a replay launches all its kernels at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EmbNetwork = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x_t [n, C, H, W], emb_t [n, emb_channels], y int64 [n] or None) -> [n, out_channels, H, W]."""
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Turn work on fixed buffers into something that repeats it, always into the same output."""

WARM_UP_CALLS = 3
"""Calls before a capture, in which libraries choose kernels and allocate what they keep."""


@dataclass(frozen=True)
class _Graph:
    x_t: Tensor
    emb_t: Tensor
    y: Tensor | None
    replay: Callable[[], Tensor]


class GraphedNetwork:
    """A network that runs at the batch sizes it was captured at, and at no other."""

    def __init__(
        self,
        network: EmbNetwork,
        sizes: Sequence[int],
        make_inputs: Callable[[int], tuple[Tensor, Tensor, Tensor | None]],
        capture: Capture,
    ) -> None:
        """Capture every size, the largest first, so that the smaller ones find memory in the pool they share.

        Args:
            network: must neither wait for the device nor depend on the values of its arguments in what it launches.
            sizes: batch sizes.
            make_inputs: returns x_t, emb_t and y (None for an unconditional network) of a batch size, for its buffers.
            capture: `cuda_capture` of the network's device, or `call_again`.
        """
        self._graphs = {size: _captured(network, make_inputs(size), capture) for size in sorted(sizes, reverse=True)}

    @torch.inference_mode()
    def __call__(self, x_t: Tensor, emb_t: Tensor, y: Tensor | None) -> Tensor:
        """Copy the arguments into the buffers of their size, replay, and return a copy of the output.

        Raises:
            ValueError: a batch size that was not captured.
        """
        graph = self._graphs.get(len(x_t))
        if graph is None:
            raise ValueError(f"captured were batches of {', '.join(map(str, sorted(self._graphs)))}; got {len(x_t)}")
        graph.x_t.copy_(x_t)
        graph.emb_t.copy_(emb_t)
        if graph.y is not None and y is not None:
            graph.y.copy_(y)
        return graph.replay().clone()


@torch.inference_mode()
def _captured(network: EmbNetwork, buffers: tuple[Tensor, Tensor, Tensor | None], capture: Capture) -> _Graph:
    # Made in inference mode, like all that is written into them.
    x_t, emb_t, y = (None if buffer is None else buffer.clone() for buffer in buffers)
    assert x_t is not None  # noqa: S101  # for the type checker: make_inputs gives both
    assert emb_t is not None  # noqa: S101
    return _Graph(x_t, emb_t, y, capture(lambda: network(x_t, emb_t, y)))


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
