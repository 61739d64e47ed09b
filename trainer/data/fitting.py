"""Scale and crop an image of any size to the model's size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import numpy as np
from PIL import Image

from diffusion.config import ImageSize, size_pair
from trainer.data.dataset import Float32Array, Uint8Array
from trainer.data.options import SmallImages

LONGEST_ASPECT = 16
"""Only the middle of an image with a larger aspect ratio is scaled: the rest would be cropped, and scaling it
takes memory in proportion to the length."""
LEAST_CROPPED = 0.8
"""A random crop shows at least this fraction of the shorter side."""
Pixels = TypeVar("Pixels", Uint8Array, Float32Array)


def fit_image(
    image: Image.Image, size: ImageSize, small_images: SmallImages, draws: Sequence[float] | None = None
) -> Uint8Array:
    """Return the middle of an image as an array [height, width, channels], or a random crop.

    Scaling is that of OpenAI's `ImageDataset` (halve by averaging while twice too large, then bicubic until the
    shorter side fits, then crop the centre), with bit-identical results for squares. The random crop is that of
    guided-diffusion's `random_crop_arr`: the image becomes up to 1 / 0.8 times as large before it is cropped at random.
    For other shapes, the image is scaled until both sides fit.

    Args:
        image: grey or RGB, 8 bits; or one band of floating-point values, the result is then float32.
        size: size of the result in pixels.
        small_images: how an image is handled that has a side below that of `size`.
        draws: three uniform numbers in [0, 1) that determine scale, top and left of a random crop; None: the centre.
    """
    height, width = size_pair(size)
    if (image.width < width or image.height < height) and small_images == "frame":
        return _frame(np.asarray(_crop(image, min(image.width, width), min(image.height, height))), height, width)
    longest_width = LONGEST_ASPECT * image.height * width // height
    longest_height = LONGEST_ASPECT * image.width * height // width
    image = _crop(image, min(image.width, longest_width), min(image.height, longest_height))
    side = min(height, width)
    shorter = side if draws is None else side + _pick(draws[0], math.ceil(side / LEAST_CROPPED) - side + 1)
    tall, wide = height * shorter / side, width * shorter / side
    while image.height >= 2 * tall and image.width >= 2 * wide:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(tall / image.height, wide / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    if draws is None:
        return _with_channels(np.asarray(_crop(image, width, height)))
    top, left = _pick(draws[1], image.height - height + 1), _pick(draws[2], image.width - width + 1)
    return _with_channels(np.asarray(image.crop((left, top, left + width, top + height))))


def fit_array(
    array: Pixels, size: ImageSize, small_images: SmallImages, draws: Sequence[float] | None = None
) -> Pixels:
    """Return the middle of an array [H, W, C] as [height, width, C]; channels are independent; none is transparency.

    Args:
        array: uint8, or float32 in [-1, 1]; what scaling makes exceed the range is clipped to it, as in 8 bits.
        size: size of the result in pixels.
        small_images: how an image is handled that has a side below that of `size`.
        draws: three uniform numbers in [0, 1) that determine a random crop; None: the centre.
    """
    if array.shape[:2] == size_pair(size) and draws is None:
        return array
    if array.shape[-1] == 3 and array.dtype == np.uint8:  # Pillow also scales the three bands of RGB separately
        return cast("Any", fit_image(Image.fromarray(array), size, small_images, draws))
    bands = [fit_image(Image.fromarray(array[..., band]), size, small_images, draws) for band in range(array.shape[-1])]
    fitted: Any = np.concatenate(bands, axis=-1)
    return fitted if fitted.dtype == np.uint8 else fitted.clip(-1, 1)


def _pick(draw: float, count: int) -> int:
    """Return an integer in 0..count-1 for a uniform number in [0, 1)."""
    return math.floor(draw * count)


def _crop(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _frame(array: Uint8Array, height: int, width: int) -> Uint8Array:
    array = _with_channels(array)
    top, left = (height - array.shape[0]) // 2, (width - array.shape[1]) // 2
    framed = np.full((height, width, array.shape[2]), 0 if array.dtype == np.uint8 else -1, array.dtype)
    framed[top : top + array.shape[0], left : left + array.shape[1]] = array
    return framed


def _with_channels(array: Uint8Array) -> Uint8Array:
    return array[..., None] if array.ndim == 2 else array
