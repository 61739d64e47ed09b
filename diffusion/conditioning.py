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
    return _along(_along(images, 2, height), 3, width)


def _along(images: A, axis: int, size: int) -> A:
    """Interpolate along one axis between the centres of pixels; outside the outermost ones, repeat them."""
    xp, count = namespace(images), images.shape[axis]
    if count == size:
        return images
    centres = np.maximum((np.arange(size) + 0.5) * (count / size) - 0.5, 0.0)
    low = np.minimum(centres.astype(np.int64), count - 1)
    shape = [size if k == axis else 1 for k in range(4)]

    def taken(places: npt.NDArray[np.int64]) -> A:
        return xp.take(images, xp.asarray(places, device=images.device), axis=axis)

    share = xp.asarray((centres - low).astype(np.float32).reshape(shape), device=images.device)
    below, above = taken(low), taken(np.minimum(low + 1, count - 1))
    return below + share * (above - below)
