"""Files from outside: what is read, and what is refused, without decoding it where the header suffices."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from formats import png_data
from formats.given_files import (
    masks_of,
    may_be_transparent,
    read_images,
    read_masks,
    read_transparency,
    read_values,
)
from formats.given_shapes import Fit, GivenFileError
from formats.value_range import ValueRange
from tests.pictures import chunk, deep_png

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (8, 8, 1), dtype=np.uint8)
RGB = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (8, 8, 3), dtype=np.uint16)


def picture(pixels: Any, kind: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(np.squeeze(pixels))
    (image if mode is None else image.convert(mode)).save(buffer, kind, **options)
    return buffer.getvalue()


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize("content", [picture(GREY), picture(GREY, "WEBP", lossless=True), npy(GREY), npz(arr_0=GREY)])
def test_eight_bits_are_read_as_they_are(content: bytes) -> None:
    images = read_images(content, (8, 8, 1), most=1)
    assert images.dtype == np.uint8
    assert np.array_equal(images[0], GREY)


def test_height_and_width_may_differ() -> None:
    assert np.array_equal(read_images(picture(RGB), (6, 8, 3), most=1)[0], RGB)
    assert read_images(picture(RGB, "JPEG"), (6, 8, 3), most=1).shape == (1, 6, 8, 3)
    with pytest.raises(GivenFileError, match="must be 6 pixels wide and 8 high"):
        read_images(picture(RGB), (8, 6, 3), most=1)


def test_sixteen_bit_grey_spans_the_range() -> None:
    deep = RNG.integers(0, 65536, (8, 8, 1), dtype=np.uint16)
    images = read_images(picture(deep), (8, 8, 1), most=1)
    assert images.dtype == np.uint16
    assert np.array_equal(images[0], deep)
    assert ValueRange((0,), (255,)).data_of(np.array([65535], np.uint16)) == 255


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("wanted", [1, 3, 4])
def test_every_sixteen_bit_png_is_read_in_full(channels: int, wanted: int) -> None:
    colours = DEEP if channels > 2 and wanted != 1 else np.repeat(DEEP[..., :1], 3, axis=2)
    alpha = DEEP[..., 1:2] if wanted == 4 and channels in (2, 4) else np.full_like(DEEP[..., :1], 65535)
    file = deep_png(np.dstack([colours[..., : 1 if channels < 3 else 3], *([alpha] if channels in (2, 4) else [])]))
    images = read_images(file, (8, 8, wanted), most=1)
    assert images.dtype == np.uint16
    expected = np.dstack([colours, alpha])[..., : {1: 1, 3: 3, 4: 4}[wanted]]
    assert np.array_equal(images[0], expected)


def test_a_transparent_colour_of_sixteen_bits_is_an_alpha_channel() -> None:
    for colours in (DEEP, DEEP[..., :1]):
        file = deep_png(colours, transparent=colours[3, 5])
        image = read_images(file, (8, 8, 4), most=1)[0]
        assert np.array_equal(image[..., :3], np.broadcast_to(colours, (8, 8, 3)))
        assert np.array_equal(image[..., 3] == 0, (colours == colours[3, 5]).all(axis=2))
        assert may_be_transparent(file)
        assert read_transparency(file, (8, 8, 1))[0].sum() == 1
        assert np.array_equal(
            read_images(file, (8, 8, 3), most=1, drop_alpha=True)[0], np.broadcast_to(colours, (8, 8, 3))
        )


def test_sixteen_bit_colours_become_grey_as_eight_bit_ones_do() -> None:
    deep = read_images(deep_png(RGB.astype(np.uint16) * 257), (6, 8, 1), most=1, fit="crop")
    grey = read_images(picture(RGB), (6, 8, 1), most=1, fit="crop")
    assert np.abs(deep / 257 - grey).max() <= 1
    assert read_masks(deep_png(np.full_like(DEEP, 65535)), (8, 8, 3), most=1).min() == 1


def test_half_transparent_pixels_of_sixteen_bits_are_mixed_in_full_precision() -> None:
    made = read_transparency(deep_png(np.dstack([DEEP, DEEP[..., 0]])), (8, 8, 1))
    np.testing.assert_allclose(made[0], 1 - DEEP[..., 0] / 65535, atol=1e-7)


def test_a_sixteen_bit_picture_is_turned_as_its_exif_says() -> None:
    exif = Image.Exif()
    exif[274] = 6  # a viewer turns it by 90 degrees
    for colours in (DEEP, DEEP[..., :2], DEEP[..., :1]):
        plain = deep_png(colours[:5])
        turned = plain[:33] + chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + plain[33:]
        image = read_images(turned, (8, 5, 3), most=1, drop_alpha=True)[0]
        wanted = np.rot90(colours[:5], -1)
        assert np.array_equal(image, np.broadcast_to(wanted if wanted.shape[2] == 3 else wanted[..., :1], (8, 5, 3)))


def turned_at_its_end(png: bytes) -> bytes:
    """Return a PNG with the orientation behind its pixels: viewers turn it by 90 degrees."""
    exif = Image.Exif()
    exif[274] = 6
    return png[:-12] + chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + png[-12:]


@pytest.mark.parametrize("deep", [False, True])
def test_a_picture_that_is_turned_behind_its_pixels_has_its_shape_after_that(deep: bool) -> None:
    alpha = np.dstack([DEEP, DEEP[..., 0]])[:6]
    rgb, rgba = (deep_png(alpha[..., :3]), deep_png(alpha)) if deep else (picture(RGB), picture(alpha.astype(np.uint8)))
    for read in (read_images, read_masks):
        with pytest.raises(GivenFileError, match=r"must be 8 pixels wide and 6 high; .* got 6 x 8"):
            read(turned_at_its_end(rgb), (6, 8, 3), most=1)
        assert read(turned_at_its_end(rgb), (6, 8, 3), most=1, fit="crop").shape[1:3] == (6, 8)
    with pytest.raises(GivenFileError, match="got 6 x 8"):
        read_transparency(turned_at_its_end(rgba), (6, 8, 3))
    assert read_transparency(turned_at_its_end(rgba), (8, 6, 3), fit="crop").shape == (1, 8, 6)


def test_a_png_is_checked_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decompression copies what it leaves of its input: with all of a large chunk, each time."""
    given: list[int] = []

    class Counted:
        def __init__(self) -> None:
            self.inner = decompressor()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def decompress(self, data: bytes, most: int) -> bytes:
            given.append(len(data))
            return self.inner.decompress(data, most)

    decompressor = zlib.decompressobj
    content = picture(RGB)
    monkeypatch.setattr(zlib, "decompressobj", Counted)
    monkeypatch.setattr(png_data, "PIECE", 16)
    assert png_data.has_all_data(content)
    assert max(given) <= 16
    assert sum(given) < 3 * len(content)


@pytest.mark.parametrize("dtype", ["f2", ">f4", "f8", "i2", "u2", "?"])
def test_other_arrays_are_in_the_units_of_the_data(dtype: str) -> None:
    array = RNG.integers(0, 2, (3, 8, 8, 1)).astype(dtype)
    images = read_images(npy(array), (8, 8, 1), most=3)
    assert images.dtype == np.float32
    assert np.array_equal(images, array.astype(np.float32))


def test_fortran_order_and_a_missing_axis() -> None:
    array = np.asfortranarray(RNG.random((8, 8)))
    assert np.array_equal(read_values(npy(array), (8, 8, 1), most=1)[0, :, :, 0], array.astype(np.float32))
    assert np.array_equal(read_values(npz(x=array), (8, 8, 1), most=1)[0, :, :, 0], array.astype(np.float32))


def test_grey_becomes_colour_and_colour_grey_only_on_request() -> None:
    grey = np.repeat(GREY, 3, axis=2)
    assert np.array_equal(read_images(picture(GREY), (8, 8, 3), most=1)[0], grey)
    assert np.array_equal(read_images(picture(GREY, mode="P"), (8, 8, 3), most=1)[0], grey)
    assert np.array_equal(read_images(picture(grey), (8, 8, 1), most=1)[0], GREY)
    with pytest.raises(GivenFileError, match="must be grey"):
        read_images(picture(RGB), (6, 8, 1), most=1)
    assert read_images(picture(RGB), (6, 8, 1), most=1, fit="crop").shape == (1, 6, 8, 1)


@pytest.mark.parametrize("fit", ["crop", "pad", "resize"])
@pytest.mark.parametrize("shape", [(4, 4, 3), (16, 9, 3), (5, 31, 3)])
def test_fits(fit: Fit, shape: tuple[int, int, int]) -> None:
    for content in (picture(RGB), npy(RGB), npy(RGB.astype(np.float32)), npy(RGB[None])):
        assert read_images(content, shape, most=1, fit=fit).shape == (1, *shape)
    assert set(np.unique(read_masks(picture(RGB[..., 0] // 128 * 255), shape, most=1, fit=fit))) <= {0, 1}


def test_crop_takes_the_middle_and_pad_repeats_the_border() -> None:
    wide = np.tile(np.arange(8, dtype=np.uint8)[None, :, None], (4, 1, 1))
    assert read_images(npy(wide), (4, 4, 1), most=1, fit="crop")[0, 0, :, 0].tolist() == [2, 3, 4, 5]
    assert read_images(npy(wide), (8, 8, 1), most=1, fit="pad")[0, :, 3, 0].tolist() == [3] * 8


@pytest.mark.parametrize(
    ("content", "levels"),
    [
        (picture(np.array([[0, 255], [255, 0]], np.uint8)), [[0, 1], [1, 0]]),
        (picture(np.array([[0, 255], [255, 0]], np.uint8), mode="1"), [[0, 1], [1, 0]]),
        (picture(np.array([[0, 255], [255, 0]], np.uint8), mode="RGB"), [[0, 1], [1, 0]]),
        (npy(np.array([[0, 1], [1, 0]], np.uint8)), [[0, 1], [1, 0]]),
        (npy(np.array([[False, True], [True, False]])), [[0, 1], [1, 0]]),
        (npy(np.array([[0, 0.5], [1, 0]])), [[0, 0.5], [1, 0]]),
        (npy(np.array([[0, 51], [255, 0]], np.uint8)), [[0, 0.2], [1, 0]]),
    ],
)
def test_masks(content: bytes, levels: list[list[float]]) -> None:
    assert np.array_equal(read_masks(content, (2, 2, 3), most=1)[0], np.array(levels, np.float32))


def test_transparent_pixels_are_made() -> None:
    alpha = np.array([[0, 255], [255, 0]], np.uint8)
    rgba = np.dstack([np.zeros((2, 2, 3), np.uint8), alpha])
    assert read_transparency(picture(rgba), (2, 2, 1))[0].tolist() == [[1, 0], [0, 1]]
    assert read_transparency(picture(rgba * 0), (2, 2, 1))[0].tolist() == [[1, 1], [1, 1]]
    faint = rgba // 255
    assert np.allclose(read_transparency(picture(faint), (2, 2, 1)), 1 - faint[..., 3] / 255)
    for content in (picture(rgba[..., :3]), npy(alpha)):
        with pytest.raises(GivenFileError, match="alpha channel"):
            read_transparency(content, (2, 2, 1))
    assert [may_be_transparent(file) for file in (picture(rgba), picture(GREY), npy(GREY))] == [True, False, False]


def test_the_colours_below_an_alpha_channel_are_read_on_request() -> None:
    rgba = np.dstack([RGB, np.zeros((6, 8), np.uint8)])
    assert np.array_equal(read_images(picture(rgba), (6, 8, 3), most=1, drop_alpha=True)[0], RGB)
    with pytest.raises(GivenFileError, match="transparent"):
        read_images(picture(rgba), (6, 8, 3), most=1)


def lying_png(width: int, height: int) -> bytes:
    """Return a PNG whose header claims another size than its pixels have."""
    png = bytearray(picture(GREY))
    png[16:24] = struct.pack(">II", width, height)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    return bytes(png)


def lying_npy(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"shape": shape, "fortran_order": False, "descr": dtype})
    return buffer.getvalue()


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def many_members() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for k in range(100):
            archive.writestr(str(k), b"")
    return buffer.getvalue()


def animated(kind: str) -> bytes:
    frames = [Image.fromarray(GREY[..., 0]), Image.fromarray(255 - GREY[..., 0])]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "is damaged, truncated, or not a PNG"),
        (b"GIF89a" + bytes(50), "is damaged"),
        (picture(GREY)[:60], "is damaged"),
        (picture(GREY, "WEBP")[:40], "is damaged"),
        (picture(GREY, "JPEG")[:-200], "is damaged"),
        (lying_png(8, 7000), "must be 8 pixels wide and 8 high"),
        (lying_png(100_000, 100_000), "must have at most 16777216 pixels"),
        (animated("PNG"), "must not be animated"),
        (animated("WEBP"), "must not be animated"),
        (deep_png(DEEP)[:300], "is damaged or truncated: its header announces 8 x 8 pixels"),
        (deep_png(DEEP, size=(9, 8)), "must be 8 pixels wide and 8 high"),
        (deep_png(DEEP[:7], size=(8, 8)), "is damaged or truncated: its header announces 8 x 8 pixels"),
        (deep_png(np.zeros((9, 8, 3)), size=(8, 8)), "is damaged or truncated"),
        (deep_png(np.zeros((8, 9, 3)), size=(8, 8)), "is damaged or truncated"),
        (picture(GREY)[:-1], "is damaged or truncated"),
        (deep_png(DEEP, size=(100_000, 100_000)), "must have at most 16777216 pixels"),
        (deep_png(DEEP), "must be grey, as the model's images; or set fit"),
        (deep_png(DEEP, animated=True), "must not be animated"),
        (deep_png(np.dstack([DEEP, DEEP[..., 0]])), "must have no transparent pixels"),
        (deep_png(np.dstack([DEEP[..., :1], DEEP[..., 0]])), "must have no transparent pixels"),
        (deep_png(DEEP, transparent=DEEP[3, 5]), "must have no transparent pixels"),
        (deep_png(DEEP[..., :1], transparent=DEEP[3, 5, :1]), "must have no transparent pixels"),
        (picture(np.dstack([GREY[..., 0]] * 4)), "must have no transparent pixels"),
        (picture(GREY, "JPEG", mode="CMYK"), "must be grey or RGB; got colour mode CMYK"),
        (pickled(), "must hold numbers; got object"),
        (npy(np.zeros((8, 8), complex)), "must hold numbers"),
        (npy(np.zeros((7, 8), np.float32)), r"must have shape \[8, 8, 1\] .* or \[n, 8, 8, 1\] for one per image"),
        (npy(np.full((8, 8), np.inf)), "finite"),
        (npy(np.full((8, 8), 1e300)), "finite"),
        (npy(np.zeros((5, 8, 8, 1))), "must hold at most 4 arrays; got 5"),
        (lying_npy((8, 8)), "must hold 256 bytes"),
        (lying_npy((1 << 40, 8, 8, 1)), "at most 4 arrays"),
        (lying_npy((-1, 8, 8, 1)), "must have shape"),
        (lying_npy((1, 8, -8, 1)), "must have shape"),
        (npy(GREY) + b"more", "must hold 64 bytes"),
        (b"\x93NUMPY\x09\x09", "must be an npy file of version 1"),
        (b"\x93NUMPY\x01\x00\xff\xff", "is damaged"),
        (npz(a=GREY, b=GREY), "named arr_0"),
        (many_members(), "at most 16 arrays"),
        (npz(arr_0=GREY)[:-30], "is damaged"),
        (b"PK", "is damaged"),
    ],
)
def test_refused(content: bytes, rule: str) -> None:
    with pytest.raises(GivenFileError, match=rule):
        read_images(content, (8, 8, 1), most=4)


def test_a_jpeg_with_further_images_is_its_first_one() -> None:
    several = animated("MPO")
    assert Image.open(io.BytesIO(several)).format == "MPO"
    assert np.array_equal(
        read_images(several, (8, 8, 1), most=1), read_images(picture(GREY, "JPEG"), (8, 8, 1), most=1)
    )
    assert not may_be_transparent(several)
    end = several.index(b"\xff\xd9")
    height = several.index(b"\xff\xc0") + 5
    lying = several[:height] + struct.pack(">H", 80) + several[height + 2 :]
    with pytest.raises(GivenFileError, match="is damaged or truncated"):
        read_images(several[: end - 20], (8, 8, 1), most=1)
    with pytest.raises(GivenFileError, match="is damaged or truncated"):
        read_images(lying, (8, 8, 1), most=1, fit="crop")


def test_an_image_that_would_be_scaled_to_a_huge_one_is_refused() -> None:
    long = np.zeros((2, 32_000, 1), np.uint8)
    for content in (picture(long), npy(long)):
        with pytest.raises(GivenFileError, match=r"32000x2 pixels would be scaled to 1024000x64 .* \"pad\" or "):
            read_images(content, (64, 64, 1), most=1, fit="crop")
        assert read_images(content, (64, 64, 1), most=1, fit="pad").shape == (1, 64, 64, 1)
    with pytest.raises(GivenFileError, match="is too long and narrow"):
        read_masks(npy(long), (64, 64, 1), most=1, fit="crop")
    assert read_images(picture(long[:, :2000]), (64, 64, 1), most=1, fit="crop").shape == (1, 64, 64, 1)


def test_what_takes_much_memory_to_be_fitted_is_refused() -> None:
    with pytest.raises(GivenFileError, match=r"at most 32768 pixels wide and high to be fitted; got 40000x1"):
        read_images(npy(np.zeros((1, 40_000), np.uint8)), (8, 8, 1), most=1, fit="resize")
    with pytest.raises(GivenFileError, match=r"at most 67108864 bytes of memory to be fitted; takes 134217728"):
        read_images(lying_npy((1, 4096, 4096, 1), "<f8"), (8, 8, 1), most=1, fit="resize")


def test_texts_of_a_png_that_take_megabytes_are_refused() -> None:
    info = PngInfo()
    for _ in range(8):
        info.add_itxt("a", "x" * 1_000_000, zip=True)
    with pytest.raises(GivenFileError, match="is damaged, truncated, or not a PNG"):
        read_images(picture(GREY, pnginfo=info), (8, 8, 1), most=1)


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "u1", "i4", "?", "f4", "f8"])
def test_ones_in_an_array_are_the_pixels_that_are_made(dtype: str) -> None:
    mask = np.eye(8).astype(dtype)
    for masks in (read_masks(npy(mask), (8, 8, 1), most=1), masks_of(mask, (8, 8, 1), most=1)):
        assert np.array_equal(masks, np.eye(8)[None])


def test_a_colour_image_is_not_taken_for_many_grey_ones() -> None:
    colour = np.zeros((32, 32, 3), np.uint8)
    for read in (read_images, read_masks):
        with pytest.raises(GivenFileError, match=r"looks like one image of 3 channels; .* have shape \[32, 32, 3, 1\]"):
            read(npy(colour), (28, 28, 1), most=64, fit="resize")
        assert len(read(npy(colour[..., None]), (28, 28, 1), most=64, fit="resize")) == 32
        assert len(read(npy(np.zeros((2, 32, 32))), (28, 28, 1), most=64, fit="resize")) == 2
    assert len(read_masks(npy(np.zeros((2, 8, 3))), (8, 3, 1), most=2, fit="crop")) == 2  # they are 3 pixels wide


def test_a_header_of_gigabytes_is_not_read() -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 1_000_000)
    with pytest.raises(GivenFileError, match="must be an npy file of version 1"):
        read_images(packed.getvalue(), (8, 8, 1), most=1)


def test_bombs_are_refused_where_pictures_are_fitted_too() -> None:
    with pytest.raises(GivenFileError, match="at most 16777216 pixels"):
        read_images(lying_png(4097, 4096), (8, 8, 1), most=1, fit="resize")
    with pytest.raises(GivenFileError, match="at most 16777216 pixels"):
        read_images(lying_npy((1, 4097, 4096, 1), "<f8"), (8, 8, 1), most=1, fit="resize")


def test_other_channels_come_as_arrays() -> None:
    assert read_images(npy(np.zeros((8, 8, 2))), (8, 8, 2), most=1).shape == (1, 8, 8, 2)
    with pytest.raises(GivenFileError, match="must be an npy or npz"):
        read_images(picture(GREY), (8, 8, 2), most=1)
    with pytest.raises(GivenFileError, match="floating-point"):
        read_values(npy(GREY), (8, 8, 1), most=1)
    with pytest.raises(GivenFileError, match="npy or npz"):
        read_values(picture(GREY), (8, 8, 1), most=1)


def test_the_range_of_values() -> None:
    ranges = ValueRange((-10.0, 0.0), (30.0, 1.0))
    ends = np.array([[[[-10.0, 0.0], [30.0, 1.0]]]], np.float32)
    assert ranges.to_network(ends)[0].tolist() == [[[-1, 1]], [[-1, 1]]]
    assert np.array_equal(ranges.to_data(ranges.to_network(ends)[0]), ends[0])
    assert np.array_equal(ranges.data_of(np.array([[[[0, 0], [255, 255]]]], np.uint8)), ends)
