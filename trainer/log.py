"""Write a run's log: means of the loss terms over windows of batches, one JSON object per line."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.losses import TrainingLosses
from formats.atomic_file import write_file
from formats.disk_errors import disk_errors_name

QUARTILES = 4


class Window:
    """Means of the loss terms since the last log line, over all timesteps and per quartile."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._rows: list[Tensor] = []
        self._grad_norms: list[float] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, batch: TrainingLosses, t: np.ndarray[Any, Any], grad_norm: float, num_steps: int) -> None:
        """Add the losses of one batch."""
        quartile = torch.from_numpy(t * QUARTILES // num_steps).float()
        self._rows.append(torch.stack([*batch, quartile]))
        self._grad_norms.append(grad_norm)

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Exclude the time spent inside from the speed."""
        before = time.perf_counter()
        yield
        self._started += time.perf_counter() - before

    def summary(self) -> dict[str, float]:
        """Return the rounded means and the speed."""
        *terms, quartile = torch.cat(self._rows, dim=1)
        values = {name: term.mean().item() for name, term in zip(TrainingLosses._fields, terms, strict=True)}
        mse = terms[TrainingLosses._fields.index("mse")]
        for q in range(QUARTILES):
            if (here := quartile == q).any():
                values[f"mse_q{q}"] = mse[here].mean().item()
        values["grad_norm"] = sum(self._grad_norms) / len(self._grad_norms)
        values["images_per_second"] = quartile.numel() / (time.perf_counter() - self._started)
        return {name: float(f"{value:.5g}") for name, value in values.items()}


def append_line(path: Path, line: Mapping[str, float]) -> None:
    """Append a line to a log, or leave the log unchanged on failure.

    Raises:
        OSError: the line cannot be written; names the file.
    """
    with disk_errors_name(path), path.open("ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        rest = memoryview(f"{json.dumps(line)}\n".encode())
        try:
            while rest:  # a write may store only part of the bytes; the next one raises
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(before)
            raise


def cut_log(path: Path, images_seen: int) -> None:
    """Remove the lines after the checkpoint from which the run resumes."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_file(path, "".join(line for line in lines if _images_of(line) <= images_seen).encode())


def _images_of(line: str) -> float:
    """Return the images seen of a log line; infinity for an incomplete line."""
    try:
        return float(json.loads(line)["images"])
    except (ValueError, KeyError, TypeError):
        return math.inf
