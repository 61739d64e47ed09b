"""The gradient noise scale, from gradients of two batch sizes (McCandlish et al. 2018, arXiv:1812.06162, A.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FloatArray = npt.NDArray[np.float64]


class Estimate(NamedTuple):
    """A value with its standard error; the error is NaN for a single batch."""

    value: float
    std_error: float


class NoiseScale(NamedTuple):
    """The gradient noise of a loss."""

    noise_scale: Estimate
    """tr(Sigma) / |G|^2, in images: the batch size at which noise and gradient are equally large; infinite where the
    estimate of |G|^2 is not positive, so that the gradient is lost in the noise."""
    trace: Estimate
    """tr(Sigma): variance of the gradient of one image, summed over the parameters."""
    gradient_squared: Estimate
    """|G|^2: squared norm of the expected gradient, without the part that noise adds to it."""


def squared_norms(parameters: Sequence[Tensor], losses: Iterable[Tensor]) -> tuple[float, float]:
    """Return the squared norms of gradients of small batches (their mean) and of the batch they form.

    Args:
        parameters: differentiated by.
        losses: the mean loss of each small batch, all of one size; taken one at a time.
    """
    total = [torch.zeros_like(parameter) for parameter in parameters]
    small, count = 0.0, 0
    for loss in losses:
        gradient = torch.autograd.grad(loss, parameters)
        small += _squared_norm(gradient)
        count += 1
        for summed, part in zip(total, gradient, strict=True):
            summed += part
    return small / count, _squared_norm(total) / count**2


def noise_scale(norms: FloatArray, small: int, big: int) -> NoiseScale:
    """Estimate the noise scale from batches; the standard errors are those of the jackknife over batches.

    Args:
        norms: float64 [K, 2]: the result of `squared_norms` for each of K independent batches.
        small: images of a small batch.
        big: images of a batch.
    """
    if not 1 <= small < big:
        raise ValueError(f"the small batch must be smaller than the big one; got {small} and {big}")

    def trace(mean: FloatArray) -> float:
        return estimates(float(mean[0]), float(mean[1]), small, big)[0]

    def gradient_squared(mean: FloatArray) -> float:
        return estimates(float(mean[0]), float(mean[1]), small, big)[1]

    def ratio(mean: FloatArray) -> float:
        below = gradient_squared(mean)
        return trace(mean) / below if below > 0 else math.inf

    return NoiseScale(*(_jackknife(norms, statistic) for statistic in (ratio, trace, gradient_squared)))


def estimates(small_norm: float, big_norm: float, small: int, big: int) -> tuple[float, float]:
    """Return unbiased estimates of tr(Sigma) and |G|^2 (A.1).

    Args:
        small_norm: mean squared norm of the gradients of small batches.
        big_norm: mean squared norm of those of big batches.
        small: images of a small batch.
        big: images of a big batch.
    """
    trace = (small_norm - big_norm) / (1 / small - 1 / big)
    return trace, (big * big_norm - small * small_norm) / (big - small)


def _jackknife(norms: FloatArray, statistic: Callable[[FloatArray], float]) -> Estimate:
    count = len(norms)
    value = statistic(norms.mean(axis=0))
    if count < 2:
        return Estimate(value, math.nan)
    left_out = [statistic((norms.sum(axis=0) - row) / (count - 1)) for row in norms]
    if not np.isfinite([value, *left_out]).all():
        return Estimate(value, math.inf)
    return Estimate(value, float(np.std(left_out) * math.sqrt(count - 1)))


def _squared_norm(gradient: Sequence[Tensor]) -> float:
    return float(torch.stack([part.double().square().sum() for part in gradient]).sum())
