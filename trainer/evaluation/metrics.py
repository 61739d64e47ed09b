"""Metrics of sets of images, computed from features: FID and sFID, Inception score, KID, precision and recall.

The formulas of the Fréchet distance, the Inception score, precision and recall are those of guided-diffusion's
evaluator. The caller selects the network of the features; results from different networks are not comparable. All
results are computed in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]
Float64Array = npt.NDArray[np.float64]

NEIGHBOURS = 3
"""Neighbour whose distance is the radius around a point of a manifold."""
BLOCK = 1000
"""Rows of a matrix of distances that are in memory at a time."""
IS_SPLIT = 5000
"""Images per part of the Inception score, as in guided-diffusion's evaluator."""
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000


class Coverage(NamedTuple):
    """Precision and recall of two sets (Kynkäänniemi et al. 2019, arXiv:1904.06991), each 0..1."""

    precision: float
    """Fraction of the samples on the reference's manifold."""
    recall: float
    """Fraction of the reference on the samples' manifold."""


class Moments(NamedTuple):
    """Mean [D] and covariance [D, D] of features, float64."""

    mean: Float64Array
    covariance: Float64Array


class Estimate(NamedTuple):
    """A mean over subsets of the images and its standard deviation over them."""

    mean: float
    std: float


def moments(features: FloatArray) -> Moments:
    """Return the moments of features [N, D], N at least 2; N > D for a covariance of full rank."""
    wide = features.astype(np.float64)
    return Moments(wide.mean(axis=0), np.cov(wide, rowvar=False).reshape(wide.shape[1], wide.shape[1]))


def frechet_distance(reference: FloatArray, samples: FloatArray) -> float:
    """Return the Fréchet distance of two sets of features [N, D] and [M, D], taken as normal distributions.

    With Inception's pooled features it is the FID (arXiv:1706.08500), with its spatial features the sFID
    (arXiv:2103.03841).
    """
    return frechet_distance_of(moments(reference), moments(samples))


def frechet_distance_of(reference: Moments, samples: Moments) -> float:
    """Return the Fréchet distance of two normal distributions with the same number of dimensions."""
    gap = reference.mean - samples.mean
    values, vectors = np.linalg.eigh(reference.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    # The trace of the root of a b equals that of root b root, which is symmetric.
    trace = np.sqrt(np.clip(np.linalg.eigvalsh(root @ samples.covariance @ root), 0, None)).sum()
    return float(gap @ gap + np.trace(reference.covariance) + np.trace(samples.covariance) - 2 * trace)


def inception_score(probabilities: FloatArray, split_size: int = IS_SPLIT) -> float:
    """Return the Inception score (Salimans et al. 2016, arXiv:1606.03498), the mean over parts of the images.

    Args:
        probabilities: of each class, [N, K].
        split_size: images per part; the last part may be smaller.
    """
    scores = []
    for start in range(0, len(probabilities), split_size):
        part = probabilities[start : start + split_size].astype(np.float64)
        divergence = part * (_log(part) - _log(part.mean(axis=0)))
        scores.append(np.exp(divergence.sum(axis=1).mean()))
    return float(np.mean(scores))


def _log(values: Float64Array) -> Float64Array:
    """Return logarithms, and 0 instead of -infinity: p log p is 0 at p = 0."""
    return np.log(values, out=np.zeros_like(values), where=values > 0)


def softmax(logits: FloatArray) -> Float64Array:
    """Return the probabilities [N, K] of logits [N, K]."""
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def kernel_distance(
    reference: FloatArray,
    samples: FloatArray,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    seed: int = 0,
) -> Estimate:
    """Return the KID (Binkowski et al. 2018, arXiv:1801.01401): unbiased MMD^2 with the kernel (x.y / D + 1)^3.

    Args:
        reference: features [N, D].
        samples: features [M, D].
        subsets: pairs of random subsets over which the estimate is averaged.
        subset_size: images per subset; reduced to the smaller set's size.
        seed: of the subsets.

    Raises:
        ValueError: a set has fewer than two images.
    """
    size = min(subset_size, len(reference), len(samples))
    if size < 2:
        raise ValueError(f"the KID needs at least two images in each set; got {len(reference)} and {len(samples)}")
    rng = np.random.default_rng(seed)
    estimates = []
    for _ in range(subsets):
        x = reference[rng.choice(len(reference), size, replace=False)].astype(np.float64)
        y = samples[rng.choice(len(samples), size, replace=False)].astype(np.float64)
        within = sum((k.sum() - np.trace(k)) / (size * (size - 1)) for k in (_kernel(x, x), _kernel(y, y)))
        estimates.append(within - 2 * _kernel(x, y).mean())
    return Estimate(float(np.mean(estimates)), float(np.std(estimates)))


def _kernel(x: Float64Array, y: Float64Array) -> Float64Array:
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def coverage(reference: FloatArray, samples: FloatArray) -> Coverage:
    """Return precision and recall of samples [M, D] against a reference [N, D]."""
    return Coverage(
        precision=_share_inside(samples, reference, manifold_radii(reference)),
        recall=_share_inside(reference, samples, manifold_radii(samples)),
    )


def manifold_radii(features: FloatArray) -> FloatArray:
    """Return the squared distance of each point to its third neighbour, [N]; of fewer points, to the farthest one."""
    wide = features.astype(np.float64)
    neighbour = min(NEIGHBOURS, len(wide) - 1)
    blocks = [
        np.partition(_squared_distances(wide[start : start + BLOCK], wide), neighbour, axis=1)[:, neighbour]
        for start in range(0, len(wide), BLOCK)
    ]
    return np.concatenate(blocks)


def _share_inside(points: FloatArray, centres: FloatArray, radii: FloatArray) -> float:
    points, centres = points.astype(np.float64), centres.astype(np.float64)
    inside = [
        (_squared_distances(points[start : start + BLOCK], centres) <= radii).any(axis=1)
        for start in range(0, len(points), BLOCK)
    ]
    return float(np.concatenate(inside).mean())


def _squared_distances(a: FloatArray, b: FloatArray) -> FloatArray:
    return np.maximum((a**2).sum(axis=1)[:, None] - 2 * a @ b.T + (b**2).sum(axis=1), 0.0)
