"""Start-up self-test: which batch sizes give a row the same bits as the full width does.

The promise that a seed's pixels do not depend on the batch rests on it: only sizes that pass are run, everything
else is padded up to the next one that does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.noise import STREAM_X_T
from diffusion.noise_torch import normal
from diffusion.respacing import respace
from service.backends.base import Denoiser


def invariant_batch_sizes(denoiser: Denoiser, width: int) -> tuple[int, ...]:
    """Return batch sizes, ascending, whose rows equal those of the full width bit for bit.

    The full width is always among them. Tried are 1, 2, 3, 4, 6, 8, 12, 16, ...: one network call each, twice the
    full width's rows in all and then some.

    Raises:
        RuntimeError: a row's result depends on its place in the batch.
    """
    model = denoiser.config.model
    shape = (model.image_channels, model.image_size, model.image_size)
    seeds = torch.arange(width)
    x_t = normal(seeds, seeds, seeds, STREAM_X_T, shape)
    told = torch.from_numpy(respace(denoiser.config.diffusion).model_t)
    emb_t = denoiser.embed_timesteps(told[torch.linspace(0, len(told) - 1, width).long()])
    y = None if model.num_classes is None else seeds % model.num_labels

    def run(rows: Tensor) -> Tensor:
        return denoiser(x_t[rows], emb_t[rows], None if y is None else y[rows])

    everything = torch.arange(width)
    full = run(everything)
    if not torch.equal(run(everything.flip(0)).flip(0), full):
        raise RuntimeError(f"{denoiser.description}: a row's result depends on its place in the batch")
    passed = [size for size in candidate_sizes(width) if torch.equal(run(everything[:size]), full[:size])]
    return (*passed, width)


def candidate_sizes(width: int) -> list[int]:
    """Return the powers of two below a width, and one and a half times each."""
    powers = [1 << k for k in range(width.bit_length())]
    return [size for size in sorted({*powers, *(3 * p // 2 for p in powers)}) if size < width]
