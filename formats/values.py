"""Convert arrays between the units of a model's data and the units of its network, where data spans [-1, 1].

`CheckpointConfig.value_range` defines the data's units. Eight-bit arrays are another view of the same images: 0 and
255 are the ends of the range, whatever it is. Arrays have channels last outside the network, and first in it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from diffusion.arrays import to_numpy
from diffusion.config import CheckpointConfig
from diffusion.update import from_uint8_reversibly

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]


def to_network(values: npt.NDArray[Any], config: CheckpointConfig) -> Float32Array:
    """Convert images to the units of the network, -1 for the low end of the value range and 1 for the high end.

    Values outside the range are not clamped.

    Args:
        values: [B, H, W, C]: numbers in the units of the data; uint8 arrays are eight-bit pixels, of which 0 and 255
            are the ends of the range, and `to_uint8` converts the result back to the same pixels.
        config: the model's; C must be its number of channels.

    Returns:
        float32 [B, C, H, W].

    Raises:
        ValueError: the shape has another number of axes or channels, or the values are not real numbers.
    """
    _check_channels(values.shape, values.shape[-1:], config)
    if values.dtype == np.uint8:
        return from_uint8_reversibly(values)
    if values.dtype.kind not in "fiu":
        raise ValueError(f"values must be real numbers; got an array of {values.dtype}")
    low, high = _range(config)
    scaled = (values.astype(np.float64) - low) / (high - low) * 2 - 1
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), dtype=np.float32)


def from_network(x: Any, config: CheckpointConfig) -> Float32Array:
    """Convert the network's images [B, C, H, W] to the units of the data, without clamping.

    Converting values with `to_network` and back changes them by at most one rounding of float32 at the size of the
    range: 2e-7 times the larger of |low| and |high|.

    Args:
        x: an array or tensor in the units where data spans [-1, 1].
        config: the model's.

    Returns:
        float32 [B, H, W, C].

    Raises:
        ValueError: the shape has another number of axes or channels.
    """
    array = to_numpy(x)
    _check_channels(array.shape, array.shape[1:2], config)
    low, high = _range(config)
    scaled = low + (array.transpose(0, 2, 3, 1).astype(np.float64) + 1) / 2 * (high - low)
    return np.ascontiguousarray(scaled, dtype=np.float32)


def _range(config: CheckpointConfig) -> tuple[Float64Array, Float64Array]:
    """Return low and high, each [C]."""
    pairs = np.array(config.channel_ranges, dtype=np.float64)
    return pairs[:, 0], pairs[:, 1]


def _check_channels(shape: tuple[int, ...], channels: tuple[int, ...], config: CheckpointConfig) -> None:
    wanted = config.model.image_channels
    if len(shape) != 4 or channels != (wanted,):
        raise ValueError(f"values must have 4 axes and {wanted} channels; got shape {list(shape)}")
