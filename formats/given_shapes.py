"""The shape of an image or mask that comes from outside: the rule, and how another one is fitted to it."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from diffusion.quoting import alternatives

Fit = Literal["crop", "pad", "resize"]
Shape = tuple[int, int, int]
"""Height, width, channels."""
Array = npt.NDArray[Any]

MAX_PICTURE_PIXELS = 1 << 24
"""Most pixels of a picture that is fitted to a model's shape."""
MAX_SIDE = 32768
"""Longest side of an image that is fitted."""
MAX_SCALED_PIXELS = 1 << 22
"""Most pixels of an image that is scaled to be cropped, unless four times the model's are more."""
FITS: tuple[Fit, ...] = ("crop", "pad", "resize")


class GivenFileError(ValueError):
    """A file cannot be read, or is not what is wanted; the message states the rule."""


def check_shape(shape: tuple[int, ...], wanted: Shape, most: int, fit: Fit | None = None) -> None:
    """Check an array's shape: [H, W, C], [n, H, W, C], or either without C if that is 1.

    Raises:
        GivenFileError: it is another one; names the shapes that are wanted.
    """
    images = _with_all_axes(shape, wanted)
    if images is None or (fit is None and images[1:] != wanted) or images[3] != wanted[2] or min(images) < 1:
        cure = f"; or set fit to {alternatives(FITS)}" if images is not None and images[3] == wanted[2] else ""
        raise GivenFileError(
            f"must have shape {[*wanted]} (height, width, channels), or {['n', *wanted]} for one per image"
            f"{cure}; got {[*shape]}".replace("'", "")
        )
    if len(shape) == 3 and images[3] == 1 and shape[2] in (3, 4) and shape[2] != wanted[1]:  # only with `fit`
        raise GivenFileError(
            f"must be grey, and shape {[*shape]} looks like one image of {shape[2]} channels; {shape[0]} grey images "
            f"{shape[2]} pixels wide have shape {[*shape, 1]}"
        )
    if images[0] > most:
        raise GivenFileError(f"must hold at most {most} arrays; got {images[0]}")
    if images[0] * images[1] * images[2] > max(MAX_PICTURE_PIXELS, most * wanted[0] * wanted[1]):
        raise GivenFileError(f"must have at most {MAX_PICTURE_PIXELS} pixels; got shape {[*shape]}")


def batched(array: Array, wanted: Shape) -> Array:
    """Return an array that `check_shape` accepts as [n, H, W, C]."""
    return array.reshape(_with_all_axes(array.shape, wanted) or array.shape)


def _with_all_axes(shape: tuple[int, ...], wanted: Shape) -> tuple[int, int, int, int] | None:
    """Return a shape as n, H, W, C; None if it cannot be one."""
    if len(shape) == 4:
        return shape[0], shape[1], shape[2], shape[3]
    if len(shape) == 3 and (wanted[2] != 1 or shape[2] == 1):
        return 1, shape[0], shape[1], shape[2]
    if len(shape) == 3:
        return shape[0], shape[1], shape[2], 1
    return (1, *shape, 1) if len(shape) == 2 and wanted[2] == 1 else None


def fitted(arrays: Array, shape: Shape, fit: Fit | None, *, nearest: bool = False) -> Array:
    """Fit arrays [n, H, W, C] to a shape.

    Raises:
        GivenFileError: their sides are too long, or they are so long and narrow that scaling before cropping would take
            too much memory.
    """
    if fit is None or arrays.shape[1:] == shape:
        return arrays
    if max(arrays.shape[1:3]) > max(MAX_SIDE, *shape[:2]):  # Pillow's tables grow with the sides
        raise GivenFileError(f"must be at most {MAX_SIDE} pixels wide and high to be fitted; got {_sides(arrays)}")
    return np.stack([_fitted_one(array, shape, fit, nearest=nearest) for array in arrays])


def _sides(arrays: Array) -> str:
    return f"{arrays.shape[2]}x{arrays.shape[1]}"


def _fitted_one(array: Array, shape: Shape, fit: Fit, *, nearest: bool) -> Array:
    (height, width), (rows, columns) = shape[:2], array.shape[:2]
    if fit == "resize":
        return _resized(array, height, width, nearest=nearest)
    choose = max if fit == "crop" else min
    scale = choose(height / rows, width / columns)
    size = max(1, round(rows * scale)), max(1, round(columns * scale))
    if size[0] * size[1] > max(MAX_SCALED_PIXELS, 4 * height * width):
        raise GivenFileError(
            f"is too long and narrow for fit=crop: {columns}x{rows} pixels would be scaled to {size[1]}x{size[0]} "
            f"before they are cropped; crop it, or set fit to {alternatives(FITS[1:])}"
        )
    scaled = _resized(array, *size, nearest=nearest)
    above, left = (height - scaled.shape[0]) // 2, (width - scaled.shape[1]) // 2
    if fit == "crop":
        return scaled[-above : height - above, -left : width - left].copy()  # not a view: `scaled` may be large
    below, right = height - scaled.shape[0] - above, width - scaled.shape[1] - left
    return np.pad(scaled, ((above, below), (left, right), (0, 0)), mode="edge")


def _resized(array: Array, height: int, width: int, *, nearest: bool) -> Array:
    filtering = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
    channels = [
        np.asarray(Image.fromarray(array[..., k].astype(np.float32)).resize((width, height), filtering))
        for k in range(array.shape[2])
    ]
    resized = np.stack(channels, axis=-1)
    return resized if array.dtype.kind == "f" else np.rint(resized).astype(array.dtype)
