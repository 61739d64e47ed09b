"""What a runner asks of a device that takes work in order and answers later, so that the host may run ahead of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from diffusion.arrays import A
from diffusion.network_inputs import NetworkInputs
from service.backends.pending import Pending

Forward = Callable[[NetworkInputs[A]], A]
"""A network or a classifier as `RowNetwork.__call__`, but for being captured: it neither waits for the device nor reads
what is there, and what it returns may be written over by the next call."""


class DeviceQueue(Protocol[A]):
    """One stream of a device: what is asked of it, and of its arrays, happens in the order in which it was asked."""

    depth: int
    """Steps that may be under way when the next one is launched."""
    network: Forward[A]
    classifier: Forward[A] | None

    def capture(self, work: Callable[[], A]) -> Callable[[], A]:
        """Turn work on arrays that stay where they are into something that repeats it, always into the same output.

        Runs the work several times.
        """
        ...

    def fuse(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of arrays as one kernel, or as it is."""
        ...

    def send(self, values: npt.NDArray[Any]) -> A:
        """Copy numbers to the device, without waiting for it; they may be changed afterwards."""
        ...

    def fetch(self, array: A) -> Pending[npt.NDArray[Any]]:
        """Copy an array, as it is when everything asked before has been done, to host memory."""
        ...

    def receive(self, shape: tuple[int, ...], dtype: Any) -> Callable[[A], Pending[npt.NDArray[Any]]]:
        """Take host memory for an array that is still to be made; returns what fetches it, and takes none."""
        ...


def send_at_once(xp: Any, device: Any) -> Callable[[npt.NDArray[Any]], Any]:
    """Return what copies numbers to a device that has no queue."""
    return lambda values: xp.asarray(np.array(values), device=device)
