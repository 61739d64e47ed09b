"""Image files: grids of images, with or without captions, and their encodings."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Uint8Array = npt.NDArray[np.uint8]
PictureFormat = Literal["png", "webp", "jpeg"]

LONGEST_SIDES: Mapping[str, int] = {"webp": 16383, "jpeg": 65500}
"""Most pixels per side, for formats with a limit that grids can reach."""
GRID_GAP = 2
CAPTION_HEIGHT = 14
JPEG_QUALITY = 90


def encode(
    pixels: Uint8Array,
    picture_format: PictureFormat = "png",
    *,
    quality: int | None = None,
    compression: int | None = None,
) -> bytes:
    """Encode one image: JPEG is lossy, the other formats are lossless.

    Args:
        pixels: uint8 [H, W, C] with C = 1, 3 or 4; JPEG does not support 4.
        picture_format: the format.
        quality: of JPEG, 1..100; None: 90.
        compression: of the other formats, 0 (fast) .. 9 (small); does not change the pixels. None: the encoder's
            default.

    Returns:
        The content of the file.

    Raises:
        ValueError: unsupported number of channels.
    """
    options: dict[str, Any] = {}
    if picture_format == "jpeg":
        options = {"quality": quality or JPEG_QUALITY, "subsampling": 0}  # no chroma subsampling
    elif picture_format == "webp":
        options = {"lossless": True, "exact": True}
        if compression is not None:
            options |= {
                "quality": min(99, 100 * compression // 9),  # 100: up to 400 times slower, and no smaller
                "method": 6 * compression // 9,
            }  # both mean effort if lossless
    elif compression is not None:
        options = {"compress_level": compression}
    buffer = io.BytesIO()
    _picture(pixels).save(buffer, format=picture_format, **options)
    return buffer.getvalue()


def grid(images: Uint8Array, columns: int | None = None) -> Uint8Array:
    """Arrange images row by row in a grid, with thin white gaps.

    Args:
        images: uint8 [N, H, W, C], N at least 1.
        columns: images per row; None: as square as possible.

    Returns:
        uint8 [rows * (H + gap) - gap, columns * (W + gap) - gap, C].
    """
    count, height, width, channels = images.shape
    columns = _columns(count, columns)
    sheet = np.full((*grid_size(count, height, width, columns), channels), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + GRID_GAP), (index % columns) * (width + GRID_GAP)
        sheet[top : top + height, left : left + width] = image
    return sheet


def grid_size(count: int, height: int, width: int, columns: int | None = None) -> tuple[int, int]:
    """Return height and width in pixels of a `grid` of `count` images of `height` x `width`."""
    columns = _columns(count, columns)
    rows = -(-count // columns)
    return rows * (height + GRID_GAP) - GRID_GAP, columns * (width + GRID_GAP) - GRID_GAP


def _columns(count: int, columns: int | None) -> int:
    return min(count, columns or int(np.ceil(np.sqrt(count))))


def shrink(pixels: Uint8Array, longest_side: int) -> Uint8Array:
    """Shrink an image, uint8 [H, W, C], by averaging, with the smallest integer factor that makes it fit.

    An image whose sides are at most `longest_side` pixels is not changed.
    """
    height, width, channels = pixels.shape
    factor = -(-max(height, width) // longest_side)
    down, across = min(factor, height), min(factor, width)
    rows, columns = height // down, width // across
    blocks = pixels[: rows * down, : columns * across].reshape(rows, down, columns, across, channels)
    return np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)


def captioned_rows(rows: Sequence[tuple[str, Uint8Array]], scale: int = 1) -> Image.Image:
    """Draw one captioned row of images per entry, enlarged by an integer factor.

    The channels of images that are neither grey nor RGB are drawn side by side, each in grey.

    Args:
        rows: pairs of a caption and images, uint8 [n, H, W, C].
        scale: the factor.
    """
    font = ImageFont.load_default(CAPTION_HEIGHT - 3)
    label_width = max(int(font.getlength(caption)) for caption, _ in rows) + 8
    strips = [_picture(grid(_channels_apart(images), columns=len(images))).convert("RGB") for _, images in rows]
    strips = [strip.resize((strip.width * scale, strip.height * scale), Image.Resampling.NEAREST) for strip in strips]
    width = label_width + max(strip.width for strip in strips)
    sheet = Image.new("RGB", (width, sum(strip.height + GRID_GAP for strip in strips)), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for (caption, _), strip in zip(rows, strips, strict=True):
        draw.text((label_width - 4, top + strip.height // 2), caption, fill="black", font=font, anchor="rm")
        sheet.paste(strip, (label_width, top))
        top += strip.height + GRID_GAP
    return sheet


def side_by_side(images: Sequence[Uint8Array]) -> Uint8Array:
    """Join images of equal height in pairs, triples, ...: uint8 [n, H, W, C] each, whose channels may differ in number.

    Returns:
        uint8 [n, H, sum of widths, 3]; channels of images that are neither grey nor RGB lie beside each other, in grey.
    """
    shown = [_channels_apart(part) for part in images]
    return np.concatenate([np.broadcast_to(part, (*part.shape[:3], 3)) for part in shown], axis=2)


def _channels_apart(images: Uint8Array) -> Uint8Array:
    """Return images [n, H, W, C] as grey images [n, H, C * W, 1], unless C is 1 or 3."""
    if images.shape[-1] in (1, 3):
        return images
    return np.concatenate(np.split(images, images.shape[-1], axis=-1), axis=2)


def _picture(pixels: Uint8Array) -> Image.Image:
    if pixels.shape[-1] not in (1, 3, 4):
        raise ValueError(f"a picture must have 1, 3 or 4 channels; got {pixels.shape[-1]}")
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
