from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from diffusion.config import DiffusionConfig
from diffusion.losses import (
    LossTables,
    LossType,
    TrainingLosses,
    discretized_gaussian_log_likelihood,
    normal_kl,
    p_log_variance,
    q_posterior_mean,
    q_sample,
    training_losses,
)
from diffusion.respacing import respace

HYBRID = DiffusionConfig(num_timesteps=400)
PROCESS = respace(HYBRID)
TABLES = LossTables.from_process(PROCESS)


class Batch(NamedTuple):
    x0: Tensor
    x_t: Tensor
    noise: Tensor
    t: Tensor


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor([0, 1, 200, 399])
    x0 = torch.randint(0, 256, (4, 3, 6, 6), generator=generator) / 127.5 - 1
    noise = torch.randn(4, 3, 6, 6, generator=generator)
    return Batch(x0, q_sample(TABLES, x0, t, noise), noise, t)


def _output(channels: int = 6) -> Tensor:
    return 0.3 * torch.randn(4, channels, 6, 6, generator=torch.Generator().manual_seed(1))


def _losses(output: Tensor, loss: LossType, *, rescale: bool, diffusion: DiffusionConfig = HYBRID) -> TrainingLosses:
    batch = _batch()
    return training_losses(
        TABLES, diffusion, output, batch.x0, batch.x_t, batch.noise, batch.t, loss=loss, rescale=rescale
    )


def test_simple_is_the_mean_squared_error_of_eps() -> None:
    output = _output()
    losses = _losses(output, "simple", rescale=False)

    torch.testing.assert_close(losses.loss, ((output[:, :3] - _batch().noise) ** 2).mean(dim=(1, 2, 3)))
    assert torch.equal(losses.loss, losses.mse)
    assert (losses.vb_bpd > 0).all()  # reported, although not trained on


def test_x0_prediction_is_compared_with_the_image() -> None:
    output = _output()
    losses = _losses(output, "simple", rescale=False, diffusion=HYBRID.replace(prediction="x0"))

    torch.testing.assert_close(losses.mse, ((output[:, :3] - _batch().x0) ** 2).mean(dim=(1, 2, 3)))


@pytest.mark.parametrize(("rescale", "weight"), [(False, 1.0), (True, 0.4)])
def test_hybrid_adds_the_bound_with_lambda_on_the_whole_chain(rescale: bool, weight: float) -> None:
    losses = _losses(_output(), "hybrid", rescale=rescale)  # S = 400 steps times 0.001
    torch.testing.assert_close(losses.loss, losses.mse + weight * losses.vb_bpd)


@pytest.mark.parametrize(("rescale", "factor"), [(False, 1), (True, 400)])
def test_vlb_is_the_bound_alone(rescale: bool, factor: int) -> None:
    losses = _losses(_output(), "vlb", rescale=rescale)
    torch.testing.assert_close(losses.loss, factor * losses.vb_bpd)


def test_in_hybrid_the_bound_trains_the_variance_only() -> None:
    output = _output().requires_grad_(True)
    losses = _losses(output, "hybrid", rescale=True)
    (of_bound,) = torch.autograd.grad(losses.vb_bpd.sum(), output, retain_graph=True)
    (of_mse,) = torch.autograd.grad(losses.mse.sum(), output)

    assert (of_bound[:, :3] == 0).all()
    assert (of_bound[:, 3:] != 0).any()
    assert (of_mse[:, :3] != 0).all()
    assert (of_mse[:, 3:] == 0).all()


def test_in_vlb_the_bound_trains_both() -> None:
    output = _output().requires_grad_(True)
    (gradient,) = torch.autograd.grad(_losses(output, "vlb", rescale=False).loss.sum(), output)

    assert (gradient[:, :3] != 0).any()
    assert (gradient[:, 3:] != 0).any()


def test_fixed_variances_report_no_bound_unless_it_is_trained_on() -> None:
    fixed = HYBRID.replace(variance="fixed_large")
    assert (_losses(_output(3), "simple", rescale=False, diffusion=fixed).vb_bpd == 0).all()
    assert (_losses(_output(3), "vlb", rescale=False, diffusion=fixed).vb_bpd > 0).all()


def test_hybrid_without_a_learned_variance_is_refused() -> None:
    with pytest.raises(ValueError, match="loss 'hybrid' needs a learned variance"):
        _losses(_output(3), "hybrid", rescale=True, diffusion=HYBRID.replace(variance="fixed_small"))


@pytest.mark.parametrize(("channels", "variance"), [(3, "learned_range"), (6, "fixed_small")])
def test_an_output_of_the_wrong_width_is_refused(channels: int, variance: str) -> None:
    diffusion = DiffusionConfig.model_validate({**HYBRID.model_dump(), "variance": variance})
    with pytest.raises(ValueError, match="model_output must have"):
        _losses(_output(channels), "simple", rescale=False, diffusion=diffusion)


def test_exact_noise_and_variance_have_no_loss_between_the_ends() -> None:
    batch = _batch()
    var_values = torch.full_like(batch.noise, -1.0)  # the posterior's own variance
    losses = _losses(torch.cat([batch.noise, var_values], dim=1), "vlb", rescale=False)

    assert (losses.mse == 0).all()
    assert (losses.vb_bpd[1:].abs() < 1e-4).all()


def test_the_loss_of_a_row_does_not_depend_on_other_rows() -> None:
    batch, output = _batch(), _output()
    together = _losses(output, "hybrid", rescale=True)
    for row in range(4):
        one = slice(row, row + 1)
        alone = training_losses(
            TABLES, HYBRID, output[one], batch.x0[one], batch.x_t[one], batch.noise[one], batch.t[one],
            loss="hybrid", rescale=True,
        )  # fmt: skip
        torch.testing.assert_close(alone.loss, together.loss[one])


def test_tables_are_float32_of_the_float64_schedule() -> None:
    np.testing.assert_array_equal(
        TABLES.sqrt_alphas_cumprod.numpy(), np.sqrt(PROCESS.schedule.alphas_cumprod).astype(np.float32)
    )
    assert TABLES.num_steps == 400


def test_the_tables_of_a_respaced_process_are_its_own() -> None:
    process = respace(HYBRID, "20")
    tables = LossTables.from_process(process)
    np.testing.assert_array_equal(tables.log_betas.numpy(), np.log(process.schedule.betas).astype(np.float32))
    assert tables.num_steps == 20


def test_noising_keeps_unit_variance() -> None:
    t = torch.arange(400)
    one = torch.ones(400, 1, 1, 1)
    of_x0 = q_sample(TABLES, one, t, 0 * one)
    of_noise = q_sample(TABLES, 0 * one, t, one)
    torch.testing.assert_close(of_x0**2 + of_noise**2, one)


def test_the_posterior_leads_to_the_less_noisy_level() -> None:
    t = torch.arange(1, 400)
    x0 = torch.full((399, 1, 1, 1), 0.7)
    zeros = torch.zeros_like(x0)
    mean = q_posterior_mean(TABLES, x0, q_sample(TABLES, x0, t, zeros), t)
    torch.testing.assert_close(mean, q_sample(TABLES, x0, t - 1, zeros), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("raw", "table"), [(-1.0, "posterior_log_variance_clipped"), (1.0, "log_betas")])
def test_learned_range_reaches_both_of_its_ends(raw: float, table: str) -> None:
    t = torch.tensor([0, 7, 399])
    log_variance = p_log_variance(TABLES, HYBRID, torch.full((3, 1, 2, 2), raw), t)
    expected = getattr(TABLES, table)[t][:, None, None, None].expand_as(log_variance)
    torch.testing.assert_close(log_variance, expected)


def test_fixed_variances_have_their_values() -> None:
    t, raw = torch.tensor([3]), torch.full((1, 1, 1, 1), -7.5)
    assert p_log_variance(TABLES, HYBRID.replace(variance="learned"), raw, t).item() == -7.5
    small = p_log_variance(TABLES, HYBRID.replace(variance="fixed_small"), raw, t).item()
    assert small == pytest.approx(math.log(PROCESS.schedule.posterior_variance[3]), rel=1e-6)
    large = p_log_variance(TABLES, HYBRID.replace(variance="fixed_large"), raw, t).item()
    assert large == pytest.approx(math.log(PROCESS.schedule.betas[3]), rel=1e-6)


moderate = st.floats(-3, 3)


@given(moderate, moderate, moderate, moderate)
def test_normal_kl_equals_that_of_torch(mean1: float, log_variance1: float, mean2: float, log_variance2: float) -> None:
    numbers = torch.tensor([mean1, log_variance1, mean2, log_variance2], dtype=torch.float64)
    ours = normal_kl(*numbers)
    theirs = kl_divergence(Normal(numbers[0], torch.exp(numbers[1] / 2)), Normal(numbers[2], torch.exp(numbers[3] / 2)))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@given(st.floats(-1.2, 1.2), st.floats(-8, 2))
def test_the_probabilities_of_all_pixel_levels_sum_to_one(mean: float, log_variance: float) -> None:
    x0 = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_p = discretized_gaussian_log_likelihood(x0, torch.full_like(x0, mean), torch.full_like(x0, log_variance))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-8)
    assert (log_p <= 0).all()


def test_the_probability_of_a_pixel_is_that_of_the_gaussian_over_its_bin() -> None:
    x0 = torch.tensor([-1.0, -0.2, 0.5, 1.0], dtype=torch.float64)
    x0 = torch.round((x0 + 1) * 127.5) / 127.5 - 1
    mean, deviation = torch.tensor(0.1, dtype=torch.float64), 0.4
    log_variance = torch.full_like(x0, 2 * math.log(deviation))
    log_p = discretized_gaussian_log_likelihood(x0, mean.expand_as(x0), log_variance)

    upper = torch.special.ndtr((x0 + 1 / 255 - mean) / deviation)
    lower = torch.special.ndtr((x0 - 1 / 255 - mean) / deviation)
    expected = torch.stack([upper[0], upper[1] - lower[1], upper[2] - lower[2], 1 - lower[3]])
    torch.testing.assert_close(log_p.exp(), expected, rtol=5e-3, atol=3e-4)  # the tanh approximation


def test_impossible_pixels_have_a_bounded_loss() -> None:
    log_p = discretized_gaussian_log_likelihood(torch.ones(1), -torch.ones(1), torch.full((1,), -15.0))
    assert log_p.item() == pytest.approx(math.log(1e-12), rel=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_min_snr_weights_the_prediction_and_not_the_bound(prediction: Literal["eps", "x0"]) -> None:
    diffusion = HYBRID.replace(prediction=prediction)
    batch, output = _batch(), _output()

    def losses(gamma: float | None) -> TrainingLosses:
        return training_losses(
            TABLES, diffusion, output, batch.x0, batch.x_t, batch.noise, batch.t,
            loss="hybrid", rescale=True, min_snr_gamma=gamma,
        )  # fmt: skip

    plain, weighted = losses(None), losses(5.0)
    abar = torch.from_numpy(PROCESS.schedule.alphas_cumprod)[batch.t]
    snr = abar / (1 - abar)
    assert snr[0] > 5 > snr[-1]
    expected = snr.clamp(max=5) / (snr if prediction == "eps" else 1)
    bound = plain.loss.double() - plain.mse.double()
    torch.testing.assert_close(weighted.loss.double(), expected * plain.mse.double() + bound, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weighted.mse, plain.mse, rtol=0, atol=0)
    torch.testing.assert_close(weighted.vb_bpd, plain.vb_bpd, rtol=0, atol=0)
