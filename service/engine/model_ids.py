"""Model ids of the engine: reloaded weights get a new id and keep the model's name."""

from __future__ import annotations

SEPARATOR = "/"
"""Never part of a name: models are named after folders."""


def model_id(name: str, loaded: int) -> str:
    """Return the id of load number `loaded` of a model, counted from 1."""
    return name if loaded == 1 else f"{name}{SEPARATOR}{loaded}"


def name_of(model: str) -> str:
    """Return the model name of an id, for metrics and messages."""
    return model.partition(SEPARATOR)[0]
