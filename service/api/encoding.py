"""From pixels to bytes a client can use."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt

from diffusion.images import encode, grid
from service.api.schemas import ImageFormat

Uint8Array = npt.NDArray[np.uint8]

MEDIA_TYPES: dict[ImageFormat, str] = {"png": "image/png", "webp": "image/webp", "npz": "application/x-npz"}


def encode_one(pixels: Uint8Array, class_index: int | None, image_format: ImageFormat) -> bytes:
    """Encode one image [H, W, C] for the JSON answer."""
    if image_format == "npz":
        return encode_npz(pixels[None], [class_index])
    return encode(pixels, image_format)


def encode_picture(images: Uint8Array, class_indices: list[int | None], image_format: ImageFormat) -> bytes:
    """Encode a whole answer [N, H, W, C] as one body: a picture (a grid of several), or an npz with all."""
    if image_format == "npz":
        return encode_npz(images, class_indices)
    return encode(images[0] if len(images) == 1 else grid(images), image_format)


def encode_npz(images: Uint8Array, class_indices: list[int | None]) -> bytes:
    """Encode as the ADM evaluator reads it: arr_0 uint8 [N, H, W, C], and arr_1 int64 labels if there are any."""
    arrays = [images]
    labels = [index for index in class_indices if index is not None]
    if labels:
        arrays.append(np.array(labels, dtype=np.int64))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, *arrays)
    return buffer.getvalue()
