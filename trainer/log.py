"""Write a run's log: means of the loss terms over windows of batches, one JSON object per line."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from formats.atomic_file import write_file
from formats.disk_errors import disk_errors_name
from trainer.noise_scale import estimates

QUARTILES = 4


class Window:
    """Means of the losses since the last log line, over all timesteps and per quartile.

    Losses stay on their device until `rows`, so that adding a batch does not wait for it.

    Args:
        by_quartile: losses whose means are also given for each quarter of the timesteps.
        skips: whether steps with a gradient that is not finite were skipped; its norm then does not count.
        noise_of: images of a micro-batch, and of a batch of all processes, whose norms estimate the gradient noise;
            None: it is not estimated.
    """

    def __init__(
        self,
        by_quartile: Sequence[str] = ("mse",),
        *,
        skips: bool = False,
        noise_of: tuple[int, int] | None = None,
    ) -> None:
        self._skips = skips
        self._noise_of = noise_of
        self._by_quartile = by_quartile
        self._started = time.perf_counter()
        self._waited = 0.0
        self._rows: list[Tensor] = []
        self.names: tuple[str, ...] = ()
        """Names of the losses."""

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(
        self,
        losses: Mapping[str, Tensor],
        t: Tensor,
        grad_norm: Tensor,
        num_steps: int,
        micro_norm: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Add the losses of one batch, and the norms of its gradient and a micro-batch's.

        Args:
            losses: [B] each.
            t: their timesteps, int64 [B].
            grad_norm: of the batch.
            num_steps: S, timesteps of the process.
            micro_norm: of the first micro-batch; None: it is not estimated.
            weights: that make means over the drawn timesteps unbiased, [B]; None: 1.
        """
        self.names = tuple(losses)
        quartile = (t * QUARTILES // num_steps).float()
        weights = torch.ones_like(quartile) if weights is None else weights
        norms = [norm.expand_as(quartile) for norm in (grad_norm, grad_norm if micro_norm is None else micro_norm)]
        self._rows.append(torch.stack([*losses.values(), quartile, weights, *norms], dim=1))

    def rows(self) -> Tensor:
        """Return a row per image: its losses, its timestep's quartile and weight, its batch's norms.

        float32 [N, losses + 4], still on the device.
        """
        return torch.cat(self._rows)

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Exclude the time spent inside from the speed."""
        before = time.perf_counter()
        yield
        self._started += time.perf_counter() - before

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time spent inside as time waited for images."""
        before = time.perf_counter()
        yield
        self._waited += time.perf_counter() - before

    def summary(self, rows: Tensor | None = None) -> dict[str, float]:
        """Return the rounded means, the share of the time that was waited for images, and the speed.

        There is no `grad_norm` if every step was skipped.

        Args:
            rows: `rows` of all processes; None: those of this one.
        """
        rows = (self.rows() if rows is None else rows).cpu()
        *terms, quartile, weights, grad_norm, micro_norm = rows.unbind(1)
        weighted = {name: term * weights for name, term in zip(self.names, terms, strict=True)}
        values = {name: term.mean().item() for name, term in weighted.items()}
        for name in self._by_quartile:
            for q in range(QUARTILES):
                if (here := quartile == q).any():
                    values[f"{name}_q{q}"] = (weighted[name][here].sum() / weights[here].sum()).item()
        if self._skips:
            grad_norm = grad_norm[torch.isfinite(grad_norm)]
        if len(grad_norm):
            values["grad_norm"] = grad_norm.mean().item()
        if self._noise_of is not None:
            small, big = (norm.double().square().mean().item() for norm in (micro_norm, grad_norm))
            values["noise_trace"], values["gradient_squared"] = estimates(small, big, *self._noise_of)
        took = time.perf_counter() - self._started
        values["data_wait"] = self._waited / took
        values["images_per_second"] = len(rows) / took
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
