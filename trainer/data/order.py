"""Order of the training images: a function of a seed."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from trainer.data.dataset import IntArray


def batch_indices(seed: int, images_seen: int, batch_size: int, num_images: int) -> IntArray:
    """Return the image indices of the next batch: epochs are permutations, each a function of (seed, epoch).

    Args:
        seed: of the run.
        images_seen: images already trained on; the batch contains positions images_seen.. of the infinite sequence.
        batch_size: length of the result.
        num_images: N.
    """
    positions = np.arange(images_seen, images_seen + batch_size)
    epochs = positions // num_images
    indices = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _epoch_order(seed, int(epoch), num_images)[positions[here] % num_images]
    return indices


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_images: int) -> IntArray:
    return np.random.default_rng((seed, 0, epoch)).permutation(num_images)
