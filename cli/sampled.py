"""The result of `iddpm sample`: images, and the files they are written to."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

if TYPE_CHECKING:
    from diffusion.config import ImageSize
    from service.requests.generate_request import ImageFormat
    from service.requests.results import Pixels

ONE_FILE: dict[str, ImageFormat] = {
    ".png": "png",
    ".webp": "webp",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".npz": "npz",
    ".npy": "npy",
}
"""Formats of a single file by its suffix; a path with another suffix is a folder."""
NOT_WRITTEN = frozenset({".avif", ".bmp", ".gif", ".tif", ".tiff", ".zip"})
"""Suffixes of unsupported file formats, which are not taken for folders."""


CheckImages = Callable[[int, "ImageSize"], None]
"""Called with channels and size (pixels) of a model's images before sampling; raises ValueError if they do not fit."""


@dataclass(frozen=True, kw_only=True)
class SampledImage:
    """An image and its inputs."""

    seed: int
    image_index: int
    class_index: int | None
    numerics_id: str
    pixels: Pixels
    """uint8 [H, W, C]; or float32, in the units of the data."""


@dataclass(frozen=True)
class Output:
    """A place that images can be written to, and their format there."""

    path: Path
    format: ImageFormat
    one_file: bool
    """Whether all images go into one file; else the path is a folder, with one file per image."""


def output_at(out: Path, wanted: str | None = None, dtype: str = "uint8") -> Output:
    """Check that images can be written to a file or folder, before a model is loaded.

    Args:
        out: a file of `ONE_FILE`, or a folder.
        wanted: format of the files in a folder. None: png, or npy for float32.
        dtype: type of the values.

    Raises:
        ValueError: the format is not supported (the message lists the supported ones), is not that of the file, or
            cannot hold the type; the path is a file instead of a folder or a folder instead of a file, or the place is
            not writable.
    """
    from diffusion.quoting import alternatives, quoted
    from service.encoding import ARRAY_FORMATS, MEDIA_TYPES
    from service.requests.generate_request import ValueType

    _refuse_other_files(out)
    if dtype not in get_args(ValueType):
        raise ValueError(f"--dtype: must be {alternatives(get_args(ValueType))}; got {quoted(dtype)}")
    if wanted is not None and wanted not in MEDIA_TYPES:
        raise ValueError(f"--format: must be {alternatives(MEDIA_TYPES)}; got {quoted(wanted)}")
    of_file = ONE_FILE.get(out.suffix.lower())
    by_default: ImageFormat = "npy" if dtype == "float32" else "png"
    asked = next((name for name in MEDIA_TYPES if name == wanted), by_default)
    chosen = asked if of_file is None else of_file
    if wanted not in (None, chosen):
        raise ValueError(f"--format: is that of the file, {quoted(chosen)}, or name a folder; got {quoted(wanted)}")
    if dtype == "float32" and chosen not in ARRAY_FORMATS:
        raise ValueError(f"--dtype: float32 is valid only with {alternatives(ARRAY_FORMATS)}; got {quoted(chosen)}")
    return Output(out, chosen, one_file=of_file is not None)


def _refuse_other_files(out: Path) -> None:
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


def refuse_impossible_pictures(output: Output, channels: int, size: ImageSize, n: int) -> None:
    """Check that a format can hold the images of a model, before sampling.

    Args:
        output: where they are written.
        channels: channels of an image.
        size: size of an image in pixels.
        n: number of images.

    Raises:
        ValueError: it cannot; names the format, its limit and a format without one.
    """
    from diffusion.config import size_pair
    from formats.images import LONGEST_SIDES, grid_size
    from service.encoding import ARRAY_FORMATS, CHANNELS

    if output.format in ARRAY_FORMATS:
        return
    allowed = CHANNELS[output.format]
    if channels not in allowed:
        what = f"{output.path.suffix} files" if output.one_file else f"the .{output.format} files of a folder"
        raise ValueError(
            f"--out: {what} hold images of {' or '.join(map(str, allowed))} channels, but this model's have "
            f"{channels}: name a file that ends in .npz"
        )
    longest = max(grid_size(n if output.one_file else 1, *size_pair(size)))
    if output.format in LONGEST_SIDES and longest > LONGEST_SIDES[output.format]:
        raise ValueError(
            f"--out: the grid of {n} images is {longest} pixels wide or high, but {output.path.suffix} files hold at "
            f"most {LONGEST_SIDES[output.format]}: name a folder, or a file that ends in .npz"
        )


def write_one_file(output: Output, images: list[SampledImage]) -> None:
    """Write all images into one file.

    Raises:
        OSError: the file cannot be written, for example because the disk is full; names the file.
    """
    import numpy as np

    from formats.atomic_file import write_file
    from service.encoding import encode_picture

    labels = [image.class_index for image in images]
    output.path.parent.mkdir(parents=True, exist_ok=True)
    write_file(output.path, encode_picture(np.stack([image.pixels for image in images]), labels, output.format))


def write_folder(output: Output, images: list[SampledImage]) -> None:
    """Write one file per image into a folder.

    Raises:
        OSError: a file cannot be written, for example because the disk is full; names the file, and leaves one that
            was there before unchanged.
    """
    from formats.atomic_file import write_files
    from service.encoding import encode_one

    output.path.mkdir(parents=True, exist_ok=True)
    files = {
        f"{image.seed}_{image.image_index}.{output.format}": encode_one(image.pixels, image.class_index, output.format)
        for image in images
    }
    write_files(output.path, files)
