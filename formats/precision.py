"""Names of precisions: one type for each place that records or selects one."""

from __future__ import annotations

from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]
"""Precision in which a graph or an engine computes, as spelled in manifests."""
PrecisionChoice = Literal["auto", "fp32", "bf16", "fp16"]
"""Precision that an operator selects for a network; `auto`: chosen by backend and machine."""
TrainingPrecision = Literal["auto", "float32", "bfloat16", "float16"]
"""Precision of autocast in training, as spelled in run configurations."""
