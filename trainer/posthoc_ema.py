"""Compute an average of any width from a run's snapshots, after training (Karras et al. 2024, arXiv:2312.02696)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.ema import power_exponent
from trainer.ema_snapshots import Snapshot

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Profile:
    """Weighting profile of a power-function average over training."""

    updates: float
    """Number of optimiser steps at which it was taken."""
    sigma_rel: float
    """Its relative width."""

    def overlap(self, other: Profile) -> float:
        """Return the inner product of two profiles over the time of training (section 3.2 of the paper).

        A profile is p(t) = (gamma + 1) t^gamma / T^(gamma + 1) on 0..T.
        """
        early, late = sorted((self, other), key=lambda profile: profile.updates)
        a, b = power_exponent(early.sigma_rel), power_exponent(late.sigma_rel)
        return (a + 1) * (b + 1) / (a + b + 1) * (early.updates / late.updates) ** b / late.updates


def fit_profile(available: list[Profile], wanted: Profile) -> tuple[FloatArray, float]:
    """Return the coefficients whose sum of profiles is closest to the wanted one, and the remaining relative error.

    Least squares over the time of training (section 3.2 of the paper). The error is the norm of the difference
    over the norm of the wanted profile, 0..1.
    """
    gram = np.array([[a.overlap(b) for b in available] for a in available])
    target = np.array([a.overlap(wanted) for a in available])
    coefficients = np.linalg.lstsq(gram, target, rcond=1e-12)[0]
    norm = wanted.overlap(wanted)
    squared = norm - 2 * coefficients @ target + coefficients @ gram @ coefficients
    return coefficients, math.sqrt(max(0.0, squared) / norm)


def combine(snapshots: list[Snapshot], coefficients: FloatArray) -> dict[str, Tensor]:
    """Return the weighted sum of snapshots, float32 tensors by weight name; their tensors are read one at a time."""
    total: dict[str, Tensor] = {}
    for snapshot, coefficient in zip(snapshots, coefficients.tolist(), strict=True):
        for name, value in snapshot.tensors():
            tensor = value.double() * coefficient
            total[name] = total[name] + tensor if name in total else tensor
    return {name: tensor.to(torch.float32) for name, tensor in total.items()}
