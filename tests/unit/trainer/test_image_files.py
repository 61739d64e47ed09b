"""Image files are read as the pixels that a viewer shows, or refused with their name."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.data import DataConfig, DataError, Uint8Array, image_file
from trainer.data.image_file import ROWS_AT_ONCE, SUFFIXES, Mode, check_whole, decode, inspect

RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257  # 0..65535: byte k becomes k
BYTES = np.arange(256, dtype=np.uint8).reshape(16, 16)


def pixels(path: Path, mode: Mode = "L", **options: Any) -> Uint8Array:
    inspect(path, mode, DataConfig(**options))
    return decode(path, mode, DataConfig(**options), np.array)


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def png(path: Path, width: int, depth: int, colour_type: int, row: bytes, transparent: bytes = b"") -> Path:
    """Write a PNG of one row, with depths that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0))
    body = (chunk(b"tRNS", transparent) if transparent else b"") + chunk(b"IDAT", zlib.compress(b"\0" + row))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jp2", "a.pgm"])
def test_sixteen_bit_grey_is_scaled_to_eight(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / name, Image.fromarray(RAMP))
    assert np.array_equal(pixels(path), BYTES)
    assert np.array_equal(pixels(path, "RGB"), np.stack([BYTES] * 3, axis=-1))


def test_sixteen_bit_grey_of_other_layouts(tmp_path: Path) -> None:
    big_endian = saved(tmp_path / "big.tif", Image.fromarray(RAMP.astype(">u2")))
    with Image.open(big_endian) as image:
        assert image.mode == "I;16B"
    assert np.array_equal(pixels(big_endian), BYTES)
    inverted = saved(tmp_path / "white_is_zero.tif", Image.fromarray(RAMP), tiffinfo={262: 0})
    assert np.array_equal(pixels(inverted), 255 - BYTES)
    with_alpha = png(tmp_path / "la.png", 2, 16, 4, struct.pack(">4H", 65535, 65535, 0, 0))
    assert pixels(with_alpha, background="#808080").tolist() == [[255, 128]]
    with_key = png(tmp_path / "key.png", 2, 16, 0, struct.pack(">2H", 65535, 300), struct.pack(">H", 300))
    assert pixels(with_key, background="#808080").tolist() == [[255, 128]]


def test_a_value_range_scales_images_of_more_than_eight_bits(tmp_path: Path) -> None:
    twelve_bits = saved(tmp_path / "a.png", Image.fromarray(RAMP // 16))
    assert pixels(twelve_bits).max() == 16  # dark, as a viewer shows it
    assert np.array_equal(pixels(twelve_bits, value_range=(0, 4095)), BYTES)
    eight_bits = saved(tmp_path / "b.png", Image.fromarray(BYTES))
    assert np.array_equal(pixels(eight_bits, value_range=(0, 4095)), BYTES)
    floats = saved(tmp_path / "c.tif", Image.fromarray(BYTES.astype(np.float32) / 255 - 0.5))
    assert np.array_equal(pixels(floats, value_range=(-0.5, 0.5)), BYTES)
    hounsfield = saved(tmp_path / "d.tif", Image.fromarray(np.array([[-2000, -1000, 1000, 3000]], np.int32)))
    assert pixels(hounsfield, value_range=(-1000, 1000)).tolist() == [[0, 0, 255, 255]]


@pytest.mark.parametrize(
    ("name", "image", "reason"),
    [
        ("a.tif", Image.fromarray(np.zeros((2, 2), np.float32)), "floating-point values .* data.value_range"),
        ("a.tif", Image.fromarray(np.zeros((2, 2), np.int32)), "32 bits or signed values .* data.value_range"),
        ("a.tif", Image.new("LAB", (2, 2)), "colour mode LAB is not supported"),
    ],
)
def test_images_without_a_standard_display_are_refused(
    tmp_path: Path, name: str, image: Image.Image, reason: str
) -> None:
    with pytest.raises(DataError, match=rf"a\.tif: .*{reason}"):
        inspect(saved(tmp_path / name, image), "L", DataConfig())


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.tif", Image.fromarray(np.full((2, 2), np.nan, np.float32)))
    with pytest.raises(DataError, match=r"a\.tif: it contains values that are not finite"):
        check_whole(path, "L", DataConfig(value_range=(0, 1)))


@pytest.mark.parametrize("kind", ["RGBA", "LA", "PA", "palette", "palette of alphas", "colour key"])
def test_transparent_pixels_show_the_background(tmp_path: Path, kind: str) -> None:
    """The left pixel is opaque and black; the right one is transparent, with a colour that must not be visible."""
    path = tmp_path / "a.png"
    rgba = Image.fromarray(np.array([[[0, 0, 0, 255], [9, 9, 9, 0]]], np.uint8))
    if kind in ("RGBA", "LA"):
        rgba.convert(kind).save(path)
    elif kind == "PA":
        path = tmp_path / "a.tif"
        image = Image.new("PA", (2, 1))
        image.putpalette([0, 0, 0, 9, 9, 9])
        image.putdata([(0, 255), (1, 0)])
        image.save(path)
    elif kind == "colour key":
        rgba.convert("RGB").save(path, transparency=(9, 9, 9))
    else:
        image = Image.new("P", (2, 1))
        image.putpalette([0, 0, 0, 9, 9, 9])
        image.putdata([0, 1])
        image.save(path, transparency=1 if kind == "palette" else b"\xff\x00")
    assert pixels(path).tolist() == [[0, 255]]
    assert pixels(path, "RGB", background="#102030").tolist() == [[[0, 0, 0], [0x10, 0x20, 0x30]]]


@pytest.mark.parametrize(("depth", "row", "key"), [(1, b"\x40", 1), (2, b"\x30", 3), (4, b"\x0f", 15)])
def test_a_transparent_grey_of_few_bits_shows_the_background(tmp_path: Path, depth: int, row: bytes, key: int) -> None:
    path = png(tmp_path / "a.png", 2, depth, 0, row, struct.pack(">H", key))
    assert pixels(path, background="#808080").tolist() == [[0, 128]]


def test_a_transparent_colour_of_sixteen_bits_is_refused(tmp_path: Path) -> None:
    path = png(tmp_path / "a.png", 1, 16, 2, struct.pack(">3H", 1, 2, 3), struct.pack(">3H", 1, 2, 3))
    with pytest.raises(DataError, match=r"a\.png: a transparent colour in a 16-bit RGB image"):
        inspect(path, "RGB", DataConfig())


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_exif_orientation_is_applied(tmp_path: Path, name: str) -> None:
    grey = np.full((32, 64), 255, np.uint8)
    grey[:, :32] = 0  # black on the left; orientation 6 turns it by a quarter to the right: black on top
    exif = Image.Exif()
    exif[274] = 6
    path = saved(tmp_path / name, Image.fromarray(grey).convert("RGB"), exif=exif)
    turned = pixels(path)
    assert turned.shape == (64, 32)
    assert turned[:24].max() < 16
    assert turned[40:].min() > 240
    assert "rotated" in inspect(path, "L", DataConfig()).traits


@pytest.mark.filterwarnings("default")  # Pillow warns
@pytest.mark.parametrize("exif", [b"Exif\0\0junkjunk", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0MM\0*"])
def test_a_corrupt_exif_block_in_an_intact_image_is_ignored(tmp_path: Path, exif: bytes) -> None:
    assert pixels(saved(tmp_path / "a.jpg", Image.new("L", (3, 2), 90), exif=exif)).tolist() == [[90] * 3] * 2


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "YCbCr"])
def test_other_colour_modes_are_converted(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (2, 2), (255, 255, 255)).convert(mode)
    assert pixels(saved(tmp_path / "a.tif", image), "RGB").min() == 255


@pytest.mark.parametrize("name", ["a.gif", "a.tif", "a.webp", "a.png", "a.mpo"])
def test_the_first_of_several_frames_is_taken(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (2, 2), (grey, grey, grey)) for grey in (0, 255)]
    options = {"lossless": True} if name == "a.webp" else {}
    path = saved(tmp_path / name, frames[0], save_all=True, append_images=frames[1:], **options)
    assert pixels(path).max() == 0
    assert "frames" in inspect(path, "L", DataConfig()).traits


def test_a_wrong_suffix_does_not_matter(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(BYTES).save(buffer, "PNG")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    assert np.array_equal(pixels(tmp_path / "a.jpg"), BYTES)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"junk" * 100, "it is damaged, or not an image in a supported format"),
        (b"<!DOCTYPE html><html>404</html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"II*\0\x08\0\0\0\0\0\0\0\0\0", "it is a damaged TIFF, or one of an unsupported kind"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "not an image in a supported format",
        ),  # would start Ghostscript
    ],
)
def test_a_file_that_is_no_image_is_refused_by_name(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.png: .*{reason}"):
        inspect(tmp_path / "a.png", "L", DataConfig())


def test_a_missing_or_unreadable_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.png: No such file or directory"):
        inspect(tmp_path / "a.png", "L", DataConfig())
    with pytest.raises(DataError, match="it is not a regular file"):
        check_whole(tmp_path, "L", DataConfig())


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif"])
def test_a_truncated_file_is_found_without_decoding(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    whole = saved(tmp_path / name, Image.fromarray(noise)).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.\w+: .*(runcated|broken)"):
        inspect(tmp_path / name, "L", DataConfig())
    (tmp_path / name).write_bytes(whole + b"\n" * 99)  # viewers ignore this
    inspect(tmp_path / name, "L", DataConfig())


@pytest.mark.parametrize(
    "error", [SyntaxError, ValueError, struct.error, IndexError, zlib.error, MemoryError, KeyError]
)
def test_every_error_of_a_decoder_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(BYTES))

    def load(*_: object) -> None:
        raise error("two\nlines") if error is not MemoryError else error()

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(DataError, match=r"a\.png: .*(two.*lines|MemoryError)") as caught:
        check_whole(path, "L", DataConfig())
    assert "\n" not in str(caught.value)


def test_a_decompression_bomb_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(BYTES))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"a\.png: it has more than 200 pixels; shrink it"):
        inspect(path, "L", DataConfig())


def test_transparency_is_drawn_over_the_background_in_strips(tmp_path: Path) -> None:
    alpha = np.zeros((ROWS_AT_ONCE + 3, 5), np.uint8)
    alpha[::2] = 255
    image = Image.fromarray(np.stack([np.zeros_like(alpha), alpha], axis=-1), "LA")
    assert np.array_equal(pixels(saved(tmp_path / "a.png", image)), 255 - alpha)


def test_large_images_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(BYTES))
    monkeypatch.setattr(image_file, "LARGE_PIXELS", BYTES.size - 1)

    def thread_of(image: Image.Image) -> str:
        assert np.array_equal(np.asarray(image), BYTES)
        return threading.current_thread().name

    with ThreadPoolExecutor(8) as threads:
        names = list(threads.map(lambda _: decode(path, "L", DataConfig(), thread_of), range(16)))
    assert len(set(names)) == 1
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"a\.png: "):
        check_whole(path, "L", DataConfig())


def test_suffixes_are_those_that_pillow_reads() -> None:
    assert {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm"} <= SUFFIXES
    assert not {".eps", ".ps", ".pdf", ".h5", ".txt", ".npy", ".npz"} & SUFFIXES


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"background": "no such colour"}, "must be a colour such as white"),
        ({"background": "#ffffff80"}, "without transparency"),
        ({"value_range": (5, 5)}, "low < high"),
        ({"value_range": (0, float("inf"))}, "finite number"),
        ({"small_images": "stretch"}, "'frame' or 'enlarge'"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        DataConfig(**options)
