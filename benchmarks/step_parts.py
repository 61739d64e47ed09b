"""Processor time of the parts of a train step: what the network takes, and what everything else takes.

    python -m benchmarks.step_parts TRAIN.npz
    python -m benchmarks.step_parts JPEG_FOLDER --set model.image_size=64 --set model.image_channels=3 --batch 16

The parts are called as `trainer/loop.py` calls them, one after the other in one thread. A run reads its images ahead in
a thread, so their time is part of the wall time only where all processors are busy. Medians over steps.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks.options import exit_status
from benchmarks.reporting import describe_run, markdown_section, markdown_table
from cli.train_command import parse_assignments
from trainer.batches import Batches
from trainer.data import open_dataset
from trainer.ema import averages_of
from trainer.log import Window
from trainer.loop import TIMESTEP_SAMPLERS, resolve
from trainer.objective import objective_of
from trainer.optimisation import Optimisation
from trainer.presets import preset
from trainer.ranks import OneProcess
from trainer.state import TrainState

WARM_UP = 2
"""Steps that do not count."""
NETWORK = "gradient"


class Clock:
    """Processor seconds of parts, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Note the time that is spent inside."""
        begun = time.process_time()
        yield
        self.seconds.setdefault(name, []).append(time.process_time() - begun)


def measure(args: argparse.Namespace) -> Clock:
    """Take steps, and return the times of their parts."""
    config = preset(args.preset).with_overrides(
        {"precision": args.precision, "batch_size": args.batch, **parse_assignments(args.set)}
    )
    dataset = open_dataset(args.data, config.model.image_size, config.model.image_channels, config.data)
    config = resolve(config, dataset)
    ranks = OneProcess("cpu")
    torch.manual_seed(config.seed)
    objective = objective_of(config, ranks.device)
    network = objective.build().train()
    optimisation = Optimisation(config, objective, network, ranks)
    sampler = TIMESTEP_SAMPLERS[config.timestep_sampler](objective.num_steps)
    batches = Batches(config, dataset, sampler, ranks.device)
    state = TrainState(network, optimisation.optimizer, averages_of(config, network), sampler)
    window, clock = Window(objective.by_quartile), Clock()
    for step in range(WARM_UP + args.steps):
        first = step * config.batch_size
        if step == WARM_UP:
            clock.seconds.clear()
        with clock.part("images: read, decode, scale"):
            images = batches.images(first)
        with clock.part("timesteps and noise"):
            batch = batches.complete(first, images)
        with clock.part(NETWORK):
            losses = optimisation.gradient(batch)
        with clock.part("clip, AdamW"):
            norm = optimisation.step(config.lr)
        with clock.part("average"):
            state.average_in()
        with clock.part("log"):
            window.add(losses, batch.t, norm, objective.num_steps)
            window.summary()
    return clock


def run(args: argparse.Namespace) -> None:
    """Measure, and print a table."""
    torch.set_num_threads(1)
    facts = describe_run(torch.device("cpu"), 1)
    seconds = {name: np.array(values) for name, values in measure(args).seconds.items()}
    total = float(np.median(sum(seconds.values())))
    rows = []
    other = sum(values for name, values in seconds.items() if name != NETWORK)
    for name, values in {**seconds, "all but the gradient": other}.items():
        low, middle, high = 1e3 * np.quantile(values, (0.25, 0.5, 0.75))
        rows.append([name, f"{middle:.2f}", f"{low:.2f} to {high:.2f}", f"{0.1 * middle / total:.2f} %"])
    table = markdown_table(["part", "processor ms", "quartiles", "share of the step"], rows)
    print(markdown_section(facts, table, "benchmarks.step_parts"))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_parts", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="as for `iddpm train`")
    parser.add_argument("--preset", default="fashion32", help="(fashion32)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="as for `iddpm train`")
    parser.add_argument("--precision", default="float32", help="(float32)")
    parser.add_argument("--batch", type=int, default=64, help="images per step (64)")
    parser.add_argument("--steps", type=int, default=8, help="(8)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(exit_status(run, parse_arguments()))
