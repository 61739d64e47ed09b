"""Whether the data of a PNG are as long as its header says.

Pillow leaves the pixels black that a file announces and does not have, and ignores those behind the last row.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

SIGNATURE_BYTES = 8
CHUNK_BYTES = 12
"""Of a chunk, without its data: length, name and checksum."""
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""By colour type."""
WHOLE = ((0, 0, 1, 1),)
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Of each pass of an interlaced file: first column and row, distance between columns and between rows."""
PIECE = 1 << 16


def has_all_data(content: bytes) -> bool:
    """Return whether a PNG has an end, and exactly the rows that its header announces.

    The data are decompressed in pieces, and not further than the header announces.

    Args:
        content: of the file; it has a valid header.
    """
    announced, found, name = _announced_bytes(content), 0, b""
    decompressor = zlib.decompressobj()
    for name, data in _chunks(content):
        for start in range(0, len(data) if name == b"IDAT" else 0, PIECE):
            rest: bytes | memoryview = data[start : start + PIECE]  # each call copies what it leaves of it
            while rest and not decompressor.eof and found <= announced:
                found += len(decompressor.decompress(rest, PIECE))
                rest = decompressor.unconsumed_tail
    return name == b"IEND" and found == announced and decompressor.eof


def _chunks(content: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Yield name and data of each whole chunk, up to the end of the picture."""
    view, position, name = memoryview(content), SIGNATURE_BYTES, b""
    while position + CHUNK_BYTES <= len(content) and name != b"IEND":
        length, name = struct.unpack_from(">I4s", content, position)
        if position + CHUNK_BYTES + length > len(content):
            return
        yield name, view[position + 8 : position + 8 + length]
        position += CHUNK_BYTES + length


def _announced_bytes(content: bytes) -> int:
    """Return the length of the decompressed data: a filter type and the pixels, for each row of each pass."""
    width, height, depth, colour_type, _, _, interlaced = struct.unpack_from(">IIBBBBB", content, 16)
    total = 0
    for column, row, across, down in ADAM7 if interlaced else WHOLE:
        columns, rows = -(-(width - column) // across), -(-(height - row) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * depth * CHANNELS[colour_type] + 7) // 8)
    return total
