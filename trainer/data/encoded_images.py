"""Data sets of encoded images, which a decoder reads by index: files of a folder, rows of a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trainer.data.dataset import Conditions, IntArray, Uint8Array
from trainer.data.decoder import Decoder
from trainer.data.part import Part


class EncodedImages:
    """The part of such a `Dataset` that reads images; subclasses set the attributes."""

    conditions: Conditions | None = None
    sizes: IntArray
    labels: IntArray
    class_names: tuple[str, ...]
    description: dict[str, str | int]
    summary: str
    _decoder: Decoder

    def images(self, indices: IntArray, draws: npt.NDArray[np.floating] | None = None) -> Uint8Array:
        """Decode the images at these indices; crop with `draws` [N, 3] if random crops are enabled."""
        return self._decoder.images(indices, draws)

    def part(self, indices: IntArray) -> Part:
        """Return some of the images as a data set; see `Dataset`."""
        return Part(self, indices, self._decoder.part(indices).images)

    def image(self, index: int, draws: Sequence[float] | None = None) -> Uint8Array:
        """Decode one image, [height, width, channels], without a replacement.

        Raises:
            DataError: it cannot be read.
        """
        return self._decoder.image(index, draws)
