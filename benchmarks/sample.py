"""Measure complete images: the service's engine with every backend, against PyTorch and diffusers, in turns.

    python -m benchmarks.sample                     # 50, 100 and 250 steps, 1 and 8 images: hours
    python -m benchmarks.sample --quick             # the bundled model, 10 steps: a minute
    python -m benchmarks.sample --device cuda --images 1 64 --width 64

The engine samples as the service does (start-up self-test, scheduler, noise, update), with its default compiled
sizes. `eager` is this repository's reference loop over the plain UNet, `diffusers` the loop of docs/diffusers.md
with UNet2DModel and DDPMScheduler. No guidance is used. Results are written after every setting, to the folder --out:
sample.md (the section for RESULTS.md) and sample.json (all times).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import Absent, EagerUNet, Entry, Place, load_diffusers, open_denoiser
from benchmarks.engine_sampler import EngineSampler
from benchmarks.networks import NETWORKS, BenchNetwork, open_network
from benchmarks.options import add_place_options, exit_status, place_of, say
from benchmarks.reporting import command_line, describe_run, markdown_table
from benchmarks.rounds import Pace, Timing, take_turns
from diffusion.noise import STREAM_STEP, STREAM_X_T, normal
from diffusion.plans import build_plan
from diffusion.sampling import ImageSpec, guided_network
from diffusion.update import sample_loop, to_uint8
from service.backends.base import BackendOptions

CPU_CONTENDERS = (
    *("eager:fp32", "torch:fp32", "onnxruntime:fp32", "openvino:fp32", "openvino:bf16"),
    *("diffusers:fp32", "diffusers:bf16"),
)
CUDA_CONTENDERS = ("eager:bf16", "torch:bf16", "torch:fp16", "torch-compile:bf16", "diffusers:bf16", "diffusers:fp16")
WARM_UP_STEPS = 2

Sampler = Callable[[int, int], Any]
"""(steps, images) -> pixels, finished when it returns."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Times of one contender for a number of images and steps."""

    network: str
    steps: int
    images: int
    contender: str
    timing: Timing

    @property
    def images_per_second(self) -> float:
        """Of the median call."""
        return self.images / self.timing.median


@dataclass(frozen=True)
class Missing:
    """A contender that was not measured with a network."""

    network: str
    contender: str
    reason: str


def labels_of(network: BenchNetwork, images: int) -> list[int | None]:
    """Return image k's class: k mod C, or None without classes."""
    classes = network.config.model.num_classes
    return [None if classes is None else k % classes for k in range(images)]


def open_sampler(entry: Entry, network: BenchNetwork, place: Place, width: int) -> Sampler:
    """Load a contender.

    Raises:
        Absent: it is not available here.
    """
    try:
        if entry.kind == "diffusers":
            return _diffusers_sampler(entry, network, place)
        if entry.kind.startswith("eager"):
            return _eager_sampler(entry, network, place)
        engine = EngineSampler(open_denoiser(entry, network, place, BackendOptions(max_rows=width)), width)
        return lambda steps, images: engine(steps, labels_of(network, images))
    except torch.OutOfMemoryError as error:
        raise Absent("out of the device's memory") from error


def _eager_sampler(entry: Entry, network: BenchNetwork, place: Place) -> Sampler:
    unet = EagerUNet(entry, network, place)
    model = network.config.model

    def sample(steps: int, images: int) -> Any:
        plan = build_plan(network.config.diffusion, "ancestral", str(steps))
        specs = [ImageSpec(seed=k, class_index=label) for k, label in enumerate(labels_of(network, images))]
        # Not `sample_images`, which pads a single image for bit-identical results; a peer would not.
        seeds = torch.arange(images, device=place.device)
        shape = model.image_shape

        def noise(step: int, stream: int) -> Tensor:
            return normal(seeds, torch.zeros_like(seeds), torch.full_like(seeds, step), stream, shape)

        guided = guided_network(unet, specs, device=place.device)
        x = sample_loop(guided, plan, noise(0, STREAM_X_T), lambda step: noise(step, STREAM_STEP))
        return to_uint8(x)

    return sample


def _diffusers_sampler(entry: Entry, network: BenchNetwork, place: Place) -> Sampler:
    unet = load_diffusers(entry, network, place)
    from diffusers import DDPMScheduler  # load_diffusers has found the package

    scheduler = DDPMScheduler.from_pretrained(network.diffusers_folder())
    model = network.config.model

    @torch.inference_mode()
    def sample(steps: int, images: int) -> Any:
        generator = torch.Generator(place.device).manual_seed(0)
        labels = labels_of(network, images)
        y = None if None in labels else torch.tensor(labels, device=place.device)
        shape = (images, *model.image_shape)
        x = torch.randn(shape, generator=generator, device=place.device)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            out = unet(x.to(unet.dtype), t, class_labels=y).sample.float()
            x = scheduler.step(out, t, x, generator=generator).prev_sample
        return ((x.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    return sample


# --- The report -------------------------------------------------------------------------------------------------------


def network_table(sampled: Sequence[Sampled]) -> str:
    """Write the times of one network: a line per contender, steps and images."""
    return markdown_table(
        ["contender", "steps", "images", "best s", "median s", "quartiles s", "calls", "images/s", "ms per image-step"],
        [
            [
                s.contender,
                str(s.steps),
                str(s.images),
                f"{s.timing.best:.2f}",
                f"{s.timing.median:.2f}",
                "-".join(f"{q:.2f}" for q in s.timing.quartiles),
                str(len(s.timing.seconds)),
                f"{s.images_per_second:.3f}",
                f"{1e3 * s.timing.median / (s.steps * s.images):.2f}",
            ]
            for s in sampled
        ],
    )


def report(
    facts: dict[str, str],
    networks: Sequence[BenchNetwork],
    sampled: Sequence[Sampled],
    missing: Sequence[Missing],
    command: str,
) -> str:
    """Write the section for RESULTS.md."""
    parts = [
        "## Whole images",
        "",
        "Ancestral chains, unguided, from the request to uint8 pixels; contenders in turns. Backends run behind the "
        "service's engine; eager is the reference loop over the plain UNet; diffusers is UNet2DModel with "
        "DDPMScheduler.",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
    ]
    for network in networks:
        own = [s for s in sampled if s.network == network.name]
        absent = [m for m in missing if m.network == network.name]
        if not own and not absent:
            continue
        parts += [f"### {network}", ""]
        if own:
            parts += [network_table(own), ""]
        if absent:
            parts += [*(f"- {m.contender} took no part: {m.reason}" for m in absent), ""]
    return "\n".join([*parts, "```", command, "```", ""])


# --- The command ------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Measure and write.

    Raises:
        ValueError: invalid options; the message gives the remedy.
    """
    place = place_of(args)
    default = CUDA_CONTENDERS if place.device.type == "cuda" else CPU_CONTENDERS
    entries = [Entry.parse(text) for text in args.contenders or default]
    names = args.networks or (NETWORKS[:1] if args.quick else ("fashion32", "c64", "cifar10"))
    steps = args.steps or ([10] if args.quick else [50, 100, 250])
    if min(args.images) < 1 or min(steps) < WARM_UP_STEPS or args.width < 2:
        raise ValueError(f"--images must be at least 1, --steps and --width at least {WARM_UP_STEPS}")
    pace = Pace(rounds=2 if args.quick else args.rounds, max_seconds=args.max_seconds, warm_up_calls=0)
    facts = {**describe_run(place.device, place.threads), "Width": f"{args.width} rows"}
    networks = [open_network(name, args.work) for name in names]

    sampled: list[Sampled] = []
    missing: list[Missing] = []
    for network in networks:
        samplers: dict[str, Sampler] = {}
        for entry in entries:
            say(f"{network.name}: loading {entry}")
            try:
                samplers[str(entry)] = open_sampler(entry, network, place, args.width)
            except Absent as reason:
                missing.append(Missing(network.name, str(entry), str(reason)))
        for images in args.images:
            for sampler in samplers.values():
                sampler(WARM_UP_STEPS, images)
            for count in steps:
                say(f"{network.name}: {images} images of {count} steps")
                calls = {name: partial(sampler, count, images) for name, sampler in samplers.items()}
                for name, timing in take_turns(calls, pace).items():
                    sampled.append(
                        Sampled(network=network.name, steps=count, images=images, contender=name, timing=timing)
                    )
                write_results(args.out, facts, networks, sampled, missing)
        samplers.clear()
        gc.collect()
    write_results(args.out, facts, networks, sampled, missing)
    print((args.out / "sample.md").read_text(encoding="utf-8"), end="")


def write_results(
    out: Path,
    facts: dict[str, str],
    networks: Sequence[BenchNetwork],
    sampled: Sequence[Sampled],
    missing: Sequence[Missing],
) -> None:
    """Write the section and the raw times."""
    out.mkdir(parents=True, exist_ok=True)
    command = command_line("benchmarks.sample")
    raw = {
        "facts": facts,
        "command": command,
        "sampled": [asdict(s) for s in sampled],
        "missing": [asdict(m) for m in missing],
    }
    (out / "sample.json").write_text(json.dumps(raw, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (out / "sample.md").write_text(report(facts, networks, sampled, missing, command), encoding="utf-8")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sample", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the bundled model, 10 steps, two rounds")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, help="(fashion32 c64 cifar10)")
    parser.add_argument("--steps", type=int, nargs="+", help="(50 100 250)")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8], help="images at a time (1 8)")
    parser.add_argument("--width", type=int, default=8, help="rows of the service's engine (8)")
    parser.add_argument("--contenders", nargs="+", metavar="KIND:PRECISION", help="(all that the device has)")
    parser.add_argument("--rounds", type=int, default=5, help="calls of each contender per setting (5)")
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=300,
        help="start no round after these seconds, except the first three (300)",
    )
    add_place_options(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(exit_status(run, parse_arguments()))
