"""Fields of a run's configuration that the data or other fields decide: setting them otherwise is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trainer.config import TrainConfig
from trainer.data import Dataset

DECIDED = ("model.num_classes", "model.null_class", "model.learn_sigma", "sampling.cfg_scale")


def split_decided(assignments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split what a user sets into what is free and what is decided elsewhere, by dotted name.

    Fields inside an object that is set as a whole (`model={...}`) are found, too, and stay in it.
    """
    free = {name: value for name, value in assignments.items() if name not in DECIDED or name == "sampling.cfg_scale"}
    decided = {name: value for name, value in assignments.items() if name in DECIDED}
    for name in DECIDED:
        parent, _, leaf = name.partition(".")
        inside = assignments.get(parent)
        if isinstance(inside, dict) and leaf in inside:
            decided[name] = inside[leaf]
    return free, decided


def refuse_overruled(decided: Mapping[str, Any], resolved: TrainConfig, dataset: Dataset) -> None:
    """Refuse values that the resolved configuration does not have.

    Args:
        decided: values that the user set, by dotted name.
        resolved: what `resolve` made of them.
        dataset: the data.

    Raises:
        ValueError: names the field, what decides it, and how to have it otherwise.
    """
    for name, value in decided.items():
        parent, _, leaf = name.partition(".")
        actual = getattr(getattr(resolved, parent), leaf)
        if value != actual or isinstance(value, bool) != isinstance(actual, bool):
            reason = _reason(name, resolved, dataset)
            raise ValueError(f"{name} is {json.dumps(actual)} here and cannot be set to {json.dumps(value)}: {reason}")


def _reason(name: str, config: TrainConfig, dataset: Dataset) -> str:
    if name == "model.learn_sigma":
        other = "learned_range" if not config.model.learn_sigma else "fixed_large and loss to simple"
        return f"diffusion.variance, {config.diffusion.variance}, decides it; set that to {other}"
    if not config.class_conditional:
        return "class_conditional=false decides it: the model has no classes"
    if name == "model.num_classes":
        return f"the data decide it, which have {len(dataset.class_names)} classes"
    if config.model.null_class:
        return f"label_dropout, {config.label_dropout:g}, decides it; set that to 0 for a model without a null class"
    return "label_dropout=0 decides it; set that to 0.1, for guidance needs a null class"
