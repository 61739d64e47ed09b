from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pydantic import ValidationError

from diffusion.config import CheckpointConfig, DiffusionConfig, ModelConfig
from diffusion.update import to_uint8
from formats.value_range import cond_range_of, value_range_of

RNG = np.random.default_rng(0)


def config(channels: int = 2, **fields: Any) -> CheckpointConfig:
    model = ModelConfig(
        image_size=8,
        image_channels=channels,
        model_channels=8,
        norm_groups=4,
        channel_mult=(1,),
        attention_resolutions=(),
    )
    return CheckpointConfig(model=model, diffusion=DiffusionConfig(), **fields)


def to_network(values: npt.NDArray[Any], of: CheckpointConfig) -> npt.NDArray[np.float32]:
    return value_range_of(of).to_network(values)


def from_network(x: npt.NDArray[np.float32], of: CheckpointConfig) -> npt.NDArray[np.float32]:
    return np.stack([value_range_of(of).to_data(image) for image in x])


def test_the_ends_of_the_range_are_minus_one_and_one() -> None:
    kelvin = config(value_range=(250, 310))
    values = np.array([250.0, 280.0, 310.0, 325.0], np.float32).reshape(1, 1, 2, 2)
    x = to_network(values, kelvin)
    assert x.dtype == np.float32
    assert x.shape == (1, 2, 1, 2)
    assert x.transpose(0, 2, 3, 1).ravel().tolist() == [-1, 0, 1, 1.5]  # not clamped
    assert np.array_equal(from_network(x, kelvin), values)


def test_each_channel_has_a_range_of_its_own() -> None:
    pair = config(value_range=((0, 1), (-10, 30)))
    values = np.stack(np.broadcast_arrays(np.array([0.0, 0.5, 1.0]), 1), axis=-1).reshape(1, 1, 3, 2)
    values[..., 1] = [-10, 10, 30]
    x = to_network(values, pair)
    assert x.tolist() == [[[[-1, 0, 1]], [[-1, 0, 1]]]]
    assert np.array_equal(from_network(x, pair), values)


def test_the_default_is_the_range_of_eight_bits() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 8, 16, 2)
    x = to_network(pixels, config())
    assert np.array_equal(to_uint8(x), pixels)
    np.testing.assert_allclose(from_network(x, config()), pixels, atol=2e-5)
    np.testing.assert_allclose(to_network(pixels.astype(np.float32), config()), x, atol=2e-7)


def test_eight_bit_pixels_span_any_range() -> None:
    pixels = np.array([0, 255], np.uint8).reshape(1, 1, 1, 2)
    scaled = config(value_range=(-1000, 1000))
    assert np.array_equal(to_network(pixels, scaled), to_network(pixels, config()))
    assert from_network(to_network(pixels, scaled), scaled).ravel().tolist() == [-1000, 1000]


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1000.0, 1000.0), (250.0, 310.0), (-1e6, 1e-3)])
def test_conversion_there_and_back_loses_one_rounding(value_range: tuple[float, float]) -> None:
    scaled = config(value_range=value_range)
    values = RNG.uniform(*value_range, (4, 8, 8, 2)).astype(np.float32)
    limit = 2e-7 * max(abs(value_range[0]), abs(value_range[1]))
    assert np.abs(from_network(to_network(values, scaled), scaled) - values).max() <= limit


@pytest.mark.parametrize(
    ("value_range", "reason"),
    [
        ((1, 1), "low < high"),
        (((0, 1), (3, 2)), "low < high"),
        (((0, 1),), r"one such pair per channel \(2\); got 1 pairs"),
        ((0, float("inf")), "finite number"),
        ((), "got 0 pairs"),
    ],
)
def test_ranges_that_map_nothing_are_refused(value_range: Any, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        config(value_range=value_range)


def conditioned(**fields: Any) -> CheckpointConfig:
    plain = config()
    model = plain.model.replace(
        **{name: fields.pop(name) for name in ("cond_channels", "low_res_size") if name in fields}
    )
    return CheckpointConfig(model=model, diffusion=plain.diffusion, **fields)


def test_conditioning_images_have_a_range_of_their_own() -> None:
    heights = np.array([[0.0, 500.0, 1000.0]], np.float32).reshape(1, 1, 3, 1)
    as_they_are = conditioned(cond_channels=1)
    assert cond_range_of(as_they_are).to_network(heights).ravel().tolist() == [0, 500, 1000]
    metres = conditioned(cond_channels=1, cond_range=(0, 1000), value_range=(0, 1))
    assert cond_range_of(metres).to_network(heights).ravel().tolist() == [-1, 0, 1]
    assert cond_range_of(metres).to_network(np.full((1, 1, 1, 1), 255, np.uint8)).item() == 1
    upsampler = conditioned(low_res_size=4, value_range=(250, 310))
    assert cond_range_of(upsampler) == value_range_of(upsampler)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"cond_channels": 2, "cond_range": (3, 2)}, r"cond_range must be \[low, high\] with low < high"),
        ({"cond_channels": 2, "cond_range": ((0, 1),)}, r"cond_range .* per channel \(2\); got 1 pairs"),
        ({"cond_range": (0, 1)}, "cond_range needs model.cond_channels"),
        ({"low_res_size": 4, "cond_range": (0, 1)}, "cond_range needs model.cond_channels"),
    ],
)
def test_ranges_that_fit_no_condition_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        conditioned(**fields)
