"""Respacing compared with OpenAI's timesteps and tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffusion.config import DiffusionConfig
from diffusion.respacing import respace, space_timesteps
from tests import golden

GOLDEN = golden.load("respacing")
TABLES = [
    (case, noise_schedule)
    for case in GOLDEN.cases
    for noise_schedule in ("linear", "cosine")
    if f"{case['key']}.{noise_schedule}.betas" in GOLDEN  # not for one step, nor for linear below 250 steps
]


@pytest.mark.parametrize("case", GOLDEN.cases, ids=lambda case: case["key"])
def test_the_same_timesteps_are_kept(case: dict[str, Any]) -> None:
    np.testing.assert_array_equal(space_timesteps(case["T"], case["spec"]), GOLDEN[f"{case['key']}.timesteps"])


@pytest.mark.parametrize(
    ("case", "noise_schedule"), TABLES, ids=[f"{case['key']}-{schedule}" for case, schedule in TABLES]
)
def test_the_shorter_process_has_the_reference_tables(case: dict[str, Any], noise_schedule: str) -> None:
    prefix = f"{case['key']}.{noise_schedule}"
    process = respace(
        DiffusionConfig.model_validate({"num_timesteps": case["T"], "noise_schedule": noise_schedule}), case["spec"]
    )

    np.testing.assert_array_equal(process.timestep_map, GOLDEN[f"{case['key']}.timestep_map"])
    np.testing.assert_allclose(process.schedule.betas, GOLDEN[f"{prefix}.betas"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(process.schedule.alphas_cumprod, GOLDEN[f"{prefix}.alphas_cumprod"], rtol=1e-9)


@pytest.mark.parametrize(("num_timesteps", "spec"), GOLDEN.config["errors_ValueError"])
def test_specifications_that_the_reference_refuses_are_refused(num_timesteps: int, spec: str) -> None:
    with pytest.raises(ValueError, match="respacing"):
        space_timesteps(num_timesteps, spec)
