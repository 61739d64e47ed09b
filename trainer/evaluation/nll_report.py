"""Summarise bits/dim: JSON and a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.evaluation.nll import TERMS, NllTerms
from trainer.evaluation.text_table import text_table

Statistics = dict[str, float | None]


def summarise(results: Mapping[str, NllTerms]) -> list[dict[str, Any]]:
    """Return one JSON object per model.

    Means are over images. Differences to the first model are means over the same images with the same noise, so their
    standard error is smaller than that of the two totals.
    """
    first = next(iter(results.values()))
    return [_summary(name, found, None if found is first else first) for name, found in results.items()]


def table(models: list[dict[str, Any]]) -> str:
    """Return a table of the summaries for a terminal: bits/dim with standard errors."""
    rows = [("model", "steps", "bits/dim", "std. error", "decoder", "prior", "minus the first")]
    for model in models:
        difference = model.get("difference_to_first")
        rows.append(
            (
                model["name"],
                str(model["num_steps"]),
                f"{model['total_bpd']['mean']:.4f}",
                _error(model["total_bpd"]["std_error"]),
                f"{model['vb_bpd']['mean'][0]:.4f}",
                f"{model['prior_bpd']['mean']:.2g}",
                "" if difference is None else f"{difference['mean']:+.4f} +- {_error(difference['std_error'])}",
            )
        )
    return text_table(rows)


def _summary(name: str, found: NllTerms, first: NllTerms | None) -> dict[str, Any]:
    means = {
        term: {"mean": _listed(values.mean(axis=0)), "std_error": _listed(_standard_errors(values))}
        for term, values in zip(TERMS, np.moveaxis(found.terms, 1, 0).astype(np.float64), strict=True)
    }
    summary: dict[str, Any] = {
        "name": name,
        "num_steps": len(found.timesteps),
        "total_bpd": _statistics(found.total_bpd),
        "prior_bpd": _statistics(found.prior_bpd.astype(np.float64)),
    }
    if first is not None:
        summary["difference_to_first"] = _statistics(found.total_bpd - first.total_bpd)
    return {**summary, "timesteps": found.timesteps.tolist(), **means}


def _statistics(values: npt.NDArray[np.float64]) -> Statistics:
    error = float(_standard_errors(values[:, None])[0])
    return {"mean": float(values.mean()), "std_error": None if math.isnan(error) else error}


def _standard_errors(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the standard error of the mean of each column; NaN for a single row."""
    if len(values) < 2:
        return np.full(values.shape[1], np.nan)
    errors: npt.NDArray[np.float64] = values.std(axis=0, ddof=1) / math.sqrt(len(values))
    return errors


def _listed(values: npt.NDArray[np.float64]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
