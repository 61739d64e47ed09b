"""Bits/dim against `calc_bpd_loop` of OpenAI's released code: every term, the prior and their sum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from diffusion.likelihood import VariationalBound
from diffusion.losses import discretized_gaussian_log_likelihood, normal_kl
from diffusion.respacing import respace
from tests import golden

GOLDEN = golden.load("bpd")
RELATIVE, ABSOLUTE = 1e-3, 1e-5
"""What tests/data/golden/README.md allows."""


@pytest.mark.parametrize("case", GOLDEN.cases, ids=lambda case: case["key"])
def test_every_term_and_the_total_are_those_of_the_reference(case: dict[str, Any]) -> None:
    key = case["key"]
    diffusion = golden.diffusion_config(case)
    bound = VariationalBound.of(diffusion, respace(diffusion, case["respacing"]))
    network = golden.network(case["model"])
    x0, y, noise = GOLDEN.tensor(f"{key}.x_start"), GOLDEN.optional(f"{key}.y"), GOLDEN.tensor(f"{key}.noise")
    steps = bound.process.num_steps

    columns = []
    for column in range(steps):  # column 0 is the noisiest step
        s = torch.full((len(x0),), steps - 1 - column)
        columns.append(bound.terms(network, x0, y, s, noise[column]))
    vb_bpd, eps_mse, x0_mse = (torch.stack(term, dim=1) for term in zip(*columns, strict=True))
    prior_bpd = bound.prior_bpd(x0)

    _assert_close(vb_bpd, f"{key}.vb")
    _assert_close(eps_mse, f"{key}.mse")
    _assert_close(x0_mse, f"{key}.xstart_mse")
    _assert_close(prior_bpd, f"{key}.prior_bpd")
    _assert_close(vb_bpd.sum(dim=1) + prior_bpd, f"{key}.total_bpd")


def test_the_decoder_gives_each_level_the_reference_probability() -> None:
    x0 = GOLDEN.tensor("dgll.x")[:, None, None]
    mean = GOLDEN.tensor("dgll.means")[None, :, None]
    log_scale = GOLDEN.tensor("dgll.log_scales")[None, None, :]
    ours = discretized_gaussian_log_likelihood(x0, mean, 2 * log_scale).numpy()
    theirs = GOLDEN["dgll.log_probs"]
    possible = theirs > -9
    np.testing.assert_allclose(ours[possible], theirs[possible], rtol=1e-3)
    assert (ours[~possible] <= -9 + 1e-3).all()


def test_the_divergence_of_gaussians_is_that_of_the_reference() -> None:
    mean1, logvar1, mean2, logvar2 = (GOLDEN.tensor(f"kl.{name}") for name in ("mean1", "logvar1", "mean2", "logvar2"))
    _assert_close(normal_kl(mean1, logvar1, mean2, logvar2), "kl.out")
    zero = torch.zeros_like(mean1)
    _assert_close(normal_kl(mean1, logvar1, zero, zero), "kl.out_vs_std_normal")


def _assert_close(ours: torch.Tensor, key: str) -> None:
    np.testing.assert_allclose(ours.numpy(), GOLDEN[key], rtol=RELATIVE, atol=ABSOLUTE)
