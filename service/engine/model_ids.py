"""What the engine knows models by: weights that are loaded anew are another model to it, and the same to people."""

from __future__ import annotations

SEPARATOR = "/"
"""In no name: models are named like folders."""


def model_id(name: str, loaded: int) -> str:
    """Return the id of what a name meant when it was loaded for the so-manieth time, counted from 1."""
    return name if loaded == 1 else f"{name}{SEPARATOR}{loaded}"


def name_of(model: str) -> str:
    """Return the name of a model by its id: for metrics and people."""
    return model.partition(SEPARATOR)[0]
