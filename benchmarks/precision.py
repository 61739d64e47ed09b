"""Measure the effect of lower precision on images: pixels and a judge's classes, against float32.

    python -m benchmarks.precision --judge build/judge.safetensors
    python -m benchmarks.precision --judge build/judge.safetensors --device cuda    # torch in fp32, bf16 and fp16

The first contender is the reference. All sample the same images (image k: seed k, class k mod C) with the bundled
model through the service's engine; an ancestral chain in another precision gives another, perhaps equally good
image. Pixels show the difference, and the judge (trained by benchmarks/conditioning.py) shows whether the image is as
good. The section for RESULTS.md goes to --out as precision.md, the numbers to precision.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from benchmarks.conditioning import Agreement, balanced_labels, percent
from benchmarks.contenders import Absent, Entry, Place, open_denoiser
from benchmarks.engine_sampler import EngineSampler
from benchmarks.judge import Judge, predict
from benchmarks.networks import BenchNetwork, open_network
from benchmarks.options import add_place_options, exit_status, place_of
from benchmarks.reporting import command_line, describe_run, markdown_table
from service.backends.base import BackendOptions
from trainer.data import IntArray, Uint8Array

LEVELS = (1, 2, 4, 16)
"""Differences in levels of 255."""
CPU_CONTENDERS = ("openvino:fp32", "openvino:bf16", "onnxruntime:fp32")
CUDA_CONTENDERS = ("torch:fp32", "torch:bf16", "torch:fp16")


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Differences of pixels from the reference's."""

    beyond: tuple[float, ...]
    """Fraction of the values that differ by more than each of `LEVELS`."""
    psnr_db: float | None
    """Peak signal-to-noise ratio over all values; None: no difference."""
    identical: int
    """Images without a difference."""

    @classmethod
    def between(cls, pixels: Uint8Array, reference: Uint8Array) -> Distance:
        """Compare uint8 images [N, H, W, C]."""
        difference = np.abs(pixels.astype(np.int16) - reference.astype(np.int16))
        mean_square = float(np.square(difference, dtype=np.float64).mean())
        return cls(
            beyond=tuple(float((difference > level).mean()) for level in LEVELS),
            psnr_db=None if mean_square == 0 else 10 * float(np.log10(255**2 / mean_square)),
            identical=int((difference.reshape(len(difference), -1).max(axis=1) == 0).sum()),
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Results of one contender's images at a number of steps."""

    steps: int
    contender: str
    description: str
    seconds: float
    distance: Distance
    agreed: int
    """Images in which the judge recognises the requested class."""
    same_verdict: int
    """Images to which the judge assigns the same class as to the reference's."""
    images: int
    agreement: str
    """Agreement with its 95 % interval, as text."""


def compare(
    steps: int,
    contender: str,
    description: str,
    seconds: float,
    pixels: Uint8Array,
    reference: Uint8Array,
    labels: IntArray,
    judge: Judge,
    num_classes: int,
) -> Outcome:
    """Compare one contender's images with the reference's."""
    judged, judged_reference = predict(judge, pixels), predict(judge, reference)
    agreement = Agreement.from_predictions(labels, judged, num_classes)
    return Outcome(
        steps=steps,
        contender=contender,
        description=description,
        seconds=seconds,
        distance=Distance.between(pixels, reference),
        agreed=agreement.agreed,
        same_verdict=int((judged == judged_reference).sum()),
        images=len(labels),
        agreement=percent(agreement),
    )


def open_judge(path: Path, network: BenchNetwork) -> Judge:
    """Read the judge that benchmarks/conditioning.py has trained.

    Raises:
        ValueError: the file does not exist or belongs to another judge.
    """
    model = network.config.model
    assert model.num_classes is not None  # the bundled model has classes
    judge = Judge(model.image_shape, model.num_classes)
    if not path.is_file():
        raise ValueError(f"--judge {path} does not exist; python -m benchmarks.conditioning trains one")
    try:
        judge.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} contains no judge for this model: {error}") from error
    return judge.eval()


def report(facts: dict[str, str], reference: str, outcomes: Sequence[Outcome], command: str) -> str:
    """Write the section for RESULTS.md."""
    table = markdown_table(
        [
            *("steps", "contender", "images", "judge agrees (95 % interval)", "same verdict"),
            *(f"beyond {level}" for level in LEVELS),
            *("PSNR dB", "identical images", "seconds"),
        ],
        [
            [
                str(o.steps),
                o.contender,
                str(o.images),
                o.agreement,
                f"{100 * o.same_verdict / o.images:.1f} %",
                *(f"{100 * part:.3f} %" for part in o.distance.beyond),
                "-" if o.distance.psnr_db is None else f"{o.distance.psnr_db:.1f}",
                str(o.distance.identical),
                f"{o.seconds:.0f}",
            ]
            for o in outcomes
        ],
    )
    return "\n".join(
        [
            "## What precision does to images",
            "",
            f"The same images by each contender, compared with {reference}: the part of the 8-bit values that differ "
            "by more than a number of levels of 255, and the agreement of the class-conditioning section's judge.",
            "",
            *(f"- {name}: {value}" for name, value in facts.items()),
            "",
            table,
            "",
            "```",
            command,
            "```",
            "",
        ]
    )


def sample(
    entry: Entry,
    network: BenchNetwork,
    place: Place,
    width: int,
    steps: Sequence[int],
    labels: IntArray,
    cfg_scale: float,
) -> tuple[str, dict[int, tuple[Uint8Array, float]]]:
    """Sample all images with one contender.

    Returns:
        The denoiser's description; pixels and seconds by number of steps.
    """
    engine = EngineSampler(open_denoiser(entry, network, place, BackendOptions(max_rows=width)), width)
    found = {}
    for count in steps:
        with tqdm(total=len(labels), desc=f"{entry}, {count} steps", unit="image", mininterval=2) as bar:
            begun = time.perf_counter()
            pixels = engine(count, labels.tolist(), cfg_scale, on_image=bar.update)
            found[count] = pixels, time.perf_counter() - begun
    return engine.description, found


def run(args: argparse.Namespace) -> None:
    """Measure and write.

    Raises:
        ValueError: invalid options; the message gives the remedy.
    """
    place = place_of(args)
    network = open_network("fashion32", args.work)
    num_classes = network.config.model.num_classes
    assert num_classes is not None  # the bundled model has classes
    judge = open_judge(args.judge, network)
    labels = balanced_labels(args.images, num_classes)
    cfg_scale = network.config.sampling.cfg_scale if args.cfg is None else args.cfg
    default = CUDA_CONTENDERS if place.device.type == "cuda" else CPU_CONTENDERS
    entries = [Entry.parse(text) for text in args.contenders or default]
    facts = {
        **describe_run(place.device, place.threads),
        "Sampling": f"ancestral, cfg_scale {cfg_scale:g}, width {args.width}; image k: seed k, class k mod C",
    }

    outcomes: list[Outcome] = []
    reference: dict[int, tuple[Uint8Array, float]] = {}
    for entry in entries:
        try:
            description, found = sample(entry, network, place, args.width, args.steps, labels, cfg_scale)
        except Absent as reason:
            if not reference:
                raise ValueError(f"the reference, {entry}, takes no part: {reason}") from reason
            facts[f"{entry} took no part"] = str(reason)
            continue
        reference = reference or found
        for count, (pixels, seconds) in found.items():
            outcomes.append(
                compare(
                    count, str(entry), description, seconds, pixels, reference[count][0], labels, judge, num_classes
                )
            )
    outcomes.sort(key=lambda outcome: outcome.steps)

    args.out.mkdir(parents=True, exist_ok=True)
    command = command_line("benchmarks.precision")
    raw = {"facts": facts, "command": command, "outcomes": [asdict(o) for o in outcomes]}
    (args.out / "precision.json").write_text(json.dumps(raw, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    text = report(facts, str(entries[0]), outcomes, command)
    (args.out / "precision.md").write_text(text, encoding="utf-8")
    print(text, end="")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--judge", type=Path, default=Path("build/judge.safetensors"), help="the judge's weights")
    parser.add_argument("--images", type=int, default=1000, help="a multiple of the classes (1000)")
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100], help="numbers of steps (50 100)")
    parser.add_argument("--cfg", type=float, help="guidance scale (the model's default)")
    parser.add_argument("--width", type=int, default=8, help="rows of the service's engine (8)")
    parser.add_argument(
        "--contenders", nargs="+", metavar="KIND:PRECISION", help="backends of the service, the reference first"
    )
    add_place_options(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(exit_status(run, parse_arguments()))
