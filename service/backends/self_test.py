"""Start-up self-test: find the batch sizes whose results are bit-identical to those of the largest one.

The guarantee that the pixels of a seed do not depend on the batch relies on this test: only sizes that pass are run,
and other batches are padded to the next size that passed.
"""

from __future__ import annotations

import logging
from typing import Any, Generic
from weakref import WeakKeyDictionary

import numpy as np

from diffusion.arrays import A, namespace
from diffusion.network_inputs import NetworkInputs, take_rows
from diffusion.noise import STREAM_X_T, normal
from diffusion.respacing import respace
from service.backends.base import RowNetwork
from service.backends.batch_sizes import largest_size, sizes_to_try

log = logging.getLogger(__name__)

_found: WeakKeyDictionary[Any, dict[int, tuple[int, ...]]] = WeakKeyDictionary()
"""Results by network and width, cached because backend selection and the runner both request them."""


def invariant_batch_sizes(network: RowNetwork[A], width: int) -> tuple[int, ...]:
    """Return batch sizes, ascending, whose rows equal those of the largest one bit for bit.

    The largest size is always included: the full width, or the largest size that the backend compiled. If any size
    may be run, 1, 2, 3, 4, 6, 8, 12, 16, ... are tested, and those that differ are excluded. Compiled sizes are tested
    with their rows in both orders, and an excluded one is logged as a warning. Each network is tested once per width.

    Raises:
        RuntimeError: a row's result depends on its place in the largest batch.
    """
    found = _found.setdefault(network, {})
    if width not in found:
        found[width] = _find_sizes(network, width)
    return found[width]


def _find_sizes(network: RowNetwork[A], width: int) -> tuple[int, ...]:
    compiled = network.batch_sizes
    largest = largest_size(compiled, width, network.description)
    rows: _TestRows[A] = _TestRows(network, largest)
    if not rows.agree(largest, backwards=True):
        raise RuntimeError(f"{network.description}: a row's result depends on its place in the batch")
    if compiled is None:
        return (*(size for size in sizes_to_try(width) if rows.agree(size)), width)

    passed: list[int] = [
        size for size in compiled[:-1] if rows.agree(size) and (size == 1 or rows.agree(size, backwards=True))
    ]
    for size in sorted(set(compiled[:-1]) - set(passed)):
        log.warning(
            "%s: batch size %d excluded: results are not bit-identical to batch size %d",
            network.description,
            size,
            largest,
        )
    return (*passed, largest)


class _TestRows(Generic[A]):
    """Rows of noise with timesteps across the whole chain and different classes, and their results in one batch."""

    def __init__(self, network: RowNetwork[A], count: int) -> None:
        model, xp, device = network.config.model, network.xp, network.device
        self._seeds: A = xp.arange(count, dtype=xp.int64, device=device)
        t_model = respace(network.config.diffusion).t_model
        spread = t_model[np.linspace(0, len(t_model) - 1, count).astype(np.int64)]
        self._network: RowNetwork[A] = network
        self._inputs: NetworkInputs[A] = NetworkInputs(
            x_t=normal(self._seeds, self._seeds, self._seeds, STREAM_X_T, model.image_shape),
            emb_t=network.embed_timesteps(xp.asarray(spread, dtype=xp.float32, device=device)),
            y=None if model.num_classes is None else self._seeds % model.num_labels,
        )
        self._together: A = self._run(self._seeds)

    def agree(self, size: int, *, backwards: bool = False) -> bool:
        """Return whether batches of this size (optionally reversed) reproduce the results of the single large batch."""
        xp = namespace(self._seeds)
        for first in range(0, len(self._seeds) - size + 1, size):
            rows = self._seeds[first : first + size]
            out = xp.flip(self._run(xp.flip(rows, axis=0)), axis=0) if backwards else self._run(rows)
            if not bool(xp.all(out == self._together[first : first + size])):
                return False
        return True

    def _run(self, rows: A) -> A:
        return self._network(take_rows(self._inputs, rows))
