from __future__ import annotations

import itertools
import math
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diffusion import noise
from diffusion.arrays import to_numpy
from diffusion.noise import MAX_SEED, MAX_WORD, STREAM_STEP, STREAM_X_T, draw_class, philox
from tests.kinds import KINDS, Kind, of_kind

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
Shape = tuple[int, int, int]

KNOWN_ANSWERS = [
    # counter, key, result: kat_vectors of Random123 (Salmon et al. 2011), philox 4x32 10
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MAX_WORD,) * 4, (MAX_WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

seeds = st.integers(0, MAX_SEED)
words = st.integers(0, MAX_WORD)
shapes = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))


def _array(*numbers: int) -> IntArray:
    return np.array(numbers, dtype=np.int64)


def _normal(seed: int, image_index: int, step: int, stream: int, shape: Shape) -> FloatArray:
    return noise.normal(_array(seed), _array(image_index), _array(step), stream, shape)[0]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_published_results_on_every_kind_of_word(
    counter: tuple[int, int, int, int], key: tuple[int, int], result: tuple[int, int, int, int]
) -> None:
    assert philox(counter, key) == result

    c0, c1, c2, c3 = (_array(word, word) for word in counter)
    arrays = philox((c0, c1, c2, c3), (_array(key[0]), _array(key[1])))
    assert [word.tolist() for word in arrays] == [[word] * 2 for word in result]

    t0, t1, t2, t3 = (torch.tensor([word]) for word in counter)
    tensors = philox((t0, t1, t2, t3), (torch.tensor([key[0]]), torch.tensor([key[1]])))
    assert [word.item() for word in tensors] == list(result)


@given(seeds, words, words, st.sampled_from([0, 1]), st.integers(0, 15))
@example(47437, 0, 0, 0, 13)  # a word of 357, where half a unit is visible
def test_each_block_of_four_elements_is_one_philox_call(
    seed: int, image_index: int, step: int, stream: int, block: int
) -> None:
    w0, w1, w2, w3 = philox((block, step, image_index, stream), (seed % 2**32, seed // 2**32))
    expected: list[float] = []
    for first, second in ((w0, w1), (w2, w3)):
        radius = math.sqrt(-2 * math.log((first + 0.5) / 2**32))
        angle = 2 * math.pi * (second + 0.5) / 2**32
        expected += [radius * math.cos(angle), radius * math.sin(angle)]

    elements = _normal(seed, image_index, step, stream, (4, 4, 4)).ravel()[4 * block : 4 * block + 4]
    np.testing.assert_allclose(elements, expected, rtol=1e-6, atol=1e-7)


def test_noise_does_not_change_between_versions() -> None:
    # To change these four values breaks the guarantee that a seed gives the same image in every version.
    values = _normal(2**53 - 1, 3, 17, STREAM_STEP, (3, 8, 8)).ravel()[[0, 1, 100, 191]]
    np.testing.assert_allclose(
        values,
        [-0.7487675547599792, 0.49951010942459106, 0.7429747581481934, -0.0029032258316874504],
        rtol=1e-6,
    )
    assert draw_class(2**53 - 1, 3, 1000) == 341


@given(st.lists(st.tuples(seeds, words, words), min_size=1, max_size=6), shapes, st.sampled_from([0, 1]))
def test_numpy_and_torch_give_equal_noise(rows: list[tuple[int, int, int]], shape: Shape, stream: int) -> None:
    columns = [_array(*column) for column in zip(*rows, strict=True)]
    from_numpy = noise.normal(columns[0], columns[1], columns[2], stream, shape)
    tensors = [torch.from_numpy(column) for column in columns]
    from_torch = noise.normal(tensors[0], tensors[1], tensors[2], stream, shape)

    assert from_numpy.dtype == np.float32
    assert from_torch.dtype == torch.float32
    assert from_numpy.shape == tuple(from_torch.shape) == (len(rows), *shape)
    np.testing.assert_allclose(from_torch.numpy(), from_numpy, rtol=0, atol=1e-6)


@KINDS
@given(rows=st.lists(st.tuples(seeds, words, words), min_size=2, max_size=9), shape=shapes)
def test_a_row_does_not_depend_on_other_rows(kind: Kind, rows: list[tuple[int, int, int]], shape: Shape) -> None:
    columns = [of_kind(kind, _array(*column)) for column in zip(*rows, strict=True)]
    together = noise.normal(columns[0], columns[1], columns[2], STREAM_STEP, shape)
    for index in range(len(rows)):
        seed, image_index, step = (column[index : index + 1] for column in columns)
        alone = noise.normal(seed, image_index, step, STREAM_STEP, shape)
        np.testing.assert_array_equal(to_numpy(together[index]), to_numpy(alone[0]))


@settings(max_examples=20)
@given(shapes, seeds)
def test_a_larger_image_begins_with_the_noise_of_a_smaller_one(shape: Shape, seed: int) -> None:
    small = _normal(seed, 0, 0, STREAM_X_T, shape).ravel()
    large = _normal(seed, 0, 0, STREAM_X_T, (5, 10, 10)).ravel()
    np.testing.assert_array_equal(large[: small.size], small)


def test_noise_is_standard_normal() -> None:
    rows = np.arange(64, dtype=np.int64)
    values = noise.normal(rows * 12345, rows % 3, rows, STREAM_STEP, (3, 32, 32)).astype(np.float64).ravel()
    count = values.size  # 196,608: a moment's standard error is sqrt(variance of the power / count)

    assert abs(values.mean()) < 4 / math.sqrt(count)
    assert abs((values**2).mean() - 1) < 4 * math.sqrt(2 / count)
    assert abs((values**3).mean()) < 4 * math.sqrt(15 / count)
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96 / count)
    # Kolmogorov-Smirnov; 1.95 is the critical value at 0.1 %.
    ordered = np.sort(values)[:: count // 2048]
    cdf = np.array([NormalDist().cdf(value) for value in ordered])
    empirical = np.arange(count)[:: count // 2048] / count
    assert np.abs(cdf - empirical).max() < 1.95 / math.sqrt(count)


def test_elements_of_a_block_are_independent() -> None:
    blocks = _normal(7, 0, 0, STREAM_X_T, (4, 128, 128)).reshape(-1, 4).astype(np.float64)
    for powers in (blocks, blocks**2 - 1):  # a Box-Muller pair shares its radius: test squares, too
        correlation = np.corrcoef(powers.T) - np.eye(4)
        assert np.abs(correlation).max() < 4 / math.sqrt(len(blocks))


@pytest.mark.parametrize("other", [(8, 0, 0, 1), (7 + 2**32, 0, 0, 1), (7, 1, 0, 1), (7, 0, 1, 1), (7, 0, 0, 0)])
def test_seeds_images_steps_and_streams_are_independent(other: tuple[int, int, int, int]) -> None:
    shape = (1, 64, 64)
    one = _normal(7, 0, 0, STREAM_STEP, shape).ravel()
    two = _normal(*other, shape).ravel()

    assert np.isin(one, two).sum() < 10  # two float32 normals may coincide
    for shift in range(-4, 5):
        correlation = float(np.corrcoef(one, np.roll(two, shift))[0, 1])
        assert abs(correlation) < 4.5 / math.sqrt(one.size)


def test_all_extremes_of_the_counter_give_different_noise() -> None:
    corners = itertools.product((0, MAX_SEED), (0, MAX_WORD), (0, MAX_WORD), (0, 1))
    firsts = {float(_normal(*corner, (1, 1, 1))[0, 0, 0]) for corner in corners}
    assert len(firsts) == 16


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("seeds", (-1, 0, 0)),
        ("seeds", (2**53, 0, 0)),
        ("image_indices", (0, -1, 0)),
        ("image_indices", (0, 2**32, 0)),
        ("steps", (0, 0, -1)),
        ("steps", (0, 0, 2**32)),
    ],
)
def test_numbers_out_of_range_are_refused(name: str, row: tuple[int, int, int]) -> None:
    arrays = [_array(0, number) for number in row]
    with pytest.raises(ValueError, match=rf"{name} must be in 0\.\."):
        noise.normal(arrays[0], arrays[1], arrays[2], STREAM_STEP, (1, 2, 2))
    tensors = [torch.from_numpy(array) for array in arrays]
    with pytest.raises(ValueError, match=rf"{name} must be in 0\.\."):
        noise.normal(tensors[0], tensors[1], tensors[2], STREAM_STEP, (1, 2, 2))


def test_arrays_whose_products_would_overflow_are_refused() -> None:
    narrow: npt.NDArray[Any] = np.zeros(1, dtype=np.int32)
    with pytest.raises(ValueError, match="steps must be int64"):
        noise.normal(_array(0), _array(0), narrow, STREAM_STEP, (1, 2, 2))
    zero = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="seeds must be int64"):
        noise.normal(zero.int(), zero, zero, STREAM_STEP, (1, 2, 2))


def test_no_rows_give_no_noise() -> None:
    assert noise.normal(_array(), _array(), _array(), STREAM_STEP, (1, 2, 3)).shape == (0, 1, 2, 3)
    none = torch.zeros(0, dtype=torch.int64)
    assert noise.normal(none, none, none, STREAM_STEP, (1, 2, 3)).shape == (0, 1, 2, 3)


@given(seeds, words, st.integers(1, 1000))
def test_a_class_is_drawn_within_range_and_is_reproducible(seed: int, image_index: int, num_classes: int) -> None:
    drawn = draw_class(seed, image_index, num_classes)
    assert 0 <= drawn < num_classes
    assert draw_class(seed, image_index, num_classes) == drawn


def test_classes_are_drawn_evenly() -> None:
    counts = np.bincount([draw_class(seed, image, 7) for seed in range(70) for image in range(20)], minlength=7)
    chi_squared = float(((counts - 200) ** 2 / 200).sum())
    assert chi_squared < 22.5  # 6 degrees of freedom: 0.1 %


@pytest.mark.parametrize("arguments", [(-1, 0, 10), (2**53, 0, 10), (0, -1, 10), (0, 2**32, 10), (0, 0, 0)])
def test_a_draw_from_no_classes_is_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be in"):
        draw_class(*arguments)
