"""Measure whether a class-conditional model draws the requested class, judged by a classifier trained on real images.

    python -m benchmarks.conditioning --model models/fashion32 \
        --train ../shared/data/fashion_mnist_train.npz --test ../shared/data/fashion_mnist_test.npz

The judge sees the real training split only; its accuracy on the real test split shows its reliability. Then, for
each number of steps and each guidance scale, images are sampled (image k: seed k, class k mod C, so that settings
can be compared image by image) and classified by the judge. Progress goes to stderr, the section for
RESULTS.md to --out-markdown. By default the reference loop samples in PyTorch; --backend samples with the service's
engine, as the model is served.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.contenders import Entry, Place, open_denoiser
from benchmarks.engine_sampler import EngineSampler
from benchmarks.judge import Judge, features_of, load_or_train_judge, open_split, predict
from benchmarks.networks import BenchNetwork
from benchmarks.options import WORK
from benchmarks.reporting import cpu_name, markdown_table
from diffusion.config import CheckpointConfig
from diffusion.plans import ancestral_plan
from diffusion.sampling import ImageSpec, sample_images
from diffusion.unet import UNet
from diffusion.update import Step
from formats.checkpoint import load_unet
from formats.checkpoint_config import checkpoint_sha256
from service.backends.base import BackendOptions
from trainer.data import IntArray, Uint8Array, eight_bit_images
from trainer.evaluation.metrics import coverage, frechet_distance
from trainer.provenance import git_commit

MIN_JUDGE_ACCURACY = 0.90
Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""

SAMPLE_BATCH = 64
ENGINE_WIDTH = 16
"""Rows of the engine with --backend."""
WORST_CLASSES = 3
FRAME_PIXELS = 2
DARK_LEVEL = 10
SATURATED_LEVEL = 250


class ConditioningError(ValueError):
    """Unsupported model, data or options; the message gives the reason."""


# --- Counting ---------------------------------------------------------------------------------------------------------


def wilson_interval(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion (Wilson 1927), which stays inside 0..1.

    Args:
        successes: 0..trials.
        trials: at least 1.
        z: normal quantile; the default gives 95 %.

    Raises:
        ValueError: counts out of range.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"successes must be in 0..trials, trials at least 1; got {successes} of {trials}")
    p = successes / trials
    shrink = 1 + z**2 / trials
    centre = (p + z**2 / (2 * trials)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / trials + z**2 / (4 * trials**2))
    # Rounding must not move the interval beyond the proportion if that is 0 or 1.
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


@dataclass(frozen=True, eq=False)
class Agreement:
    """How often the judge recognised the requested class."""

    counts: IntArray
    """int64 [C, C]: images by requested class (row) and judged class (column)."""

    @classmethod
    def from_predictions(cls, requested: IntArray, judged: IntArray, num_classes: int) -> Self:
        """Count pairs of labels, each in 0..num_classes-1."""
        counts = np.zeros((num_classes, num_classes), dtype=np.int64)
        np.add.at(counts, (requested, judged), 1)
        return cls(counts)

    @property
    def total(self) -> int:
        """Images judged."""
        return int(self.counts.sum())

    @property
    def agreed(self) -> int:
        """Images judged to show the requested class."""
        return int(np.trace(self.counts))

    @property
    def rate(self) -> float:
        """Agreement over all images."""
        return self.agreed / self.total

    @property
    def class_rates(self) -> npt.NDArray[np.float64]:
        """Agreement of each class, float64 [C]; NaN where a class was never requested."""
        totals = self.counts.sum(axis=1)
        return np.divide(np.diag(self.counts), totals, out=np.full(len(totals), np.nan), where=totals > 0)

    def worst(self, limit: int) -> list[int]:
        """Return the classes of lowest agreement below 100 %, worst first."""
        rates = self.class_rates
        return [int(c) for c in np.argsort(rates, kind="stable")[:limit] if rates[c] < 1]

    def mistaken_for(self, class_index: int, limit: int = 3) -> list[tuple[int, int]]:
        """Return (judged class, images) of the commonest disagreements about a class, commonest first."""
        row = self.counts[class_index].copy()
        row[class_index] = 0
        return [(int(c), int(row[c])) for c in np.argsort(-row, kind="stable")[:limit] if row[c]]


# --- The model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Likeness:
    """Distance of a set of images from the real test split."""

    frechet: float
    """Fréchet distance in the judge's features; grows as the set gets smaller."""
    precision: float
    recall: float
    dark_frames: float
    """Fraction of the images whose frame, the outermost two pixels, has a mean below level 10 (of 255)."""
    saturated: float
    """Fraction of the values that are level 250 or higher: burnt-out garments raise it."""

    @classmethod
    def measure(cls, judge: Judge, pixels: Uint8Array, reference: npt.NDArray[np.float32]) -> Self:
        """Compare images, uint8 [N, H, W, C], with the features of the test split."""
        features = features_of(judge, pixels)
        covered = coverage(reference, features)
        distance = frechet_distance(reference, features)
        return cls(distance, covered.precision, covered.recall, dark_frames(pixels), saturated(pixels))


def dark_frames(pixels: Uint8Array) -> float:
    """Return the fraction of images, uint8 [N, H, W, C], with a dark frame."""
    frame = np.ones(pixels.shape[1:3], dtype=bool)
    frame[FRAME_PIXELS:-FRAME_PIXELS, FRAME_PIXELS:-FRAME_PIXELS] = False
    return float((pixels[:, frame].mean(axis=(1, 2)) < DARK_LEVEL).mean())


def saturated(pixels: Uint8Array) -> float:
    """Return the fraction of the values of images, uint8 [N, H, W, C], that are almost the highest."""
    return float((pixels >= SATURATED_LEVEL).mean())


@dataclass(frozen=True)
class Setting:
    """How images are sampled."""

    steps: int
    cfg_scale: float

    def __str__(self) -> str:
        return f"{self.steps} steps, cfg {self.cfg_scale:g}"


@dataclass(frozen=True)
class Outcome:
    """Results of one setting."""

    setting: Setting
    agreement: Agreement
    likeness: Likeness
    seconds: float
    """Wall time of sampling all images."""


def balanced_labels(images: int, num_classes: int) -> IntArray:
    """Return the class of each image, int64 [images]: k mod num_classes, each class equally often.

    Raises:
        ConditioningError: images is not a positive multiple of num_classes.
    """
    if images < 1 or images % num_classes:
        raise ConditioningError(f"--images must be a positive multiple of {num_classes}, the classes; got {images}")
    return np.arange(images) % num_classes


def generate(
    network: UNet, config: CheckpointConfig, setting: Setting, labels: IntArray, bfloat16: bool = False
) -> Uint8Array:
    """Sample image k from seed k and class labels[k], uint8 [N, H, W, C]; bfloat16: autocast the network."""
    plan = ancestral_plan(config.diffusion, str(setting.steps))
    specs = [ImageSpec(seed=k, class_index=int(label), cfg_scale=setting.cfg_scale) for k, label in enumerate(labels)]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)
    with autocast, tqdm(total=len(specs) * setting.steps, desc=str(setting), unit="step", mininterval=2) as bar:

        def count(_index: int, step: Step[Tensor]) -> None:
            bar.update(len(step.ok))

        parts = [
            sample_images(network, plan, specs[start : start + SAMPLE_BATCH], on_step=count)
            for start in range(0, len(specs), SAMPLE_BATCH)
        ]
    return np.concatenate(parts)


def open_engine(model: Path, backend: Entry, threads: int) -> EngineSampler:
    """Open a checkpoint in the service's engine; its artifact is exported if it has none.

    Raises:
        ParityError: the exported graph is too far from PyTorch.
        Absent: the backend is not available here.
    """
    network = BenchNetwork(model.name, model, WORK / "judged" / checkpoint_sha256(model)[:12], trained=True)
    place = Place(device=torch.device("cpu"), threads=threads)
    return EngineSampler(open_denoiser(backend, network, place, BackendOptions(max_rows=ENGINE_WIDTH)), ENGINE_WIDTH)


def generate_in_engine(engine: EngineSampler, setting: Setting, labels: IntArray) -> Uint8Array:
    """Sample the images of `generate` with the service's engine."""
    with tqdm(total=len(labels), desc=str(setting), unit="image", mininterval=2) as bar:
        return engine(setting.steps, labels.tolist(), setting.cfg_scale, on_image=bar.update)


def settings_of(config: CheckpointConfig, steps: Sequence[int], scales: Sequence[float] | None) -> list[Setting]:
    """Combine steps and guidance scales; by default without guidance and with the recommended scale.

    Raises:
        ConditioningError: the model is unconditional, or was not trained for guidance.
    """
    if config.model.num_classes is None:
        raise ConditioningError("the model is unconditional: it has no classes")
    chosen = dict.fromkeys(scales or (1.0, config.sampling.cfg_scale))
    if not config.model.null_class and any(scale != 1 for scale in chosen):
        raise ConditioningError("--cfg other than 1 needs a model with model.null_class")
    return [Setting(count, scale) for count in dict.fromkeys(steps) for scale in chosen]


# --- The report -------------------------------------------------------------------------------------------------------


def percent(agreement: Agreement) -> str:
    """Write an agreement with its 95 % interval."""
    low, high = wilson_interval(agreement.agreed, agreement.total)
    return f"{100 * agreement.rate:.1f} % ({100 * low:.1f}-{100 * high:.1f})"


def confusion_line(agreement: Agreement, class_names: Sequence[str]) -> str:
    """Describe the classes with the lowest agreement, and the judge's classes for them."""
    phrases = []
    for worst in agreement.worst(WORST_CLASSES):
        taken = ", ".join(f"{class_names[c]} {count}" for c, count in agreement.mistaken_for(worst))
        total = int(agreement.counts[worst].sum())
        phrases.append(f"{class_names[worst]} {agreement.counts[worst, worst]} of {total} (else {taken})")
    return "; ".join(phrases) or "none wrong"


def report(
    facts: dict[str, str],
    class_names: Sequence[str],
    real: Agreement,
    real_likeness: Likeness,
    outcomes: Sequence[Outcome],
    command: str,
) -> str:
    """Write the section for RESULTS.md."""
    summary = markdown_table(
        ["steps", "cfg_scale", "images", "agreement (95 % interval)", "worst class", "seconds"],
        [
            [
                str(o.setting.steps),
                f"{o.setting.cfg_scale:g}",
                str(o.agreement.total),
                percent(o.agreement),
                f"{100 * o.agreement.class_rates.min():.0f} %",
                f"{o.seconds:.0f}",
            ]
            for o in outcomes
        ],
    )
    per_class = markdown_table(
        ["agreement in %", "real test split", *(str(o.setting) for o in outcomes)],
        [
            [name, f"{100 * real.class_rates[c]:.1f}", *(f"{100 * o.agreement.class_rates[c]:.0f}" for o in outcomes)]
            for c, name in enumerate(class_names)
        ],
    )
    likeness = markdown_table(
        ["against the test split", "Fréchet distance", "precision", "recall", "dark frames", "saturated"],
        [
            [
                name,
                f"{likeness.frechet:.2f}",
                f"{likeness.precision:.3f}",
                f"{likeness.recall:.3f}",
                f"{100 * likeness.dark_frames:.1f} %",
                f"{100 * likeness.saturated:.2f} %",
            ]
            for name, likeness in [
                ("as many real training images", real_likeness),
                *((str(o.setting), o.likeness) for o in outcomes),
            ]
        ],
    )
    confusions = [f"- real test split: {confusion_line(real, class_names)}"]
    confusions += [f"- {o.setting}: {confusion_line(o.agreement, class_names)}" for o in outcomes]
    return "\n".join(
        [
            "## Class conditioning",
            "",
            "How often a classifier trained on the real training split finds the requested class in generated images.",
            "",
            *(f"- {name}: {value}" for name, value in facts.items()),
            f"- Judge: {percent(real)} of {real.total} real test images right",
            "",
            summary,
            "",
            per_class,
            "",
            "How far the images are from real ones, in the features of the judge's last hidden layer:",
            "",
            likeness,
            "",
            "Worst classes, and the judge's classes for them:",
            "",
            *confusions,
            "",
            "```",
            command,
            "```",
            "",
        ]
    )


def describe(model: Path, config: CheckpointConfig, sampler: str) -> dict[str, str]:
    """Return date, machine and model of the measurement."""
    images_seen = config.provenance.get("images_seen")
    trained = f"{images_seen:,} images seen" if isinstance(images_seen, int) else "images seen unknown"
    return {
        "Date": f"{datetime.now(UTC):%Y-%m-%d}",
        "Commit": git_commit() or "unknown",
        "Machine": f"{cpu_name()}, {os.cpu_count()} cores; {torch.get_num_threads()} torch threads used; "
        f"torch {torch.__version__}",
        "Model": f"`{model}`, {trained}, sha256 {checkpoint_sha256(model)[:12]}, "
        f"recommended cfg_scale {config.sampling.cfg_scale:g}",
        "Sampling": f"ancestral, {sampler}; image k: seed k, class k mod C",
    }


# --- The command ------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> str:
    """Measure, and return the section for RESULTS.md.

    Raises:
        ValueError: invalid options or data; the message gives the remedy.
    """
    torch.set_num_threads(args.threads)
    config, network = load_unet(args.model)
    engine = None if args.backend is None else open_engine(args.model, Entry.parse(args.backend), args.threads)
    loop = f"PyTorch loop in {'bfloat16 autocast' if args.bfloat16 else 'float32'}"
    facts = describe(args.model, config, loop if engine is None else f"engine, {engine.description}")
    settings = settings_of(config, args.steps, args.cfg)
    num_classes = config.model.num_classes
    assert num_classes is not None  # settings_of refuses it
    labels = balanced_labels(args.images, num_classes)
    test = open_split(args.test, config)

    judge = Judge(config.model.image_shape, num_classes)
    load_or_train_judge(args.judge, judge, args.train, config, args.judge_epochs)
    seen = predict(judge, eight_bit_images(test, np.arange(len(test.labels))))
    real = Agreement.from_predictions(test.labels, seen, num_classes)
    print(f"judge: {percent(real)} of {real.total} real test images right", file=sys.stderr)
    if real.rate < MIN_JUDGE_ACCURACY:
        raise ConditioningError(
            f"the judge must be right about {100 * MIN_JUDGE_ACCURACY:.0f} % of the real test images; "
            f"got {100 * real.rate:.1f} %: delete {args.judge} and give more --judge-epochs"
        )

    reference = features_of(judge, eight_bit_images(test, np.arange(len(test.labels))))
    train = open_split(args.train, config)
    chosen = np.random.default_rng(0).permutation(len(train.labels))[: args.images]
    real_likeness = Likeness.measure(judge, eight_bit_images(train, chosen), reference)

    outcomes: list[Outcome] = []
    for setting in settings:
        started = time.perf_counter()
        if engine is None:
            pixels = generate(network, config, setting, labels, args.bfloat16)
        else:
            pixels = generate_in_engine(engine, setting, labels)
        seconds = time.perf_counter() - started
        agreement = Agreement.from_predictions(labels, predict(judge, pixels), num_classes)
        outcomes.append(Outcome(setting, agreement, Likeness.measure(judge, pixels, reference), seconds))
        worst = f"worst class {100 * agreement.class_rates.min():.0f} %"
        print(f"{setting}: {percent(agreement)}, {worst}, {outcomes[-1].likeness}", file=sys.stderr)
        if args.images_out is not None:
            args.images_out.mkdir(parents=True, exist_ok=True)
            file = args.images_out / f"steps{setting.steps}_cfg{setting.cfg_scale:g}.npz"
            np.savez_compressed(file, images=pixels, labels=labels, classes=np.array(test.class_names))

    command = shlex.join(["python", "-m", "benchmarks.conditioning", *sys.argv[1:]])
    return report(facts, test.class_names, real, real_likeness, outcomes, command)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.conditioning", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder of a class-conditional UNet")
    parser.add_argument("--train", type=Path, required=True, help="real training split: npz or folder of classes")
    parser.add_argument("--test", type=Path, required=True, help="real test split, never trained on")
    parser.add_argument("--images", type=int, default=1000, help="per setting, a multiple of the classes (1000)")
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100], help="numbers of steps (50 100)")
    parser.add_argument("--cfg", type=float, nargs="+", help="guidance scales (1 and the model's default)")
    parser.add_argument(
        "--judge", type=Path, default=Path("build/judge.safetensors"), help="kept here; trained if absent"
    )
    parser.add_argument("--judge-epochs", type=int, default=4, help="how long a judge is trained (4)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--bfloat16", action="store_true", help="sample with the network in bfloat16 autocast")
    parser.add_argument(
        "--backend", metavar="KIND:PRECISION", help="sample with a backend of the service, e.g. openvino:bf16"
    )
    parser.add_argument("--images-out", type=Path, help="folder for the generated images, one npz per setting")
    parser.add_argument("--out-markdown", default="-", help="file for the section, - for stdout (-)")
    return parser.parse_args(arguments)


def main() -> int:
    """Run the command; user errors are reported in one line."""
    args = parse_arguments()
    try:
        text = run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.out_markdown == "-":
        print(text, end="")
    else:
        Path(args.out_markdown).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
