"""A part of a data set: the images for training, or the held-out ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from trainer.data.dataset import Conditions, Dataset, Float32Array, IntArray, Uint8Array

Draws = npt.NDArray[np.floating] | None
Read = Callable[[IntArray, Draws], Uint8Array | Float32Array]
"""Return images by their number in the part; arguments as of `Dataset.images`."""


class Part:
    """Some images of a data set, as a data set; its description and summary are those of the whole."""

    def __init__(self, whole: Dataset, indices: IntArray, read: Read, conditions: Conditions | None = None) -> None:
        """Describe the part.

        Args:
            whole: the data set.
            indices: of the images in it.
            read: reads images of the part.
            conditions: of the part; None: the data are no pairs.
        """
        self._whole = whole
        self._indices = indices
        self._read = read
        self.conditions: Conditions | None = conditions
        self.sizes = whole.sizes[indices]
        self.labels = whole.labels[indices]
        self.class_names = whole.class_names
        self.description = whole.description
        self.summary = whole.summary

    def images(self, indices: IntArray, draws: Draws = None) -> Uint8Array | Float32Array:
        """Return some of the images; arguments as for `Dataset`."""
        return self._read(indices, draws)

    def part(self, indices: IntArray) -> Dataset:
        """Return some of the images as a data set."""
        return self._whole.part(self._indices[indices])
