"""What `iddpm sample` comes to, wherever it was sampled, and the files it becomes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from formats.images import Uint8Array
    from service.requests.generate_request import ImageFormat

ONE_FILE: dict[str, ImageFormat] = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg", ".npz": "npz"}
"""By the ending of its name; whatever ends otherwise is a folder."""
NOT_WRITTEN = frozenset({".avif", ".bmp", ".gif", ".npy", ".tif", ".tiff", ".zip"})
"""Endings of files that are not written; a folder is hardly called so."""


LONGEST_SIDES: dict[ImageFormat, int] = {"webp": 16383, "jpeg": 65500}
"""Most pixels of a side, where a format has a limit that grids can reach."""


CheckImages = Callable[[int, int], None]
"""Called with channels and size of a model's images before any is sampled; raises ValueError where they do not fit."""


@dataclass(frozen=True, kw_only=True)
class SampledImage:
    """An image and what it was made from."""

    seed: int
    image_index: int
    class_index: int | None
    numerics_id: str
    pixels: Uint8Array
    """uint8 [H, W, C]."""


def refuse_other_files(out: Path) -> None:
    """Refuse what cannot be written, before a model is loaded for it.

    Raises:
        ValueError: a file of a kind that is not written (named are those that are), a file where a folder is asked
            for or a folder where a file is, or a place that may not be written to.
    """
    ending = out.suffix.lower()
    if ending in NOT_WRITTEN:
        raise ValueError(f"--out: must be a folder, or a file that ends in {', '.join(ONE_FILE)}; got {out}")
    if ending in ONE_FILE and out.is_dir():
        raise ValueError(f"--out: {out} is a folder; name a file, or a folder whose name does not end in {ending}")
    if ending not in ONE_FILE and out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file; a folder, or a file that ends in {', '.join(ONE_FILE)}, is needed")
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not (place.is_dir() or place == out.absolute()) or not os.access(place, os.W_OK):
        raise ValueError(f"--out: nothing can be written to {place}: it is no folder, or this user may not")


def refuse_impossible_pictures(out: Path, channels: int, size: int, n: int) -> None:
    """Refuse a format that cannot hold the images of a model, before any is sampled.

    Args:
        out: as for `write_images`.
        channels: of an image.
        size: of an image, in pixels.
        n: images.

    Raises:
        ValueError: names the format, its limit and one that has none.
    """
    from formats.images import grid_size
    from service.encoding import CHANNELS

    image_format = ONE_FILE.get(out.suffix.lower())
    if image_format == "npz":
        return
    allowed = CHANNELS[image_format or "png"]
    if channels not in allowed:
        what = f"{out.suffix} files" if image_format else "the .png files of a folder"
        raise ValueError(
            f"--out: {what} hold images of {' or '.join(map(str, allowed))} channels, and this model's have "
            f"{channels}: name a file that ends in .npz"
        )
    longest = max(grid_size(n, size, size))
    if image_format in LONGEST_SIDES and longest > LONGEST_SIDES[image_format]:
        raise ValueError(
            f"--out: {n} images make a picture of {longest} pixels, and {out.suffix} files hold at most "
            f"{LONGEST_SIDES[image_format]}: name a folder, or a file that ends in .npz"
        )


def write_images(out: Path, images: list[SampledImage]) -> None:
    """Write one file per image into a folder, or all into one file of `ONE_FILE`.

    Raises:
        OSError: a file cannot be written, for one because the disk is full; names it.
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
    """Write one of many files, or remove what was written of it."""
    from formats.disk_errors import disk_errors_name

    with disk_errors_name(path):
        try:
            path.write_bytes(content)
        except OSError:
            path.unlink(missing_ok=True)
            raise
