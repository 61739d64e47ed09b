from __future__ import annotations

import numpy as np
import pytest

from tests.golden import load
from trainer.evaluation.metrics import (
    coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    manifold_radii,
    softmax,
)


def test_the_numbers_equal_those_of_the_released_evaluator() -> None:
    golden = load("evaluator")
    reference, samples = golden.arrays["ref"], golden.arrays["sample"]
    assert frechet_distance(reference, samples) == pytest.approx(float(golden.arrays["fid"]), rel=1e-4)
    np.testing.assert_allclose(manifold_radii(reference), golden.arrays["radii_ref"][:, 0], rtol=1e-4)
    assert coverage(reference, samples) == (float(golden.arrays["precision"]), float(golden.arrays["recall"]))


def test_the_distance_of_a_set_to_itself_is_0_and_that_of_a_shift_its_square() -> None:
    features = np.random.default_rng(0).normal(size=(500, 4))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features + 2.0) == pytest.approx(4 * 2.0**2)
    assert coverage(features, features) == (1.0, 1.0)
    assert coverage(features, features + 100.0) == (0.0, 0.0)


def test_rank_deficient_covariances_have_a_distance() -> None:
    features = np.random.default_rng(1).normal(size=(50, 3))
    flat = np.concatenate([features, features[:, :1]], axis=1)
    assert frechet_distance(flat, flat) == pytest.approx(0, abs=1e-6)


def test_the_inception_score_is_that_of_the_released_evaluator() -> None:
    golden = load("evaluator")
    score = inception_score(golden.arrays["probs"], golden.config["split_size"])
    assert score == pytest.approx(float(golden.arrays["inception_score"]), rel=1e-5)


def test_the_inception_score_is_one_for_equal_rows_and_the_number_of_classes_for_certain_and_even_ones() -> None:
    assert inception_score(np.full((40, 8), 1 / 8)) == pytest.approx(1)
    assert inception_score(np.tile(np.eye(8), (5, 1))) == pytest.approx(8)


def test_softmax_is_exact_for_large_logits() -> None:
    np.testing.assert_allclose(softmax(np.array([[1000.0, 1000.0 + np.log(3)]])), [[0.25, 0.75]])


def test_the_kernel_distance_of_whole_sets_is_the_unbiased_estimate() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=(7, 3)) + 1

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 3 + 1) ** 3)

    pairs = [(i, j) for i in range(7) for j in range(7)]
    within = sum(kernel(s[i], s[j]) for s in (x, y) for i, j in pairs if i != j) / (7 * 6)
    across = sum(kernel(x[i], y[j]) for i, j in pairs) / 7**2
    estimate = kernel_distance(x, y, subsets=3)
    assert estimate.mean == pytest.approx(within - 2 * across)
    assert estimate.std == pytest.approx(0, abs=1e-12)


def test_the_kernel_distance_of_two_samples_of_one_distribution_is_zero_within_its_error() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(400, 5)), rng.normal(size=(400, 5))
    estimate = kernel_distance(x, y, subsets=50, subset_size=100)
    assert abs(estimate.mean) < 3 * estimate.std
    assert kernel_distance(x, y + 1, subsets=50, subset_size=100).mean > 10 * estimate.std
    with pytest.raises(ValueError, match="at least two images"):
        kernel_distance(x[:1], y)
