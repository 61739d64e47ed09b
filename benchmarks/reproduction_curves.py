"""The curves of figure 6 of the paper: the variational bound during training, from a run's log."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

WINDOW = 5000
"""Images of a point of the curves."""
Line = dict[str, float]


def curves_of(log: Path, num_timesteps: int) -> dict[str, Any]:
    """Return the bound during a run's training, in bits/dim: T times the mean of its terms.

    The prior, which is near 0, is left out. The weights are those of the moment, not averaged ones.

    Args:
        log: `metrics.jsonl` of the run.
        num_timesteps: T.

    Returns:
        `points`: of each `WINDOW`, its last image, and of the bounds of its log lines the mean, the quantiles 0.1 and
        0.9 and the standard deviation; the other fields are those of the second half.
    """
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    windows: dict[int, list[Line]] = {}
    whole = max(1, int(lines[-1]["images"] // WINDOW))  # a shorter last window joins the one before
    for line in lines:
        windows.setdefault(min(whole, math.ceil(line["images"] / WINDOW)), []).append(line)
    points = [
        {"images": number * WINDOW, **_numbers(found, num_timesteps)} for number, found in sorted(windows.items())
    ]
    half = lines[-1]["images"] / 2
    return {**_numbers([line for line in lines if line["images"] > half], num_timesteps), "points": points}


def _numbers(lines: Sequence[Line], num_timesteps: int) -> dict[str, float | None]:
    bounds = num_timesteps * np.array([line["vb_bpd"] for line in lines])
    return {
        "bits_per_dim": float(bounds.mean()),
        "low": float(np.quantile(bounds, 0.1)),
        "high": float(np.quantile(bounds, 0.9)),
        "spread": float(bounds.std(ddof=1)) if len(bounds) > 1 else None,
    }
