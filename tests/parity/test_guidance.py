"""Classifier guidance against OpenAI's, in both of its forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.guidance import classifier_gradient
from diffusion.plans import Sampler, SamplingPlan, ancestral_plan, build_plan, ddim_plan
from diffusion.respacing import respace
from diffusion.unet import split_output
from diffusion.update import PlanRows, Step, advance, sample_loop
from tests import golden

GOLDEN = golden.load("guidance")
CASES = pytest.mark.parametrize("case", GOLDEN.cases, ids=lambda case: case["key"])


def _relative_error(actual: Tensor, key: str) -> float:
    expected = GOLDEN.tensor(key)
    return float((actual - expected).abs().max() / expected.abs().max())


def _guided_step(case: dict[str, Any], plan: SamplingPlan, noise: Tensor) -> Step:
    """Take a step with the recorded gradient."""
    key = case["key"]
    x_t, t, y = (GOLDEN.tensor(f"{key}.{name}") for name in ("x", "t", "y"))
    rows = PlanRows.from_lines(torch.from_numpy(plan.table.copy())[plan.num_steps - 1 - t])
    output = golden.network(GOLDEN.config["unet"])(x_t, rows.t_model.flatten(), y)
    out, var_values = split_output(output, x_t.shape[1])
    return advance(rows, x_t, torch.zeros_like(x_t), out, var_values, noise, GOLDEN.tensor(f"{key}.grad"))


@CASES
def test_the_gradient_equals_the_reference(case: dict[str, Any]) -> None:
    key = case["key"]
    x_t, t, y = (GOLDEN.tensor(f"{key}.{name}") for name in ("x", "t", "y"))
    told = torch.from_numpy(respace(golden.diffusion_config(case), case["respacing"]).model_t)[t]
    gradient = classifier_gradient(
        golden.classifier(GOLDEN.config["classifier"]), x_t, told, y, case["classifier_scale"]
    )

    assert torch.equal(told, GOLDEN.tensor(f"{key}.classifier_t").float())
    assert _relative_error(gradient, f"{key}.grad") < 2e-5


@CASES
def test_a_guided_ancestral_step_equals_the_reference(case: dict[str, Any]) -> None:
    key = case["key"]
    plan = ancestral_plan(golden.diffusion_config(case), case["respacing"], case["clip_denoised"])
    step = _guided_step(case, plan, GOLDEN.tensor(f"{key}.p_sample.noise"))

    assert _relative_error(step.x_prev, f"{key}.p_sample.sample") < 4e-6
    assert _relative_error(step.x0, f"{key}.p_sample.pred_xstart") < 4e-5


@CASES
def test_a_guided_ddim_step_equals_the_reference(case: dict[str, Any]) -> None:
    key = case["key"]
    diffusion = golden.diffusion_config(case)
    plan = ddim_plan(diffusion, case["respacing"], 0.0, case["clip_denoised"])
    step = _guided_step(case, plan, torch.zeros_like(GOLDEN.tensor(f"{key}.x")))

    assert _relative_error(step.x_prev, f"{key}.ddim.sample") < 4e-6
    # The reference reports the shifted x0, which we never form.
    abar = respace(diffusion, case["respacing"]).schedule.alphas_cumprod[GOLDEN[f"{key}.t"]]
    shift = torch.from_numpy(((1 - abar) / np.sqrt(abar)).astype(np.float32))[:, None, None, None]
    assert _relative_error(step.x0 + shift * GOLDEN.tensor(f"{key}.grad"), f"{key}.ddim.pred_xstart") < 4e-6


@pytest.mark.parametrize(("key", "sampler"), [("chain_p_sample_loop", "ancestral"), ("chain_ddim_sample_loop", "ddim")])
def test_a_guided_chain_equals_the_reference(key: str, sampler: Sampler) -> None:
    case = GOLDEN.config["chain"]
    network = golden.network(GOLDEN.config["unet"])
    classifier = golden.classifier(GOLDEN.config["classifier"])
    y = GOLDEN.tensor(f"{key}.y")
    plan = build_plan(golden.diffusion_config(case), sampler, case["respacing"], clip=case["clip_denoised"])
    samples: list[Tensor] = []

    def denoise(x_t: Tensor, t_model: Tensor) -> Tensor:
        return network(x_t, t_model, y)

    def gradient(x_t: Tensor, t_model: Tensor) -> Tensor:
        return classifier_gradient(classifier, x_t, t_model, y, case["classifier_scale"])

    final = sample_loop(
        denoise,
        plan,
        GOLDEN.tensor(f"{key}.init_noise"),
        GOLDEN.tensor(f"{key}.step_noise"),
        gradient=gradient,
        on_step=lambda _, step: samples.append(step.x_prev),
    )

    torch.testing.assert_close(torch.stack(samples), GOLDEN.tensor(f"{key}.samples"), rtol=0, atol=5e-4)
    torch.testing.assert_close(final, GOLDEN.tensor(f"{key}.final"), rtol=0, atol=5e-4)
