"""The exponential moving average of a network's weights, which is what gets sampled and exported."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class EMA:
    """Float32 averages of the parameters, updated once per optimiser step.

    `num_updates` belongs to the state: the warm-up depends on it.
    """

    def __init__(self, network: nn.Module, decay: float, warmup: bool) -> None:
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        self.weights: dict[str, Tensor] = {
            name: tensor.detach().float().clone() for name, tensor in network.state_dict().items()
        }

    def current_decay(self) -> float:
        """Return the decay of the next update."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Average in the weights: target = decay * target + (1 - decay) * source."""
        decay = self.current_decay()
        for name, target in self.weights.items():
            target.mul_(decay).add_(weights[name].float(), alpha=1 - decay)
        self.num_updates += 1
