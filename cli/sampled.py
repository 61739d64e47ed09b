"""What `iddpm sample` comes to, wherever it was sampled, and the files it becomes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from diffusion.images import Uint8Array
    from service.api.schemas import ImageFormat

ONE_FILE: dict[str, ImageFormat] = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg", ".npz": "npz"}
"""By the ending of its name; whatever ends otherwise is a folder."""
NOT_WRITTEN = frozenset({".avif", ".bmp", ".gif", ".npy", ".tif", ".tiff", ".zip"})
"""What nobody would call a folder."""


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
    """Refuse a file of a kind that is not written, before anything is sampled for it.

    Raises:
        ValueError: naming those that are.
    """
    if out.suffix.lower() in NOT_WRITTEN:
        raise ValueError(f"--out: must be a folder, or a file that ends in {', '.join(ONE_FILE)}; got {out}")


def write_images(out: Path, images: list[SampledImage]) -> None:
    """Write one file per image into a folder, or all into one file of `ONE_FILE`."""
    import numpy as np

    from diffusion.images import encode
    from service.api.encoding import encode_picture

    if (image_format := ONE_FILE.get(out.suffix.lower())) is not None:
        labels = [image.class_index for image in images]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(encode_picture(np.stack([image.pixels for image in images]), labels, image_format))
        typer.echo(f"wrote {out}")
        return
    out.mkdir(parents=True, exist_ok=True)
    for image in images:
        (out / f"{image.seed}_{image.image_index}.png").write_bytes(encode(image.pixels))
    typer.echo(f"wrote {len(images)} images to {out}")
