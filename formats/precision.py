"""Precisions by name: one type for each place where one is written down or asked for."""

from __future__ import annotations

from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]
"""What a graph or an engine computes in, as manifests spell it."""
PrecisionChoice = Literal["auto", "fp32", "bf16", "fp16"]
"""What an operator wants a network to compute in; `auto` leaves it to backend and machine."""
TrainingPrecision = Literal["auto", "float32", "bfloat16"]
"""What a training run's autocast computes in, as run configurations spell it."""
