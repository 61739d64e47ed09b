"""The forward process and its posterior compared with OpenAI's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from diffusion.config import DiffusionConfig
from diffusion.losses import LossTables, q_posterior_mean, q_sample
from diffusion.respacing import Process, respace
from tests import golden

GOLDEN = golden.load("diffusion_q")
CASES = pytest.mark.parametrize("case", GOLDEN.cases, ids=lambda case: case["key"])


def _process(case: dict[str, Any]) -> Process:
    config: DiffusionConfig = golden.diffusion_config(case)
    return respace(config, case["respacing"])


@CASES
def test_noised_images_equal_the_reference(case: dict[str, Any]) -> None:
    key = case["key"]
    tables = LossTables.from_process(_process(case))
    x0, t, noise = (GOLDEN.tensor(f"{key}.{name}") for name in ("x_start", "t", "noise"))

    torch.testing.assert_close(q_sample(tables, x0, t, noise), GOLDEN.tensor(f"{key}.q_sample"), rtol=1e-6, atol=1e-7)


@CASES
def test_the_forward_mean_and_variance_equal_the_reference(case: dict[str, Any]) -> None:
    key = case["key"]
    tables = LossTables.from_process(_process(case))
    x0, t = GOLDEN.tensor(f"{key}.x_start"), GOLDEN.tensor(f"{key}.t")

    mean = q_sample(tables, x0, t, torch.zeros_like(x0))
    torch.testing.assert_close(mean, GOLDEN.tensor(f"{key}.q_mean"), rtol=1e-6, atol=0)
    deviation = q_sample(tables, torch.zeros_like(x0), t, torch.ones_like(x0))
    torch.testing.assert_close(deviation**2, GOLDEN.tensor(f"{key}.q_variance"), rtol=1e-6, atol=0)


@CASES
def test_the_posterior_equals_the_reference(case: dict[str, Any]) -> None:
    key = case["key"]
    process = _process(case)
    tables = LossTables.from_process(process)
    x0, t = GOLDEN.tensor(f"{key}.x_start"), GOLDEN.tensor(f"{key}.t")
    x_t = GOLDEN.tensor(f"{key}.q_sample")  # the recorded posterior belongs to the recorded x_t

    torch.testing.assert_close(
        q_posterior_mean(tables, x0, x_t, t), GOLDEN.tensor(f"{key}.post_mean"), rtol=1e-6, atol=1e-7
    )
    log_variance = tables.posterior_log_variance_clipped[t]
    torch.testing.assert_close(
        log_variance, GOLDEN.tensor(f"{key}.post_log_variance_clipped")[:, 0, 0, 0], rtol=1e-6, atol=0
    )
    np.testing.assert_allclose(
        process.schedule.posterior_variance[t.numpy()], GOLDEN[f"{key}.post_variance"][:, 0, 0, 0], rtol=1e-6
    )
