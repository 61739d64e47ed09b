"""The interface of an asynchronous device, which executes work in order while the host runs ahead of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from diffusion.arrays import A
from diffusion.network_inputs import NetworkInputs
from service.backends.pending import Pending

Forward = Callable[[NetworkInputs[A]], A]
"""A network or classifier that can be captured. Unlike `RowNetwork.__call__`, it must not wait for the device or read
its memory, and the next call may overwrite its result."""

Normal = Callable[[A, A, A, int, tuple[int, int, int]], A]
"""Seeds, image indices and steps, int64 [B], stream, (C, H, W) -> standard normals, float32 [B, C, H, W]."""


class DeviceQueue(Protocol[A]):
    """One stream of a device; operations on it and on its arrays are executed in the order of submission."""

    depth: int
    """Maximum number of steps in flight when the next one is launched."""
    network: Forward[A]
    classifier: Forward[A] | None
    normal: Normal[A]
    """The noise, as `unchecked_normal`."""

    def warm_up(self, work: Callable[[], A]) -> None:
        """Run work for the first time; call this for all work before the first of it is captured (`Capture`)."""
        ...

    def capture(self, work: Callable[[], A]) -> Callable[[], A]:
        """Capture work on arrays at fixed addresses; return a function that replays it into the same output."""
        ...

    def fuse(self, work: Callable[..., Any]) -> Callable[..., Any] | None:
        """Return noise and update as one kernel, whose results may be rounded differently; None: there is none.

        Args:
            work: `add_noise_and_advance`.
        """
        ...

    def send(self, values: npt.NDArray[Any]) -> A:
        """Copy values to the device without waiting for it; the caller may change them afterwards."""
        ...

    def fetch(self, array: A) -> Pending[npt.NDArray[Any]]:
        """Start a copy of an array to host memory, which runs after all operations submitted before."""
        ...

    def receive(self, shape: tuple[int, ...], dtype: Any) -> Callable[[A], Pending[npt.NDArray[Any]]]:
        """Allocate host memory for a future array; return a function that fetches the array without allocating."""
        ...


def send_at_once(xp: Any, device: Any) -> Callable[[npt.NDArray[Any]], Any]:
    """Return a function that copies values to a device without a queue."""
    return lambda values: xp.asarray(np.array(values), device=device)
