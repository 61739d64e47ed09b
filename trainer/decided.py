"""Derived fields of a run's configuration: the data or other fields determine them; other values are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from diffusion.config import ClassifierConfig
from trainer.config import TrainConfig
from trainer.data import Dataset

DECIDED = ("model.num_classes", "model.null_class", "model.learn_sigma", "sampling.cfg_scale")


def split_decided(assignments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the fields that a user sets into free and derived ones, by dotted name.

    Derived fields inside an object that is set at once (`model={...}`) are found too, and stay in the object.
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
    """Check that values set by the user equal those of the resolved configuration.

    Args:
        decided: values that the user set, by dotted name.
        resolved: the configuration returned by `resolve`.
        dataset: the data.

    Raises:
        ValueError: a value differs; the message names the field, what determines it, and how to change it.
    """
    for name, value in decided.items():
        parent, _, leaf = name.partition(".")
        actual = getattr(getattr(resolved, parent), leaf, None)
        if value != actual or isinstance(value, bool) != isinstance(actual, bool):
            reason = _reason(name, resolved, dataset)
            raise ValueError(f"{name} is {json.dumps(actual)} here and cannot be set to {json.dumps(value)}: {reason}")


def _reason(name: str, config: TrainConfig, dataset: Dataset) -> str:
    if isinstance(config.model, ClassifierConfig):
        return f"the data, which have {len(dataset.class_names)} classes, determine it"
    if name == "model.learn_sigma":
        other = "learned_range" if not config.model.learn_sigma else "fixed_large and loss to simple"
        return f"diffusion.variance, {config.diffusion.variance}, determines it; set that to {other}"
    if not config.class_conditional:
        return "class_conditional=false determines it: the model has no classes"
    if name == "model.num_classes":
        return f"the data, which have {len(dataset.class_names)} classes, determine it"
    if config.model.null_class:
        return f"label_dropout, {config.label_dropout:g}, determines it; set that to 0 for a model without a null class"
    return "label_dropout=0 determines it; set that to 0.1, because guidance needs a null class"
