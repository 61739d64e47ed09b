from __future__ import annotations

import numpy as np
import pytest

from benchmarks.feature_metrics import coverage, frechet_distance, manifold_radii
from tests.golden import load


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
