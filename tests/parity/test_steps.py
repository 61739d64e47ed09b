"""Single sampling steps compared with OpenAI's; errors are relative to the largest element."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from diffusion.arrays import to_numpy
from diffusion.config import DiffusionConfig
from diffusion.plans import SamplingPlan, ancestral_plan, ddim_encoding_plan, ddim_plan
from diffusion.update import PlanRows, advance, split_output
from tests import golden
from tests.kinds import KINDS, Kind, of_kind, on_kind

GOLDEN = golden.load("diffusion_step")
CASES = pytest.mark.parametrize("case", golden.supported_cases(GOLDEN), ids=lambda case: case["key"])


class Inputs(NamedTuple):
    diffusion: DiffusionConfig
    x_t: Any
    t: Any
    out: Any
    var_values: Any
    t_model: Any


def _inputs(case: dict[str, Any], kind: Kind) -> Inputs:
    """Run the case's network on a batch of mixed timesteps, with the first and the last."""
    key = case["key"]
    diffusion = golden.diffusion_config(case)
    x_t, t = of_kind(kind, GOLDEN[f"{key}.x"]), of_kind(kind, GOLDEN[f"{key}.t"])
    t_model = _rows(ancestral_plan(diffusion, case["respacing"]), t, kind).t_model.reshape(-1)
    output = on_kind(kind, golden.network(case["model"]))(x_t, t_model, GOLDEN.optional(f"{key}.y"))
    out, var_values = split_output(output, x_t.shape[1])
    return Inputs(diffusion, x_t, t, out, var_values, t_model)


def _rows(plan: SamplingPlan, t: Any, kind: Kind) -> PlanRows[Any]:
    return PlanRows.from_lines(of_kind(kind, plan.table)[plan.num_steps - 1 - t])


def _noiseless(rows: PlanRows[Any]) -> PlanRows[Any]:
    return rows._replace(noise_scale=0 * rows.noise_scale)


def _relative_error(actual: Any, key: str) -> float:
    expected = GOLDEN[key]
    return float(np.abs(to_numpy(actual) - expected).max() / np.abs(expected).max())


@KINDS
@CASES
def test_the_network_gets_the_same_timestep(case: dict[str, Any], kind: Kind) -> None:
    t_model = to_numpy(_inputs(case, kind).t_model)
    np.testing.assert_array_equal(t_model, GOLDEN[f"{case['key']}.model_t"].astype(np.float32))


@KINDS
@CASES
def test_mean_variance_and_x0_equal_the_reference(case: dict[str, Any], kind: Kind) -> None:
    key = case["key"]
    inputs = _inputs(case, kind)
    rows = _rows(ancestral_plan(inputs.diffusion, case["respacing"], case["clip_denoised"]), inputs.t, kind)
    zeros = 0 * inputs.x_t
    step = advance(_noiseless(rows), inputs.x_t, zeros, inputs.out, inputs.var_values, zeros, zeros)

    assert _relative_error(step.x_prev, f"{key}.pmv.mean") < golden.STEP_TOLERANCE
    assert _relative_error(step.x0, f"{key}.pmv.pred_xstart") < golden.STEP_X0_TOLERANCE
    log_variance = rows.lv_min + (rows.lv_max - rows.lv_min) * (inputs.var_values + 1) / 2
    assert _relative_error(log_variance, f"{key}.pmv.log_variance") < golden.STEP_TOLERANCE


@KINDS
@CASES
def test_an_ancestral_step_equals_the_reference(case: dict[str, Any], kind: Kind) -> None:
    key = case["key"]
    inputs = _inputs(case, kind)
    rows = _rows(ancestral_plan(inputs.diffusion, case["respacing"], case["clip_denoised"]), inputs.t, kind)
    zeros = 0 * inputs.x_t
    noise = of_kind(kind, GOLDEN[f"{key}.p_sample.noise"])
    step = advance(rows, inputs.x_t, zeros, inputs.out, inputs.var_values, noise, zeros)

    assert _relative_error(step.x_prev, f"{key}.p_sample.sample") < golden.STEP_TOLERANCE
    assert step.ok.all()


@pytest.mark.parametrize("eta", ["0.0", "0.5"])
@KINDS
@CASES
def test_a_ddim_step_equals_the_reference(case: dict[str, Any], eta: str, kind: Kind) -> None:
    key = case["key"]
    inputs = _inputs(case, kind)
    rows = _rows(ddim_plan(inputs.diffusion, case["respacing"], float(eta), case["clip_denoised"]), inputs.t, kind)
    zeros = 0 * inputs.x_t
    noise = of_kind(kind, GOLDEN[f"{key}.ddim{eta}.noise"])
    step = advance(rows, inputs.x_t, zeros, inputs.out, inputs.var_values, noise, zeros)

    assert _relative_error(step.x_prev, f"{key}.ddim{eta}.sample") < golden.DDIM_TOLERANCE


@KINDS
@CASES
def test_a_step_of_the_encoding_equals_the_reference(case: dict[str, Any], kind: Kind) -> None:
    key = case["key"]
    inputs = _inputs(case, kind)
    plan = ddim_encoding_plan(inputs.diffusion, case["respacing"], case["clip_denoised"])
    rows = PlanRows.from_lines(of_kind(kind, plan.table)[inputs.t])  # its lines go up
    np.testing.assert_array_equal(to_numpy(rows.t_model), to_numpy(inputs.t_model).reshape(-1, 1, 1, 1))
    zeros = 0 * inputs.x_t
    step = advance(rows, inputs.x_t, zeros, inputs.out, inputs.var_values, zeros, zeros)

    assert _relative_error(step.x_prev, f"{key}.ddim_reverse.sample") < golden.DDIM_TOLERANCE
