"""Time inpainting with RePaint's resampling: the service's engine against diffusers' RePaintScheduler.

    python -m benchmarks.repaint --images TEST.npz

The same network, images, masks and schedule (arXiv:2201.09865, appendix B) for all; contenders in turns. The loop
around RePaintScheduler is that of diffusers' pipeline: a network call where the schedule goes down, `undo_step` where
it goes up. The masks are of the kinds of the paper's evaluation: the right half, everything outside a box, every second
line, every second pixel in both directions, and a wide brush. Results go to the folder --out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.contenders import Entry, Place, load_diffusers, open_denoiser
from benchmarks.networks import BenchNetwork, open_network
from benchmarks.options import add_place_options, exit_status, place_of, say
from benchmarks.reporting import command_line, describe_run, markdown_table
from benchmarks.rounds import Pace, Timing, take_turns
from diffusion.chains import Chain, Resample, build_chain
from diffusion.schedules import named_betas
from diffusion.update import from_uint8
from service.backends.base import BackendOptions
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.request import GenerationRequest, GivenArrays, ImageParams, ImageStatus
from service.engine.runners.array_runner import ArrayRunner
from service.metrics import Metrics
from trainer.data import eight_bit_images, open_dataset

Masks = npt.NDArray[np.float32]
"""1 where pixels are made, 0 where they are kept: [N, 1, H, W]."""
CONTENDERS = ("openvino:bf16", "torch:fp32", "diffusers:fp32")


def paper_masks(height: int, width: int) -> Masks:
    """Return one mask of each kind, [5, 1, H, W]."""
    masks = np.zeros((5, 1, height, width), dtype=np.float32)
    half, expand, lines, pixels, brush = masks[:, 0]
    half[:, width // 2 :] = 1
    expand[:] = 1
    expand[height // 4 : -(height // 4), width // 4 : -(width // 4)] = 0
    lines[::2] = 1
    pixels[:] = 1
    pixels[::2, ::2] = 0
    y, x = np.mgrid[:height, :width]
    brush[np.abs((y - height / 2) - (x - width / 2) / 2) < height / 8] = 1
    return masks


def engine_call(
    entry: Entry, network: BenchNetwork, place: Place, chain: Chain, given: npt.NDArray[np.float32], masks: Masks
) -> Callable[[], Any]:
    """Return a function that inpaints all images with the service's engine."""
    width = min(8, len(given))
    denoiser = open_denoiser(entry, network, place, BackendOptions(max_rows=width))
    config = EngineConfig(max_rows=width)
    engine = Engine({"m": ArrayRunner(denoiser, config)}, config, Metrics())
    engine.warm_up()
    calls = build_chain(network.config.diffusion, chain).num_steps
    images = tuple(
        ImageParams(
            plan=chain,
            num_steps=calls,
            seed=k,
            image_index=0,
            class_index=_label(network, k),
            given=GivenArrays(image=image, mask=mask),
        )
        for k, (image, mask) in enumerate(zip(given, masks, strict=True))
    )

    def call() -> None:
        engine.add(GenerationRequest(request_id="all", model="m", images=images), time.monotonic())
        while engine.has_work():
            for result in engine.step():
                if result.status is not ImageStatus.DONE:
                    raise RuntimeError(f"{entry}: image {result.position} {result.status.value}")

    return call


def diffusers_call(
    entry: Entry, network: BenchNetwork, place: Place, chain: Chain, given: npt.NDArray[np.float32], masks: Masks
) -> Callable[[], Any]:
    """Return a function that inpaints all images in one batch with RePaintScheduler."""
    unet = load_diffusers(entry, network, place)
    from diffusers import RePaintScheduler  # load_diffusers has found the package

    diffusion = network.config.diffusion
    betas = named_betas(diffusion.noise_schedule, diffusion.num_timesteps)
    scheduler = RePaintScheduler(num_train_timesteps=diffusion.num_timesteps, trained_betas=betas, eta=1.0)
    assert chain.resample is not None  # `run` sets it
    scheduler.set_timesteps(int(chain.spec), chain.resample.jump, chain.resample.times)
    channels = network.config.model.image_channels
    labels = [_label(network, k) for k in range(len(given))]
    y = None if None in labels else torch.tensor(labels, device=place.device)
    original = torch.from_numpy(given).to(place.device)
    kept = torch.from_numpy(1 - masks).to(place.device)

    @torch.inference_mode()
    def call() -> None:
        generator = torch.Generator(place.device).manual_seed(0)
        x = torch.randn(original.shape, generator=generator, device=place.device)
        before = int(scheduler.timesteps[0]) + 1
        for t in scheduler.timesteps:
            if t < before:
                eps = unet(x.to(unet.dtype), t, class_labels=y).sample.float()[:, :channels]
                x = scheduler.step(eps, t, x, original, kept, generator).prev_sample
            else:
                x = scheduler.undo_step(x, before, generator)
            before = t
        place.wait()

    return call


def _label(network: BenchNetwork, k: int) -> int | None:
    classes = network.config.model.num_classes
    return None if classes is None else k % classes


def section(facts: dict[str, str], timings: dict[str, Timing], images: int, chain: Chain, calls: int) -> str:
    """Write the section for RESULTS.md."""
    rows = [
        [name, f"{t.median:.2f}", "-".join(f"{q:.2f}" for q in t.quartiles), f"{images / t.median:.3f}"]
        for name, t in timings.items()
    ]
    return "\n".join(
        [
            "## Inpainting with resampling (RePaint)",
            "",
            *(f"- {name}: {value}" for name, value in facts.items()),
            "",
            f"{images} images with five masks, {chain.spec} steps, {chain.resample}: {calls} network calls per image.",
            "",
            markdown_table(["contender", "median s", "quartiles s", "images/s"], rows),
            "",
            "```",
            command_line("benchmarks.repaint"),
            "```",
            "",
        ]
    )


def run(args: argparse.Namespace) -> None:
    """Measure and write.

    Raises:
        ValueError: invalid options or data; the message gives the reason.
    """
    place = place_of(args)
    network = open_network(args.network, args.work)
    model = network.config.model
    data = open_dataset(args.images, model.image_size, model.image_channels, labelled=False)
    given = from_uint8(eight_bit_images(data, np.arange(args.count)))
    masks = np.resize(paper_masks(*model.image_shape[1:]), (args.count, 1, *model.image_shape[1:]))
    chain = Chain(spec=str(args.steps), resample=Resample(times=args.times, jump=args.jump))
    calls = build_chain(network.config.diffusion, chain).num_steps
    facts = describe_run(place.device, place.threads)
    contenders: dict[str, Callable[[], Any]] = {}
    for text in args.contenders:
        say(f"loading {text}")
        entry = Entry.parse(text)
        make = diffusers_call if entry.kind == "diffusers" else engine_call
        contenders[text] = partial(make(entry, network, place, chain, given, masks))
    timings = take_turns(contenders, Pace(rounds=args.rounds, max_seconds=args.max_seconds, warm_up_calls=1))
    args.out.mkdir(parents=True, exist_ok=True)
    raw = {"facts": facts, "calls": calls, "timings": {name: asdict(timing) for name, timing in timings.items()}}
    (args.out / "repaint.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    text = section(facts, timings, args.count, chain, calls)
    (args.out / "repaint.md").write_text(text, encoding="utf-8")
    print(text, end="")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.repaint", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=Path, required=True, help="images to inpaint, as for `iddpm train`")
    parser.add_argument("--network", default="fashion32", help="a network of benchmarks.networks (fashion32)")
    parser.add_argument("--count", type=int, default=10, help="images at a time (10)")
    parser.add_argument("--steps", type=int, default=25, help="steps of the chain (25; the paper: 250)")
    parser.add_argument("--times", type=int, default=3, help="resampling (3; the paper: 10)")
    parser.add_argument("--jump", type=int, default=5, help="jump length (5; the paper: 10)")
    parser.add_argument("--contenders", nargs="+", metavar="KIND:PRECISION", default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5, help="calls of each contender (5)")
    parser.add_argument("--max-seconds", type=float, default=400, help="start no round after these seconds (400)")
    add_place_options(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(exit_status(run, parse_arguments()))
