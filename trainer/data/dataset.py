"""What the trainer asks of labelled images, whatever they are stored in."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Uint8Array = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]


class DataError(ValueError):
    """Data that cannot be trained on; the message says which file and what is wrong with it."""


class Dataset(Protocol):
    """Labelled images, addressed by index."""

    labels: IntArray
    """int64 [N]; zeros where the data were opened without labels."""
    class_names: tuple[str, ...]
    """One name per class; empty where the data were opened without labels."""
    description: dict[str, str | int]
    """What goes into a checkpoint's provenance, and what a resumed run is compared with; no paths beyond the name."""
    summary: str
    """One line: what was found, and what is done to it."""

    def images(self, indices: IntArray) -> Uint8Array:
        """Return the images [len(indices), size, size, channels]."""
        ...
