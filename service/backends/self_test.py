"""Start-up self-test: find the batch sizes whose results are bit-identical to each other.

The guarantee that the pixels of a seed do not depend on the batch relies on this test: only sizes that pass are run,
and other batches are padded to the next size that passed.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Generic
from weakref import WeakKeyDictionary

import numpy as np

from diffusion.arrays import A, namespace
from diffusion.config import ModelConfig
from diffusion.network_inputs import NetworkInputs, take_rows
from diffusion.noise import STREAM_X_T, normal
from diffusion.respacing import respace
from service.backends.base import RowNetwork
from service.backends.batch_sizes import largest_size, sizes_to_try
from service.errors import ModelError

log = logging.getLogger(__name__)

SLOW_TEST_S = 60.0
"""Expected seconds of a self-test from which the log announces it."""
LEAST_WIDTH = 2
"""Smallest IDDPM_MAX_ROWS."""

_found: WeakKeyDictionary[Any, dict[int, tuple[int, ...]]] = WeakKeyDictionary()
"""Results by network and width, cached because backend selection and the runner both request them."""


def invariant_batch_sizes(network: RowNetwork[A], width: int) -> tuple[int, ...]:
    """Return the largest set of batch sizes, ascending, whose rows equal each other bit for bit.

    Of sets with equally many sizes, the one with the largest size is returned. It may lack the full width; steps must
    then have fewer rows. If any size may be run, 1, 2, 3, 4, 6, 8, 12, 16, ... and the width are tested. Compiled sizes
    are tested with their rows in both orders, and an excluded one is logged as a warning. Each network is tested once
    per width.

    Raises:
        ModelError: an output is not finite, or a row's result depends on its place in the largest batch.
    """
    found = _found.setdefault(network, {})
    if width not in found:
        found[width] = _find_sizes(network, width)
    return found[width]


def _find_sizes(network: RowNetwork[A], width: int) -> tuple[int, ...]:
    name, compiled = network.description, network.batch_sizes
    largest = largest_size(compiled, width, name)
    rows: _TestRows[A] = _TestRows(network, largest)
    sizes = (*sizes_to_try(width), width) if compiled is None else compiled
    begun = time.monotonic()
    together = rows.results(largest)
    seconds = time.monotonic() - begun
    if seconds * (len(sizes) + 1) > SLOW_TEST_S:
        log.warning(
            "%s: the self-test takes about %.0f s more, because %d rows took %.0f s%s",
            *(name, seconds * len(sizes), largest, seconds),
            "; a smaller IDDPM_MAX_ROWS shortens it" if width > LEAST_WIDTH else "",
        )
    xp = namespace(together)
    if not bool(xp.all(xp.isfinite(together))):
        raise ModelError(f"{name}: the network's output is not finite: its weights are damaged, or overflow")
    if not rows.are_independent(largest, together):
        raise ModelError(f"{name}: a row's result depends on its place in the batch")
    sets: list[tuple[A, list[int]]] = []
    """Results of all rows, and the sizes that give them."""
    for size in reversed(sizes):
        results = together if size == largest else rows.results(size)
        if compiled is not None and size not in (1, largest) and not rows.are_independent(size, results):
            log.warning("%s: batch size %d excluded: a row's result depends on its place in the batch", name, size)
            continue
        equal = next((members for other, members in sets if rows.equal(results, other)), None)
        if equal is None:
            sets.append((results, [size]))
        else:
            equal.append(size)
    _, chosen = max(sets, key=lambda group: (len(group[1]), group[1][0]))
    _report(name, compiled, [members for _, members in sets], chosen, width)
    return tuple(sorted(chosen))


def _report(name: str, compiled: tuple[int, ...] | None, sets: list[list[int]], chosen: list[int], width: int) -> None:
    """Log what the choice of a set excludes."""
    if compiled is not None:
        for size in sorted(size for members in sets if members is not chosen for size in members):
            log.warning(
                "%s: batch size %d excluded: results are not bit-identical to batch size %d", name, size, chosen[0]
            )
        if len(chosen) == 1 and len(compiled) > 1:
            log.error("%s: no two batch sizes give bit-identical results; all are padded to %d", name, chosen[0])
    if chosen[0] < width:
        log.warning("%s: steps have at most %d rows instead of %d", name, chosen[0], width)


class _TestRows(Generic[A]):
    """Rows of noise with timesteps across the whole chain and different classes, and their results in one batch."""

    def __init__(self, network: RowNetwork[A], count: int) -> None:
        model, xp, device = network.config.model, network.xp, network.device
        self._seeds: A = xp.arange(count, dtype=xp.int64, device=device)
        t_model = respace(network.config.diffusion).t_model
        spread = t_model[np.linspace(0, len(t_model) - 1, count).astype(np.int64)]
        cond_shape = model.cond_shape if isinstance(model, ModelConfig) else None
        self._network: RowNetwork[A] = network
        self._inputs: NetworkInputs[A] = NetworkInputs(
            x_t=normal(self._seeds, self._seeds, self._seeds, STREAM_X_T, model.image_shape),
            emb_t=network.embed_timesteps(xp.asarray(spread, dtype=xp.float32, device=device)),
            y=None if model.num_classes is None else self._seeds % model.num_labels,
            cond=None
            if cond_shape is None
            else normal(self._seeds, self._seeds, self._seeds + 1, STREAM_X_T, cond_shape),
        )

    def results(self, size: int) -> A:
        """Return the results of all rows in batches of this size; the last batch may overlap the one before."""
        xp, count = namespace(self._seeds), len(self._seeds)
        parts: list[A] = [self._run(self._seeds[first : first + size]) for first in range(0, count - size + 1, size)]
        if rest := count % size:
            parts.append(self._run(self._seeds[count - size :])[size - rest :])
        return xp.concat(parts)

    def are_independent(self, size: int, results: A) -> bool:
        """Return whether batches of this size give the same results with their rows in reverse order."""
        xp = namespace(self._seeds)
        for first in range(0, len(self._seeds) - size + 1, size):
            rows = self._seeds[first : first + size]
            out = xp.flip(self._run(xp.flip(rows, axis=0)), axis=0)
            if not bool(xp.all(out == results[first : first + size])):
                return False
        return True

    def equal(self, results: A, others: A) -> bool:
        """Return whether two results are bit-identical."""
        return bool(namespace(results).all(results == others))

    def _run(self, rows: A) -> A:
        return self._network(take_rows(self._inputs, rows))
