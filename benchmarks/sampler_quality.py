"""Compare the samplers at equal numbers of network calls: agreement, Fréchet distance, distance to a long chain.

    python -m benchmarks.sampler_quality --model models/fashion32 --test TEST.npz --judge JUDGE.safetensors

Image k has seed k and class k mod C for every sampler, so that all begin with the same x_T. Measured are: how often
the judge of `benchmarks.conditioning` sees the requested class; the Fréchet distance to the test split in the judge's
features; and the mean absolute difference of pixels to a DDIM chain of 1000 steps, which solves the probability-flow
equation: deterministic samplers approach it, stochastic ones draw other images. The service's engine samples.
Results are kept in OUT, one JSON file per setting; the same command continues. The section for RESULTS.md and the plot
are written at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from benchmarks.conditioning import Agreement, balanced_labels, open_engine, percent, wilson_interval
from benchmarks.contenders import Entry
from benchmarks.engine_sampler import EngineSampler
from benchmarks.judge import Judge, features_of, open_split, predict
from benchmarks.options import WORK, exit_status, say
from benchmarks.plots import Curve, draw_curves
from benchmarks.reporting import describe_run, markdown_table
from diffusion.config import CheckpointConfig
from diffusion.plans import SAMPLERS
from formats.atomic_file import write_file
from formats.checkpoint_config import checkpoint_sha256, read_config
from formats.json_files import read_object
from trainer.data import IntArray, Uint8Array, eight_bit_images
from trainer.evaluation.metrics import frechet_distance

REFERENCE_STEPS = 1000
PLOT = Path(__file__).parents[1] / "docs" / "images" / "samplers.png"
SECTION = "sampler_quality.md"


class Measurement:
    """Samples and judges one setting after another, and keeps the results."""

    def __init__(self, args: argparse.Namespace, config: CheckpointConfig) -> None:
        self._out: Path = args.out / f"samplers-{checkpoint_sha256(args.model)[:12]}-{args.images}-{args.cfg:g}"
        self._out.mkdir(parents=True, exist_ok=True)
        self._cfg_scale: float = args.cfg
        self._near: int = args.near
        self._num_classes = config.model.num_classes or 0
        self._labels: IntArray = balanced_labels(args.images, self._num_classes)
        self._judge = Judge(config.model.image_shape, self._num_classes)
        self._judge.load_state_dict(load_file(args.judge))
        self._judge.eval()
        test = open_split(args.test, config)
        self._real = features_of(self._judge, eight_bit_images(test, np.arange(len(test.labels))))
        self._engine: EngineSampler = open_engine(args.model, Entry.parse(args.backend), args.threads)
        self.description = self._engine.description

    def measure(self, sampler: str, steps: int) -> dict[str, Any]:
        """Return the results of a setting, from its file if there is one."""
        path = self._out / f"{sampler}-{steps}.json"
        if not path.exists():
            pixels = self._sample(sampler, steps, self._labels)
            judged = Agreement.from_predictions(self._labels, predict(self._judge, pixels), self._num_classes)
            difference = np.abs(pixels[: self._near].astype(float) - self._reference().astype(float))
            found = {
                "sampler": sampler,
                "steps": steps,
                "agreed": judged.agreed,
                "images": judged.total,
                "worst_class": float(judged.class_rates.min()),
                "frechet": frechet_distance(self._real, features_of(self._judge, pixels)),
                "distance": float(difference.mean()),
                "distance_std_error": float(difference.mean(axis=(1, 2, 3)).std(ddof=1) / np.sqrt(len(difference))),
            }
            write_file(path, f"{json.dumps(found, indent=1)}\n".encode())
        found = read_object(path)
        say(f"{sampler}, {steps} steps: {found['agreed']} of {found['images']}, Frechet {found['frechet']:.2f}")
        return found

    def _reference(self) -> Uint8Array:
        """Return the first images of the long chain."""
        path = self._out / "reference.npy"
        if not path.exists():
            np.save(path, self._sample("ddim", REFERENCE_STEPS, self._labels[: self._near]))
        images: Uint8Array = np.load(path)
        return images

    def _sample(self, sampler: str, steps: int, labels: IntArray) -> Uint8Array:
        with tqdm(total=len(labels), desc=f"{sampler}, {steps} steps", unit="image", mininterval=5) as bar:
            return self._engine(steps, labels.tolist(), self._cfg_scale, on_image=bar.update, sampler=sampler)


def section(found: Sequence[dict[str, Any]], facts: dict[str, str], cfg_scale: float) -> str:
    """Write the section for RESULTS.md."""
    rows = [
        [
            row["sampler"],
            str(row["steps"]),
            percent(_agreement(row)),
            f"{100 * row['worst_class']:.0f} %",
            f"{row['frechet']:.2f}",
            f"{row['distance']:.2f} +- {row['distance_std_error']:.2f}",
        ]
        for row in found
    ]
    header = ["sampler", "network calls", "agreement (95 % interval)", "worst class", "Fréchet distance", "distance"]
    lines = ["## Samplers at equal network calls", ""]
    lines += [f"{name}: {value}  " for name, value in facts.items()]
    lines += [
        "",
        f"{found[0]['images']} images per row, cfg_scale {cfg_scale:g}. Distance: mean absolute difference to a DDIM",
        f"chain of {REFERENCE_STEPS} steps from the same x_T, in levels of 255.",
        "",
        markdown_table(header, rows),
        "",
        "![Quality against network calls](../docs/images/samplers.png)",
        "",
    ]
    return "\n".join(lines)


def draw(found: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw the three measures against the number of network calls."""
    plots: dict[str, list[Curve]] = {"disagreement (%)": [], "Fréchet distance": [], "distance to 1000 steps": []}
    for name in dict.fromkeys(row["sampler"] for row in found):
        rows = [row for row in found if row["sampler"] == name]
        x = [float(row["steps"]) for row in rows]
        wrong = [100.0 - 100 * row["agreed"] / row["images"] for row in rows]
        intervals = [wilson_interval(row["agreed"], row["images"]) for row in rows]
        low, high = [100 - 100 * high for _, high in intervals], [100 - 100 * low for low, _ in intervals]
        plots["disagreement (%)"].append(Curve(name=name, x=x, y=wrong, low=low, high=high))
        frechet = [row["frechet"] for row in rows]
        plots["Fréchet distance"].append(Curve(name=name, x=x, y=frechet, low=frechet, high=frechet))
        distance, error = [row["distance"] for row in rows], [2 * row["distance_std_error"] for row in rows]
        low, high = ([d + sign * e for d, e in zip(distance, error, strict=True)] for sign in (-1, 1))
        plots["distance to 1000 steps"].append(Curve(name=name, x=x, y=distance, low=low, high=high))
    return draw_curves(plots, "network calls per image", "", path)


def _agreement(row: dict[str, Any]) -> Agreement:
    return Agreement(np.array([[row["agreed"], row["images"] - row["agreed"]], [0, 0]]))


def run(args: argparse.Namespace) -> None:
    """Measure all settings, and write the section and the plot.

    Raises:
        ValueError: invalid options or data; the message gives the reason.
    """
    torch.set_num_threads(args.threads)
    config = read_config(args.model)
    if not isinstance(config, CheckpointConfig) or config.model.num_classes is None:
        raise ValueError(f"{args.model} must be a class-conditional UNet")
    if not 1 <= args.near <= args.images:
        raise ValueError(f"--near must be 1..--images ({args.images}); got {args.near}")
    measurement = Measurement(args, config)
    found = [measurement.measure(sampler, steps) for steps in args.steps for sampler in args.samplers]
    found.sort(key=lambda row: list(SAMPLERS).index(row["sampler"]))
    facts = {**describe_run(torch.device("cpu"), args.threads), "engine": measurement.description}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / SECTION).write_text(section(found, facts, args.cfg), encoding="utf-8")
    draw(found, args.plot)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampler_quality", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", type=Path, default=Path("models/fashion32"), help="class-conditional checkpoint")
    parser.add_argument("--test", type=Path, required=True, help="real test split, never trained on")
    parser.add_argument("--judge", type=Path, required=True, help="judge of benchmarks.conditioning")
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS), help="(all)")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 15, 20, 25, 50, 100], help="network calls")
    parser.add_argument("--images", type=int, default=500, help="per setting, a multiple of the classes (500)")
    parser.add_argument("--near", type=int, default=50, help="images compared with the long chain (50)")
    parser.add_argument("--cfg", type=float, default=1.0, help="guidance scale (1)")
    parser.add_argument("--backend", default="openvino:bf16", metavar="KIND:PRECISION", help="(openvino:bf16)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--out", type=Path, default=WORK, help=f"folder of the results ({WORK})")
    parser.add_argument("--plot", type=Path, default=PLOT, help="PNG file to write (docs/images/samplers.png)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(exit_status(run, parse_arguments()))
