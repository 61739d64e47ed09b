"""Time training steps: our trainer, OpenAI's loop and diffusers' example, on the same network, in turns.

    python -m benchmarks.training --data TRAIN.npz

OpenAI's loop (improved-diffusion, `train_util.py`) and diffusers' example for unconditional generation are restated:
what they do in each step, in float32, with their own way of zeroing gradients, logging, measuring the gradient's norm
and averaging weights. The loss of OpenAI's loop is our L_hybrid, which is the same computation. Each turn trains
WARM_UP and then --batches batches; the time of the latter counts. Results go to the folder --out.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.options import WORK, exit_status, say
from benchmarks.reporting import command_line, describe_run, markdown_table
from benchmarks.rounds import Timing
from diffusion.config import CheckpointConfig, ModelConfig
from diffusion.losses import LossTables, q_sample, training_losses
from diffusion.respacing import respace
from diffusion.schedules import named_betas
from diffusion.unet import UNet
from formats.checkpoint import write_checkpoint
from model_export.diffusers_export import export_diffusers
from trainer.config import TrainConfig
from trainer.data import Dataset, network_input, open_dataset
from trainer.loop import resolve, train
from trainer.presets import preset
from trainer.run_folder import LOG_FILE

WARM_UP = 3
"""Batches that do not count."""
EMA_DECAY = 0.9999
Turn = Callable[[int], float]
"""Trains a number of batches after the warm-up; returns the seconds that they took."""


def ours(config: TrainConfig, dataset: Dataset, precision: str) -> Turn:
    """Return turns of our trainer: whole runs, whose log says how fast the last batches were."""

    def turn(batches: int) -> float:
        images = (WARM_UP + batches) * config.batch_size
        short = config.replace(
            total_images=images, checkpoint_every_images=images, precision=precision, log_every_batches=1
        )
        with tempfile.TemporaryDirectory() as folder:
            train(short, dataset, Path(folder) / "run")
            lines = (Path(folder) / "run" / LOG_FILE).read_text(encoding="utf-8").splitlines()
        rates = [json.loads(line)["images_per_second"] for line in lines[WARM_UP:]]
        return sum(config.batch_size / rate for rate in rates)

    return turn


class OpenAILoop:
    """What `TrainLoop.run_step` of improved-diffusion does without a GPU: no DDP, float32, one EMA rate."""

    def __init__(self, config: TrainConfig, dataset: Dataset) -> None:
        assert isinstance(config.model, ModelConfig)  # `run` checks it
        torch.manual_seed(0)
        self._config, self._dataset = config, dataset
        self._network = UNet(config.model).train()
        self._parameters = list(self._network.parameters())
        self._average = copy.deepcopy(self._parameters)
        self._optimizer = torch.optim.AdamW(self._parameters, lr=config.lr, weight_decay=config.weight_decay)
        process = respace(config.diffusion)
        self._tables, self._t_model = LossTables.from_process(process, "cpu"), torch.from_numpy(process.t_model)
        self._rng = np.random.default_rng(0)
        self._sums: dict[str, list[float]] = {}

    def __call__(self, batches: int) -> float:
        """Take a turn."""
        for _ in range(WARM_UP):
            self._step()
        begun = time.perf_counter()
        for _ in range(batches):
            self._step()
        return time.perf_counter() - begun

    def _step(self) -> None:
        config = self._config
        x0, y = _batch(self._dataset, self._rng, config.batch_size)
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.detach_()
                parameter.grad.zero_()
        probabilities = np.full(len(self._t_model), 1 / len(self._t_model))
        t = torch.from_numpy(self._rng.choice(len(probabilities), size=(len(x0),), p=probabilities))
        noise = torch.randn_like(x0)
        x_t = q_sample(self._tables, x0, t, noise)
        output = self._network(x_t, self._t_model[t], y)
        assert config.loss != "cross_entropy"  # a UNet has another
        losses = training_losses(
            self._tables, config.diffusion, output, x0, x_t, noise, t, loss=config.loss, rescale=config.rescale_vlb
        )._asdict()
        for name, values in losses.items():  # logged per image, by quartile
            for quartile, value in zip(4 * t.numpy() // len(self._t_model), values.detach().numpy(), strict=True):
                self._sums.setdefault(f"{name}_q{quartile}", []).append(float(value))
        losses["loss"].mean().backward()
        norm = sum(float((p.grad**2).sum()) for p in self._parameters if p.grad is not None)
        self._sums.setdefault("grad_norm", []).append(norm**0.5)
        self._optimizer.step()
        with torch.no_grad():
            for target, source in zip(self._average, self._parameters, strict=True):
                target.mul_(EMA_DECAY).add_(source, alpha=1 - EMA_DECAY)


class DiffusersLoop:
    """What diffusers' `train_unconditional.py` does in a step on a CPU, in float32, with its EMAModel."""

    def __init__(self, config: TrainConfig, dataset: Dataset, folder: Path) -> None:
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self._dataset, self._batch_size = dataset, config.batch_size
        self._network: Any = UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False).train()
        diffusion = config.diffusion
        betas = named_betas(diffusion.noise_schedule, diffusion.num_timesteps)
        self._scheduler = DDPMScheduler(diffusion.num_timesteps, trained_betas=betas)
        self._optimizer = torch.optim.AdamW(self._network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self._lr = get_scheduler("cosine", self._optimizer, num_warmup_steps=500, num_training_steps=100_000)
        self._average = EMAModel(self._network.parameters(), decay=EMA_DECAY, use_ema_warmup=True)
        self._rng = np.random.default_rng(0)

    def __call__(self, batches: int) -> float:
        """Take a turn."""
        for _ in range(WARM_UP):
            self._step()
        begun = time.perf_counter()
        for _ in range(batches):
            self._step()
        return time.perf_counter() - begun

    def _step(self) -> None:
        x0, y = _batch(self._dataset, self._rng, self._batch_size)
        noise = torch.randn_like(x0)
        t = torch.randint(0, self._scheduler.config["num_train_timesteps"], (len(x0),))
        x_t = self._scheduler.add_noise(x0, noise, t)
        output = self._network(x_t, t, class_labels=y).sample
        loss = F.mse_loss(output[:, : x0.shape[1]].float(), noise.float())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._network.parameters(), 1.0)
        self._optimizer.step()
        self._lr.step()
        self._optimizer.zero_grad()
        self._average.step(self._network.parameters())
        loss.detach().item()  # logged at each step


def _batch(dataset: Dataset, rng: np.random.Generator, size: int) -> tuple[Tensor, Tensor]:
    indices = rng.integers(0, len(dataset.labels), size)
    return torch.from_numpy(network_input(dataset.images(indices))), torch.from_numpy(dataset.labels[indices])


def take_turns(contenders: dict[str, Turn], rounds: int, batches: int) -> dict[str, Timing]:
    """Let each contender train once per round; each round begins with another one."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(contenders[name](batches) / batches)
            say(f"round {number + 1}, {name}: {1e3 * seconds[name][-1]:.0f} ms per batch")
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def section(facts: dict[str, str], timings: dict[str, Timing], peer: str, batch_size: int) -> str:
    """Write the section for RESULTS.md; ratios are medians of those within a round."""

    def ratio(name: str) -> str:
        ratios = np.array(timings[peer].seconds) / np.array(timings[name].seconds)
        return f"{np.median(ratios):.2f} ({ratios.min():.2f}-{ratios.max():.2f})"

    rows = [
        [name, f"{1e3 * t.median:.0f}", f"{batch_size / t.median:.0f}", ratio(name), str(len(t.seconds))]
        for name, t in timings.items()
    ]
    header = ["trainer", "median ms per batch", "images/s", f"speed against {peer} (range)", "rounds"]
    lines = ["## Training", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += [markdown_table(header, rows), "", "```", command_line("benchmarks.training"), "```", ""]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Measure and write.

    Raises:
        ValueError: invalid options or data; the message gives the reason.
    """
    torch.set_num_threads(args.threads)
    config = preset(args.preset).with_overrides({"preview_per_class": 0, "ema_sigma_rels": []})
    dataset = open_dataset(args.data, config.model.image_size, config.model.image_channels, config.data)
    config = resolve(config, dataset)
    if not isinstance(config.model, ModelConfig):
        raise ValueError(f"{args.preset} trains a classifier; a diffusion model is needed here")
    facts = describe_run(torch.device("cpu"), args.threads)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "network"
        described = CheckpointConfig(model=config.model, diffusion=config.diffusion, class_names=dataset.class_names)
        write_checkpoint(checkpoint, described, UNet(config.model).state_dict())
        export_diffusers(checkpoint, Path(folder) / "diffusers")
        peer = "OpenAI's loop, float32"
        contenders: dict[str, Turn] = {
            peer: OpenAILoop(config, dataset),
            "diffusers' example, float32": DiffusersLoop(config, dataset, Path(folder) / "diffusers"),
            **{f"iddpm, {precision}": ours(config, dataset, precision) for precision in args.precisions},
        }
        timings = take_turns(contenders, args.rounds, args.batches)
    args.out.mkdir(parents=True, exist_ok=True)
    raw = {"facts": facts, "timings": {name: asdict(timing) for name, timing in timings.items()}}
    (args.out / "training.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    text = section(facts, timings, peer, config.batch_size)
    (args.out / "training.md").write_text(text, encoding="utf-8")
    print(text, end="")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="as for `iddpm train`")
    parser.add_argument("--preset", default="fashion32", help="(fashion32)")
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"], help="of our trainer")
    parser.add_argument("--batches", type=int, default=10, help="batches of each turn (10)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--out", type=Path, default=WORK, help=f"folder of the results ({WORK})")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(exit_status(run, parse_arguments()))
