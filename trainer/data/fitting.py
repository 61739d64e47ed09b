"""Scale and crop an image of any size to the model's square."""

from __future__ import annotations

import numpy as np
from PIL import Image

from trainer.data.dataset import Uint8Array
from trainer.data.options import SmallImages

LONGEST_ASPECT = 16
"""Only the middle of an image with a larger aspect ratio is scaled: the rest would be cropped, and scaling it
takes memory in proportion to the length."""


def fit_image(image: Image.Image, size: int, small_images: SmallImages) -> Uint8Array:
    """Return the middle of an image as a square [size, size, channels].

    Scaling is that of OpenAI's `ImageDataset` (halve by averaging while twice too large, then bicubic until the
    shorter side fits, then crop the centre), with bit-identical results.

    Args:
        image: grey or RGB, 8 bits.
        size: height and width of the result.
        small_images: how an image is handled whose shorter side is below `size`.
    """
    if min(image.size) < size and small_images == "frame":
        return _frame(np.asarray(_crop(image, min(image.width, size), min(image.height, size))), size)
    longest = LONGEST_ASPECT * min(image.size)
    image = _crop(image, min(image.width, longest), min(image.height, longest))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return _with_channels(np.asarray(_crop(image, size, size)))


def fit_array(array: Uint8Array, size: int, small_images: SmallImages) -> Uint8Array:
    """Return the middle of an array [H, W, C] as [size, size, C]; channels are independent; none is transparency."""
    if array.shape[:2] == (size, size):
        return array
    if array.shape[-1] == 3:  # Pillow also scales the three bands of RGB separately
        return fit_image(Image.fromarray(array), size, small_images)
    bands = [fit_image(Image.fromarray(array[..., band]), size, small_images) for band in range(array.shape[-1])]
    return np.concatenate(bands, axis=-1)


def _crop(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _frame(array: Uint8Array, size: int) -> Uint8Array:
    array = _with_channels(array)
    height, width, channels = array.shape
    top, left = (size - height) // 2, (size - width) // 2
    square = np.zeros((size, size, channels), np.uint8)
    square[top : top + height, left : left + width] = array
    return square


def _with_channels(array: Uint8Array) -> Uint8Array:
    return array[..., None] if array.ndim == 2 else array
