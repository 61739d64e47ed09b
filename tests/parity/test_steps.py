"""Single sampling steps against OpenAI's numbers; errors are relative to the largest element."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from diffusion.config import DiffusionConfig
from diffusion.plans import SamplingPlan, ancestral_plan, ddim_plan
from diffusion.unet import split_output
from diffusion.update import PlanRows, advance
from tests import golden

GOLDEN = golden.load("diffusion_step")
CASES = pytest.mark.parametrize("case", golden.supported_cases(GOLDEN), ids=lambda case: case["key"])


class Inputs(NamedTuple):
    diffusion: DiffusionConfig
    x_t: Tensor
    t: Tensor
    out: Tensor
    var_values: Tensor
    model_t: Tensor


def _inputs(case: dict[str, Any]) -> Inputs:
    """Run the case's network; its batch mixes timesteps, 0 and the last among them."""
    key = case["key"]
    diffusion = golden.diffusion_config(case)
    x_t, t = GOLDEN.tensor(f"{key}.x"), GOLDEN.tensor(f"{key}.t")
    model_t = _rows(ancestral_plan(diffusion, case["respacing"]), t).t_model.flatten()
    output = golden.network(case["model"])(x_t, model_t, GOLDEN.optional(f"{key}.y"))
    out, var_values = split_output(output, x_t.shape[1])
    return Inputs(diffusion, x_t, t, out, var_values, model_t)


def _rows(plan: SamplingPlan, t: Tensor) -> PlanRows:
    return PlanRows.from_lines(torch.from_numpy(plan.table.copy())[plan.num_steps - 1 - t])


def _relative_error(actual: Tensor, key: str) -> float:
    expected = GOLDEN.tensor(key)
    return float((actual - expected).abs().max() / expected.abs().max())


@CASES
def test_the_network_is_told_the_same_timestep(case: dict[str, Any]) -> None:
    assert torch.equal(_inputs(case).model_t, GOLDEN.tensor(f"{case['key']}.model_t").float())


@CASES
def test_mean_variance_and_x0_equal_the_reference(case: dict[str, Any]) -> None:
    key = case["key"]
    inputs = _inputs(case)
    rows = _rows(ancestral_plan(inputs.diffusion, case["respacing"], case["clip_denoised"]), inputs.t)
    zeros = torch.zeros_like(inputs.x_t)
    noiseless = rows._replace(noise_scale=torch.zeros_like(rows.noise_scale))
    step = advance(noiseless, inputs.x_t, zeros, inputs.out, inputs.var_values, zeros, zeros)

    assert _relative_error(step.x_prev, f"{key}.pmv.mean") < 1e-5
    assert _relative_error(step.x0, f"{key}.pmv.pred_xstart") < 2e-4
    log_variance = torch.lerp(rows.lv_min, rows.lv_max, (inputs.var_values + 1) / 2)
    assert _relative_error(log_variance, f"{key}.pmv.log_variance") < 1e-6


@CASES
def test_an_ancestral_step_equals_the_reference(case: dict[str, Any]) -> None:
    key = case["key"]
    inputs = _inputs(case)
    rows = _rows(ancestral_plan(inputs.diffusion, case["respacing"], case["clip_denoised"]), inputs.t)
    zeros = torch.zeros_like(inputs.x_t)
    noise = GOLDEN.tensor(f"{key}.p_sample.noise")
    step = advance(rows, inputs.x_t, zeros, inputs.out, inputs.var_values, noise, zeros)

    assert _relative_error(step.x_prev, f"{key}.p_sample.sample") < 1e-5
    assert step.ok.all()


@pytest.mark.parametrize("eta", ["0.0", "0.5"])
@CASES
def test_a_ddim_step_equals_the_reference(case: dict[str, Any], eta: str) -> None:
    key = case["key"]
    inputs = _inputs(case)
    rows = _rows(ddim_plan(inputs.diffusion, case["respacing"], float(eta), case["clip_denoised"]), inputs.t)
    zeros = torch.zeros_like(inputs.x_t)
    noise = GOLDEN.tensor(f"{key}.ddim{eta}.noise")
    step = advance(rows, inputs.x_t, zeros, inputs.out, inputs.var_values, noise, zeros)

    assert _relative_error(step.x_prev, f"{key}.ddim{eta}.sample") < 1e-4
