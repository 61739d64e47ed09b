"""Summarise gradient noise scales: JSON and a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trainer.evaluation.gradient_noise import Case
from trainer.evaluation.text_table import text_table
from trainer.noise_scale import Estimate, NoiseScale


def summarise(found: Mapping[Case, NoiseScale]) -> list[dict[str, Any]]:
    """Return one JSON object per case; values that are not finite are null."""
    return [
        {
            "loss": case.loss,
            "timestep_sampler": case.sampler,
            **{name: _json(value) for name, value in measured._asdict().items()},
        }
        for case, measured in found.items()
    ]


def table(cases: list[dict[str, Any]]) -> str:
    """Return a table of the summaries for a terminal."""
    rows = [("loss", "timesteps", "noise scale", "std. error", "tr(Sigma)", "std. error", "|G|^2", "std. error")]
    for case in cases:
        numbers = [case[name][part] for name in NoiseScale._fields for part in Estimate._fields]
        rows.append((case["loss"], case["timestep_sampler"], *("-" if n is None else f"{n:.3g}" for n in numbers)))
    return text_table(rows, left=2)


def _json(estimate: Estimate) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in estimate._asdict().items()}
