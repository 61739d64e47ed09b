"""Whether the data of a JPEG are as long as its header says.

libjpeg makes the pixels grey for which a file has no data, and warns; Pillow does not pass its warnings on. simplejpeg
decodes with libjpeg too, and raises them.
"""

from __future__ import annotations

import re

from simplejpeg import decode_jpeg

from formats.given_shapes import GivenFileError

MAX_SCANS = 100
"""Each scan visits all pixels, even if it has a few bytes. Encoders write about ten; libvips has this limit too."""

_START, _END = b"\xff\xd8", b"\xff\xd9"
_END_KIND, _SCAN_KIND = 0xD9, 0xDA
_NEEDED = frozenset([0xC0, 0xC1, 0xC2, 0xC4, _SCAN_KIND, 0xDB, 0xDD])
"""Segments that the data cannot be decoded without: frame (baseline, extended or progressive, all with Huffman codes),
codes, scan, quantisation, restart interval."""
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
"""Begins a segment or ends the file. The bytes that are left out stand for data, restarts inside them, and filling."""
_SURPLUS = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
"""libjpeg's warning about bytes between the last pixel and the end, which some cameras write."""


def has_all_data(content: bytes) -> bool:
    """Return whether a JPEG has undamaged data for all pixels that its header announces.

    All data are read, but pixels are made at an eighth of the size only. Parts without an effect on the pixels are left
    out before, because libjpeg warns about some: metadata, and bytes between segments or behind the end.

    Args:
        content: of the file; it has a valid header.

    Raises:
        GivenFileError: the file has too many scans, or is of a kind that cannot be checked.
    """
    needed = _needed(content)
    while True:
        try:
            decode_jpeg(needed, "GRAY", min_height=1, min_width=1, strict=True)
        except ValueError as error:
            message = str(error)
        else:
            return True
        if "tjDecompressHeader" in message:  # the function that failed
            raise GivenFileError(
                "must be a baseline or progressive JPEG with Huffman codes, grey or with the chroma subsampling 4:4:4, "
                "4:2:2, 4:4:0, 4:2:0, 4:1:1 or 4:4:1; or another format"
            )
        surplus = _SURPLUS.search(message)
        if surplus is None:
            return False
        # Not the end of the check: where a restart is expected, this warning comes before that about missing data
        needed = needed[: -len(_END) - int(surplus[1])] + _END


def _needed(content: bytes) -> bytes:
    """Return a JPEG without the parts that have no effect on its pixels.

    Raises:
        GivenFileError: it has too many scans.
    """
    parts, position, scans = [_START], len(_START), 0
    while (marker := _MARKER.search(content, position)) and (kind := marker[0][1]) != _END_KIND:
        position = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2], "big")
        if kind == _SCAN_KIND:
            scans += 1
            following = _MARKER.search(content, position)
            position = following.start() if following else len(content)
        if kind in _NEEDED:
            parts.append(content[marker.start() : position])
    if scans > MAX_SCANS:
        raise GivenFileError(f"must have at most {MAX_SCANS} scans; got {scans}")
    return b"".join([*parts, _END])
