"""Networks with random weights, of kinds that no golden file has."""

from __future__ import annotations

import torch

from diffusion.classifier import Classifier
from diffusion.config import ClassifierConfig


def random_classifier(config: ClassifierConfig) -> Classifier:
    """Build a noisy classifier in which no weight is zero."""
    classifier = Classifier(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in classifier.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return classifier
