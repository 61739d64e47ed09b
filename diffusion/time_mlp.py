"""The network's time MLP without the network: numpy, for runtimes that are given emb_t."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]

WEIGHTS = {
    "time_embed.0.weight": (0, 1),
    "time_embed.0.bias": (0,),
    "time_embed.2.weight": (0, 0),
    "time_embed.2.bias": (0,),
}
"""Names, as in a checkpoint, and which of (4C, C) each dimension is."""
MAX_PERIOD = 10000.0


@dataclass(frozen=True)
class TimeMLP:
    """Sinusoidal embedding of timesteps, and the MLP that UNet and classifier begin with.

    Computed in float64 and rounded, so that a timestep's embedding does not depend on those computed with it.
    Frequencies and angles are rounded as the network rounds them in float32: a frequency's last bit is worth 2e-4 of an
    angle at t = 3999. What is left is the last bit of float32's exp, which differs between libraries and processors.
    """

    weights: Mapping[str, Float32Array]

    def __post_init__(self) -> None:
        shapes = {name: self.weights[name].shape for name in WEIGHTS if name in self.weights}
        wide, narrow = shapes.get("time_embed.0.weight", (0, 0))
        wanted = {name: tuple((wide, narrow)[i] for i in dims) for name, dims in WEIGHTS.items()}
        if shapes != wanted or len(self.weights) != len(WEIGHTS) or not narrow:
            raise ValueError(f"a time MLP has {', '.join(WEIGHTS)} in matching shapes; got {shapes}")

    def __call__(self, t: Float32Array) -> Float32Array:
        """Embed what the network is told of n timesteps, [n] (`Process.t_model`): float32 [n, 4C]."""
        w0, b0, w2, b2 = (self.weights[name].astype(np.float64) for name in WEIGHTS)
        dim = w0.shape[1]
        half = dim // 2
        exponents = np.float32(-np.log(MAX_PERIOD)) * np.arange(half, dtype=np.float32) / np.float32(half)
        frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
        angles = (t[:, None] * frequencies[None]).astype(np.float64)
        embedding = np.concatenate([np.cos(angles), np.sin(angles), np.zeros((len(t), dim % 2))], axis=1)
        hidden = embedding @ w0.T + b0
        silu = hidden / (1 + np.exp(-hidden))
        return (silu @ w2.T + b2).astype(np.float32)

    def write(self, path: Path) -> None:
        """Write the weights as an npz file."""
        arrays: dict[str, Any] = {name: self.weights[name] for name in WEIGHTS}
        np.savez(path, **arrays)

    @classmethod
    def read(cls, path: Path) -> TimeMLP:
        """Read what `write` wrote; nothing is unpickled.

        Raises:
            ValueError: a file that is no such thing.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                return cls({name: archive[name] for name in archive.files})
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} holds no time MLP: {error}") from error
