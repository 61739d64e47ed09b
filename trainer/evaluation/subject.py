"""Subject: a model to evaluate, with a network for every timestep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from diffusion.config import CheckpointConfig
from diffusion.respacing import IntArray
from diffusion.unet import UNet
from formats.checkpoint import load_unet
from formats.checkpoint_config import checkpoint_sha256
from formats.ensemble import is_ensemble, read_ensemble
from trainer.data import DataError, Dataset


@dataclass(frozen=True, eq=False, kw_only=True)
class Subject:
    """A loaded model: one network, or the members of an ensemble."""

    name: str
    sha256: str
    """Identity of the weights and of the timesteps at which each network is used."""
    config: CheckpointConfig
    networks: tuple[UNet, ...]
    """In eval mode, on one device."""
    network_of: IntArray
    """int64 [T]: index of the network of each training timestep."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.config.model.image_shape


def load_subject(folder: Path, device: torch.device) -> Subject:
    """Load a checkpoint folder, or an ensemble folder whose members are checkpoints.

    Raises:
        CheckpointError: a checkpoint cannot be read.
        EnsembleError: the ensemble cannot be read.
    """
    if is_ensemble(folder):
        ensemble = read_ensemble(folder)
        return Subject(
            name=_name_of(folder),
            sha256=ensemble.sha256,
            config=ensemble.config,
            networks=tuple(load_unet(member)[1].to(device) for member in ensemble.folders),
            network_of=ensemble.network_of,
        )
    config, network = load_unet(folder)
    return Subject(
        name=_name_of(folder),
        sha256=checkpoint_sha256(folder),
        config=config,
        networks=(network.to(device),),
        network_of=np.zeros(config.diffusion.num_timesteps, np.int64),
    )


def distinct_names(subjects: Sequence[Subject]) -> list[str]:
    """Return the subjects' names, numbered where they are equal."""
    names = [subject.name for subject in subjects]
    return [
        name if names.count(name) == 1 else f"{name}#{names[:index].count(name) + 1}"
        for index, name in enumerate(names)
    ]


def model_labels(name: str, config: CheckpointConfig, dataset: Dataset) -> IntArray | None:
    """Return the data's labels as indices of a model's classes, int64 [N]; None for an unconditional model.

    Args:
        name: of the model, for messages.
        config: of the model.
        dataset: opened with labels, if the model takes them.

    Raises:
        DataError: a class of the data is not a class of the model.
    """
    count, names = config.model.num_classes, config.class_names
    if count is None:
        return None
    if names is not None and set(dataset.class_names) <= set(names):
        return np.array([names.index(name) for name in dataset.class_names], np.int64)[dataset.labels]
    are_numbers = all(name.isdecimal() for name in dataset.class_names)  # an npz without the array `classes`
    if names is not None and not are_numbers:
        missing = sorted(set(dataset.class_names) - set(names))
        raise DataError(f"classes of the data must be classes of {name}; it does not have: {', '.join(missing[:10])}")
    if len(dataset.class_names) != count:
        raise DataError(f"the data have {len(dataset.class_names)} classes and {name} has {count}")
    return dataset.labels


def _name_of(folder: Path) -> str:
    """Return the name of a folder, or that of the run around RUN/model."""
    path = folder.resolve()
    return path.parent.name if path.name == "model" else path.name
