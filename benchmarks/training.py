"""Time of a train step: ours against OpenAI's loop, restated, on one network; the contenders take turns.

    python -m benchmarks.training --threads 1 --batch 32 --rounds 10

The restated loop is that of openai/improved-diffusion's `train_util.py` with its default flags: float32, images
converted one by one, a norm and an average computed parameter by parameter, every loss of the log read by itself. Both
use the network of this package, its losses (the same tables and terms), and PyTorch's AdamW, so that the difference is
that of the loops. Our batches are drawn in the step itself; a run draws them ahead, in a thread.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.reporting import describe_run, markdown_section, markdown_table
from benchmarks.rounds import Pace, Timing, take_turns
from diffusion.config import size_pair
from formats.precision import TrainingPrecision
from trainer.batches import Batch, Batches
from trainer.config import TrainConfig
from trainer.data import Dataset, open_dataset
from trainer.ema import EMA, exponential_decay
from trainer.log import Window
from trainer.loop import TIMESTEP_SAMPLERS, resolve
from trainer.objective import objective_of
from trainer.optimisation import Optimisation, learning_rate
from trainer.presets import preset
from trainer.ranks import OneProcess
from trainer.state import TrainState

IMAGES = 512
CPU = torch.device("cpu")
BASELINE = "OpenAI's loop, float32"


def main() -> None:
    """Run the benchmark and print its section of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="fashion32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--max-seconds", type=float, default=300)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = describe_run(CPU, options.threads)
    facts["Network"] = f"preset {options.preset}, batches of {options.batch}"
    with tempfile.TemporaryDirectory() as folder:
        config, dataset = _problem(options.preset, options.batch, Path(folder))
        timings = take_turns(contenders(config, dataset), Pace(rounds=options.rounds, max_seconds=options.max_seconds))
    facts["Rounds"] = str(len(timings[BASELINE].seconds))
    print(markdown_section(facts, table(timings), "benchmarks.training"))


def contenders(config: TrainConfig, dataset: Dataset) -> dict[str, Callable[[], object]]:
    """Return train steps by name; each has a network of its own, and continues with its next batch at each call."""
    return {
        BASELINE: openai_step(config, dataset),
        **{f"ours, {precision}": our_step(config, dataset, precision) for precision in ("float32", "bfloat16")},
        "ours, bfloat16, channels_last": our_step(config, dataset, "bfloat16", channels_last=True),
        "gradient alone, float32": our_step(config, dataset, "float32", gradient_alone=True),
        "gradient alone, bfloat16": our_step(config, dataset, "bfloat16", gradient_alone=True),
    }


def our_step(
    config: TrainConfig,
    dataset: Dataset,
    precision: TrainingPrecision,
    *,
    channels_last: bool = False,
    gradient_alone: bool = False,
) -> Callable[[], object]:
    """Return the step of `trainer.loop`, or only the forward and backward passes of one batch."""
    config = config.replace(precision=precision, channels_last=channels_last)
    torch.manual_seed(config.seed)
    objective = objective_of(config, CPU)
    network = objective.build().train()
    optimisation = Optimisation(config, objective, network, OneProcess(CPU))
    sampler = TIMESTEP_SAMPLERS[config.timestep_sampler](objective.num_steps)
    ema = EMA(network, exponential_decay(config.ema_decay, warmup=config.ema_warmup))
    state = TrainState(network, optimisation.optimizer, ema, sampler)
    batches = Batches(config, dataset, sampler)
    window = Window(objective.by_quartile)
    if gradient_alone:
        batch = batches.draw(0)
        return lambda: optimisation.gradient(batch)

    def step() -> None:
        before = state.images_seen
        batch = batches.draw(before)
        losses = optimisation.gradient(batch)
        grad_norm = optimisation.step(learning_rate(config, before))
        state.average_in()
        state.images_seen = before + config.batch_size
        window.add(losses, batch.t, grad_norm, objective.num_steps)

    return step


def openai_step(config: TrainConfig, dataset: Dataset) -> Callable[[], object]:
    """Return a step of OpenAI's loop in float32."""
    torch.manual_seed(config.seed)
    objective = objective_of(config, CPU)
    network = objective.build().train()
    parameters = list(network.parameters())
    averages = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    sums: dict[str, float] = {}
    rng = np.random.default_rng(config.seed)

    def step() -> None:
        indices = rng.integers(0, IMAGES, config.batch_size)
        images = dataset.images(indices)
        x0 = torch.stack([torch.from_numpy(_in_network_units(image)) for image in images])
        t = torch.from_numpy(rng.choice(objective.num_steps, size=(config.batch_size,)))
        batch = Batch(
            positions=indices, x0=x0, y=torch.from_numpy(dataset.labels[indices]), t=t,
            weights=torch.ones(config.batch_size), noise=torch.randn_like(x0), conditions={},
        )  # fmt: skip
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.detach_()
                parameter.grad.zero_()
        losses = objective.losses(network, batch)
        (losses["loss"] * batch.weights).mean().backward()  # type: ignore[no-untyped-call]
        for name, values in losses.items():
            sums[name] = sums.get(name, 0.0) + values.mean().item()
            for at, value in zip(t.numpy(), values.detach().numpy(), strict=True):
                quartile = f"{name}_q{int(4 * at / objective.num_steps)}"
                sums[quartile] = sums.get(quartile, 0.0) + float(value)
        norm = sum((parameter.grad**2).sum().item() for parameter in parameters if parameter.grad is not None)
        sums["grad_norm"] = sums.get("grad_norm", 0.0) + norm**0.5
        optimizer.step()
        for average, parameter in zip(averages, parameters, strict=True):
            average.mul_(config.ema_decay).add_(parameter.detach(), alpha=1 - config.ema_decay)

    return step


def table(timings: dict[str, Timing]) -> str:
    """Return a table of times; the speed is the median of the rounds' ratios to OpenAI's loop."""
    rows = []
    for name, timing in timings.items():
        ratios = np.array(timings[BASELINE].seconds) / np.array(timing.seconds)
        low, high = np.percentile(ratios, (25, 75))
        rows.append(
            [
                name,
                f"{1e3 * timing.median:.0f}",
                f"{1e3 * timing.best:.0f}",
                f"{np.median(ratios):.2f}",
                f"{low:.2f} to {high:.2f}",
            ]
        )
    return markdown_table(["step", "median, ms", "best, ms", "speed", "quartiles"], rows)


def _in_network_units(image: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return an image [H, W, C] of 8 bits as float32 [C, H, W] in [-1, 1]."""
    return np.ascontiguousarray(np.transpose(image.astype(np.float32) / 127.5 - 1, (2, 0, 1)))


def _problem(name: str, batch_size: int, folder: Path) -> tuple[TrainConfig, Dataset]:
    """Return a preset's configuration, and random images of its size in ten classes."""
    config = preset(name).replace(batch_size=batch_size)
    rng = np.random.default_rng(0)
    height, width = size_pair(config.model.image_size)
    images = rng.integers(0, 256, (IMAGES, height, width, config.model.image_channels), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.arange(IMAGES) % 10)
    dataset = open_dataset(folder / "images.npz", config.model.image_size, config.model.image_channels)
    return resolve(config, dataset), dataset


if __name__ == "__main__":
    main()
