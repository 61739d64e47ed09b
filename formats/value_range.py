"""Values of images: in the units of the data, and in those of the network, where the data spans [-1, 1].

Images of the data are [H, W, C], those of the network [C, H, W].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diffusion.config import CheckpointConfig
from diffusion.update import from_uint8_reversibly

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ValueRange:
    """The lowest and the highest value of the data, which are -1 and 1 for the network."""

    low: tuple[float, ...]
    """One for all channels, or one per channel."""
    high: tuple[float, ...]

    def data_of(self, images: npt.NDArray[Any]) -> FloatArray:
        """Return images as `formats.given_files` reads them, [..., C], in the units of the data."""
        if images.dtype not in (np.uint8, np.uint16):
            return images.astype(np.float32)
        share = images / np.iinfo(images.dtype).max
        values: FloatArray = (self._low + share * (self._high - self._low)).astype(np.float32)
        return values

    def to_network(self, images: npt.NDArray[Any]) -> FloatArray:
        """Return images as `formats.given_files` reads them, [n, H, W, C], in the units of the network, [n, C, H, W].

        Images of uint8 come back unchanged from `diffusion.update.to_uint8`.
        """
        if images.dtype == np.uint8:
            return from_uint8_reversibly(images)
        share = (self.data_of(images).astype(np.float64) - self._low) / (self._high - self._low)
        return np.ascontiguousarray((2 * share - 1).astype(np.float32).transpose(0, 3, 1, 2))

    def to_data(self, values: FloatArray) -> FloatArray:
        """Return an image of the network, [C, H, W], in the units of the data, [H, W, C]."""
        share = (values.transpose(1, 2, 0).astype(np.float64) + 1) / 2
        return np.ascontiguousarray((self._low + share * (self._high - self._low)).astype(np.float32))

    @property
    def _low(self) -> npt.NDArray[np.float64]:
        return np.array(self.low)

    @property
    def _high(self) -> npt.NDArray[np.float64]:
        return np.array(self.high)


def value_range_of(config: CheckpointConfig) -> ValueRange:
    """Return the value range of a model's data."""
    return _of_channels(config.channel_ranges)


def cond_range_of(config: CheckpointConfig) -> ValueRange:
    """Return the value range of the conditioning images in requests for a model that takes one.

    That of an upsampler's low-resolution images is the value range of the data.
    """
    return value_range_of(config) if config.model.low_res_size is not None else _of_channels(config.cond_channel_ranges)


def _of_channels(ranges: tuple[tuple[float, float], ...]) -> ValueRange:
    low, high = zip(*ranges, strict=True)
    return ValueRange(low, high)
