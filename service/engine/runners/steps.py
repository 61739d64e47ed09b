"""What the two ways in which a runner takes steps have in common."""

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
    """The embedded timesteps of a model, made once, by training timestep."""

    network: A
    """float32 [T, emb_channels]."""
    classifier: A | None
    """The same, as the classifier embeds them; None where there is none."""


class Steps(Protocol):
    """Takes steps of a `SlotTable`."""

    depth: int
    """Steps that may be under way when the next one is launched."""

    def launch(self, steps: Sequence[ImageStep]) -> Pending[list[bool]]:
        """As `Runner.launch`."""
        ...

    def pixels(self, array: Any, slots: Sequence[int]) -> Pending[npt.NDArray[np.uint8]]:
        """Copy some slots of an array of images; waited for, as pixels."""
        ...


def asking_places(steps: Sequence[ImageStep]) -> list[int]:
    """Return the places of the images that the classifier is called on."""
    return [place for place, step in enumerate(steps) if step.params.classified_rows]


def no_classifier(description: str) -> ModelError:
    """Return what is wrong with a step in which an image asks for a classifier that is not there."""
    return ModelError(f"{description}: the model has no classifier, and classifier_scale is not 0")
