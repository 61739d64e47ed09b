"""What the engine asks of a runner: it owns every array of a model's images, and moves them a step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from service.backends.base import FailureKind
from service.backends.pending import Pending
from service.engine.request import ImageStep


class Runner(Protocol):
    """Holds the slots of one model."""

    numerics_id: str
    """Names all that pixels depend on besides the request: `Denoiser.network_id`, and what the runner adds."""
    depth: int
    """Steps that may be under way when the next one is launched. Where it is 0, a step is over when it has been waited
    for; else only a launch raises what an image is guilty of, and what is raised later is the device's end."""

    def warm_up(self) -> None:
        """Do whatever the first step would otherwise pay for, and check the promises the runner makes."""
        ...

    def start(self, steps: Sequence[ImageStep]) -> None:
        """Set the slots of images up that begin: x_T. May be repeated."""
        ...

    def launch(self, steps: Sequence[ImageStep]) -> Pending[list[bool]]:
        """Begin a step of some images; waited for, it says which are still finite.

        Where it raises, here or (with a depth of 0) when it is waited for, nothing has been written: the same step can
        be taken again, by all or some of these images.
        """
        ...

    def failure_kind(self, error: Exception) -> FailureKind:
        """Say what an error means that `start` or a step raised."""
        ...

    def check_network(self) -> None:
        """Call the network, and its classifier, on a row that is nobody's; raises what they raise. Touches no slot."""
        ...

    def evict(self, slots: Sequence[int]) -> list[object]:
        """Copy what these slots hold to host memory, one opaque state per slot; the slots are free afterwards."""
        ...

    def restore(self, slots: Sequence[int], saved: Sequence[object]) -> None:
        """Put states that `evict` returned into these slots, which need not be the ones they came from."""
        ...

    def padded_rows(self, rows: int) -> int:
        """Say how many rows a network call for that many rows computes."""
        ...

    def padded_classified_rows(self, rows: int) -> int:
        """Say how many rows a classifier call for that many computes; 0 where there is no classifier."""
        ...

    def is_uncaptured(self, rows: int) -> bool:
        """Say whether a step of so many rows has to do without the graph that its device could have."""
        ...

    def read(self, slots: Sequence[int]) -> Pending[npt.NDArray[np.uint8]]:
        """Copy the images in these slots, which are free afterwards; waited for, as pixels [n, H, W, C]."""
        ...

    def preview(self, slots: Sequence[int]) -> Pending[npt.NDArray[np.uint8]]:
        """Copy what these images were predicted to become at their last step; waited for, as pixels."""
        ...
