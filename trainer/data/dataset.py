"""Interface of labelled images to the trainer, independent of their storage."""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from diffusion.update import from_uint8

Uint8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


class DataError(ValueError):
    """The data cannot be used for training; the message names the file and the problem."""


def network_input(images: Uint8Array | Float32Array) -> Float32Array:
    """Return images of a data set [B, H, W, C] as the network takes them: float32 [B, C, H, W] in [-1, 1]."""
    if images.dtype == np.uint8:
        return from_uint8(cast("Uint8Array", images))
    return np.ascontiguousarray(cast("Float32Array", images).transpose(0, 3, 1, 2))


def eight_bit_images(dataset: Dataset, indices: IntArray) -> Uint8Array:
    """Return images of a data set whose images have 8 bits.

    Raises:
        DataError: they are floating-point numbers.
    """
    images = dataset.images(indices)
    if images.dtype != np.uint8:
        raise DataError(f"images of 8 bits are needed; the data set has {images.dtype}")
    return cast("Uint8Array", images)


class ImageSource(Protocol):
    """Images, addressed by index."""

    def images(self, indices: IntArray, draws: npt.NDArray[np.floating] | None = None) -> Uint8Array | Float32Array:
        """Return the images [len(indices), height, width, channels]: uint8, or float32 in [-1, 1].

        Args:
            indices: of the images.
            draws: [len(indices), 3], uniform in [0, 1): determine the random crop of each image. Ignored unless
                `data.random_crop` is set; without them, the centre is cropped.

        Raises:
            DataError: an image cannot be read.
        """
        ...


class Conditions(ImageSource, Protocol):
    """The conditioning images of a data set's images."""

    def pairs(
        self, indices: IntArray, draws: npt.NDArray[np.floating] | None = None
    ) -> tuple[Uint8Array | Float32Array, Uint8Array | Float32Array]:
        """Return images and their conditioning images; arguments and errors as of `images`.

        A pair of which one image cannot be read is replaced as a whole, if `data.unreadable` allows it.
        """
        ...


class Dataset(ImageSource, Protocol):
    """Labelled images, and a conditioning image for each if the data have pairs."""

    labels: IntArray
    """int64 [N]; zeros where the data were opened without labels."""
    class_names: tuple[str, ...]
    """One name per class; empty where the data were opened without labels."""
    description: dict[str, str | int]
    """Description for a checkpoint's provenance and for comparison on resume; contains names, no paths."""
    summary: str
    """The data found and how they are processed: a line, and a second one about conditioning images."""
    sizes: IntArray
    """Height and width of each image as stored, int64 [N, 2]."""
    conditions: Conditions | None
    """The conditioning image of each image, cropped as that by equal draws; None: the data are no pairs."""

    def part(self, indices: IntArray) -> Dataset:
        """Return some of the images as a data set, which replaces unreadable images by others of its own only."""
        ...
