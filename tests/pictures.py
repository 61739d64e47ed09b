"""PNG and JPEG files that Pillow cannot write."""

from __future__ import annotations

import re
import struct
import zlib
from typing import Any

import numpy as np


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def deep_png(
    pixels: Any, *, size: tuple[int, int] | None = None, transparent: Any = None, animated: bool = False
) -> bytes:
    """Return a PNG with 16 bits per channel, [H, W, 1..4], which Pillow cannot write; rows have the filters 0, 1, 2.

    Args:
        pixels: uint16.
        size: width and height in the header, if they are others.
        transparent: the transparent colour.
        animated: whether the header announces two frames.
    """
    rows, columns, channels = pixels.shape
    values = np.ascontiguousarray(pixels, ">u2").view(np.uint8).reshape(rows, -1)
    left = np.pad(values, ((0, 0), (2 * channels, 0)))[:, : values.shape[1]]
    above = np.pad(values, ((1, 0), (0, 0)))[:rows]
    filtered = [(values - base).astype(np.uint8) for base in (np.zeros_like(values), left, above)]
    lines = b"".join(bytes([row % 3]) + filtered[row % 3][row].tobytes() for row in range(rows))
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", *(size or (columns, rows)), 16, kind, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"acTL", struct.pack(">II", 2, 0)) if animated else b"",
            b"" if transparent is None else chunk(b"tRNS", np.asarray(transparent, ">u2").tobytes()),
            chunk(b"IDAT", zlib.compress(lines)),
            chunk(b"IEND", b""),
        ]
    )


def jpeg_announcing(content: bytes, width: int, height: int) -> bytes:
    """Return a JPEG with another size in its header."""
    frame = re.search(rb"\xff[\xc0-\xc2]\x00[\x0b\x11]\x08", content)
    assert frame is not None
    return content[: frame.end()] + struct.pack(">HH", height, width) + content[frame.end() + 4 :]
