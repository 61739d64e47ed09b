"""Random crops are those of guided-diffusion, as a function of three uniform numbers per image."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.data import DataConfig, Uint8Array, open_dataset
from trainer.data.fitting import fit_array, fit_image


def reference(image: Image.Image, size: int, smaller: int, top: int, left: int) -> Uint8Array:
    """Scale the shorter side to `smaller` and crop, with the random numbers of guided-diffusion given."""
    while min(*image.size) >= 2 * smaller:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), resample=Image.Resampling.BOX)
    scale = smaller / min(*image.size)
    image = image.resize((round(image.size[0] * scale), round(image.size[1] * scale)), Image.Resampling.BICUBIC)
    return np.array(image)[top : top + size, left : left + size]


def noise(*shape: int) -> Uint8Array:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", [(16, 16, 3), (57, 40, 3), (33, 70, 3), (200, 90, 3), (12, 15, 3)])
def test_crops_are_those_of_guided_diffusion(shape: tuple[int, ...]) -> None:
    size, array = 16, noise(*shape)
    image = Image.fromarray(array)
    sizes = range(16, math.ceil(16 / 0.8) + 1)
    height, width = shape[:2]
    for number, smaller in enumerate(sizes):
        scale = smaller / min(height, width)
        # halving rounds down, so the scaled size is taken from the result of the reference
        whole = reference(image, 10**6, smaller, 0, 0)
        assert abs(max(whole.shape[:2]) - max(height, width) * scale) <= 2
        tops, lefts = whole.shape[0] - size + 1, whole.shape[1] - size + 1
        for top, left in ((0, 0), (tops - 1, lefts - 1), (tops // 2, lefts // 3)):
            draws = ((number + 0.5) / len(sizes), (top + 0.5) / tops, (left + 0.5) / lefts)
            crop = fit_image(image, size, "enlarge", draws)
            assert np.array_equal(crop, reference(image, size, smaller, top, left))


def test_the_extremes_of_the_draws_are_inside() -> None:
    array, last = noise(40, 57, 3), float(np.nextafter(1, 0))
    for draws in ((0.0, 0.0, 0.0), (last, last, last)):
        assert fit_array(array, 16, "frame", draws).shape == (16, 16, 3)


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_crops_are_random_only_when_enabled(tmp_path: Path, kind: str) -> None:
    arrays = noise(3, 24, 30)
    path = tmp_path / ("a.npz" if kind == "npz" else "a")
    if kind == "npz":
        np.savez(path, images=arrays, labels=[0, 0, 0])
    else:
        (path / "c").mkdir(parents=True)
        for number, array in enumerate(arrays):
            Image.fromarray(array).save(path / "c" / f"{number}.png")
    indices, draws = np.array([2, 0]), np.random.default_rng(0).random((2, 3))
    centre = open_dataset(path, 16, 1)
    assert np.array_equal(centre.images(indices, draws), centre.images(indices))
    cropping = open_dataset(path, 16, 1, DataConfig(random_crop=True))
    assert np.array_equal(cropping.images(indices), centre.images(indices))
    expected = [
        fit_array(arrays[index, ..., None], 16, "frame", draw) for index, draw in zip(indices, draws, strict=True)
    ]
    assert np.array_equal(cropping.images(indices, draws), expected)
    assert not np.array_equal(cropping.images(indices, draws), centre.images(indices))


def test_small_images_in_a_frame_are_not_cropped() -> None:
    array = noise(6, 7, 1)
    assert np.array_equal(fit_array(array, 8, "frame", (0.9, 0.9, 0.9)), fit_array(array, 8, "frame"))
