"""Encode pixels for responses. Slow: call these functions in the `EncodingPool`."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import get_args
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import numpy as np
import numpy.typing as npt

from formats.images import PictureFormat, encode, grid
from service.requests.generate_request import ImageFormat
from service.requests.results import Pixels

Uint8Array = npt.NDArray[np.uint8]

MEDIA_TYPES: dict[ImageFormat, str] = {
    "png": "image/png",
    "webp": "image/webp",
    "jpeg": "image/jpeg",
    "npz": "application/x-npz",
    "npy": "application/x-npy",
}
ZIP_MEDIA_TYPE = "application/zip"
PICTURE_FORMATS: tuple[PictureFormat, ...] = get_args(PictureFormat)
CHANNELS: dict[ImageFormat, tuple[int, ...]] = {"png": (1, 3, 4), "webp": (1, 3, 4), "jpeg": (1, 3)}
"""Numbers of image channels that each format supports; npz and npy support any."""
ARRAY_FORMATS: tuple[ImageFormat, ...] = ("npz", "npy")
_NAME_LENGTH = 40


def encode_one(
    pixels: Pixels,
    class_index: int | None,
    image_format: ImageFormat,
    *,
    quality: int | None = None,
    compression: int | None = None,
) -> bytes:
    """Encode one image, uint8 [H, W, C], for a JSON response; see `formats.images.encode` for options and errors."""
    if image_format == "npz":
        return encode_npz(pixels[None], [class_index], compression=compression)
    if image_format == "npy":
        return encode_npy(pixels[None])
    return encode(pixels, image_format, quality=quality, compression=compression)


def encode_picture(
    images: Pixels,
    class_indices: Sequence[int | None],
    image_format: ImageFormat,
    *,
    quality: int | None = None,
    compression: int | None = None,
) -> bytes:
    """Encode all images of a response, uint8 [N, H, W, C], as one body: a picture (a grid if N > 1), or an npz."""
    if image_format == "npz":
        return encode_npz(images, class_indices, compression=compression)
    if image_format == "npy":
        return encode_npy(images)
    picture = images[0] if len(images) == 1 else grid(images)
    return encode(picture, image_format, quality=quality, compression=compression)


def encode_npy(images: Pixels) -> bytes:
    """Encode arrays [N, H, W, C] as an npy."""
    content = io.BytesIO()
    np.lib.format.write_array(content, np.ascontiguousarray(images), allow_pickle=False)
    return content.getvalue()


def encode_npz(images: Pixels, class_indices: Sequence[int | None], *, compression: int | None = None) -> bytes:
    """Encode an npz in the ADM evaluator's format: arr_0 uint8 [N, H, W, C], arr_1 int64 labels if there are any."""
    arrays: list[npt.NDArray[np.generic]] = [images]
    labels = [index for index in class_indices if index is not None]
    if labels:
        arrays.append(np.array(labels, dtype=np.int64))
    buffer = io.BytesIO()
    with ZipFile(buffer, "w") as archive:  # np.savez_compressed has no option for the level
        for number, array in enumerate(arrays):
            content = io.BytesIO()
            np.lib.format.write_array(content, array, allow_pickle=False)
            archive.writestr(_member(f"arr_{number}.npy"), content.getvalue(), ZIP_DEFLATED, compression)
    return buffer.getvalue()


def encode_zip(files: Sequence[tuple[str, bytes]]) -> bytes:
    """Pack encoded images into a zip archive; equal files give equal bytes at any time."""
    buffer = io.BytesIO()
    with ZipFile(buffer, "w", ZIP_STORED) as archive:  # the files are compressed already
        for name, content in files:
            archive.writestr(_member(name), content)
    return buffer.getvalue()


def file_name(position: int, class_name: str | None, seed: int, image_index: int, extension: str) -> str:
    """Return the name of an image's file, of letters, digits and hyphens only, for any class name.

    Different positions give different names.
    """
    readable = re.sub(r"[^A-Za-z0-9]+", "-", class_name or "").strip("-")[:_NAME_LENGTH]
    return "-".join(filter(None, [f"{position:04d}", readable, f"seed{seed}", str(image_index)])) + f".{extension}"


def _member(name: str) -> ZipInfo:
    """Return the entry of a file in an archive, without the time of writing."""
    info = ZipInfo(name)
    info.external_attr = 0o644 << 16  # with 0, unzip creates files without read permission
    return info
