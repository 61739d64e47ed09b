"""Describe a scaling study: its points, and the power laws fitted to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.evaluation.scores import markdown


def scaling_page(results: Mapping[str, Any]) -> str:
    """Return a study as Markdown: a table of its points, the laws, the command.

    Args:
        results: the content of results.json.
    """
    measures = results["measures"]
    heading = ["channels", "parameters", "images", "FLOPs", *(described["label"] for described in measures.values())]
    body = [
        [
            str(network["channels"]),
            f"{network['parameters']:,}",
            f"{point['images']:,}",
            f"{point['flops']:.3g}",
            *(f"{point[name]:.4g}" if name in point else "-" for name in measures),
        ]
        for network in results["networks"]
        for point in network["points"]
    ]
    laws = "".join(f"- {described['label']}: {_law(described['fit'])}\n" for described in measures.values())
    return f"{markdown(heading, body)}\n{laws}\n```\n{results['command']}\n```\n"


def _law(fit: Mapping[str, float] | None) -> str:
    if fit is None:
        return "no power law: too few points, or it does not fall"
    return f"{fit['limit']:.4g} + ({fit['scale']:.3g} C)^-{fit['exponent']:.3g}, from {fit['points']} points"
