"""Decode the images of a batch in a bounded pool of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from diffusion.config import ImageSize, size_pair
from trainer.data.dataset import DataError, IntArray, Uint8Array
from trainer.data.fitting import fit_image
from trainer.data.image_file import Mode, Source, decode, name_of_source
from trainer.data.options import DataConfig
from trainer.data.workers import Workers
from trainer.run_folder import warn

FOUND_BEFORE = "--decode-all leaves out such images before the first step"


class Decoder:
    """Decodes encoded images by index.

    An image that turns out to be unreadable is replaced, if `data.unreadable` allows it, by the next readable one of
    its class: a function of the data only, so that a resumed run trains on the same images.
    """

    def __init__(
        self,
        source: Callable[[int], Source],
        labels: IntArray,
        image_size: ImageSize,
        mode: Mode,
        options: DataConfig,
    ) -> None:
        self._source = source
        self._labels = labels
        self._size = image_size
        self._mode: Mode = mode
        self._options = options
        self._workers = Workers(options.workers)
        self._unreadable: set[int] = set()
        self._checked = np.zeros(len(labels), np.bool_)
        """Images that have all their data: a check once per image and run costs less than one each time."""

    def images(self, indices: IntArray, draws: npt.NDArray[np.floating] | None) -> Uint8Array:
        """Return the images [N, height, width, channels]; crop with `draws` [N, 3] if random crops are enabled."""
        count = len(indices)
        pixels = np.empty((count, *size_pair(self._size), 1 if self._mode == "L" else 3), np.uint8)
        crops = [None] * count if draws is None else draws.tolist()

        def decode_one(position: int) -> None:
            pixels[position] = self._image(int(indices[position]), crops[position])

        self._workers.each(count, decode_one)
        return pixels

    def part(self, indices: IntArray) -> Decoder:
        """Return a decoder of some of the images, which replaces them by one another only."""

        def source(index: int) -> Source:
            return self._source(int(indices[index]))

        return Decoder(source, self._labels[indices], self._size, self._mode, self._options)

    def _image(self, index: int, draws: Sequence[float] | None) -> Uint8Array:
        try:
            return self.image(index, draws)
        except DataError as error:
            if self._options.unreadable == "fail":
                raise DataError(
                    f"{error}; repair it; --decode-all lists all such files before the first step"
                ) from error
            return self._replacement(index, draws, error)

    def _replacement(self, index: int, draws: Sequence[float] | None, error: DataError) -> Uint8Array:
        for other in stand_ins(self._labels, index):
            try:
                pixels = self.image(other, draws)
            except DataError:
                continue
            if index not in self._unreadable:
                self._unreadable.add(index)
                name = name_of_source(self._source(other))
                warn(f"{error}; {name} takes its place; unreadable images found so far: {len(self._unreadable)}")
            return pixels
        raise DataError(f"{error}; no image of its class can be read; {FOUND_BEFORE}") from error

    def image(self, index: int, draws: Sequence[float] | None) -> Uint8Array:
        """Return one image, without a replacement.

        Raises:
            DataError: it cannot be read.
        """
        crop = draws if self._options.random_crop else None

        def fit(image: Image.Image) -> Uint8Array:
            return fit_image(image, self._size, self._options.small_images, crop)

        pixels = decode(self._source(index), self._mode, self._options, fit, all_data=not self._checked[index])
        self._checked[index] = True
        return pixels


def stand_ins(labels: IntArray, index: int) -> list[int]:
    """Return the images that may take the place of an unreadable one: those of its class, the ones behind it first."""
    alike = np.flatnonzero(labels == labels[index])
    others: list[int] = np.roll(alike, -int(np.searchsorted(alike, index)))[1:].tolist()
    return others
