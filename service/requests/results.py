"""Results of the engine as arrays: in the units of the data, or in those of the network."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from diffusion.update import to_uint8
from formats.value_range import ValueRange
from service.engine.request import ImageParams, ImageResult

Pixels = npt.NDArray[Any]
"""uint8, or float32 in the formats of arrays."""


def output_of(params: ImageParams, result: ImageResult, values: ValueRange) -> Pixels:
    """Return a finished image: uint8 pixels, or float32 in the units of the data, [H, W, C].

    Values that a mask keeps are those that were given, bit for bit.

    Raises:
        ValueError: the image has neither.
    """
    if result.pixels is not None:
        return result.pixels
    if result.values is None:
        raise ValueError(f"image {result.position} of {result.request_id} has no pixels")
    data, given = values.to_data(result.values), params.given
    if given is not None and given.mask is not None and given.original is not None:
        data = np.where(given.mask[0, :, :, None] == 0, given.original, data)
    return data


def eight_bits_of(result: ImageResult) -> npt.NDArray[np.uint8]:
    """Return a finished image with eight bits, whichever output was asked for: uint8 [H, W, C].

    Raises:
        ValueError: the image has neither pixels nor values.
    """
    if result.pixels is not None:
        return result.pixels
    if result.values is None:
        raise ValueError(f"image {result.position} of {result.request_id} has no pixels")
    return to_uint8(result.values[None])[0]


def network_values(result: ImageResult) -> npt.NDArray[np.float32]:
    """Return the values of a finished encoding or raw call in the units of the network, float32 [H, W, C].

    Raises:
        ValueError: the output is not values.
    """
    if result.values is None:
        raise ValueError(f"image {result.position} of {result.request_id} has no values")
    return np.ascontiguousarray(result.values.transpose(1, 2, 0), dtype=np.float32)
