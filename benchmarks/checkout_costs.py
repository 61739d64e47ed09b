"""Measure what the engine costs in the checkout whose Python runs this file, in processor time.

For every line of standard input it measures once and prints a line of JSON. `benchmarks.two_checkouts` runs it in each
of two checkouts and asks them in turns. It uses only names that both must have, and takes all of
them from the checkout in PYTHONPATH:

    PYTHONPATH=. .venv/bin/python -P checkout_costs.py --model models/fashion32 --waiting 2000 --steps 200

- bookkeeping: `Engine.step`, `submit` and `eta`, as `benchmarks.bookkeeping` calls them;
- host: a step of `--width` rows with a network that does nothing: gather, noise, update;
- step: a step of 1 and of 8 rows of the model, its network included.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

import benchmarks.bookkeeping as bookkeeping
from benchmarks.null_network import NullDenoiser
from service.backends.base import BackendOptions, Denoiser
from service.backends.select import load_denoiser
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.request import GenerationRequest, ImageParams, PlanKey
from service.engine.runners.array_runner import ArrayRunner
from service.metrics import Metrics

CHAIN = 50
"""Timed steps of the model."""


def bookkeeping_costs(waiting: int, width: int, steps: int) -> dict[str, float]:
    """Return the median microseconds of a thread's processor time per call, by policy and kind of call."""
    timed_by_thread = SimpleNamespace(perf_counter=time.thread_time, monotonic=time.monotonic)
    with mock.patch.object(bookkeeping, "time", timed_by_thread):
        costs = bookkeeping.measure(waiting, width, steps, repeats=1)
    return {f"bookkeeping: {policy}, {call}": 1e6 * float(np.median(took[0])) for (policy, call), took in costs.items()}


class Steps:
    """An engine around a network, warmed up."""

    def __init__(self, denoiser: Denoiser[Any], rows: int) -> None:
        settings = EngineConfig(max_rows=max(rows, 2), timed_calls=0)
        self._engine = Engine({"m": ArrayRunner(denoiser, settings)}, settings, Metrics())
        self._engine.warm_up()
        self._classes = denoiser.config.model.num_classes

    def cost(self, rows: int, steps: int, clock: Callable[[], float]) -> float:
        """Return the median microseconds of a step of plain images: no guidance, mask, given or conditioning image."""
        key = PlanKey(sampler="ancestral", spec=str(steps))
        images = tuple(
            ImageParams(
                plan=key,
                num_steps=steps,
                seed=k,
                image_index=0,
                class_index=k % self._classes if self._classes else None,
            )
            for k in range(rows)
        )
        self._engine.add(GenerationRequest(request_id="r", model="m", images=images), time.monotonic())
        took: list[float] = []
        while self._engine.has_work():
            begun = clock()
            self._engine.step()
            took.append(clock() - begun)
        return 1e6 * float(np.median(took))


def main() -> None:
    """Answer every line of standard input."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--waiting", type=int, required=True)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--steps", type=int, required=True)
    asked = parser.parse_args()
    host = Steps(NullDenoiser(image_size=32, max_rows=asked.width), asked.width)
    model = Steps(load_denoiser(asked.model, "openvino", BackendOptions(max_rows=8, threads=1)), 8)
    for _ in sys.stdin:
        costs = bookkeeping_costs(asked.waiting, asked.width, asked.steps)
        costs[f"host: {asked.width} rows of 32x32x3"] = host.cost(asked.width, asked.steps, time.thread_time)
        for rows in (1, 8):  # a network call may use threads of its own
            costs[f"step: {rows} row{'s' * (rows > 1)} of the model"] = model.cost(rows, CHAIN, time.process_time)
        print(json.dumps({name: round(value, 2) for name, value in costs.items()}), flush=True)


if __name__ == "__main__":
    main()
