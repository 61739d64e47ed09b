"""What the progress bar of a training run shows beside images per second and the time left."""

from __future__ import annotations

from collections.abc import Mapping

HIDDEN = frozenset({"images", "images_per_second", "noise_trace", "gradient_squared"})
"""The bar itself shows the first two; single estimates of the gradient noise say little."""


def bar_entries(line: Mapping[str, float]) -> dict[str, str]:
    """Return the entries of a log line for the progress bar: loss terms, gradient norm, learning rate."""
    return {name: f"{value:.3g}" for name, value in line.items() if name not in HIDDEN and "_q" not in name}
