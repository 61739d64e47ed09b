"""Timestep samplers compared with OpenAI's weights and draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import golden
from trainer.timestep_sampler import LossSecondMomentSampler, UniformSampler

GOLDEN = golden.load("resampler")
CASES = pytest.mark.parametrize("case", GOLDEN.cases, ids=lambda case: case["key"])


def _sampler(case: dict[str, Any]) -> LossSecondMomentSampler:
    return LossSecondMomentSampler(case["num_timesteps"], case["history_per_term"], case["uniform_prob"])


@CASES
def test_weights_follow_the_losses_like_the_reference(case: dict[str, Any]) -> None:
    sampler = _sampler(case)
    for stage in case["stages"]:
        prefix = f"{case['key']}.{stage}"
        sampler.update(GOLDEN[f"{prefix}.ts"], GOLDEN[f"{prefix}.losses"])

        np.testing.assert_allclose(sampler.weights(), GOLDEN[f"{prefix}.weights"], rtol=1e-10, err_msg=stage)
        assert sampler.warmed_up == bool(GOLDEN[f"{prefix}.warmed_up"]), stage


@CASES
def test_the_same_random_state_draws_the_same_timesteps(case: dict[str, Any]) -> None:
    sampler = _sampler(case)
    for stage in case["stages"]:
        sampler.update(GOLDEN[f"{case['key']}.{stage}.ts"], GOLDEN[f"{case['key']}.{stage}.losses"])
    t, weights = sampler.sample(_legacy_rng(case), 16)

    np.testing.assert_array_equal(t, GOLDEN[f"{case['key']}.sample.indices"])
    np.testing.assert_allclose(weights, GOLDEN[f"{case['key']}.sample.weights"], rtol=1e-6)


@CASES
def test_uniform_draws_equal_the_reference(case: dict[str, Any]) -> None:
    t, weights = UniformSampler(case["num_timesteps"]).sample(_legacy_rng(case), 16)

    np.testing.assert_array_equal(t, GOLDEN[f"{case['key']}.uniform.indices"])
    np.testing.assert_allclose(weights, GOLDEN[f"{case['key']}.uniform.weights"], rtol=1e-6)


def _legacy_rng(case: dict[str, Any]) -> np.random.RandomState:
    return np.random.RandomState(case["numpy_seed"])
