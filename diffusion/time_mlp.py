"""The network's time MLP in numpy, for runtimes whose graphs take emb_t as an input."""

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
"""Parameter names as in a checkpoint; each dimension is an index into (4C, C)."""
MAX_PERIOD = 10000.0


@dataclass(frozen=True)
class TimeMLP:
    """The sinusoidal timestep embedding and the MLP at the input of the UNet and the classifier.

    Computed in float64 and rounded, so a timestep's embedding does not depend on the other rows of its batch.
    Frequencies and angles are rounded to float32 as in the network: the last bit of a frequency changes an angle by
    2e-4 at t = 3999. The remaining difference is the last bit of float32's exp, which varies between libraries and
    processors.
    """

    weights: Mapping[str, Float32Array]

    def __post_init__(self) -> None:
        shapes = {name: self.weights[name].shape for name in WEIGHTS if name in self.weights}
        wide, narrow = shapes.get("time_embed.0.weight", (0, 0))
        wanted = {name: tuple((wide, narrow)[i] for i in dims) for name, dims in WEIGHTS.items()}
        if shapes != wanted or len(self.weights) != len(WEIGHTS) or not narrow:
            raise ValueError(f"a time MLP must have {', '.join(WEIGHTS)} in matching shapes; got {shapes}")

    def __call__(self, t: Float32Array) -> Float32Array:
        """Return the embedding, float32 [n, 4C], of n timestep inputs [n] (`Process.t_model`)."""
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
        """Read a file written by `write`; nothing is unpickled.

        Raises:
            ValueError: the file cannot be read, or holds no time MLP.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                return cls({name: archive[name] for name in archive.files})
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} holds no time MLP: {error}") from error
