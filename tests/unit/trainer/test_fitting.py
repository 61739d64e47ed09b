"""Images of any size are fitted to the model's size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.golden import load
from trainer.data import Uint8Array
from trainer.data.fitting import LONGEST_ASPECT, fit_array, fit_image
from trainer.data.options import SmallImages


def noise(*shape: int) -> Uint8Array:
    return np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("case", load("preprocess").cases, ids=lambda case: f"{case['width']}x{case['height']}")
@pytest.mark.parametrize("small_images", ["frame", "enlarge"])
def test_scaling_and_cropping_equal_openai_s(case: dict[str, object], small_images: SmallImages) -> None:
    golden = load("preprocess")
    square = fit_array(golden[f"{case['key']}.input"], 16, small_images)
    expected = golden[f"{case['key']}.output"].transpose(1, 2, 0)
    assert np.array_equal(square.astype(np.float32) / 127.5 - 1, expected)


def test_a_set_of_28x28_keeps_its_frame() -> None:
    image = noise(28, 28, 1)
    square = fit_array(image, 32, "frame")
    assert np.array_equal(square, np.pad(image, ((2, 2), (2, 2), (0, 0))))


@pytest.mark.parametrize(("height", "width"), [(7, 7), (7, 9), (9, 7), (7, 20), (3, 8)])
def test_small_images_of_any_shape_are_framed_or_enlarged(height: int, width: int) -> None:
    image = noise(height, width, 3)
    framed = fit_array(image, 8, "frame")
    inside_height, inside_width = min(height, 8), min(width, 8)
    assert (framed > 0).all(axis=-1).sum() == inside_height * inside_width  # nothing is enlarged
    top, left = (8 - inside_height) // 2, (8 - inside_width) // 2
    skipped_rows, skipped_columns = (height - inside_height) // 2, (width - inside_width) // 2
    assert np.array_equal(
        framed[top : top + inside_height, left : left + inside_width],
        image[skipped_rows : skipped_rows + inside_height, skipped_columns : skipped_columns + inside_width],
    )
    enlarged = fit_array(np.full((height, width, 3), 200, np.uint8), 8, "enlarge")
    assert enlarged.min() == enlarged.max() == 200  # no border


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 40])
@pytest.mark.parametrize("small_images", ["frame", "enlarge"])
def test_bands_are_scaled_independently(channels: int, small_images: SmallImages) -> None:
    """In particular, the last of two or four bands is not transparency, which would change the others."""
    array = noise(20, 23, channels)
    array[..., -1] = 0
    for size in (8, 32):
        square = fit_array(array, size, small_images)
        assert square.shape == (size, size, channels)
        for band in range(channels):
            alone = fit_image(Image.fromarray(array[..., band]), size, small_images)
            assert np.array_equal(square[..., band], alone[..., 0])


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000)])
@pytest.mark.parametrize("small_images", ["frame", "enlarge"])
def test_very_long_images_need_little_memory(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], small_images: SmallImages
) -> None:
    scaled_to: list[int] = []
    resize = Image.Image.resize

    def counting(self: Image.Image, to: tuple[int, int], *rest: Any) -> Image.Image:
        scaled_to.append(to[0] * to[1])
        return resize(self, to, *rest)

    monkeypatch.setattr(Image.Image, "resize", counting)
    image = Image.new("L", size, 9)
    image.paste(200, (size[0] // 2 - 40, 0, size[0] // 2 + 40, 1) if size[1] == 1 else (0, 29_960, 1, 30_040))
    square = fit_image(image, 64, small_images)
    assert max(scaled_to, default=0) <= LONGEST_ASPECT * 64 * 64
    assert square.shape == (64, 64, 1)
    assert set(np.unique(square)) == ({0, 200} if small_images == "frame" else {200})  # the middle


@pytest.mark.parametrize(("height", "width"), [(12, 20), (40, 50), (25, 90), (200, 30), (12, 90)])
def test_images_are_scaled_until_both_sides_fit_and_cropped_in_the_middle(height: int, width: int) -> None:
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([255 * rows // (height - 1), 255 * columns // (width - 1)], axis=-1).astype(np.uint8)
    fitted = fit_array(image, (12, 20), "enlarge").astype(int)
    assert fitted.shape == (12, 20, 2)
    scale = max(12 / height, 20 / width)
    seen = [12 / (height * scale), 20 / (width * scale)]  # of the height, of the width
    assert np.isclose(max(seen), 1)
    for axis, part in enumerate(seen):
        levels = fitted[..., axis].mean(axis=1 - axis)
        assert abs(levels.mean() - 127.5) < 8
        assert np.all(np.diff(levels) >= 0)
        assert abs((levels[-1] - levels[0]) / 255 - part) < 0.13
    assert fit_array(image, (12, 20), "enlarge", [0.5, 0.99, 0.99]).shape == (12, 20, 2)


def test_images_with_one_small_side_are_framed() -> None:
    image = noise(30, 8, 2)
    framed = fit_array(image, (12, 20), "frame")
    assert np.array_equal(framed[:, 6:14], image[9:21])
    assert not framed[:, :6].any()
    assert not framed[:, 14:].any()
