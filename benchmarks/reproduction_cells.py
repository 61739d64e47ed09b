"""The measurements of the reproduction: a cell is one number of one model, kept in a JSON file of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from benchmarks.judge import Judge, JudgeError, features_of
from benchmarks.options import say
from benchmarks.reproduction_curves import curves_of
from benchmarks.reproduction_runs import (
    BASE_WIDTH,
    OTHER_WIDTHS,
    SCHEDULES,
    SEEDS,
    Run,
    images_seen,
    is_finished,
    run_name,
    width_name,
)
from diffusion.config import DiffusionConfig, ModelConfig
from diffusion.network_inputs import NetworkInputs
from diffusion.plans import build_plan
from diffusion.sampling import ImageSpec, sample_images
from diffusion.unet import UNet
from formats.atomic_file import write_file
from formats.json_files import read_object
from trainer.data import Dataset, Uint8Array, eight_bit_images, open_dataset
from trainer.evaluation.folder import EvaluationStopped
from trainer.evaluation.gradient_noise import Case, GradientNoise, NoiseOptions
from trainer.evaluation.gradient_noise_report import summarise
from trainer.evaluation.metrics import frechet_distance
from trainer.evaluation.nll import NllOptions, evaluate_nll
from trainer.evaluation.reading import reading_of
from trainer.evaluation.records import Records
from trainer.evaluation.scaling import parameter_count, training_flops
from trainer.evaluation.subject import Subject, load_subject
from trainer.run_folder import LOG_FILE, MODEL_FOLDER, checkpoints

FULL = 0
"""Stands for the number of steps of the full chain."""
WIDTH_STEPS = 50
"""Sampling steps along the training of each width (figure 10)."""
WIDTH_NLL_STEPS = 100
EXTRA = "+extra"
"""Suffix of the variants of bits/dim with appendix E's extra steps."""
SAMPLE_BATCH = 64
NOISE_CASES = ("hybrid:uniform", "vlb:uniform", "vlb:loss_second_moment")

CURVES = {"hybrid": "hybrid:uniform", "vlbuniform": "vlb:uniform", "vlb": "vlb:loss_second_moment"}
"""Objectives whose curves over training are compared (figures 6 and 7), with the case of `NOISE_CASES` of each."""

Kind = Literal["nll", "frechet", "noise", "curves"]


@dataclass(frozen=True)
class Cell:
    """What is measured of which model."""

    kind: Kind
    run: str
    steps: int = FULL
    """Steps of the chain; FULL for noise and curves."""
    variant: str = "trained"
    """A variance (`trained`, `fixed_small`, `fixed_large`), for images also `ddim`; for bits/dim with or without EXTRA;
    for noise a case of `iddpm evaluate noise-scale`."""
    images_seen: int | None = None
    """A checkpoint during training; None: the trained model."""

    @property
    def file_name(self) -> str:
        """Return the name of the cell's JSON file."""
        at = [] if self.images_seen is None else [f"at{self.images_seen}"]
        steps = [] if self.kind in ("noise", "curves") else [str(self.steps) if self.steps else "full"]
        return "_".join([self.kind, self.run, *at, *steps, self.variant.replace(":", "-")]) + ".json"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much is measured."""

    steps: tuple[int, ...] = (25, 50, 100, 250, FULL)
    """Numbers of steps; FULL is needed for tables 1 and 2."""
    nll_images: int = 200
    """Test images of each bits/dim; the same ones for every model."""
    frechet_images: int = 500
    """Samples of each Fréchet distance."""
    noise_batches: int = 16
    noise_small: int = 16
    noise_big: int = 256
    noise_history: int = 10
    bfloat16: bool = False
    """Sample with the network in bfloat16 autocast; likelihoods and gradients are in float32."""

    def settings(self) -> dict[str, int]:
        """Return what every cell of a folder must share; further numbers of steps may be added later."""
        return {name: value for name, value in asdict(self).items() if name != "steps"}


def final_cells(options: Options, seeds: Sequence[int] = SEEDS) -> list[Cell]:
    """Return the cells of trained models, whether or not their runs are finished."""
    cells: list[Cell] = []
    for seed in seeds:
        for schedule in SCHEDULES:
            for objective in ("hybrid", "simple", "vlb"):
                name = run_name(objective, schedule, seed)
                cells.append(Cell("nll", name))
                cells += [Cell("frechet", name, steps) for steps in options.steps]
            cells.append(Cell("nll", run_name("simple", schedule, seed), FULL, "fixed_large"))
        hybrid, simple, uniform = (run_name(name, "cosine", seed) for name in ("hybrid", "simple", "vlbuniform"))
        cells.append(Cell("nll", uniform))
        cells += [Cell("frechet", uniform, steps) for steps in options.steps]
        for steps in options.steps:  # figure 8
            cells += [Cell("frechet", hybrid, steps, variant) for variant in ("fixed_small", "fixed_large", "ddim")]
            cells += [Cell("frechet", simple, steps, variant) for variant in ("fixed_large", "ddim")]
            if steps != FULL:  # figure 15
                for suffix in ("", EXTRA):
                    cells += [Cell("nll", hybrid, steps, f"trained{suffix}")]
                    cells += [Cell("nll", simple, steps, f"{v}{suffix}") for v in ("trained", "fixed_large")]
        cells += [Cell("noise", run, FULL, case) for run in (hybrid, uniform) for case in NOISE_CASES]
        for objective, case in CURVES.items():
            run = run_name(objective, "cosine", seed)
            cells += [Cell("curves", run), Cell("noise", run, FULL, case)]
        for width in (BASE_WIDTH, *OTHER_WIDTHS):
            cells += width_cells(width_name(width, seed), None)
    return list(dict.fromkeys(cells))


def width_cells(run: str, seen: int | None) -> list[Cell]:
    """Return the cells of one point of figure 10."""
    return [
        Cell("frechet", run, WIDTH_STEPS, "trained", seen),
        Cell("nll", run, WIDTH_NLL_STEPS, f"trained{EXTRA}", seen),
    ]


def possible_cells(folder: Path, runs: Sequence[Run], options: Options, seeds: Sequence[int] = SEEDS) -> list[Cell]:
    """Return the cells of the finished runs and, for figures 7 and 10, of their checkpoints, cheap ones first."""
    finished = {run.name for run in runs if is_finished(folder, run)}
    cells = [cell for cell in final_cells(options, seeds) if cell.run in finished]
    for seed in seeds:
        widths = [width_name(width, seed) for width in (BASE_WIDTH, *OTHER_WIDTHS)]
        cases = {run_name(objective, "cosine", seed): case for objective, case in CURVES.items()}
        for name in sorted(finished):
            for checkpoint in checkpoints(folder / name)[:-1]:  # the last one is the trained model
                seen = int(checkpoint.name)
                if name in widths:
                    cells += width_cells(name, seen)
                if name in cases:
                    cells.append(Cell("noise", name, FULL, cases[name], seen))
    return sorted(cells, key=lambda cell: _rows(cell, options))


def _rows(cell: Cell, options: Options) -> int:
    """Return about how many rows a network evaluates; a backward pass counts as two rows."""
    if cell.kind == "curves":
        return 0
    if cell.kind == "noise":
        return 3 * options.noise_batches * options.noise_big
    images = options.nll_images if cell.kind == "nll" else options.frechet_images
    return images * (cell.steps or 1000)


class EpsOnly:
    """A network without its variance channels, to sample with fixed variances."""

    def __init__(self, network: UNet) -> None:
        self.config: ModelConfig = network.config.replace(learn_sigma=False)
        self._network = network

    def embed_timesteps(self, t: Any, /) -> Any:
        """Return the network's emb_t."""
        return self._network.embed_timesteps(t)

    def run(self, inputs: NetworkInputs[Any], /) -> Any:
        """Return eps, [B, C, H, W]."""
        return self._network.run(inputs)[:, : self.config.image_channels]


class Evaluation:
    """Measures cells of the runs in a folder, and keeps them in a folder of results."""

    def __init__(
        self, runs: Path, test: Path, judge: Path, out: Path, options: Options, *, cache: Path | None = None
    ) -> None:
        self._runs, self._test, self._judge_file, self._out, self._options = runs, test, judge, out, options
        self._cache = cache

    def measure_all(self, cells: Sequence[Cell], stop: Callable[[], bool] = lambda: False) -> None:
        """Measure the cells that have no file yet, in order.

        Raises:
            EvaluationStopped: `stop` returned True; call again to continue.
        """
        missing = [cell for cell in cells if not (self._out / cell.file_name).exists()]
        say(f"{len(cells) - len(missing)} of {len(cells)} cells are measured")
        for number, cell in enumerate(missing, start=1):
            if stop():
                raise EvaluationStopped
            started = time.perf_counter()
            subject = load_subject(self._folder_of(cell), torch.device("cpu"))
            measure = {"nll": self._nll, "frechet": self._frechet, "noise": self._noise, "curves": self._curves}
            found = measure[cell.kind](cell, subject, stop)
            seconds = round(time.perf_counter() - started, 1)
            model = {"sha256": subject.sha256, **_training(subject, self._folder_of(cell))}
            content = {**asdict(cell), "model": model, "seconds_since_resumed": seconds, **found}
            write_file(self._out / cell.file_name, f"{json.dumps(content, indent=1)}\n".encode())
            self._partial(cell).unlink(missing_ok=True)
            say(f"{number}/{len(missing)} {cell.file_name} in {seconds} s")

    def _folder_of(self, cell: Cell) -> Path:
        run = self._runs / cell.run
        if cell.images_seen is None:
            return run / MODEL_FOLDER
        return next(path for path in checkpoints(run) if int(path.name) == cell.images_seen)

    def _partial(self, cell: Cell) -> Path:
        """Return the file of what is done of a cell."""
        return (self._out / cell.file_name).with_suffix(".f32")

    def _nll(self, cell: Cell, subject: Subject, stop: Callable[[], bool]) -> dict[str, Any]:
        variance = cell.variant.removesuffix(EXTRA)
        config = subject.config.replace(diffusion=_diffusion(subject, variance).model_dump())
        options = NllOptions(
            respacing=_respacing(cell), extra_steps=cell.variant.endswith(EXTRA), images=self._options.nll_images
        )
        found = evaluate_nll(replace(subject, config=config), self._dataset, options, self._partial(cell), stop=stop)
        total = found.total_bpd
        return {
            "bits_per_dim": float(total.mean()),
            "std_error": float(total.std(ddof=1) / np.sqrt(len(total))),
            "steps_evaluated": len(found.timesteps),
        }

    def _frechet(self, cell: Cell, subject: Subject, stop: Callable[[], bool]) -> dict[str, Any]:
        pixels = self._samples(cell, subject, stop)
        features = features_of(self._judge, pixels)
        return {
            "frechet_distance": frechet_distance(self._reference, features),
            "steps_sampled": cell.steps or subject.config.diffusion.num_timesteps,
        }

    def _samples(self, cell: Cell, subject: Subject, stop: Callable[[], bool]) -> Uint8Array:
        """Sample image k from seed k, for every cell; continue what an interrupted process left."""
        unet, is_ddim = subject.networks[0], cell.variant == "ddim"
        diffusion = _diffusion(subject, "trained" if is_ddim else cell.variant)
        network = unet if diffusion.learns_variance else EpsOnly(unet)
        plan = build_plan(diffusion, "ddim" if is_ddim else "ancestral", _respacing(cell))
        channels, height, width = subject.image_shape
        count, records = self._options.frechet_images, Records(self._partial(cell), channels * height * width)
        done = min(len(records), count) // SAMPLE_BATCH * SAMPLE_BATCH
        records.truncate(done)
        for start in range(done, count, SAMPLE_BATCH):
            if stop():
                raise EvaluationStopped
            specs = [ImageSpec(seed=k) for k in range(start, min(start + SAMPLE_BATCH, count))]
            with torch.autocast("cpu", torch.bfloat16, enabled=self._options.bfloat16):
                batch = sample_images(network, plan, specs)
            records.append(batch.reshape(len(batch), -1).astype(np.float32))
        return records.read(count).astype(np.uint8).reshape(count, height, width, channels)

    def _noise(self, cell: Cell, subject: Subject, stop: Callable[[], bool]) -> dict[str, Any]:
        case, options = Case.parse(cell.variant), self._options
        noise = GradientNoise(
            subject,
            self._dataset,
            NoiseOptions(
                small=options.noise_small,
                big=options.noise_big,
                batches=options.noise_batches,
                history=options.noise_history,
            ),
        )
        sampler = None
        if case.sampler != "uniform":
            sampler = noise.importance(self._out / f"history_{cell.run}_{subject.sha256[:12]}.f32", stop=stop)
        measured = noise.measure(case, sampler, self._partial(cell), stop=stop)
        return summarise({case: measured})[0]

    def _curves(self, cell: Cell, subject: Subject, stop: Callable[[], bool]) -> dict[str, Any]:
        return curves_of(self._runs / cell.run / LOG_FILE, subject.config.diffusion.num_timesteps)

    @cached_property
    def _dataset(self) -> Dataset:
        subject = load_subject(next(self._runs.glob(f"*/{MODEL_FOLDER}")), torch.device("cpu"))
        model, reading = subject.config.model, reading_of(subject.config)
        return open_dataset(
            self._test, model.image_size, model.image_channels, reading, labelled=False, cache=self._cache
        )

    @cached_property
    def _judge(self) -> Judge:
        weights, images = load_file(self._judge_file), self._dataset.images(np.arange(1))
        if "head.4.weight" not in weights:
            raise JudgeError(f"{self._judge_file} contains no judge; benchmarks.conditioning trains one")
        judge = Judge((images.shape[-1], *images.shape[1:3]), len(weights["head.4.weight"]))
        try:
            judge.load_state_dict(weights)
        except RuntimeError as error:
            raise JudgeError(f"{self._judge_file} contains no judge for these images: {error}") from error
        return judge.eval()

    @cached_property
    def _reference(self) -> npt.NDArray[np.float32]:
        """Return the judge's features of the test images."""
        everything = np.arange(len(self._dataset.labels))
        return features_of(self._judge, eight_bit_images(self._dataset, everything))


def _diffusion(subject: Subject, variance: str) -> DiffusionConfig:
    diffusion = subject.config.diffusion
    return diffusion if variance == "trained" else diffusion.replace(variance=variance)


def _respacing(cell: Cell) -> str:
    """Return the spec of a number of steps; DDIM takes constant strides, as in the paper."""
    if cell.steps == FULL:
        return ""
    return f"ddim{cell.steps}" if cell.variant == "ddim" else str(cell.steps)


def _training(subject: Subject, folder: Path) -> dict[str, Any]:
    model, seen = subject.config.model, images_seen(folder)
    flops = float(seen) * training_flops(model)
    return {
        "channels": model.model_channels,
        "parameters": parameter_count(model),
        "images_seen": seen,
        "flops": flops,
    }


def read_cell(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """Return the content of a cell's file; None if it is not measured."""
    path = folder / cell.file_name
    return read_object(path) if path.exists() else None
