"""Likelihoods: which steps a bound is evaluated on, and that a row's terms are its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.config import DiffusionConfig
from diffusion.likelihood import VariationalBound, likelihood_process
from diffusion.losses import training_losses
from diffusion.respacing import respace

DIFFUSION = DiffusionConfig(num_timesteps=400)


def network(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    return torch.cat([0.9 * x_t, torch.tanh(x_t)], dim=1)


def rows() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, 256, (4, 1, 6, 6), generator=generator) / 127.5 - 1
    return x0, torch.tensor([0, 1, 200, 399]), torch.randn(x0.shape, generator=generator)


def test_without_clipping_the_terms_are_those_of_training() -> None:
    bound = VariationalBound.of(DIFFUSION, respace(DIFFUSION), clip=False)
    x0, s, noise = rows()
    terms = bound.terms(network, x0, None, s, noise)

    a, b = bound.tables.sqrt_alphas_cumprod[s], bound.tables.sqrt_one_minus_alphas_cumprod[s]
    x_t = a[:, None, None, None] * x0 + b[:, None, None, None] * noise
    losses = training_losses(
        bound.tables, DIFFUSION, network(x_t, s, None), x0, x_t, noise, s, loss="vlb", rescale=False
    )
    torch.testing.assert_close(terms.vb_bpd, losses.vb_bpd)
    torch.testing.assert_close(terms.eps_mse[1:], losses.mse[1:], rtol=1e-3, atol=1e-5)


def test_clipping_lowers_the_error_of_x0() -> None:
    x0, s, noise = rows()
    clipped, free = (
        VariationalBound.of(DIFFUSION, respace(DIFFUSION), clip=clip).terms(network, x0, None, s, noise).x0_mse
        for clip in (True, False)
    )
    assert (clipped <= free).all()
    assert clipped[-1] < free[-1]


def test_a_row_costs_the_same_whatever_is_beside_it() -> None:
    bound = VariationalBound.of(DIFFUSION, respace(DIFFUSION))
    x0, s, noise = rows()
    together = bound.terms(network, x0, None, s, noise)
    for row in range(4):
        one = slice(row, row + 1)
        alone = bound.terms(network, x0[one], None, s[one], noise[one])
        torch.testing.assert_close(torch.stack(alone), torch.stack(together)[:, one])


def test_the_prior_is_what_is_left_of_the_image_at_the_end_of_the_chain() -> None:
    diffusion = DiffusionConfig(num_timesteps=1000, noise_schedule="linear")
    process = respace(diffusion)
    abar = process.schedule.alphas_cumprod[-1]
    x0 = torch.full((1, 1, 2, 2), 0.5)
    expected = 0.5 * (abar * 0.25 - abar - np.log1p(-abar)) / np.log(2)
    assert VariationalBound.of(diffusion, process).prior_bpd(x0).item() == pytest.approx(expected, rel=1e-2)


def test_extra_steps_add_every_timestep_below_the_stride() -> None:
    plain = likelihood_process(DIFFUSION, "20")
    dense = likelihood_process(DIFFUSION, "20", extra_steps=True)
    assert plain.num_steps == 20
    assert dense.timestep_map.tolist() == sorted({*range(400 // 20), *plain.timestep_map.tolist()})
    kept = respace(DIFFUSION).schedule.alphas_cumprod[dense.timestep_map]
    np.testing.assert_allclose(dense.schedule.alphas_cumprod, kept, rtol=1e-9)


def test_the_full_chain_has_no_extra_steps() -> None:
    assert likelihood_process(DIFFUSION, extra_steps=True).num_steps == 400
