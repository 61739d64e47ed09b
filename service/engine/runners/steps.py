"""The two ways in which a runner takes steps share this much."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from diffusion.arrays import A
from diffusion.noise import STREAM_STEP, unchecked_normal
from diffusion.update import PlanRows, Step, begin_advance, finish_advance
from service.backends.pending import Pending
from service.errors import ModelError


@dataclass
class BatchSizes:
    """The rows that calls may have, which a runner finds as it warms up; shared with what takes its steps."""

    network: tuple[int, ...]
    classifier: tuple[int, ...]
    """None where there is no classifier."""

    def padded_rows(self, rows: int) -> int:
        """Round up to the next batch size that the network may be run at."""
        return self.network[bisect_left(self.network, rows)]

    def padded_classified_rows(self, rows: int) -> int:
        """Round up to the next batch size that the classifier may be run at; 0 where there is none."""
        return self.classifier[bisect_left(self.classifier, rows)] if self.classifier else 0


class Steps(Protocol):
    """Takes steps of a `SlotTable`."""

    depth: int
    """Steps that may be under way when the next one is launched."""

    def launch(self, slots: Sequence[int]) -> Pending[list[bool]]:
        """As `Runner.launch`."""
        ...

    def pixels(self, array: Any, slots: Sequence[int]) -> Pending[npt.NDArray[np.uint8]]:
        """Copy some slots of an array of images; waited for, as pixels."""
        ...


def no_classifier(description: str) -> ModelError:
    """Return what is wrong with a step in which an image asks for a classifier that is not there."""
    return ModelError(f"{description}: the model has no classifier, and classifier_scale is not 0")


def add_noise_and_advance(
    lines: A, x_t: A, x0_prev: A, out: A, var_values: A, noise_of: tuple[A, A, A], grad: A | None
) -> Step[A]:
    """Make a step's noise and take the step: everything that comes after the network, and nothing but pointwise work.

    Args:
        lines: of the plan, one per row, float32 [B, 12].
        x_t: as for `advance`, like x0_prev, out, var_values and grad.
        x0_prev: see there.
        out: see there.
        var_values: see there.
        noise_of: seed, image index and step of each row, int64 [B].
        grad: see there.
    """
    _, channels, height, width = x_t.shape
    z = unchecked_normal(*noise_of, STREAM_STEP, (channels, height, width))
    return finish_advance(begin_advance(PlanRows.from_lines(lines), x_t, x0_prev), out, var_values, z, grad)
