"""State that a run needs to resume exactly: saved in the checkpoint's folder `state/`, without pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from formats.checkpoint import write_checkpoint
from formats.checkpoint_config import WEIGHTS_FILE, AnyCheckpointConfig, CheckpointError, read_config
from formats.json_files import read_object
from trainer.ema import EMA
from trainer.timestep_sampler import TimestepSampler

STATE_FOLDER = "state"
TENSORS_FILE = "train_state.safetensors"
PROGRESS_FILE = "progress.json"
HASHED_FILES = (WEIGHTS_FILE, f"{STATE_FOLDER}/{TENSORS_FILE}")
RAW_PREFIX = "raw."
OPTIMIZER_PREFIX = "optimizer."
SAMPLER_PREFIX = "timestep_sampler."
AVERAGE_PREFIX = "average."
OLD_AVERAGE_PREFIX = "power_ema."
"""The same in earlier versions."""


@dataclass
class TrainState:
    """The objects of a run whose state changes. All randomness is a function of (seed, images_seen)."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    averages: Mapping[str, EMA]
    """Averages by key, all updated at each step; the first one, `ema`, is the model."""
    timestep_sampler: TimestepSampler
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    images_seen: int = 0
    _weights: dict[str, Tensor] = field(init=False, repr=False)
    """The network's tensors by name, which share its memory; listed once, because listing takes a millisecond."""

    def __post_init__(self) -> None:
        self._weights = self.network.state_dict()

    @property
    def ema(self) -> EMA:
        """The average whose weights are the model."""
        return next(iter(self.averages.values()))

    @property
    def others(self) -> dict[str, EMA]:
        """The other averages, by key."""
        return dict(list(self.averages.items())[1:])

    def average_in(self) -> None:
        """Update every average with the network's weights."""
        for ema in self.averages.values():
            ema.update(self._weights)


def save(state: TrainState, folder: Path, config: AnyCheckpointConfig) -> None:
    """Write a checkpoint with the EMA weights and the state needed to resume, atomically.

    Raises:
        OSError: it cannot be written; incomplete files are removed.
    """

    def add_state(temporary: Path) -> None:
        (temporary / STATE_FOLDER).mkdir()
        tensors = {f"{RAW_PREFIX}{name}": tensor for name, tensor in state.network.state_dict().items()}
        for index, slots in state.optimizer.state_dict()["state"].items():
            tensors |= {f"{OPTIMIZER_PREFIX}{index}.{slot}": value for slot, value in slots.items()}
        for name, array in state.timestep_sampler.state_dict().items():
            tensors[f"{SAMPLER_PREFIX}{name}"] = torch.from_numpy(np.array(array))
        for key, ema in state.others.items():
            tensors |= {f"{AVERAGE_PREFIX}{key}/{name}": tensor for name, tensor in ema.weights.items()}
        cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(cpu, temporary / STATE_FOLDER / TENSORS_FILE)
        progress = {
            "images_seen": state.images_seen,
            "ema_updates": state.ema.num_updates,
            "scaler": state.scaler.state_dict(),
            "sha256": {name: _sha256(temporary / name) for name in HASHED_FILES},
        }
        (temporary / STATE_FOLDER / PROGRESS_FILE).write_text(json.dumps(progress) + "\n", encoding="utf-8")

    write_checkpoint(folder, config, state.ema.weights, extra=add_state)


@dataclass(frozen=True)
class SavedState:
    """Content of a checkpoint to resume from, read and verified."""

    folder: Path
    config: AnyCheckpointConfig
    images_seen: int
    ema_updates: int
    scaler: Mapping[str, float]
    """State of the loss scale; empty if the precision needs none."""
    averages: Mapping[str, Tensor]
    """Weights of the average that is the model."""
    tensors: Mapping[str, Tensor]
    """Everything else, by prefixed name."""

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose name begins with a prefix, named without it."""
        found = self.tensors.items()
        return {name.removeprefix(prefix): tensor for name, tensor in found if name.startswith(prefix)}


def read(folder: Path) -> SavedState:
    """Read a checkpoint to resume from.

    Raises:
        CheckpointError: a file is missing, damaged or changed, or a tensor contains NaN.
    """
    try:
        config = read_config(folder)
        progress = read_object(folder / STATE_FOLDER / PROGRESS_FILE)
        for name, digest in progress.get("sha256", {}).items():  # checkpoints of older versions have none
            if _sha256(folder / name) != digest:
                raise CheckpointError(f"{name} is damaged: its sha256 differs from the recorded one")
        saved = SavedState(
            folder=folder,
            config=config,
            images_seen=int(progress["images_seen"]),
            ema_updates=int(progress["ema_updates"]),
            scaler=dict(progress.get("scaler", {})),  # older versions wrote none
            averages=load_file(folder / WEIGHTS_FILE),
            tensors=load_file(folder / STATE_FOLDER / TENSORS_FILE),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{folder} is damaged and cannot be resumed from: {reason}") from error
    if name := first_not_finite({**saved.averages, **saved.tensors}):
        raise CheckpointError(f"{folder} cannot be resumed from: {name} contains NaN or infinity, the run had diverged")
    return saved


def restore(state: TrainState, saved: SavedState) -> None:
    """Restore the objects of a run to their state at a checkpoint.

    Raises:
        CheckpointError: the checkpoint belongs to another network or another configuration.
    """
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in saved.below(OPTIMIZER_PREFIX).items():
        index, _, slot = name.partition(".")
        slots.setdefault(int(index), {})[slot] = tensor
    parameters = dict(enumerate(parameter for group in state.optimizer.param_groups for parameter in group["params"]))
    sampler_state = {name: tensor.numpy() for name, tensor in saved.below(SAMPLER_PREFIX).items()}
    others = saved.below(OLD_AVERAGE_PREFIX) | saved.below(AVERAGE_PREFIX)
    try:
        state.network.load_state_dict(saved.below(RAW_PREFIX))
        laid_out = {index: _laid_out_as(parameters[index], values) for index, values in slots.items()}
        state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": laid_out})
        state.timestep_sampler.load_state_dict(sampler_state)
        for name, target in state.ema.weights.items():
            target.copy_(saved.averages[name])
        for key, ema in state.others.items():
            for name, target in ema.weights.items():
                target.copy_(others[f"{key}/{name}"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{saved.folder} does not fit the configuration of its run: {error}") from error
    if saved.scaler and state.scaler.is_enabled():
        state.scaler.load_state_dict(dict(saved.scaler))
    for ema in state.averages.values():
        ema.num_updates = saved.ema_updates
    state.images_seen = saved.images_seen


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of a tensor that contains NaN or infinity; None if all are finite."""
    return next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _laid_out_as(parameter: Tensor, slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the optimiser's values of a parameter with its strides, which files do not record.

    On a CPU, fused AdamW takes elements in the order of memory and checks no strides: with `channels_last` it would
    combine values of different weights.
    """
    return {
        name: torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
        for name, value in slots.items()
    }
