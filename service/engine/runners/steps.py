"""Steps: the interface of the two ways to take steps (`HostSteps`, `QueuedSteps`), and their common helpers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from diffusion.arrays import A
from service.backends.pending import Pending
from service.engine.request import ImageStep
from service.errors import ModelError


class Embeddings(NamedTuple, Generic[A]):
    """The embedded timesteps of a model, computed once, by training timestep."""

    network: A
    """float32 [T, emb_channels]."""
    classifier: A | None
    """The classifier's embeddings of the same timesteps; None without a classifier."""


class Steps(Protocol):
    """Takes steps of the images in a `SlotTable`."""

    depth: int
    """Steps that may be under way when the next one is launched."""

    def launch(self, steps: Sequence[ImageStep]) -> Pending[list[bool]]:
        """Start a step of some images; see `Runner.launch`."""
        ...

    def copied(self, array: Any, slots: Sequence[int]) -> Pending[npt.NDArray[np.float32]]:
        """Start copying some slots of an image array; the pending result is in host memory, [n, C, H, W]."""
        ...


def classified_places(steps: Sequence[ImageStep]) -> list[int]:
    """Return the places of the images with classifier guidance."""
    return [place for place, step in enumerate(steps) if step.params.classified_rows]


def finished_places(steps: Sequence[ImageStep]) -> list[int]:
    """Return the places of the images with a mask or jumps."""
    return [place for place, step in enumerate(steps) if step.params.has_finish]


class StepIncomplete(Exception):
    """A part of a step's results has been written, so that it cannot be repeated."""


def no_classifier(description: str) -> ModelError:
    """Return the error for an image with classifier guidance on a model without a classifier."""
    return ModelError(f"{description}: the model has no classifier, and classifier_scale is not 0")
