"""Averages of a network's weights over training; these are sampled and exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from trainer.config import TrainConfig

Decay = Callable[[int], float]
"""Return the decay of an update from the number of previous updates."""

DECAY_KEY = "decay_"
"""Begins the keys of exponential averages."""


def decay_key(decay: float) -> str:
    """Return the key of an exponential average in files, e.g. `decay_0.999`."""
    return f"{DECAY_KEY}{decay}"


def decay_of(key: str) -> float | None:
    """Return the decay of the exponential average with a key; None: it is a power-function average."""
    return float(key.removeprefix(DECAY_KEY)) if key.startswith(DECAY_KEY) else None


def power_key(sigma_rel: float) -> str:
    """Return the key of a power-function average in files, e.g. `0.05`."""
    return f"{sigma_rel:g}"


def sigma_rel_of(key: str) -> float | None:
    """Return the relative width of the power-function average with a key; None: it is an exponential average."""
    return None if key.startswith(DECAY_KEY) else float(key)


def exponential_decay(decay: float, *, warmup: bool) -> Decay:
    """Return a constant decay; with warm-up min(decay, (1 + n) / (10 + n)), so that early averages forget the start."""
    return partial(_warmed_up, decay) if warmup else lambda _updates: decay


def power_decay(sigma_rel: float) -> Decay:
    """Return the decay of a power-function average (Karras et al. 2024, arXiv:2312.02696, section 3.1).

    Its weights grow as t^gamma, so that its width stays the same share of the training so far.

    Args:
        sigma_rel: that share, the standard deviation of the weights' profile, between 0 and 0.28.
    """
    return partial(_power, power_exponent(sigma_rel))


def power_exponent(sigma_rel: float) -> float:
    """Return gamma for a relative width: the root of sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    Raises:
        ValueError: no power function has this width.
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel must be above 0 and below 0.288 (a plain mean); got {sigma_rel:g}")
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


class EMA:
    """Float32 averages of the parameters, updated once per optimiser step.

    `num_updates` is part of the state, because the decay may depend on it.
    """

    def __init__(self, network: nn.Module, decay: Decay) -> None:
        self.decay = decay
        self.num_updates = 0
        self.weights: dict[str, Tensor] = {
            name: tensor.detach().float().clone() for name, tensor in network.state_dict().items()
        }

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Update the averages: target = decay * target + (1 - decay) * source."""
        sources = [weights[name].float() for name in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), sources, 1 - self.decay(self.num_updates))
        self.num_updates += 1


def averages_of(config: TrainConfig, network: nn.Module) -> dict[str, EMA]:
    """Return the averages that a run keeps of a network's weights, by key; the first one is the model."""
    decays = {decay_key(decay): exponential_decay(decay, warmup=config.ema_warmup) for decay in config.ema_decay}
    decays |= {power_key(sigma_rel): power_decay(sigma_rel) for sigma_rel in config.ema_sigma_rels}
    return {key: EMA(network, decay) for key, decay in decays.items()}


def _warmed_up(decay: float, updates: int) -> float:
    return min(decay, (1 + updates) / (10 + updates))


def _power(gamma: float, updates: int) -> float:
    return (1 - 1 / (updates + 1)) ** (gamma + 1)
