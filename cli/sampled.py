"""The result of `iddpm sample`: images, and the files they are written to."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from diffusion.config import ImageSize
    from formats.images import Uint8Array
    from service.requests.generate_request import ImageFormat

ONE_FILE: dict[str, ImageFormat] = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg", ".npz": "npz"}
"""Formats of a single file by its suffix; a path with another suffix is a folder."""
NOT_WRITTEN = frozenset({".avif", ".bmp", ".gif", ".npy", ".tif", ".tiff", ".zip"})
"""Suffixes of unsupported file formats, which are not taken for folders."""


LONGEST_SIDES: dict[ImageFormat, int] = {"webp": 16383, "jpeg": 65500}
"""Most pixels per side, for formats with a limit that grids can reach."""


CheckImages = Callable[[int, "ImageSize"], None]
"""Called with channels and size (pixels) of a model's images before sampling; raises ValueError if they do not fit."""


@dataclass(frozen=True, kw_only=True)
class SampledImage:
    """An image and its inputs."""

    seed: int
    image_index: int
    class_index: int | None
    numerics_id: str
    pixels: Uint8Array
    """uint8 [H, W, C]."""


def refuse_other_files(out: Path) -> None:
    """Check that a file or folder can be written, before a model is loaded.

    Raises:
        ValueError: the file format is not supported (the message lists the supported ones), the path is a file instead
            of a folder or a folder instead of a file, or the place is not writable.
    """
    ending = out.suffix.lower()
    if ending in NOT_WRITTEN:
        raise ValueError(f"--out: must be a folder, or a file that ends in {', '.join(ONE_FILE)}; got {out}")
    if ending in ONE_FILE and out.is_dir():
        raise ValueError(f"--out: {out} is a folder; name a file, or a folder whose name does not end in {ending}")
    if ending not in ONE_FILE and out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file; name a folder, or a file that ends in {', '.join(ONE_FILE)}")
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not (place.is_dir() or place == out.absolute()) or not os.access(place, os.W_OK):
        raise ValueError(f"--out: cannot write to {place}: it is not a folder, or permission is denied")


def refuse_impossible_pictures(out: Path, channels: int, size: ImageSize, n: int) -> None:
    """Check that the format of a file can hold the images of a model, before sampling.

    Args:
        out: as for `write_images`.
        channels: channels of an image.
        size: size of an image in pixels.
        n: number of images.

    Raises:
        ValueError: it cannot; names the format, its limit and a format without one.
    """
    from diffusion.config import size_pair
    from formats.images import grid_size
    from service.encoding import CHANNELS

    image_format = ONE_FILE.get(out.suffix.lower())
    if image_format == "npz":
        return
    allowed = CHANNELS[image_format or "png"]
    if channels not in allowed:
        what = f"{out.suffix} files" if image_format else "the .png files of a folder"
        raise ValueError(
            f"--out: {what} hold images of {' or '.join(map(str, allowed))} channels, but this model's have "
            f"{channels}: name a file that ends in .npz"
        )
    longest = max(grid_size(n, *size_pair(size)))
    if image_format in LONGEST_SIDES and longest > LONGEST_SIDES[image_format]:
        raise ValueError(
            f"--out: the grid of {n} images is {longest} pixels wide or high, but {out.suffix} files hold at most "
            f"{LONGEST_SIDES[image_format]}: name a folder, or a file that ends in .npz"
        )


def write_images(out: Path, images: list[SampledImage]) -> None:
    """Write one file per image into a folder, or all images into one file of `ONE_FILE`.

    Raises:
        OSError: a file cannot be written, for example because the disk is full; names the file.
    """
    import numpy as np

    from formats.atomic_file import write_file
    from formats.images import encode
    from service.encoding import encode_picture

    if (image_format := ONE_FILE.get(out.suffix.lower())) is not None:
        labels = [image.class_index for image in images]
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, encode_picture(np.stack([image.pixels for image in images]), labels, image_format))
        typer.echo(f"wrote {out}")
        return
    out.mkdir(parents=True, exist_ok=True)
    for image in images:
        _write_new(out / f"{image.seed}_{image.image_index}.png", encode(image.pixels))
    typer.echo(f"wrote {len(images)} images to {out}")


def _write_new(path: Path, content: bytes) -> None:
    """Write a new file; remove it if writing fails."""
    from formats.disk_errors import disk_errors_name

    with disk_errors_name(path):
        try:
            path.write_bytes(content)
        except OSError:
            path.unlink(missing_ok=True)
            raise
