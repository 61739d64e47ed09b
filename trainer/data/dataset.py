"""Interface of labelled images to the trainer, independent of their storage."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Uint8Array = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]


class DataError(ValueError):
    """The data cannot be used for training; the message names the file and the problem."""


class Dataset(Protocol):
    """Labelled images, addressed by index."""

    labels: IntArray
    """int64 [N]; zeros where the data were opened without labels."""
    class_names: tuple[str, ...]
    """One name per class; empty where the data were opened without labels."""
    description: dict[str, str | int]
    """Description for a checkpoint's provenance and for comparison on resume; contains names, no paths."""
    summary: str
    """One line: the data found and how they are processed."""

    def images(self, indices: IntArray) -> Uint8Array:
        """Return the images [len(indices), size, size, channels]."""
        ...
