"""Replace the bundled model by an average of a training run's snapshots, and make the README's pictures from it.

    python -m benchmarks.bundle RUN --sigma-rel 0.1 --cfg-scale 1.3

Writes the checkpoint and its artifact to models/fashion32, and docs/images/samples.png and sneakers.png.
docs/experiments.md lists what else depends on the bundled model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.conditioning import Setting, generate_in_engine, open_engine
from benchmarks.contenders import Entry
from benchmarks.networks import BUNDLED
from benchmarks.options import exit_status, say
from cli.ema_command import ema_command
from cli.sample_local import sample_local
from diffusion.config import SamplingDefaults
from formats.checkpoint import load_unet, write_checkpoint
from formats.images import captioned_rows, grid
from model_export.artifact_export import export_artifact

IMAGES = Path(__file__).parents[1] / "docs" / "images"
PER_CLASS = 8
STEPS = 100
MAX_BYTES = 12_000_000
"""Largest file of the bundled model."""


def write_average(run: Path, sigma_rel: float, at_images: int | None, cfg_scale: float, folder: Path) -> None:
    """Write a checkpoint of averaged weights, with a recommended guidance scale."""
    with tempfile.TemporaryDirectory() as work:
        average = Path(work) / "average"
        ema_command(run, average, sigma_rel, at_images)
        config, network = load_unet(average)
    config = config.replace(sampling=SamplingDefaults(cfg_scale=cfg_scale).model_dump())
    write_checkpoint(folder, config, network.state_dict())


def draw_samples(model: Path, backend: Entry, threads: int) -> Image.Image:
    """Draw one row of images per class, with the recommended guidance; image k, counted row by row, has seed k."""
    config = load_unet(model)[0]
    names = config.class_names or ()
    setting = Setting(STEPS, config.sampling.cfg_scale)
    labels = np.repeat(np.arange(len(names)), PER_CLASS)
    pixels = generate_in_engine(open_engine(model, backend, threads), setting, labels)
    return captioned_rows(list(zip(names, np.split(pixels, len(names)), strict=True)), scale=2)


def draw_sneakers(model: Path) -> Image.Image:
    """Draw the answer to the README's request, enlarged four times."""
    found = sample_local([model], None, {"class": "Sneaker", "steps": STEPS, "seed": 3}, 4, lambda *_: None)
    sheet = grid(np.stack([image.pixels for image in found]))
    return Image.fromarray(np.kron(sheet[:, :, 0], np.ones((4, 4), np.uint8)))


def run(args: argparse.Namespace) -> None:
    """Write the model, its artifact and the pictures.

    Raises:
        ValueError: a file is too large, or the graph is too far from PyTorch; then the artifact is not written.
    """
    write_average(args.run, args.sigma_rel, args.at_images, args.cfg_scale, args.model)
    export_artifact(args.model, args.model / "artifact", notify=say)
    for path in args.model.rglob("*"):
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path} must have at most {MAX_BYTES} bytes; got {path.stat().st_size}")
    args.images.mkdir(parents=True, exist_ok=True)
    draw_samples(args.model, Entry.parse(args.backend), args.threads).save(args.images / "samples.png", optimize=True)
    draw_sneakers(args.model).save(args.images / "sneakers.png", optimize=True)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bundle", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run trained with ema_sigma_rels")
    parser.add_argument("--sigma-rel", type=float, required=True, help="relative width of the average")
    parser.add_argument("--at-images", type=int, help="snapshot at which the average ends (the last)")
    parser.add_argument("--cfg-scale", type=float, required=True, help="guidance scale to recommend")
    parser.add_argument("--model", type=Path, default=BUNDLED, help="checkpoint folder to write (models/fashion32)")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder for the pictures (docs/images)")
    parser.add_argument("--backend", default="openvino:bf16", metavar="KIND:PRECISION", help="of the pictures")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for the pictures (1)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(exit_status(run, parse_arguments()))
