from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.timestep_sampler import LossSecondMomentSampler, StratifiedSampler, TimestepSampler, UniformSampler

SAMPLERS: list[Callable[[int], TimestepSampler]] = [UniformSampler, StratifiedSampler, LossSecondMomentSampler]
every_sampler = pytest.mark.parametrize("make", SAMPLERS)


def _warm(sampler: TimestepSampler, num_timesteps: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(10):
        sampler.update(np.arange(num_timesteps), rng.random(num_timesteps) + np.arange(num_timesteps))


@every_sampler
def test_timesteps_are_in_the_chain_and_weights_have_mean_one(make: Callable[[int], TimestepSampler]) -> None:
    sampler = make(40)
    _warm(sampler, 40)
    t, weights = sampler.sample(np.random.default_rng(0), 20_000)

    assert t.dtype == np.int64
    assert weights.dtype == np.float32
    assert t.shape == weights.shape == (20_000,)
    assert t.min() == 0
    assert t.max() == 39
    assert weights.mean() == pytest.approx(1, abs=0.05)


@every_sampler
def test_weighted_losses_estimate_the_mean_over_the_chain(make: Callable[[int], TimestepSampler]) -> None:
    sampler = make(40)
    _warm(sampler, 40)
    loss = np.arange(40) ** 1.5
    t, weights = sampler.sample(np.random.default_rng(1), 50_000)

    assert (weights * loss[t]).mean() == pytest.approx(loss.mean(), rel=0.02)


@every_sampler
def test_a_resumed_sampler_continues_its_draws(make: Callable[[int], TimestepSampler]) -> None:
    def run(sampler: TimestepSampler, rng: np.random.Generator, rounds: int) -> list[list[int]]:
        drawn: list[list[int]] = []
        for _ in range(rounds):
            t, _ = sampler.sample(rng, 64)
            sampler.update(t, rng.random(64) * (1 + t))
            drawn.append(t.tolist())
        return drawn

    sampler, rng = make(12), np.random.default_rng(3)
    run(sampler, rng, 5)
    resumed, resumed_rng = make(12), np.random.default_rng(99)
    resumed.load_state_dict(sampler.state_dict())
    resumed_rng.bit_generator.state = rng.bit_generator.state

    assert run(resumed, resumed_rng, 8) == run(sampler, rng, 8)


@every_sampler
def test_a_saved_state_does_not_change_afterwards(make: Callable[[int], TimestepSampler]) -> None:
    sampler = make(12)
    _warm(sampler, 12)
    state = sampler.state_dict()
    before = {name: array.copy() for name, array in state.items()}
    _warm(sampler, 12, seed=1)

    for name, array in state.items():
        np.testing.assert_array_equal(array, before[name])


@given(st.integers(2, 4000), st.integers(1, 300), st.integers(0, 100))
def test_stratified_batches_cover_the_chain_evenly(num_timesteps: int, batch_size: int, seed: int) -> None:
    t, weights = StratifiedSampler(num_timesteps).sample(np.random.default_rng(seed), batch_size)

    assert (weights == 1).all()
    # The i-th smallest is in the i-th of batch_size equal parts, up to the width of one timestep.
    part = np.arange(batch_size) * num_timesteps / batch_size
    ordered = np.sort(t)
    assert (ordered >= np.floor(part)).all()
    assert (ordered < part + num_timesteps / batch_size).all()


def test_stratified_timesteps_are_uniform_for_every_place_in_the_batch() -> None:
    rng = np.random.default_rng(0)
    sampler = StratifiedSampler(10)
    draws = np.stack([sampler.sample(rng, 3)[0] for _ in range(6000)])

    for place in range(3):
        counts = np.bincount(draws[:, place], minlength=10)
        assert float(((counts - 600) ** 2 / 600).sum()) < 27.9  # 9 degrees of freedom: 0.1 %


def test_stratified_means_are_less_noisy_than_uniform_ones() -> None:
    loss = np.exp(-np.arange(1000) / 100)

    def spread(sampler: TimestepSampler) -> float:
        rng = np.random.default_rng(0)
        return float(np.std([loss[sampler.sample(rng, 64)[0]].mean() for _ in range(300)]))

    assert spread(StratifiedSampler(1000)) < 0.1 * spread(UniformSampler(1000))


def test_importance_sampling_waits_for_every_timestep() -> None:
    sampler = LossSecondMomentSampler(3, history_per_term=2)
    sampler.update(np.array([0, 0, 1, 1, 2]), np.array([9.0, 9.0, 1.0, 1.0, 1.0]))
    assert not sampler.warmed_up
    np.testing.assert_array_equal(sampler.weights(), np.ones(3))

    sampler.update(np.array([2]), np.array([1.0]))
    assert sampler.warmed_up
    assert sampler.weights()[0] > 0.8


def test_importance_sampling_drops_the_oldest_losses_first() -> None:
    sampler = LossSecondMomentSampler(2, history_per_term=2, uniform_prob=0.0)
    sampler.update(np.array([0, 0, 1, 1]), np.array([100.0, 100.0, 4.0, 4.0]))
    sampler.update(np.array([0]), np.array([3.0]))
    sampler.update(np.array([0]), np.array([3.0]))

    np.testing.assert_allclose(sampler.weights(), [3 / 7, 4 / 7])


def test_a_loss_that_is_not_finite_is_ignored() -> None:
    sampler = LossSecondMomentSampler(2, history_per_term=1)
    sampler.update(np.array([0, 1]), np.array([1.0, 2.0]))
    before = sampler.weights()
    sampler.update(np.array([0, 1]), np.array([np.nan, np.inf]))

    np.testing.assert_array_equal(sampler.weights(), before)


def test_the_state_of_another_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match="has nothing; got"):
        UniformSampler(4).load_state_dict(LossSecondMomentSampler(4).state_dict())
    with pytest.raises(ValueError, match=r"has \['counts', 'history'\]; got nothing"):
        LossSecondMomentSampler(4).load_state_dict(UniformSampler(4).state_dict())
    with pytest.raises(ValueError, match=r"history of the timestep sampler must be \(4, 10\); got \(5, 10\)"):
        LossSecondMomentSampler(4).load_state_dict(LossSecondMomentSampler(5).state_dict())
