"""Start-up self-test: which batch sizes give a row the same bits as the full width does.

The promise that a seed's pixels do not depend on the batch rests on it: only sizes that pass are run, everything
else is padded up to the next one that does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.noise import STREAM_X_T
from diffusion.noise_torch import normal
from service.backends.base import Denoiser


def invariant_batch_sizes(denoiser: Denoiser, width: int) -> tuple[int, ...]:
    """Return the batch sizes 1..width, ascending, whose rows equal those of the full width bit for bit.

    The full width is always among them. Costs one network call per size.
    """
    model = denoiser.config.model
    shape = (model.image_channels, model.image_size, model.image_size)
    seeds = torch.arange(width)
    x_t = normal(seeds, seeds, seeds, STREAM_X_T, shape)
    last = denoiser.config.diffusion.num_timesteps - 1
    emb_t = denoiser.embed_timesteps(torch.linspace(0, last, width))
    y = None if model.num_classes is None else seeds % model.num_labels

    def run(rows: Tensor) -> Tensor:
        return denoiser(x_t[rows], emb_t[rows], None if y is None else y[rows])

    everything = torch.arange(width)
    full = run(everything)
    if not torch.equal(run(everything.flip(0)).flip(0), full):
        raise RuntimeError(f"{denoiser.description}: a row's result depends on its place in the batch")
    passed = [size for size in range(1, width) if torch.equal(run(everything[:size]), full[:size])]
    return (*passed, width)
