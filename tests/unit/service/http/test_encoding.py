"""Encoding of pixels: formats, file names that are safe for every class name, and archives."""

from __future__ import annotations

import io
from zipfile import ZipFile

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from formats.images import PictureFormat, encode
from service.encoding import encode_npz, encode_zip, file_name


def picture(channels: int = 3, size: int = 16) -> npt.NDArray[np.uint8]:
    waves = np.add.outer(np.arange(size), np.arange(size) ** 2)[..., None] * np.arange(3, 3 + channels)
    return waves.astype(np.uint8)


def decoded(content: bytes) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(content)))


@pytest.mark.parametrize("picture_format", ["png", "webp"])
@pytest.mark.parametrize("compression", [None, 0, 9])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_lossless_formats_keep_every_pixel_at_every_compression(
    picture_format: PictureFormat, compression: int | None, channels: int
) -> None:
    pixels = picture(channels)
    back = decoded(encode(pixels, picture_format, compression=compression)).reshape(16, 16, -1)
    if picture_format == "webp" and channels == 1:
        back = back[..., :1]  # WebP has no grey mode
    assert np.array_equal(back, pixels)


def test_more_compression_and_less_quality_give_smaller_files() -> None:
    pixels = picture(size=128)
    assert len(encode(pixels, "png", compression=9)) < len(encode(pixels, "png", compression=0))
    assert (
        len(encode(pixels, "jpeg", quality=20)) < len(encode(pixels, "jpeg")) < len(encode(pixels, "jpeg", quality=100))
    )
    arrays = pixels[None].repeat(4, axis=0)
    assert len(encode_npz(arrays, [None] * 4, compression=9)) < len(encode_npz(arrays, [None] * 4, compression=0))


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_close_to_the_pixels(channels: int) -> None:
    flat = np.full((16, 16, channels), 90, dtype=np.uint8)
    back = decoded(encode(flat, "jpeg")).reshape(flat.shape).astype(int)
    assert np.abs(back - flat).max() <= 2


@pytest.mark.parametrize("compression", [None, 0, 9])
def test_npz_has_the_layout_of_the_adm_evaluator(compression: int | None) -> None:
    images = np.stack([picture(), picture()[::-1]])
    with np.load(io.BytesIO(encode_npz(images, [3, 1], compression=compression)), allow_pickle=False) as arrays:
        assert arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"], images)
        assert (arrays["arr_1"].dtype, arrays["arr_1"].tolist()) == (np.int64, [3, 1])
    with np.load(io.BytesIO(encode_npz(images, [None, None]))) as arrays:
        assert arrays.files == ["arr_0"]


@given(
    st.text()
    | st.sampled_from(["T-shirt/top", "../../etc/passwd", "C:\\con", "", "..", "-rf", "a\0b", "é" * 300, "猫"])
)
def test_file_names_are_safe_for_any_class_name(class_name: str) -> None:
    name = file_name(7, class_name, 2**53 - 1, 3, "png")
    assert name.startswith("0007-")
    assert name.endswith("-seed9007199254740991-3.png")
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.")
    assert name.count(".") == 1
    assert len(name) < 100


def test_file_names_contain_the_class_if_possible_and_never_collide() -> None:
    assert file_name(0, "T-shirt/top", 3, 0, "png") == "0000-T-shirt-top-seed3-0.png"
    assert file_name(1, None, 3, 1, "webp") == "0001-seed3-1.webp"
    assert len({file_name(k, name, 3, 0, "png") for k in range(3) for name in ("a/b",)}) == 3


def test_archives_are_reproducible_and_readable() -> None:
    content = encode_zip([("a.png", b"1"), ("b.png", b"22")])
    assert content == encode_zip([("a.png", b"1"), ("b.png", b"22")])
    with ZipFile(io.BytesIO(content)) as archive:
        assert {info.filename: archive.read(info) for info in archive.infolist()} == {"a.png": b"1", "b.png": b"22"}
        assert all(info.external_attr >> 16 & 0o444 == 0o444 for info in archive.infolist())
