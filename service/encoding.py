"""Encode pixels for responses. Slow: call these functions in the `EncodingPool`."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, get_args
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import numpy as np
import numpy.typing as npt

from formats.images import PictureFormat, encode, grid
from formats.value_range import ValueRange
from service.engine.request import ImageParams, ImageResult
from service.requests.generate_request import ImageFormat

Uint8Array = npt.NDArray[np.uint8]
Pixels = npt.NDArray[Any]
"""uint8, or float32 in the formats of arrays."""

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


def output_of(params: ImageParams, result: ImageResult, values: ValueRange) -> Pixels:
    """Return a finished image: uint8 pixels, or float32 in the units of the data, [H, W, C].

    Values that a mask keeps are those that were given, bit for bit.

    Raises:
        ValueError: the image has neither.
    """
    if result.pixels is not None:
        return result.pixels
    if result.values is None:
        raise ValueError(f"image {result.position} of {result.request_id} has no pixels")
    data, given = values.to_data(result.values), params.given
    if given is not None and given.mask is not None and given.original is not None:
        data = np.where(given.mask[0, :, :, None] == 0, given.original, data)
    return data


def network_values(result: ImageResult) -> npt.NDArray[np.float32]:
    """Return the values of a finished encoding or raw call in the units of the network, float32 [H, W, C].

    Raises:
        ValueError: the output is not values.
    """
    if result.values is None:
        raise ValueError(f"image {result.position} of {result.request_id} has no values")
    return np.ascontiguousarray(result.values.transpose(1, 2, 0), dtype=np.float32)


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
