"""Runner: the interface between the engine and a model. A runner owns the image arrays and advances them by steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from service.backends.base import FailureKind
from service.backends.pending import Pending
from service.engine.request import GivenArrays, ImageStep, NetworkOf


class Runner(Protocol):
    """Holds the slots of one model and takes its steps."""

    numerics_id: str
    """Identifies everything besides the request that pixels depend on: `Denoiser.network_id` and the runner's part."""
    depth: int
    """Steps that may be under way when the next one is launched. If 0, a step is complete when it has been waited for.
    Otherwise only a launch raises errors caused by an image, and any later error is fatal to the device."""
    network_of: NetworkOf | None
    """The network of an image's step; only steps of one network may be launched together. None: the model has one."""
    trial_given: GivenArrays | None
    """Arrays for images that only try the network out: with a conditioning image, if the model takes one."""

    @property
    def max_rows(self) -> int:
        """Maximum rows of a step; `warm_up` may reduce it."""
        ...

    def warm_up(self) -> None:
        """Do the one-time work of the first step, and check the runner's guarantees."""
        ...

    def start(self, steps: Sequence[ImageStep]) -> None:
        """Initialize the slots of new images with x_T. May be repeated."""
        ...

    def launch(self, steps: Sequence[ImageStep]) -> Pending[list[bool]]:
        """Start a step of some images. The pending result tells for each image whether it is still finite.

        If this raises, here or (with a depth of 0) when the result is waited for, nothing has been written. The same
        step can then be repeated with all or some of these images.
        """
        ...

    def failure_kind(self, error: Exception) -> FailureKind:
        """Classify an error that `start` or a step raised."""
        ...

    def check_network(self) -> None:
        """Call the network and its classifier on a dummy row and propagate their errors. Does not access any slot."""
        ...

    def evict(self, slots: Sequence[int]) -> list[object]:
        """Copy what these slots hold to host memory, one opaque state per slot; the slots are free afterwards."""
        ...

    def restore(self, slots: Sequence[int], saved: Sequence[object]) -> None:
        """Restore states that `evict` returned into these slots, which may differ from the original ones."""
        ...

    def padded_rows(self, rows: int) -> int:
        """Return the number of rows that a network call for `rows` rows computes."""
        ...

    def padded_classified_rows(self, rows: int) -> int:
        """Return the number of rows that a classifier call for `rows` rows computes; 0 without a classifier."""
        ...

    def is_uncaptured(self, rows: int) -> bool:
        """Return whether a step of `rows` rows runs without a captured graph on a device that supports graphs."""
        ...

    def read(self, slots: Sequence[int]) -> Pending[npt.NDArray[np.uint8]]:
        """Start copying the images in these slots. The slots are free afterwards.

        The pending result is pixels, uint8 [n, H, W, C].
        """
        ...

    def read_values(self, slots: Sequence[int], *, both: bool = False) -> Pending[npt.NDArray[np.float32]]:
        """Start copying the values of the images in these slots. The slots are free afterwards.

        The pending result is x, float32 [n, C, H, W]; if `both`, followed by x0, [n, 2 * C, H, W].
        """
        ...

    def preview(self, slots: Sequence[int]) -> Pending[npt.NDArray[np.uint8]]:
        """Start copying the predicted results (x0) of these images; the pending result is pixels as for `read`."""
        ...
