"""The form in which noise and update run on a device queue: one compiled kernel where it was tested equal, or separate
operations."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from diffusion.arrays import to_numpy
from diffusion.plans import PLAN_COLUMNS
from service.backends.base import Denoiser
from service.backends.device_queue import DeviceQueue
from service.engine.runners.step import add_noise_and_advance

log = logging.getLogger(__name__)

FUSED_TOLERANCE = 1e-5
"""Tolerance between noise and update as one fused kernel and as separate ones: allows rounding, but no wrong noise."""


class UpdateForm(NamedTuple):
    """How noise and update are computed."""

    advance: Callable[..., Any]
    """As `add_noise_and_advance`."""
    name: str
    """`fused` or `separate`; part of the numerics_id, as the two are rounded differently."""


def separate(queue: DeviceQueue[Any]) -> UpdateForm:
    """Return the form of separate operations, with the noise of the device."""
    return UpdateForm(partial(add_noise_and_advance, normal=queue.normal), "separate")


def choose_update(queue: DeviceQueue[Any], denoiser: Denoiser[Any], rows: int) -> UpdateForm:
    """Return the fused form if the device has one that gives the results of the separate one on random rows.

    Logs a warning if the device has one that cannot be compiled or gives other results.

    Args:
        queue: queue of the device.
        denoiser: the model.
        rows: of the comparison.
    """
    fused = queue.fuse(add_noise_and_advance)
    if fused is None:
        return separate(queue)
    try:
        problem = None if are_equal(fused, queue, denoiser, rows) else "it gives other results than separate ones"
    except Exception as error:  # no C compiler, no folder for its cache, a version of Triton that does not fit, ...
        problem = str(error)
    if problem is None:
        return UpdateForm(fused, "fused")
    log.warning("%s: noise and update run without a fused kernel, more slowly: %s", denoiser.description, problem)
    return separate(queue)


def are_equal(fused: Callable[..., Any], queue: DeviceQueue[Any], denoiser: Denoiser[Any], rows: int) -> bool:
    """Return whether a fused kernel gives the results of separate operations for a number of rows, with and without
    a row that is not finite."""
    draw = np.random.default_rng(rows)
    shape = (rows, *denoiser.config.model.image_shape)
    lines = queue.send(draw.random((rows, len(PLAN_COLUMNS)), dtype=np.float32))
    numbers = queue.send(np.arange(rows))
    for broken in (False, True):
        out = draw.standard_normal(shape, dtype=np.float32)
        if broken:
            out[0, 0, 0, 0] = np.inf
        images = [queue.send(draw.standard_normal(shape, dtype=np.float32)) for _ in range(4)]
        x_t, x0_prev, var_values, grad = images
        grad = None if queue.classifier is None else grad
        arguments = (lines, x_t, x0_prev, queue.send(out), var_values, (numbers, numbers, numbers), grad)
        results = [update(*arguments) for update in (fused, separate(queue).advance)]
        (ok, x_prev), (expected_ok, expected) = ((to_numpy(step.ok), to_numpy(step.x_prev)) for step in results)
        if not np.array_equal(ok, expected_ok):
            return False
        if not np.allclose(x_prev[ok], expected[ok], rtol=FUSED_TOLERANCE, atol=FUSED_TOLERANCE):
            return False
    return True
