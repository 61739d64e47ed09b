from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.schedules import MAX_BETA, Schedule, named_betas

schedules = st.builds(
    lambda name, num_timesteps: Schedule(named_betas(name, num_timesteps)),
    st.sampled_from(["linear", "cosine"]),
    st.integers(25, 4000),  # below 20 timesteps the linear schedule's last beta exceeds 1
)


@given(schedules)
def test_the_signal_decreases_monotonically(schedule: Schedule) -> None:
    assert (np.diff(schedule.alphas_cumprod) < 0).all()
    assert schedule.alphas_cumprod[0] < 1
    assert schedule.alphas_cumprod[-1] > 0


@given(schedules)
def test_the_posterior_is_narrower_than_a_step_of_noise(schedule: Schedule) -> None:
    assert (schedule.posterior_variance <= schedule.betas).all()
    assert schedule.posterior_variance[0] == 0
    assert schedule.posterior_log_variance_clipped[0] == schedule.posterior_log_variance_clipped[1]
    assert np.isfinite(schedule.posterior_log_variance_clipped).all()


@given(schedules)
def test_the_posterior_mean_keeps_a_noiseless_image_at_its_level(schedule: Schedule) -> None:
    # Without noise x_t = sqrt(abar_t) x_0, and x_{t-1} is sqrt(abar_{t-1}) x_0.
    x_t = np.sqrt(schedule.alphas_cumprod)
    x_prev = schedule.posterior_mean_coef1 + schedule.posterior_mean_coef2 * x_t
    np.testing.assert_allclose(x_prev, np.sqrt(schedule.alphas_cumprod_prev), rtol=1e-9, atol=1e-12)


def test_cosine_betas_are_limited_as_in_the_paper() -> None:
    betas = named_betas("cosine", 4000)
    assert betas.max() == betas[-1] == MAX_BETA


@pytest.mark.parametrize("num_timesteps", [500, 1000, 4000])
def test_linear_schedules_of_any_length_end_at_the_same_signal(num_timesteps: int) -> None:
    end = Schedule(named_betas("linear", num_timesteps)).alphas_cumprod[-1]
    assert np.log(end) == pytest.approx(-10.1, abs=0.2)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"noise_schedule must be 'linear' or 'cosine'; got 'quadratic'"):
        named_betas("quadratic", 1000)


def test_a_chain_of_one_timestep_is_refused() -> None:
    with pytest.raises(ValueError, match="num_timesteps must be at least 2"):
        named_betas("cosine", 1)


@pytest.mark.parametrize("betas", [[0.1], [0.0, 0.1], [0.1, 1.5], [0.1, float("nan")], [[0.1, 0.2]]])
def test_invalid_betas_are_refused(betas: list[float]) -> None:
    with pytest.raises(ValueError, match="betas must"):
        Schedule(np.array(betas))
