"""JPEGs: those with all their data are read as Pillow reads them, those without are refused."""

from __future__ import annotations

import io
import itertools
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from formats.given_files import read_images, read_masks
from formats.given_shapes import GivenFileError
from formats.jpeg_data import has_all_data
from tests.pictures import jpeg_announcing

RNG = np.random.default_rng(0)
END = b"\xff\xd9"
RESTARTS: list[dict[str, Any]] = [{}, {"restart_marker_blocks": 1}, {"restart_marker_blocks": 5}]
CODED: list[dict[str, Any]] = [
    {"progressive": progressive, "subsampling": subsampling, **restarts}
    for progressive, subsampling, restarts in itertools.product([False, True], [0, 1, 2], RESTARTS)
]
SIZES = [(1, 1), (8, 8), (7, 9), (17, 33), (64, 40)]
"""Width and height."""


def picture(size: tuple[int, int], channels: int, *, flat: bool = False) -> npt.NDArray[np.uint8]:
    shape = (size[1], size[0], 3) if channels == 3 else (size[1], size[0])
    return np.full(shape, 90, np.uint8) if flat else RNG.integers(0, 256, shape, dtype=np.uint8)


def jpeg(pixels: npt.NDArray[np.uint8], **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def pixels_of(content: bytes, size: tuple[int, int], channels: int) -> npt.NDArray[Any]:
    return read_images(content, (size[1], size[0], channels), most=1)[0]


def by_pillow(content: bytes, channels: int) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.asarray(image)
    return pixels if channels == 3 else pixels[..., None]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_with_all_its_data_has_the_pixels_that_pillow_reads(size: tuple[int, int], channels: int) -> None:
    for options, quality, flat in itertools.product(CODED, (1, 75, 100), (False, True)):
        content = jpeg(picture(size, channels, flat=flat), quality=quality, **options)
        assert np.array_equal(pixels_of(content, size, channels), by_pillow(content, channels)), (options, quality)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_that_announces_more_pixels_than_it_has_is_refused(channels: int) -> None:
    for options, size, flat in itertools.product(CODED, SIZES, (False, True)):
        content = jpeg(picture(size, channels, flat=flat), **options)
        for announced in ((size[0], size[1] + 16), (size[0], 8 * size[1] + 99), (size[0] + 16, size[1])):
            rule = f"its header announces {announced[0]} x {announced[1]} pixels"
            with pytest.raises(GivenFileError, match=rule):
                pixels_of(jpeg_announcing(content, *announced), announced, channels)


@pytest.mark.parametrize("options", CODED)
def test_a_mask_that_announces_more_rows_than_it_has_is_refused(options: dict[str, Any]) -> None:
    content = jpeg_announcing(jpeg(picture((8, 8), 3), **options), 8, 48)
    with pytest.raises(GivenFileError, match="its header announces 8 x 48 pixels"):
        read_masks(content, (48, 8, 3), most=1)


@pytest.mark.parametrize(
    "changed",
    [
        lambda content: content[:-2] + bytes(20) + END,  # libjpeg warns of the next four too
        lambda content: content[:-2] + b"\xff\x00" * 50 + END,
        lambda content: content[:20] + b"between" + content[20:],
        lambda content: content.replace(b"JFIF\x00\x01", b"JFIF\x00\x02"),
        lambda content: content[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64" + bytes(4) + b"\x07" + content[2:],
        lambda content: content[:20] + b"\xff\xff\xff" + content[20:],
        lambda content: content + b"behind the end",
        lambda content: content + content[:-9],
    ],
)
@pytest.mark.parametrize("options", CODED)
def test_what_has_no_effect_on_the_pixels_is_no_damage(options: dict[str, Any], changed: Any) -> None:
    plain = jpeg(picture((17, 33), 3), **options)
    content = changed(plain)
    assert content != plain
    assert np.array_equal(pixels_of(content, (17, 33), 3), by_pillow(content, 3))


@pytest.mark.parametrize("surplus", [1, 3, 7, 20, 1000])
def test_bytes_before_the_end_do_not_hide_that_data_are_missing(surplus: int) -> None:
    """Where a restart is expected, they are skipped up to the end of the file, with a warning of their own."""
    for byte in (b"\x00", b"\x55", b"\xff\x00"):
        content = jpeg(picture((16, 16), 1), restart_marker_rows=1)
        padded = content[:-2] + byte * surplus + END
        assert has_all_data(padded)
        assert not has_all_data(jpeg_announcing(padded, 16, 24))


def test_metadata_are_read() -> None:
    exif = Image.Exif()
    exif[274] = 6  # a viewer turns it by 90 degrees
    pixels = picture((17, 33), 3)
    content = jpeg(pixels, exif=exif, comment=b"\xff\xd9", icc_profile=bytes(200))
    assert np.array_equal(pixels_of(content, (33, 17), 3), np.rot90(by_pillow(content, 3), -1))


@pytest.mark.parametrize("options", [{"progressive": True}, {"progressive": True, "restart_marker_blocks": 5}])
def test_every_scan_must_have_all_its_data(options: dict[str, Any]) -> None:
    content = jpeg(picture((64, 40), 3), **options)
    scans = [marker.start() for marker in re.finditer(rb"\xff\xda", content)]
    assert len(scans) > 5
    for scan in scans:
        end = re.compile(rb"\xff[^\x00\xd0-\xd7]").search(content, scan + 2)
        assert end is not None
        middle = (scan + end.start()) // 2
        assert not has_all_data(content[:middle] + content[end.start() :])


def test_a_jpeg_of_many_scans_is_refused() -> None:
    """Each visits all pixels, in a few bytes."""
    content = jpeg(picture((64, 64), 1, flat=True), progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    with pytest.raises(GivenFileError, match="must have at most 100 scans; got 106"):
        pixels_of(content[:-2] + last * 100 + END, (64, 64), 1)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\xff\xc0", b"\xff\xc9"),  # arithmetic coding
        (b"\x03\x01\x22", b"\x03\x01\x31"),  # three columns of brightness for one of colour
    ],
)
def test_a_jpeg_that_cannot_be_checked_is_refused(old: bytes, new: bytes) -> None:
    content = jpeg(picture((16, 16), 3), subsampling=2)
    assert content.count(old) == 1
    with pytest.raises(GivenFileError, match=r"must be a baseline or progressive JPEG .* or another format"):
        pixels_of(content.replace(old, new), (16, 16), 3)
