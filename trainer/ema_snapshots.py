"""Snapshots of a run's averages, `RUN/ema/N.safetensors`, one per checkpoint: tensors named `KEY/NAME`, float32.

KEY (`trainer/ema.py`) names the average, NAME the weight. The metadata `updates` is the number of optimiser steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from formats.atomic_file import replace_file
from trainer.ema import EMA, decay_of, sigma_rel_of


class SnapshotError(ValueError):
    """An average cannot be computed from the snapshots; the message names the file and the reason."""


@dataclass(frozen=True)
class Snapshot:
    """One average in a snapshot file."""

    path: Path
    key: str
    updates: int
    """Number of optimiser steps at which it was taken."""
    sigma_rel: float | None
    """Relative width of a power-function average; None: it is an exponential one."""
    decay: float | None
    """Decay of an exponential average; None: it is a power-function one."""

    @property
    def images(self) -> int:
        """Training images after which it was taken."""
        return int(self.path.stem)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Read its tensors one after another, with the names of the weights."""
        prefix = f"{self.key}/"
        with safe_open(self.path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                if name.startswith(prefix):
                    yield name.removeprefix(prefix), file.get_tensor(name)


def write_snapshot(path: Path, averages: Mapping[str, EMA]) -> None:
    """Write the present averages, by key, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(exist_ok=True)
    tensors = {f"{key}/{name}": value.cpu() for key, ema in averages.items() for name, value in ema.weights.items()}
    metadata = {"updates": str(next(iter(averages.values())).num_updates)}  # of all: each step updates them
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def list_snapshots(folder: Path) -> list[Snapshot]:
    """Return the averages in a run's snapshot files, oldest first.

    Raises:
        SnapshotError: the folder has no snapshots, or a file is not a snapshot.
    """
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                updates = int(file.metadata()["updates"])
                keys = sorted({name.partition("/")[0] for name in file.keys()})  # noqa: SIM118  # not a mapping
                found += [Snapshot(path, key, updates, sigma_rel_of(key), decay_of(key)) for key in keys]
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise SnapshotError(f"{path} is not a snapshot of averages: {error}") from error
    if not found:
        raise SnapshotError(
            f"{folder} contains no snapshot; train with --set ema_sigma_rels=0.05,0.1 (power-function averages) or "
            "--set ema_decay=0.9999,0.999 (several decays) to write one per checkpoint"
        )
    return found
