"""The inputs of a network or a noisy classifier, as one named tuple for all backends."""

from __future__ import annotations

from typing import Generic, NamedTuple

from diffusion.arrays import A


class NetworkInputs(NamedTuple, Generic[A]):
    """A batch of n rows, in the order in which `UNet.forward_emb` takes them."""

    x_t: A
    """Noisy images, float32 [n, C, H, W]."""
    emb_t: A
    """Embedded timesteps, float32 [n, emb_channels]."""
    y: A | None
    """Labels, int64 [n]; None for an unconditional network."""
    cond: A | None = None
    """Conditioning images, float32 [n, C', H, W] (`ModelConfig.cond_shape`); None for a network without."""


def take_rows(inputs: NetworkInputs[A], rows: A | slice) -> NetworkInputs[A]:
    """Return some of the rows, by index or slice."""
    return NetworkInputs._make(None if array is None else array[rows] for array in inputs)
