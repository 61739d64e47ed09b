"""What `iddpm sample` comes to, wherever it was sampled, and the files it becomes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from diffusion.images import Uint8Array
    from service.api.schemas import ImageFormat


@dataclass(frozen=True, kw_only=True)
class SampledImage:
    """An image and what it was made from."""

    seed: int
    image_index: int
    class_index: int | None
    numerics_id: str
    pixels: Uint8Array
    """uint8 [H, W, C]."""


def write_images(out: Path, images: list[SampledImage]) -> None:
    """Write one file per image into a folder, or all into one .png, .webp or .npz."""
    import numpy as np

    from diffusion.images import encode
    from service.api.encoding import encode_picture

    one_file: dict[str, ImageFormat] = {".png": "png", ".webp": "webp", ".npz": "npz"}
    if (image_format := one_file.get(out.suffix.lower())) is not None:
        labels = [image.class_index for image in images]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(encode_picture(np.stack([image.pixels for image in images]), labels, image_format))
        typer.echo(f"wrote {out}")
        return
    out.mkdir(parents=True, exist_ok=True)
    for image in images:
        (out / f"{image.seed}_{image.image_index}.png").write_bytes(encode(image.pixels))
    typer.echo(f"wrote {len(images)} images to {out}")
