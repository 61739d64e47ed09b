"""The weights that a new run begins with: those of a trained checkpoint, checked against the run's configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from formats.checkpoint import read_weights
from formats.checkpoint_config import CheckpointError, checkpoint_sha256, read_config
from trainer.config import TrainConfig, flat
from trainer.errors import TrainError

FREE = frozenset({"model.dropout"})
"""Fields of the network that do not change the meaning of its weights."""

RECORDED: Sequence[str] = ("images_seen", "initial_model")
"""Entries of a model's provenance that the run's provenance repeats."""


@dataclass(frozen=True)
class InitialModel:
    """Weights to begin with, and what the provenance of the run's checkpoints says about them."""

    weights: Mapping[str, Tensor]
    provenance: Mapping[str, Any]


def read_initial_model(folder: Path, config: TrainConfig) -> InitialModel:
    """Read the averaged weights of a checkpoint for a run that starts from them.

    Args:
        folder: a checkpoint folder: of `iddpm train`, `iddpm import` or `iddpm ema`.
        config: the run's configuration, completed by `resolve`.

    Raises:
        TrainError: the folder cannot be read, or its network or diffusion process is not that of the configuration.
    """
    try:
        found, weights = read_config(folder), read_weights(folder)
    except CheckpointError as error:
        raise TrainError(str(error)) from error
    parts = ("model", "diffusion")
    theirs = flat(found.model_dump(mode="json", include=set(parts)))
    mine = flat(config.model_dump(mode="json", include=set(parts)))
    if differences := [
        f"{name} is {theirs.get(name)} there and {mine.get(name)} here"
        for name in (*mine, *(name for name in theirs if name not in mine))
        if mine.get(name) != theirs.get(name) and name not in FREE
    ]:
        raise TrainError(
            f"{folder} is not a model of this configuration: {'; '.join(differences)}. Set these fields to the model's "
            "with --set; the data determine model.num_classes"
        )
    trained: dict[str, Any] = {name: found.provenance[name] for name in RECORDED if name in found.provenance}
    return InitialModel(weights, {"checkpoint_sha256": checkpoint_sha256(folder), **trained})
