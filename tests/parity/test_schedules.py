"""Schedules compared with OpenAI's tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffusion.schedules import Schedule, named_betas
from tests import golden

GOLDEN = golden.load("schedules")


@pytest.mark.parametrize("case", GOLDEN.cases, ids=lambda case: case["prefix"])
def test_tables_equal_the_reference(case: dict[str, Any]) -> None:
    schedule = Schedule(named_betas(case["schedule"], case["T"]))

    np.testing.assert_allclose(schedule.betas, GOLDEN[f"{case['prefix']}.betas"], rtol=1e-12)
    for name in (
        "alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    ):
        np.testing.assert_allclose(getattr(schedule, name), GOLDEN[f"{case['prefix']}.{name}"], rtol=1e-9, err_msg=name)
