"""Measure the error of encoding images and decoding their latents, by number of steps and by where the latents are.

    python -m benchmarks.round_trip --images data/fashion_mnist_test.npz

Each image is encoded with its class and decoded by `ddim` with the same steps, without guidance, as a client of
`POST /v1/encode` and `POST /v1/generate` does. The service's engine computes, with the settings in the environment
(`IDDPM_BACKEND`, ...). The table is printed.
"""

from __future__ import annotations

import argparse
import base64
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.judge import open_split
from benchmarks.options import exit_status, say
from benchmarks.reporting import markdown_table
from cli.local_engine import LocalEngine, local_settings
from formats.value_range import value_range_of
from service.encoding import encode_npy
from service.requests.generate_request import MAX_IMAGES
from trainer.data import Uint8Array, eight_bit_images

Values = npt.NDArray[np.float32]


class Errors(NamedTuple):
    """What decoding makes of images, in levels of 255."""

    steps: int
    timestep: int
    """t of the training chain where the latents are."""
    mean: float
    """Mean absolute difference."""
    worst: float
    """That of the worst image."""
    equal: float
    """Part of the pixels that come back as the same eight-bit level."""


def errors_of(images: Uint8Array, decoded: Values, steps: int, timestep: int) -> Errors:
    """Compare images [n, H, W, C] with what came back, in levels of 255 as floats."""
    by_image = np.abs(decoded - images).mean(axis=(1, 2, 3))
    equal = np.clip(np.rint(decoded), 0, 255) == images
    return Errors(steps, timestep, float(by_image.mean()), float(by_image.max()), float(equal.mean()))


def round_trip(
    engine: LocalEngine, images: Uint8Array, labels: Sequence[int], steps: int, end_timestep: int | None
) -> Errors:
    """Encode images [n, H, W, C] up to a timestep (None: the noisiest one), decode their latents, and compare."""
    fields: dict[str, Any] = {"class": list(labels), "steps": steps, "cfg_scale": 1}
    encoding, timestep = engine.complete_encoding({"image": _base64(images), "end_timestep": end_timestep, **fields})
    ((_, latents),) = engine.run([[encoding]], lambda _: None)
    body = {"latent": _base64(np.stack(latents)), "sampler": "ddim", "start_timestep": timestep, "seed": 0, **fields}
    body |= {"format": "npy", "dtype": "float32"}
    ((_, decoded),) = engine.run([[engine.complete(body, engine.read_given(body))]], lambda _: None)
    low, high = value_range_of(engine.config).data_of(np.array([[[[0]]], [[[255]]]], np.uint8))
    return errors_of(images, (np.stack(decoded) - low) * (255 / (high - low)), steps, timestep)


def table(found: Sequence[Errors]) -> str:
    """Write the table."""
    header = ["steps", "latent at timestep", "mean error, levels of 255", "worst image", "equal 8-bit pixels"]
    return markdown_table(
        header,
        [[str(e.steps), str(e.timestep), f"{e.mean:.2f}", f"{e.worst:.2f}", f"{100 * e.equal:.1f} %"] for e in found],
    )


def _base64(array: npt.NDArray[Any]) -> str:
    return base64.b64encode(encode_npy(array)).decode()


def run(args: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        ValueError: invalid options or data; the message gives the reason.
    """
    if not 1 <= args.count <= MAX_IMAGES:
        raise ValueError(f"--count must be 1..{MAX_IMAGES}; got {args.count}")
    engine = LocalEngine(local_settings(args.model))
    data = open_split(args.images, engine.config)
    images = eight_bit_images(data, np.arange(args.count))
    labels = [int(label) for label in data.labels[: args.count]]
    found: list[Errors] = []
    for end_timestep in (None, engine.config.diffusion.num_timesteps // 2):
        for steps in args.steps:
            found.append(round_trip(engine, images, labels, steps, end_timestep))
            say(str(found[-1]))
    print(f"{args.count} images of {args.images.name}, numerics_id {engine.numerics_id}\n\n{table(found)}")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.round_trip", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("models/fashion32"), help="class-conditional model folder")
    parser.add_argument("--images", type=Path, required=True, help="images with labels, as for `iddpm train`")
    parser.add_argument("--count", type=int, default=MAX_IMAGES, help=f"images, 1..{MAX_IMAGES} ({MAX_IMAGES})")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25, 50, 100, 250], help="numbers of steps")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(exit_status(run, parse_arguments()))
