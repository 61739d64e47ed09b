"""Distances between sets of images, from features of them: Fréchet distance, precision and recall.

The formulas are those of guided-diffusion's evaluator; the caller selects the network of the features,
and results from different networks are not comparable.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]

NEIGHBOURS = 3
"""Neighbour whose distance is the radius around a point of a manifold."""
BLOCK = 1000


class Coverage(NamedTuple):
    """Precision and recall of two sets (Kynkäänniemi et al. 2019, arXiv:1904.06991), each 0..1."""

    precision: float
    """Fraction of the samples on the reference's manifold."""
    recall: float
    """Fraction of the reference on the samples' manifold."""


def frechet_distance(reference: FloatArray, samples: FloatArray) -> float:
    """Return the Fréchet distance of two sets of features [N, D], taken as normal distributions (arXiv:1706.08500).

    Args:
        reference: [N, D], N > D for a covariance of full rank.
        samples: [M, D].
    """
    mean_gap = reference.mean(axis=0, dtype=np.float64) - samples.mean(axis=0, dtype=np.float64)
    a, b = (np.cov(features.astype(np.float64), rowvar=False) for features in (reference, samples))
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    # The trace of the root of a b equals that of root b root, which is symmetric.
    trace = np.sqrt(np.clip(np.linalg.eigvalsh(root @ b @ root), 0, None)).sum()
    return float(mean_gap @ mean_gap + np.trace(a) + np.trace(b) - 2 * trace)


def coverage(reference: FloatArray, samples: FloatArray) -> Coverage:
    """Return precision and recall of samples [M, D] against a reference [N, D]."""
    return Coverage(
        precision=_share_inside(samples, reference, manifold_radii(reference)),
        recall=_share_inside(reference, samples, manifold_radii(samples)),
    )


def manifold_radii(features: FloatArray) -> FloatArray:
    """Return the squared distance of each point to its third neighbour, [N]."""
    blocks = [
        np.partition(_squared_distances(features[start : start + BLOCK], features), NEIGHBOURS, axis=1)[:, NEIGHBOURS]
        for start in range(0, len(features), BLOCK)
    ]
    return np.concatenate(blocks)


def _share_inside(points: FloatArray, centres: FloatArray, radii: FloatArray) -> float:
    inside = [
        (_squared_distances(points[start : start + BLOCK], centres) <= radii).any(axis=1)
        for start in range(0, len(points), BLOCK)
    ]
    return float(np.concatenate(inside).mean())


def _squared_distances(a: FloatArray, b: FloatArray) -> FloatArray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.maximum((a**2).sum(axis=1)[:, None] - 2 * a @ b.T + (b**2).sum(axis=1), 0.0)
