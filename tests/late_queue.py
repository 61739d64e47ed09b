"""A queue for tests: the CPU computes at once, and the host gets results late, as from a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from diffusion.config import CheckpointConfig
from diffusion.noise import unchecked_normal
from service.backends.device_queue import Normal
from service.backends.pending import Later
from tests.denoisers import ExactDenoiser

READ_VALUE = torch.ops.aten._local_scalar_dense.default  # noqa: SLF001  # what `item` and `bool` call


def recorded(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Run work once; return a function that repeats its operations on the same tensors.

    Like a graph, it freezes all that Python computes: shapes, numbers, and which operations are called.
    """
    with _Recording() as recording:
        result = work()

    def replay() -> Tensor:
        made: dict[int, Any] = {}
        for function, leaves, spec, outs in recording.calls:
            args, kwargs = tree_unflatten([made.get(id(leaf), leaf) for leaf in leaves], spec)
            again = tree_leaves(function(*args, **kwargs))
            made.update(zip(map(id, outs), again, strict=True))
        out: Tensor = made[id(result)]
        return out

    return replay


class _Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]  # missing types
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, list[Any], Any, list[Any]]] = []
        """Function, leaves of its arguments and their structure, leaves of its result; keeps all tensors alive."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not READ_VALUE, "a step must not read values of the device"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, *tree_flatten((args, kwargs or {})), tree_leaves(out)))
        return out


class LateQueue:
    """Implements `DeviceQueue` on a CPU. A captured function replays its operations on the arrays of its capture."""

    depth = 2

    def __init__(self, network: Callable[..., Any], classifier: Callable[..., Any] | None) -> None:
        self.network = network
        self.classifier = classifier
        self.normal: Normal[Tensor] = unchecked_normal
        self.captures = 0
        self.replays = 0
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
        replay = recorded(work)
        out = replay().clone()

        def run() -> Tensor:
            self.replays += 1
            return out.copy_(replay())  # into the same output, which the next replay writes over

        return run

    def fuse(self, work: Callable[..., Any]) -> Callable[..., Any] | None:
        return None

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
