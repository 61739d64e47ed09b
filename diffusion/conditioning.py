"""Conditioning images: arrays of a model's height and width that the network gets beside x_t."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from diffusion.arrays import A, namespace


def enlarged(images: A, height: int, width: int) -> A:
    """Enlarge images bilinearly, as OpenAI's super-resolution models do: what `F.interpolate` computes without
    `align_corners`.

    Args:
        images: float32 [B, C, h, w], h at most `height` and w at most `width`.
        height: H.
        width: W.

    Returns:
        float32 [B, C, H, W].
    """
    if not isinstance(images, np.ndarray):
        return _along(_along(images, -2, height), -1, width)
    # Plane by plane: larger temporary arrays get new pages from the system each time, which takes longer than the sums
    result = np.empty((*images.shape[:2], height, width), dtype=images.dtype)
    for image, enlarged_image in zip(images, result, strict=True):
        for plane, enlarged_plane in zip(image, enlarged_image, strict=True):
            enlarged_plane[...] = _along(_along(plane, -2, height), -1, width)
    return result


def _along(images: A, axis: int, size: int) -> A:
    """Interpolate along one of the last two axes between the centres of pixels; repeat the outermost ones outside."""
    xp, count = namespace(images), images.shape[axis]
    if count == size:
        return images
    centres = np.maximum((np.arange(size) + 0.5) * (count / size) - 0.5, 0.0)
    low = np.minimum(centres.astype(np.int64), count - 1)

    def taken(array: A, places: npt.NDArray[np.int64]) -> A:
        return xp.take(array, xp.asarray(places, device=images.device), axis=axis)

    shares = (centres - low).astype(np.float32).reshape((size,) + (1,) * (-1 - axis))
    change = taken(images, np.minimum(np.arange(count) + 1, count - 1)) - images
    return taken(images, low) + xp.asarray(shares, device=images.device) * taken(change, low)
