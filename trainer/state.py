"""Everything a run must remember to continue exactly: saved beside the checkpoint, in `state/`, without pickle."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion.checkpoint import write_checkpoint
from diffusion.checkpoint_config import CONFIG_FILE, CheckpointError
from diffusion.config import CheckpointConfig
from trainer.ema import EMA
from trainer.timestep_sampler import TimestepSampler

TENSORS_FILE = "train_state.safetensors"
PROGRESS_FILE = "progress.json"
POWER_PREFIX = "power_ema."


@dataclass
class TrainState:
    """The objects of a run whose state changes. All randomness is a function of (seed, images_seen)."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA
    timestep_sampler: TimestepSampler
    power_emas: dict[float, EMA] = field(default_factory=dict)
    """Power-function averages by relative width; as many updates as `ema`."""
    images_seen: int = 0

    def average_in(self) -> None:
        """Take the network's weights into every average."""
        weights = self.network.state_dict()
        for ema in (self.ema, *self.power_emas.values()):
            ema.update(weights)


def save(state: TrainState, folder: Path, config: CheckpointConfig) -> None:
    """Write a checkpoint whose weights are the EMA's, with what is needed to resume beside them, atomically."""

    def add_state(temporary: Path) -> None:
        (temporary / "state").mkdir()
        tensors = {f"raw.{name}": tensor for name, tensor in state.network.state_dict().items()}
        for index, slots in state.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{slot}": value for slot, value in slots.items()}
        for name, array in state.timestep_sampler.state_dict().items():
            tensors[f"timestep_sampler.{name}"] = torch.from_numpy(np.array(array))
        tensors |= _power_tensors(state)
        cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(cpu, temporary / "state" / TENSORS_FILE)
        progress = {"images_seen": state.images_seen, "ema_updates": state.ema.num_updates}
        (temporary / "state" / PROGRESS_FILE).write_text(json.dumps(progress) + "\n")

    write_checkpoint(folder, config, state.ema.weights, extra=add_state)


def save_ema_snapshot(state: TrainState, path: Path) -> None:
    """Write the power-function averages of this moment, float32, tensors named `SIGMA_REL/NAME`.

    The metadata `updates` says after how many optimiser steps they were taken.
    """
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".new")
    tensors = {name.removeprefix(POWER_PREFIX): tensor.cpu() for name, tensor in _power_tensors(state).items()}
    save_file(tensors, temporary, metadata={"updates": str(state.ema.num_updates)})
    temporary.replace(path)


def restore(state: TrainState, folder: Path) -> None:
    """Bring the objects of a run to where they were when the checkpoint was written.

    Raises:
        CheckpointError: a folder without training state.
    """
    try:
        progress = json.loads((folder / "state" / PROGRESS_FILE).read_text())
        tensors = load_file(folder / "state" / TENSORS_FILE)
        averages = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be resumed from, its state is missing or damaged: {error}") from error
    state.network.load_state_dict(_below("raw.", tensors))
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _below("optimizer.", tensors).items():
        index, slot = name.split(".", 1)
        slots.setdefault(int(index), {})[slot] = tensor
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": slots})
    sampler_state = {name: tensor.numpy() for name, tensor in _below("timestep_sampler.", tensors).items()}
    state.timestep_sampler.load_state_dict(sampler_state)
    for name, target in state.ema.weights.items():
        target.copy_(averages[name])
    for sigma_rel, ema in state.power_emas.items():
        for name, target in ema.weights.items():
            target.copy_(tensors[f"{POWER_PREFIX}{sigma_rel:g}/{name}"])
    for ema in (state.ema, *state.power_emas.values()):
        ema.num_updates = progress["ema_updates"]
    state.images_seen = progress["images_seen"]


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first."""
    found = [path for path in (run / "checkpoints").glob("[0-9]*") if (path / CONFIG_FILE).is_file()]
    return sorted(found, key=lambda path: int(path.name))


def checkpoint_folder(run: Path, images_seen: int) -> Path:
    """Return where the checkpoint after that many images belongs."""
    return run / "checkpoints" / f"{images_seen:012d}"


def delete_old(run: Path, keep: int) -> None:
    """Delete all but the newest checkpoints."""
    for folder in checkpoints(run)[:-keep]:
        shutil.rmtree(folder)


def _power_tensors(state: TrainState) -> dict[str, Tensor]:
    return {
        f"{POWER_PREFIX}{sigma_rel:g}/{name}": tensor
        for sigma_rel, ema in state.power_emas.items()
        for name, tensor in ema.weights.items()
    }


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
