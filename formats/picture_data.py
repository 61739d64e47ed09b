"""Whether a picture's file has the data for all pixels that its header announces, by Pillow's name of the format."""

from __future__ import annotations

from formats import jpeg_data, png_data

HAS_ALL_DATA = {
    "PNG": png_data.has_all_data,
    "JPEG": jpeg_data.has_all_data,
    "MPO": jpeg_data.has_all_data,  # of its first image
}
"""Checks of a file's content; they raise `GivenFileError` for files that they cannot check."""
