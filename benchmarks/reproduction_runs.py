"""The training runs of the reproduction of IDDPM (arXiv:2102.09672), and their execution in order."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.options import say
from formats.checkpoint_config import CONFIG_FILE
from formats.json_files import read_object
from trainer.data import open_dataset
from trainer.loop import resolve, train
from trainer.presets import preset
from trainer.resume import resumed_config
from trainer.run_folder import MODEL_FOLDER, checkpoints

PRESET = "fashion32"
SEEDS = (0, 1)
SCHEDULES = ("cosine", "linear")
BASE_WIDTH = 16
OTHER_WIDTHS = (8, 12, 24)
IMAGES = 60_000
COMMON: Mapping[str, Any] = {
    "model.model_channels": BASE_WIDTH,
    "model.norm_groups": 4,
    "model.channel_mult": [1, 2, 2],
    "model.attention_resolutions": [],
    "diffusion.num_timesteps": 1000,
    "lr": 5e-4,
    "lr_warmup_images": 5000,
    "lr_schedule": "constant",
    "timestep_sampler": "uniform",
    "class_conditional": False,
    "label_dropout": 0,
    "total_images": IMAGES,
    "checkpoint_every_images": 20_000,
    "keep_checkpoints": 9,
    "preview_per_class": 0,
    "microbatch_size": 16,  # with it, the log has gradient noise, for `iddpm plot`
    "log_every_batches": 5,
}
"""What the runs have in common, beside the preset."""
LEARNED = "learned_range"
OBJECTIVES: Mapping[str, Mapping[str, Any]] = {
    "hybrid": {"loss": "hybrid", "diffusion.variance": LEARNED},
    "simple": {"loss": "simple", "diffusion.variance": "fixed_small"},
    "vlb": {"loss": "vlb", "diffusion.variance": LEARNED, "timestep_sampler": "loss_second_moment"},
    "vlbuniform": {"loss": "vlb", "diffusion.variance": LEARNED},
}


@dataclass(frozen=True)
class Run:
    """A training run: the name of its folder, and the fields that differ from the preset."""

    name: str
    settings: Mapping[str, Any]


def run_name(objective: str, schedule: str, seed: int) -> str:
    """Return the name of the run of an objective and a noise schedule."""
    return f"{objective}-{schedule}-{seed}"


def width_name(width: int, seed: int) -> str:
    """Return the name of the run of L_hybrid with the cosine schedule and a number of channels."""
    return run_name("hybrid", "cosine", seed) if width == BASE_WIDTH else f"width{width}-{seed}"


def planned_runs(changes: Mapping[str, Any] | None = None, seeds: Sequence[int] = SEEDS) -> list[Run]:
    """Return the runs in the order of training; `changes` are settings that replace those of every run."""
    runs = []
    for seed in seeds:
        for schedule in SCHEDULES:
            runs += [_run(name, schedule, seed, changes) for name in ("hybrid", "simple", "vlb")]
        runs.append(_run("vlbuniform", "cosine", seed, changes))
        for width in OTHER_WIDTHS:
            settings = {**_run("hybrid", "cosine", seed, None).settings, "model.model_channels": width}
            runs.append(Run(width_name(width, seed), {**settings, **(changes or {})}))
    return runs


def _run(objective: str, schedule: str, seed: int, changes: Mapping[str, Any] | None) -> Run:
    settings = {**COMMON, "seed": seed, "diffusion.noise_schedule": schedule, **OBJECTIVES[objective]}
    return Run(run_name(objective, schedule, seed), {**settings, **(changes or {})})


def images_seen(model: Path) -> int:
    """Return the number of images that a checkpoint was trained on; 0 if there is no checkpoint."""
    if not (model / CONFIG_FILE).exists():
        return 0
    return int(read_object(model / CONFIG_FILE).get("provenance", {}).get("images_seen", 0))


def is_finished(folder: Path, run: Run) -> bool:
    """Return whether a run's `model/` was trained on all of its images."""
    return images_seen(folder / run.name / MODEL_FOLDER) >= run.settings["total_images"]


def train_runs(
    folder: Path, data: Path, runs: Sequence[Run], cache: Path | None = None, stop: Callable[[], bool] = lambda: False
) -> None:
    """Train the runs that are not finished, one after another, each from its newest checkpoint.

    Args:
        folder: of the runs' folders.
        data: as for `iddpm train`.
        runs: in order.
        cache: see `open_dataset`.
        stop: as for `train`.

    Raises:
        TrainError: a run diverged, or another process trains it; the later runs are not started.
        Stopped: `stop` returned True; call again to continue.
        DataError: the data cannot be read.
    """
    for number, run in enumerate(runs, start=1):
        out = folder / run.name
        if is_finished(folder, run):
            say(f"{number}/{len(runs)} {run.name}: finished")
            continue
        say(f"{number}/{len(runs)} {run.name}: training")
        resume = bool(checkpoints(out))
        config = (resumed_config(out, PRESET) if resume else preset(PRESET)).with_overrides(dict(run.settings))
        dataset = open_dataset(
            data, config.model.image_size, config.model.image_channels, config.data, labelled=False, cache=cache
        )
        train(resolve(config, dataset), dataset, out, resume=resume, command=_command(data, run), stop=stop)


def _command(data: Path, run: Run) -> str:
    """Return the command that trains the same model."""
    sets = [part for name, value in run.settings.items() for part in ("--set", f"{name}={_text(value)}")]
    return shlex.join(["iddpm", "train", PRESET, "--data", data.name, *sets])


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
