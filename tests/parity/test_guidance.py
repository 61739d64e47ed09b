"""Both forms of classifier guidance compared with OpenAI's."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from diffusion.arrays import to_numpy
from diffusion.classifier import classifier_gradient
from diffusion.plans import SamplingPlan, ancestral_plan, build_plan, ddim_plan
from diffusion.respacing import respace
from diffusion.update import PlanRows, Step, advance, sample_loop, split_output
from tests import golden
from tests.kinds import KINDS, Kind, of_kind, on_kind

GOLDEN = golden.load("guidance")
CASES = pytest.mark.parametrize("case", GOLDEN.cases, ids=lambda case: case["key"])


def _relative_error(actual: Any, key: str) -> float:
    expected = GOLDEN[key]
    return float(np.abs(to_numpy(actual) - expected).max() / np.abs(expected).max())


def _guided_step(case: dict[str, Any], plan: SamplingPlan, noise: npt.NDArray[Any], kind: Kind) -> Step[Any]:
    """Take a step with the recorded gradient."""
    key = case["key"]
    x_t, t, y, grad = (of_kind(kind, GOLDEN[f"{key}.{name}"]) for name in ("x", "t", "y", "grad"))
    rows = PlanRows.from_lines(of_kind(kind, plan.table)[plan.num_steps - 1 - t])
    output = on_kind(kind, golden.network(GOLDEN.config["unet"]))(x_t, rows.t_model.reshape(-1), y)
    out, var_values = split_output(output, x_t.shape[1])
    return advance(rows, x_t, 0 * x_t, out, var_values, of_kind(kind, noise), grad)


@CASES
def test_the_gradient_equals_the_reference(case: dict[str, Any]) -> None:
    key = case["key"]
    x_t, t, y = (GOLDEN.tensor(f"{key}.{name}") for name in ("x", "t", "y"))
    t_model = torch.from_numpy(respace(golden.diffusion_config(case), case["respacing"]).t_model)[t]
    gradient = classifier_gradient(
        golden.classifier(GOLDEN.config["classifier"]), x_t, t_model, y, case["classifier_scale"]
    )

    assert torch.equal(t_model, GOLDEN.tensor(f"{key}.classifier_t").float())
    assert _relative_error(gradient, f"{key}.grad") < golden.GRADIENT_TOLERANCE


@KINDS
@CASES
def test_a_guided_ancestral_step_equals_the_reference(case: dict[str, Any], kind: Kind) -> None:
    key = case["key"]
    plan = ancestral_plan(golden.diffusion_config(case), case["respacing"], case["clip_denoised"])
    step = _guided_step(case, plan, GOLDEN[f"{key}.p_sample.noise"], kind)

    assert _relative_error(step.x_prev, f"{key}.p_sample.sample") < golden.GUIDANCE_TOLERANCE
    assert _relative_error(step.x0, f"{key}.p_sample.pred_xstart") < golden.GUIDANCE_TOLERANCE


@KINDS
@CASES
def test_a_guided_ddim_step_equals_the_reference(case: dict[str, Any], kind: Kind) -> None:
    key = case["key"]
    diffusion = golden.diffusion_config(case)
    plan = ddim_plan(diffusion, case["respacing"], 0.0, case["clip_denoised"])
    step = _guided_step(case, plan, np.zeros_like(GOLDEN[f"{key}.x"]), kind)

    assert _relative_error(step.x_prev, f"{key}.ddim.sample") < golden.GUIDANCE_TOLERANCE
    # The reference reports the shifted x0, which we never compute.
    abar = respace(diffusion, case["respacing"]).schedule.alphas_cumprod[GOLDEN[f"{key}.t"]]
    shift = ((1 - abar) / np.sqrt(abar)).astype(np.float32)[:, None, None, None]
    shifted = to_numpy(step.x0) + shift * GOLDEN[f"{key}.grad"]
    assert _relative_error(shifted, f"{key}.ddim.pred_xstart") < golden.GUIDANCE_TOLERANCE


@KINDS
@pytest.mark.parametrize(("key", "sampler"), [("chain_p_sample_loop", "ancestral"), ("chain_ddim_sample_loop", "ddim")])
def test_a_guided_chain_equals_the_reference(key: str, sampler: str, kind: Kind) -> None:
    case = GOLDEN.config["chain"]
    network = golden.network(GOLDEN.config["unet"])
    classifier = golden.classifier(GOLDEN.config["classifier"])
    y = GOLDEN.tensor(f"{key}.y")
    plan = build_plan(golden.diffusion_config(case), sampler, case["respacing"], clip=case["clip_denoised"])
    samples: list[Any] = []

    def denoise(x_t: Any, t_model: Any) -> Any:
        return on_kind(kind, network)(x_t, t_model, y)

    def gradient(x_t: Any, t_model: Any) -> Any:
        return on_kind(kind, lambda x, t: classifier_gradient(classifier, x, t, y, case["classifier_scale"]))(
            x_t, t_model
        )

    final = sample_loop(
        denoise,
        plan,
        of_kind(kind, GOLDEN[f"{key}.init_noise"]),
        of_kind(kind, GOLDEN[f"{key}.step_noise"]),
        gradient=gradient,
        on_step=lambda _, step: samples.append(to_numpy(step.x_prev)),
    )

    tolerance = golden.GUIDED_CHAIN_TOLERANCE
    np.testing.assert_allclose(np.stack(samples), GOLDEN[f"{key}.samples"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(to_numpy(final), GOLDEN[f"{key}.final"], rtol=0, atol=tolerance)
